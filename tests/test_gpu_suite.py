"""The GPU suite, dry: every stage on a CPU, and what is computed about it."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / 'tools' / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

import gpu_suite  # noqa: E402
from _gpu import (  # noqa: E402
    correctness,
    layer,
    model,
    records,
    roofline,
    sanitize,
    scan_versions,
    timing,
    train,
)
from _gpu import stage as stages  # noqa: E402
from _gpu.records import Record  # noqa: E402
from _gpu.roofline import Shape  # noqa: E402

# forward memory, exp; backward memory, exp; milliseconds
FLOORS = {
    'Vim-T 224': (0.018, 0.046, 0.033, 0.093),
    'Vim-S 224': (0.036, 0.093, 0.064, 0.185),
    'Vim-B 224': (0.072, 0.185, 0.127, 0.370),
    'Vim-T 512': (0.012, 0.030, 0.021, 0.060),
    'Vim-T 1024': (0.024, 0.060, 0.042, 0.120),
    'Vim-T 1248': (0.035, 0.089, 0.063, 0.179),
}


@pytest.fixture
def make_stage(tmp_path):
    """A stage without a process of its own."""

    def make(name='stage', **changes):
        options = dict(
            out=tmp_path,
            device='cpu',
            quick=True,
            force=False,
            deadline=time.monotonic() + 60,
            train_config=gpu_suite.TRAIN_CONFIG,
        )
        record = Record(tmp_path / f'{name}.json', name)
        return stages.Stage(record=record, **(options | changes))

    return make


# The whole command, without a GPU.


@pytest.fixture(scope='module')
def dry_run(tmp_path_factory):
    """Exit code and folder of a run of all stages."""
    out = tmp_path_factory.mktemp('gpu_suite')
    command = [sys.executable, str(BENCHMARKS / 'gpu_suite.py'), '--quick']
    done = subprocess.run(
        [*command, '--out', str(out)],
        capture_output=True,
        text=True,
        timeout=450,
    )
    report = out / 'report.md'
    assert report.exists(), done.stderr
    return done.returncode, out


def rows_of(folder, stage, title):
    """One table of a stage."""
    data = json.loads((folder / 'stages' / f'{stage}.json').read_text())
    (table,) = (t for t in data['tables'] if t['title'] == title)
    return table['rows']


@pytest.mark.slow
def test_dry_run_completes_every_stage(dry_run):
    code, out = dry_run
    report = json.loads((out / 'report.json').read_text())
    ends = {data['stage']: data['status'] for data in report['stages']}
    wanted = dict.fromkeys(gpu_suite.STAGES, 'ok') | {'sanitize': 'skipped'}
    assert ends == wanted, (out / 'report.md').read_text()
    assert code == 0
    assert report['header'].keys() >= {'device', 'torch', 'triton', 'date'}
    text = (out / 'report.md').read_text()
    assert 'A dry run without a GPU' in text
    for stage in gpu_suite.STAGES:
        section = (out / 'stages' / f'{stage}.md').read_text()
        assert section.startswith(f'## {stage}: ')
        assert section in text


@pytest.mark.slow
def test_dry_run_ran_tests(dry_run):
    (row,) = rows_of(dry_run[1], 'correctness', 'Counts')
    assert (row['passed'], row['failed']) == (2, 0)
    assert not rows_of(dry_run[1], 'correctness', 'Failures')


@pytest.mark.slow
def test_dry_run_checked_and_timed_the_scan(dry_run):
    checks = rows_of(
        dry_run[1], 'scan', 'Against float64, before anything is timed'
    )
    assert len(checks) == 3
    assert all(row['ok'] for row in checks)
    times = rows_of(dry_run[1], 'scan', 'Times')
    assert len(times) == 2 * 3
    assert all(row['first'] > 0 and row['floor'] > 0 for row in times)
    assert {row['met'] for row in rows_of(dry_run[1], 'scan', 'Aims')} == {
        None
    }


@pytest.mark.slow
def test_dry_run_timed_the_layer(dry_run):
    checks = rows_of(dry_run[1], 'layer', 'Before anything is timed')
    assert all(row['ok'] for row in checks)
    assert [row['what'] for row in checks][-1] == 'mixer'
    times = rows_of(dry_run[1], 'layer', 'Times')
    assert len(times) == 3 * 2 * 2 + 2 * 3


@pytest.mark.slow
def test_dry_run_timed_models(dry_run):
    rows = rows_of(dry_run[1], 'model', 'Throughput')
    assert [row['model'] for row in rows] == ['DeiT-tiny', 'Vim-tiny'] * 2
    assert all(row['rate'] > 0 for row in rows)
    assert all(row['ratio'] for row in rows if row['model'] == 'Vim-tiny')


@pytest.mark.slow
def test_dry_run_trained(dry_run):
    """Once: the three runs differ in an option."""
    runs = rows_of(dry_run[1], 'train', 'Runs')
    ends = {row['precision']: row['status'] for row in runs}
    skipped = 'skipped in a dry run'
    assert ends == dict(float32=skipped, bfloat16='ok', float16=skipped)
    assert runs[1]['finite']
    assert 0 <= runs[1]['accuracy'] <= 100


@pytest.mark.slow
def test_dry_run_called_every_kernel(dry_run):
    row = rows_of(dry_run[1], 'sanitize', 'Tools')[-1]
    wanted = 'scan, complex scan, long scan, conv1d, gated merge, add'
    assert row['kernels'].startswith(wanted)


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch):
    found = SimpleNamespace(
        returncode=0, stdout='a warning\n{"gpu": false, "header": {}}\n'
    )
    monkeypatch.setattr(gpu_suite.subprocess, 'run', lambda *_, **__: found)
    with pytest.raises(SystemExit, match='--quick is a dry run'):
        gpu_suite.main(['--out', str(tmp_path)])


# Stages that fail.

FAKE_STAGE = """
import os, sys, time, types
import gpu_suite
def run(stage):
    stage.record.table('Kept', x='x').add(x=1)
    {body}
sys.modules['_gpu.{stage}'] = types.SimpleNamespace(run=run)
raise SystemExit(gpu_suite.main(sys.argv[1:]))
"""


@pytest.fixture
def run_fake(tmp_path, monkeypatch):
    """Run the suite with stages that do what they are told."""

    def run(bodies, **options):
        def command(self, stage, limit):
            code = FAKE_STAGE.format(stage=stage, body=bodies[stage])
            arguments = real_command(self, stage, limit)[2:]
            return [sys.executable, '-c', code, *arguments]

        real_command = gpu_suite.Suite.command
        monkeypatch.setattr(gpu_suite.Suite, 'command', command)
        monkeypatch.setattr(
            gpu_suite,
            'describe_machine',
            lambda *_: (dict(device='none'), 'cpu'),
        )
        arguments = ['--quick', '--out', str(tmp_path), '--stages', *bodies]
        for name, value in options.items():
            arguments += [f'--{name.replace("_", "-")}', str(value)]
        code = gpu_suite.main(arguments)
        report = json.loads((tmp_path / 'report.json').read_text())
        return code, {data['stage']: data for data in report['stages']}

    return run


def test_a_failing_stage_does_not_stop_the_rest(run_fake):
    code, results = run_fake(
        {
            'scan': 'raise ArithmeticError("planted")',
            'layer': 'os._exit(7)',
            'model': 'pass',
        }
    )
    assert code == 1
    ends = {name: data['status'] for name, data in results.items()}
    assert ends == {'scan': 'failed', 'layer': 'failed', 'model': 'ok'}
    assert 'Traceback' in results['scan']['error']
    assert 'ArithmeticError: planted' in results['scan']['error']
    assert 'returned 7 without a result' in results['layer']['error']
    for data in results.values():
        assert data['tables'][0]['rows'] == [{'x': 1}]


def test_complete_stages_give_zero(run_fake):
    skip = 'from _gpu.stage import SkippedError; raise SkippedError("why")'
    code, results = run_fake({'scan': 'pass', 'layer': skip})
    assert code == 0
    assert results['layer']['status'] == 'skipped'
    assert results['layer']['error'] == 'why'


def is_running(pid):
    """Whether there is such a process, and it is not dead and unmissed."""
    stat = Path('/proc', pid, 'stat')
    return (
        stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z'
    )


def test_a_stage_that_hangs_is_stopped(run_fake, tmp_path):
    """With all it has started; where it was, and what it had, are kept."""
    child = tmp_path / 'child'
    hang = (
        'import subprocess; '
        f'open({str(child)!r}, "w").write(str(subprocess.Popen('
        '["sleep", "60"]).pid)); time.sleep(60)'
    )
    start = time.monotonic()
    code, results = run_fake({'layer': hang, 'scan': 'pass'}, time_limit=20)
    assert time.monotonic() - start < 20
    assert code == 1
    assert results['scan']['status'] == 'ok'
    data = results['layer']
    assert data['status'] == 'timeout'
    assert 'did not end within' in data['error']
    assert re.search(r'File "<string>", line \d+ in run', data['error'])
    assert data['tables'][0]['rows'] == [{'x': 1}]
    assert not is_running(child.read_text())


def test_a_stage_out_of_time_is_partial(run_fake):
    body = 'from _gpu.timing import Budget; Budget(0, 1).take()'
    code, results = run_fake({'scan': body})
    assert code == 1
    assert results['scan']['status'] == 'partial'


@pytest.mark.parametrize(
    'argument', [['--time-limit', '0'], ['--stages', 'scna']], ids=str
)
def test_wrong_arguments(argument, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.parse_args(argument)
    assert argument[0] in capsys.readouterr().err


# The floors.


@pytest.mark.parametrize('name', FLOORS)
def test_floors(name):
    shape = roofline.VIM_SHAPES[name]
    forward = roofline.forward_floor(shape)
    backward = roofline.backward_floor(shape)
    found = (
        forward.memory_ms,
        forward.exp_ms,
        backward.memory_ms,
        backward.exp_ms,
    )
    assert tuple(round(ms, 3) for ms in found) == FLOORS[name]
    assert forward.ms == forward.exp_ms


def test_floors_follow_the_call():
    """Twice for two directions, more bytes in float32, less without gate."""
    shape = Shape(1, 10, 100, 16)
    for floor in (roofline.forward_floor, roofline.backward_floor):
        one = floor(shape)
        two = floor(shape, directions=2)
        assert two.memory_ms == pytest.approx(2 * one.memory_ms)
        assert two.exp_ms == pytest.approx(2 * one.exp_ms)
        wide = floor(shape, itemsize=4)
        assert wide.memory_ms > one.memory_ms
        assert wide.exp_ms == one.exp_ms
        bare = floor(shape, gate=False)
        assert bare.memory_ms < one.memory_ms
        assert bare.exp_ms == pytest.approx(one.exp_ms * 18 / 20)
        slow = roofline.Machine(bandwidth=4.3e9)
        assert floor(shape, machine=slow).ms == pytest.approx(
            1000 * one.memory_ms
        )


def test_documented_floors():
    text = (ROOT / 'docs' / 'benchmarks' / 'gpu.md').read_text()
    assert roofline.markdown_table() in text


# Checks before timings.


def run_check(scan, directions=2):
    inputs = scan_versions.make_inputs(
        Shape(3, 4, 40, 2), torch.float32, 'cpu'
    )
    weights = scan_versions.subset_weights(inputs['u'])
    exact = scan_versions.exact_results(inputs, weights)
    version = scan_versions.Version('', directions, scan)
    leaves = version.leaves(inputs)
    return scan_versions.check(version, leaves, weights, exact)


def reference(*tensors, reverse=(False, True)):
    y = scan_versions.selective_scan_directions(
        *tensors, delta_softplus=True, reverse=reverse, backend='reference'
    )
    return list(y.unbind())


def test_check_accepts_what_is_right():
    assert run_check(reference) <= 1
    first = run_check(
        lambda *x: reference(*(t[None] for t in x), reverse=(False,)),
        directions=1,
    )
    assert first <= 1


def leaking(u, *others):
    """The first row's gradient gets a little of the last one's."""
    u = u + 0.01 * (u - u.detach()).roll(1, dims=1)
    return reference(u, *others)


def unwritten(*tensors):
    ys = reference(*tensors)
    return [ys[0], torch.cat([ys[1][:, :-1], torch.empty(3, 1, 40)], dim=1)]


@pytest.mark.parametrize(
    'scan',
    [
        lambda *x: reference(*x, reverse=(False, False)),
        lambda u, *x: reference(1.001 * u, *x),
        lambda *x: reference(*x[:5], 1.001 * x[5], x[6]),
        lambda *x: [y + 0.01 for y in reference(*x)],
        leaking,
        unwritten,
    ],
    ids=['direction', 'u', 'D', 'offset', 'leaking', 'unwritten'],
)
def test_check_rejects_what_is_wrong(scan):
    assert not run_check(scan) <= 1


def test_mamba_layout_there_and_back():
    inputs = scan_versions.make_inputs(Shape(2, 3, 4, 5), torch.float32, 'cpu')
    for directions in (1, 2):
        version = scan_versions.Version('', directions, None, True)
        leaves = version.leaves(inputs)
        assert leaves[0].shape[-2:] == (4, 3)
        assert leaves[3].shape[-2:] == (5, 3)
        assert all(x.is_contiguous() for x in leaves)
        wanted = (x[:directions] for x in inputs.values())
        assert all(map(torch.equal, version.restore(leaves), wanted))


def test_flips_are_the_other_direction():
    """And with a kernel in mamba_ssm's layout and signature, too."""

    def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
        return scan_versions.selective_scan(
            u, delta, A, B, C, D,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            backend='reference',
        )  # fmt: skip

    inputs = scan_versions.make_inputs(Shape(2, 3, 4, 5), torch.float32, 'cpu')
    weights = scan_versions.subset_weights(inputs['u'])
    exact = scan_versions.exact_results(inputs, weights)
    foreign = [v for v in scan_versions.make_versions(scan) if v.foreign]
    assert [v.directions for v in foreign] == [1, 2]
    for version in foreign:
        leaves = version.leaves(inputs)
        assert scan_versions.check(version, leaves, weights, exact) <= 1


def check_layer(change):
    """Error of a case of the layer whose kernel is PyTorch's, changed."""
    (case,) = (c for c in layer.CASES if c.kernel == 'gated_merge')

    def ours(y, z):
        return (change(*case.plain(y, z)),)

    leaves = case.leaves((2, 3, 4), torch.bfloat16, 'cpu')
    changed = dataclasses.replace(case, ours=ours)
    return layer.check(changed, [x.requires_grad_() for x in leaves])


def test_layer_check_compares_values_and_gradients():
    assert check_layer(lambda y: y) <= 1
    assert check_layer(lambda y: 1.05 * y.detach() + y - y.detach()) > 1
    assert check_layer(lambda y: y + 0.05 * (y - y.detach())) > 1
    assert math.isnan(check_layer(lambda y: y + torch.empty_like(y)))


# Kernels whose tests failed.


@pytest.mark.parametrize(
    ('test', 'kernel'),
    [
        ('tests/test_ops/test_triton_scan.py::test_lengths[1]', 'scan'),
        ('tests/test_ops/test_triton_conv1d.py::test_x', 'conv1d'),
        ('tests/test_ops/test_rms_norm.py::test_x', 'rms_norm'),
        ('tests/test_ops/test_gated_merge.py::test_x', 'gated_merge'),
        ('tests/test_layers/test_mixer.py::test_on_a_gpu', 'mixer'),
        ('tests/test_ops/test_triton_scan.py::test_registers[90]', None),
        ('tests/test_ops/test_triton_scan.py', 'scan'),
        ('tests/test_models/test_hosts.py', None),
        ('tests/test_models/test_hosts.py::test_on_a_gpu', 'mixer'),
        ('tests/test_stability/test_spectral.py::test_on_a_gpu', None),
    ],
)
def test_kernel_of_a_test(test, kernel):
    assert stages.kernel_of(test) == kernel


def test_failed_kernels_are_refused(make_stage):
    record = make_stage('correctness').record
    table = record.table('Failures', test='', kernel='', text='')
    assert not make_stage().refuses(*stages.KERNELS)
    table.add(test='a::test_registers', kernel=None)
    assert not make_stage().refuses(*stages.KERNELS)
    table.add(test='a::test_values', kernel='conv1d')
    assert not make_stage().refuses('scan')
    stage = make_stage()
    assert stage.refuses('scan', 'conv1d')
    assert 'a::test_values' in stage.record.data['notes'][0]
    forced = make_stage(force=True)
    assert not forced.refuses('conv1d')
    assert 'timed all the same' in forced.record.data['notes'][0]


def test_without_results_of_tests_it_says_so(make_stage):
    stage = make_stage()
    assert not stage.refuses('scan')
    assert 'has no results' in stage.record.data['notes'][0]


TESTS = """
import os
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip
def test_skipped(): pass
def test_last(): {last}
"""


@pytest.mark.parametrize(
    ('last', 'passed', 'end'),
    [('pass', 2, 'returned 1'), ('os.kill(os.getpid(), 9)', 1, 'returned -9')],
    ids=['failed', 'killed'],
)
def test_failures_are_named(
    last, passed, end, make_stage, monkeypatch, tmp_path
):
    """Also if the tests do not come to their end."""
    file = tmp_path / 'test_triton_conv1d.py'
    file.write_text(TESTS.format(last=last))
    monkeypatch.setattr(correctness, '_files', lambda: [str(file)])
    monkeypatch.setattr(correctness, '_workers', lambda _: 0)
    monkeypatch.setenv('PYTHONPATH', str(BENCHMARKS))
    stage = make_stage('correctness', quick=False)
    with pytest.raises(stages.StageFailedError, match=end):
        correctness.run(stage)
    counts, failures = stage.record.data['tables']
    (row,) = counts['rows']
    assert (row['passed'], row['failed'], row['skipped']) == (passed, 1, 1)
    (failure,) = failures['rows']
    assert failure['test'].endswith('test_triton_conv1d.py::test_wrong')
    assert failure['kernel'] == 'conv1d'
    assert 'assert 1 == 2' in failure['text']


# compute-sanitizer.


def fake_sanitizer(folder, errors, code):
    path = folder / 'compute-sanitizer'
    path.write_text(
        '#!/bin/sh\necho "done: scan"\n'
        f'echo "========= ERROR SUMMARY: {errors} errors"\nexit {code}\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(('errors', 'code'), [(0, 0), (3, 86), (3, 0), (0, 1)])
def test_sanitizer(errors, code, make_stage, monkeypatch, tmp_path):
    fake_sanitizer(tmp_path, errors, code)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    stage = make_stage(device='cuda')
    if code or errors:
        with pytest.raises(stages.StageFailedError, match='memcheck'):
            sanitize.run(stage)
    else:
        sanitize.run(stage)
    rows = stage.record.data['tables'][0]['rows']
    assert [row['tool'] for row in rows] == ['memcheck', 'racecheck']
    assert all(row['errors'] == errors for row in rows)
    assert all(row['kernels'] == 'scan' for row in rows)


@pytest.mark.parametrize('hanging', ['memcheck', 'racecheck'])
def test_a_sanitizer_that_hangs(hanging, make_stage, monkeypatch, tmp_path):
    """Memcheck must end, racecheck takes what time is left."""
    path = fake_sanitizer(tmp_path, 0, 0)
    wait = f'#!/bin/sh\ntest $2 = {hanging} && exec sleep 60\n'
    path.write_text(wait + path.read_text())
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    stage = make_stage(device='cuda', deadline=time.monotonic() + 1.5)
    if hanging == 'memcheck':
        with pytest.raises(stages.StageFailedError, match='memcheck: stopped'):
            sanitize.run(stage)
    else:
        sanitize.run(stage)
    rows = stage.record.data['tables'][0]['rows']
    ends = {row['tool']: row['end'].split()[0] for row in rows}
    assert ends == {'memcheck': 'ok', 'racecheck': 'ok', hanging: 'stopped'}


def test_without_a_sanitizer_it_is_skipped(make_stage, monkeypatch):
    monkeypatch.setattr(sanitize, 'find_program', lambda: None)
    with pytest.raises(stages.SkippedError, match='compute-sanitizer'):
        sanitize.run(make_stage(device='cuda'))


# Small parts.


def test_out_of_memory_is_a_row(make_stage, monkeypatch):
    def measure(stage, candidate, *args):
        if candidate.name == 'DeiT-tiny':
            raise torch.cuda.OutOfMemoryError
        return timing.Timing(4.0, 3.0, 5.0), 100.0

    monkeypatch.setattr(model, 'measure', measure)
    stage = make_stage()
    model.run(stage)
    rows = stage.record.data['tables'][0]['rows']
    assert [row['memory'] for row in rows] == ['out of memory', 100.0] * 2
    assert rows[1]['rate'] == 500.0  # two images in four milliseconds
    assert rows[1]['ratio'] is None


def test_batches():
    """About as many tokens at every size, in multiples of eight."""
    batches = [model.choose_batch(size) for size in model.SIZES]
    assert batches == [328, 112, 56, 24, 8, 8]


@pytest.mark.parametrize('loss', [0.5, float('nan')], ids=str)
def test_training_is_summarized(tmp_path, loss):
    folder = tmp_path / '20260101' / 'vis_data'
    folder.mkdir(parents=True)
    lines = [
        {'loss': 2.0, 'time': 0.1},
        {'loss': loss, 'time': 0.3},
        {'loss': 1.0, 'time': 0.2},
        {'accuracy/top1': 90.0},
    ]
    text = '\n'.join(map(json.dumps, lines))
    (folder / 'scalars.json').write_text(text)
    assert train.summarize(tmp_path) == dict(
        accuracy=90.0, loss=1.0, finite=loss == 0.5, seconds=0.2
    )
    assert not train.summarize(folder)['finite']


def test_budget_shares_what_is_left():
    budget = timing.Budget(time.monotonic() + 10, 5)
    assert budget.take() == pytest.approx(2.0, abs=0.1)
    budget.drop(2)
    assert budget.take() == pytest.approx(5.0, abs=0.1)
    with pytest.raises(stages.OutOfTimeError):
        timing.Budget(time.monotonic() - 1, 5).take()


def collect(errors, reached):
    """Raise the errors one after the other where failures are kept."""
    with stages.Failures() as failures:
        for error in errors:
            with failures.kept('what'):
                raise error
            reached.append(error)


def test_failures_are_collected():
    errors, reached = [ValueError('first'), KeyError('second')], []
    with pytest.raises(stages.StageFailedError) as failed:
        collect(errors, reached)
    assert reached == errors
    assert 'ValueError: first' in str(failed.value)
    assert "KeyError: 'second'" in str(failed.value)


def test_the_end_of_time_is_no_failure():
    """But what had failed until then is."""
    end, reached = stages.OutOfTimeError('over'), []
    with pytest.raises(stages.OutOfTimeError):
        collect([end, ValueError()], reached)
    with pytest.raises(stages.StageFailedError, match=r'first[\s\S]*over'):
        collect([ValueError('first'), end], reached)
    assert [str(error) for error in reached] == ['first']


def test_records(tmp_path):
    """Strict JSON, and cells that stay in their rows."""
    record = Record(tmp_path / 'a' / 'x.json', 'x')
    table = record.table('T', a='A', b='B')
    table.add(a=float('nan'), b='one|two\nthree')
    table.add(a=0.123456, b=[1, 2.0])
    table.add(a=123456.7)
    with pytest.raises(KeyError, match='c'):
        table.add(c=1)
    text = record.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail)
    markdown = record.path.with_suffix('.md').read_text()
    assert markdown.splitlines()[-5:] == [
        '| A | B |',
        '|---|---|',
        '| - | one\\|two three |',
        '| 0.1235 | 1, 2 |',
        '| 123457 | - |',
    ]
    again = Record.load(record.path, 'x')
    assert records.to_markdown(again.data) == markdown
    assert Record.load(tmp_path / 'none.json', 'y').data['stage'] == 'y'


def test_scan_aims(make_stage):
    """The worst case of each, over both ways to compare with mamba_ssm."""
    from _gpu import scan

    def row(shape, version, graph, share=None):
        return dict(
            shape=shape,
            dtype='bfloat16',
            what='forward',
            version=version,
            first=1.0,
            graph=graph,
            share=share,
        )

    rows = [
        row('128, 197, 384, 16', scan_versions.BOTH, 0.2, 0.6),
        row('8, 4096, 384, 16', scan_versions.BOTH, 0.4, 0.45),
        row('128, 197, 384, 16', scan_versions.ONE, 0.1, 0.6),
        row('8, 4096, 384, 16', scan_versions.ONE, float('nan'), 0.6),
        row('128, 197, 384, 16', scan_versions.MAMBA, 0.25),
        row('8, 4096, 384, 16', scan_versions.MAMBA, 1.5),
        row('8, 4096, 384, 16', scan_versions.MAMBA_FLIP, 0.36),
    ]
    stage = make_stage(quick=False)
    scan.add_aims(stage, rows)
    found = stage.record.data['tables'][0]['rows']
    assert [r['worst'] for r in found] == pytest.approx([0.45, 0.9, 2.5])
    assert [r['met'] for r in found] == [False, False, True]


def test_sanitizer_is_found_in_wheels(monkeypatch, tmp_path):
    folder = tmp_path / 'cu13' / 'bin'
    folder.mkdir(parents=True)
    fake_sanitizer(folder, 0, 0)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(sanitize, 'PLACES', ())
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(sanitize.importlib.util, 'find_spec', lambda _: spec)
    assert sanitize.find_program() == folder / 'compute-sanitizer'

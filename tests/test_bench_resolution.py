"""The benchmark of image sizes: measurements, what they become, resuming."""

import csv
import math
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / 'tools' / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

import bench_resolution as bench  # noqa: E402

MEGABYTES = 100
FUSED = '_scaled_dot_product_flash_attention_for_cpu'


def options(*argv):
    given = ['--threads=1', '--timed-seconds=0.01', *argv]
    return bench.parse_args(given)


@pytest.fixture
def results(tmp_path):
    """Runs the benchmark; its rows and its page."""

    def run(*argv):
        given = ['--threads=1', '--timed-seconds=0.01', *argv]
        bench.main([*given, f'--out={tmp_path / "results"}'])
        with (tmp_path / 'results.csv').open(newline='') as file:
            rows = list(csv.DictReader(file))
        return rows, (tmp_path / 'results.md').read_text()

    return run


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurements: milliseconds, or what went wrong."""

    def replace(answers):
        calls = []

        def answer(context, args, family, mode, size):
            calls.append((family, size))
            found = answers[family, size]
            found = found.pop(0) if isinstance(found, list) else found
            if isinstance(found, str):
                return dict(status=found)
            return dict(
                status='ok', ms=found, mb=1.0, gflop=1.0, attention='a'
            )

        monkeypatch.setattr(bench, 'run_alone', answer)
        return calls

    return replace


def tables(page):
    """Cells of each table, without the rule."""
    blocks = [b for b in page.split('\n\n') if b.startswith('|')]
    return [
        [
            [cell.strip() for cell in line.strip('|').split('|')]
            for line in block.strip().splitlines()
            if '--:' not in line
        ]
        for block in blocks
    ]


def test_measures_both_models(results, tmp_path):
    """Real processes; a second call measures what is new only."""
    rows, _ = results('--sizes', '48', '32', '--rounds=1')
    inference = [('32', 'inference'), ('48', 'inference')]
    assert [(r['size'], r['mode']) for r in rows[::2]] == inference
    more, page = results('--sizes', '32', '--rounds=1', '--training')
    assert more[:4] == rows
    assert [r['mode'] for r in more[4:]] == ['training step'] * 2
    for row in more:
        assert row['status'] == 'ok'
        assert min(float(row[key]) for key in bench.QUANTITIES) > 0
        assert int(row['tokens']) == {'32': 5, '48': 10}[row['size']]
        # the attention that the comparison promises
        expected = FUSED if row['model'] == 'DeiT-tiny' else ''
        assert row['attention'] == expected
    operations = [float(r['gflop']) for r in (*rows[:2], *more[4:])]
    # the backward pass has twice the operations of the forward pass
    assert operations[2] > 2.5 * operations[0]
    assert operations[3] > 2.5 * operations[1]

    first, second = tables(page)
    assert [line[0] for line in first] == ['pixels', '32', '48', 'p']
    assert [line[0] for line in second] == ['pixels', '32', 'p']
    assert {len(line) for line in (*first, *second)} == {11}
    assert FUSED in page
    for ending in ('png', 'svg'):
        picture = (tmp_path / f'results.{ending}').read_bytes()
        assert picture[:5] in (b'\x89PNG\r', b'<?xml')


@pytest.mark.parametrize(
    ('argv', 'name'),
    [
        (['--threads=1'], 'processor'),
        (['--threads=2'], 'wall'),
    ],
)
def test_waiting_counts_with_several_threads_only(argv, name):
    """What other programs take is no time of one thread."""
    clock = bench.clock_name(options(*argv))
    assert clock == name
    waited = bench.time_steps(time.sleep, 0.1, 0.0, bench.CLOCKS[clock])
    assert (waited < 0.05) == (name == 'processor')


def test_refuses_to_mix(results, measured):
    """Rows of another batch do not go into one table."""
    measured({('Vim', 32): 1.0, ('DeiT', 32): 1.0})
    results('--sizes', '32', '--rounds=1')
    with pytest.raises(SystemExit, match='batch 1, not 2'):
        results('--sizes', '32', '--rounds=1', '--batch-size=2')


@pytest.mark.parametrize(
    ('limit', 'status'),
    [
        ('--max-memory-gb=0.1', 'does not fit'),
        ('--max-seconds=0.01', 'longer than 0.01 s'),
    ],
    ids=['memory', 'time'],
)
def test_limits(limit, status):
    """Beyond a limit a process says so, or is stopped."""
    args = options(limit, '--batch-size=4')
    context = bench.make_context('cpu')
    found = bench.run_alone(context, args, 'Vim', 'training step', 224)
    assert found == dict(status=status)


def test_other_failures_stop_the_sweep():
    """What is neither memory nor time is no result."""
    args = options()
    args.arch = 'enormous'
    context = bench.make_context('cpu')
    with pytest.raises(SystemExit, match='Vim, inference, 32: failed with'):
        bench.run_alone(context, args, 'Vim', 'inference', 32)


def test_larger_sizes_are_left_out(results, measured):
    """Of the model that failed, in the table as in the CSV file."""
    answers = {('Vim', size): 2.0 for size in (32, 48, 64)}
    answers |= {('DeiT', 32): 1.0, ('DeiT', 48): 'does not fit'}
    calls = measured(answers)
    rows, page = results('--sizes', '32', '48', '64', '--rounds=2')
    assert calls.count(('DeiT', 48)) == 1
    assert ('DeiT', 64) not in calls
    assert calls.count(('Vim', 64)) == 2
    status = {r['size']: r['status'] for r in rows if 'DeiT' in r['model']}
    assert status == {'32': 'ok', '48': 'does not fit', '64': 'left out'}
    (table,) = tables(page)
    assert [line[3] for line in table[1:4]] == [
        '1 (1 to 1)',
        'does not fit',
        'left out',
    ]
    assert [line[4] for line in table[1:4]] == ['2 (2 to 2)', '-', '-']


def test_nothing_fits(results, measured):
    """A report without a figure."""
    measured(dict.fromkeys([('Vim', 32), ('DeiT', 32)], 'does not fit'))
    _, page = results('--sizes', '32', '--rounds=1')
    assert 'svg' not in page
    (table,) = tables(page)
    assert table[1][2:5] == ['does not fit', 'does not fit', '-']


def test_ratios_are_those_of_rounds(results, measured):
    """The machine is four times slower in round 2: no ratio is changed."""
    calls = measured(
        {('Vim', 32): [3.0, 12.0, 3.3], ('DeiT', 32): [1.0, 4.0, 1.0]}
    )
    _, page = results('--sizes', '32', '--rounds=3')
    # each model is first in turn
    assert [family for family, _ in calls] == [
        *('Vim', 'DeiT'),
        *('DeiT', 'Vim'),
        *('Vim', 'DeiT'),
    ]
    (table,) = tables(page)
    assert table[1][2:5] == [
        '3.3 (3 to 12)',
        '1 (1 to 4)',
        '3 (3 to 3.3)',
    ]


def test_nothing_is_lost(results, measured, tmp_path):
    """Rounds that ended are on disk when a later one fails."""
    answers = {('Vim', 32): 2.0, ('DeiT', 32): [1.0]}
    measured(answers)
    with pytest.raises(IndexError):
        results('--sizes', '32', '--rounds=2')
    before = (tmp_path / 'results.csv').read_text()
    assert before.count('\n') == 3
    answers['DeiT', 32] = [1.0]
    calls = measured(answers)
    results('--sizes', '32', '--rounds=2')
    assert calls == [('DeiT', 32), ('Vim', 32)]
    assert (tmp_path / 'results.csv').read_text().startswith(before)


def test_operations_include_attention():
    """Two products of (L, D / h) by (D / h, L) for each of h heads."""
    deit = bench.build('DeiT', 'tiny').eval()
    with torch.no_grad():
        counts = bench.count_operations(deit, torch.randn(2, 3, 48, 48))
    batch, tokens, width, layers = 2, 10, 192, 12
    assert counts.pop(FUSED) == layers * batch * 4 * tokens**2 * width
    weights = 12 * width**2  # of a layer: qkv, projection, two of 4 D
    linear = 2 * batch * (layers * tokens * weights + width * bench.CLASSES)
    patches = 2 * batch * (tokens - 1) * 3 * bench.PATCH**2 * width
    assert sum(counts.values()) == linear + patches


def test_refuses_another_attention(monkeypatch):
    """DeiT with a softmax of its own is not what the table says."""
    from mmpretrain.models.utils import attention

    deit = bench.build('DeiT', 'tiny')
    for layer in deit.backbone.layers:
        layer.attn.scaled_dot_product_attention = (
            attention.scaled_dot_product_attention_pyimpl
        )
    # these would reach the other tests
    monkeypatch.setattr(bench, 'limit_memory', lambda total: None)
    monkeypatch.setattr(bench.logging, 'disable', lambda level: None)
    monkeypatch.setattr(torch, 'set_num_threads', lambda count: None)
    monkeypatch.setattr(bench, 'build', lambda family, arch: deit)
    with pytest.raises(RuntimeError, match='DeiT must run a fused'):
        bench.measure(options(), 'DeiT', 'inference', 32)


def allocate(sender):
    """In a process of its own: most memory, memory afterwards."""
    held, _ = bench.memory_bytes('cpu')
    torch.ones(MEGABYTES * 250_000)
    now, peak = bench.memory_bytes('cpu')
    sender.send([(now - held) / 1e6, (peak - held) / 1e6])


def test_memory_is_the_peak():
    """Of what is given back at once, too."""
    context = bench.make_context('cpu')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=allocate, args=(sender,))
    process.start()
    sender.close()
    now, peak = receiver.recv()
    process.join()
    assert now < 0.2 * MEGABYTES
    assert MEGABYTES <= peak < 1.2 * MEGABYTES


@pytest.mark.parametrize('power', [1, 2])
def test_growth(power):
    """Of the largest sizes: the others are dominated by something else."""
    tokens = [5, 10, 100, 200, 400, 800]
    rows = [
        dict(tokens=n, round=i, ms=3.0 * max(n, 100) ** power)
        for n in tokens
        for i in (1, 2)
    ]
    assert float(bench.exponent(rows, 'ms')) == pytest.approx(power)
    assert bench.exponent(rows[:2], 'ms') == '-'


def test_figure_marks_what_is_missing():
    """A cross where the model's next size failed, none at the sweep's end."""
    common = dict(mode='inference', model='Vim-tiny', round=1)
    rows = [dict(common, size=size, ms=1.0 * size) for size in (32, 48)]
    ends = [mark['ended'] for mark in bench.curve(rows, 'ms')]
    assert ends == [False, False]
    rows.append(dict(common, size=64, ms=None))
    marks = list(bench.curve(rows, 'ms'))
    assert [mark['ended'] for mark in marks] == [False, True]
    assert [mark['step'] for mark in marks] == [32, 48]
    assert all(math.isclose(m['mean'], m['step']) for m in marks)


@pytest.mark.parametrize(
    ('argument', 'text'),
    [
        ('--sizes=30', 'multiples of 16, got [30]'),
        ('--rounds=0', 'must be positive'),
    ],
    ids=['sizes', 'rounds'],
)
def test_arguments(argument, text, capsys):
    """Refused before anything is measured."""
    with pytest.raises(SystemExit):
        options(argument)
    assert text in capsys.readouterr().err

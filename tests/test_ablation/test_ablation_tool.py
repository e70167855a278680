"""tools/ablation.py as a user calls it: real trainings, killed and resumed."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmstabvim.ablation import results

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'ablation.py'
MATRIX = Path(__file__).parent / 'digits' / 'matrix.py'
CELLS = {
    'small.fp32.seed0': 'done',
    'large.fp32.seed0': 'done',
    'broken.fp32.seed0': 'failed',
    'wild.fp32.lr1e9.seed0': 'diverged',
    'small.fp32.seed1': 'done',
    'large.fp32.seed1': 'done',
}


def load_tool():
    """Import the tool, as its file is no part of a package."""
    spec = importlib.util.spec_from_file_location('tool_ablation', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def record(folder, name):
    return results.read_json(folder / results.CELLS / name / results.RECORD)


def statuses(folder):
    return [record(folder, name).get('status') for name in CELLS]


def kill_when(process, condition):
    """SIGKILL leaves the tool no time for anything."""
    for _ in range(3000):
        if condition() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope='module')
def killed_and_resumed(tmp_path_factory):
    """What the kill and the second call left."""
    folder = tmp_path_factory.mktemp('real')
    arguments = ['run', str(MATRIX), '--work-dir', str(folder), '--jobs', '2']
    first = subprocess.Popen(
        [sys.executable, str(TOOL), *arguments],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.DEVNULL,
    )
    kill_when(first, lambda: statuses(folder).count('done') == 2)
    seen = {c.name: c.status for c in results.read_study(folder).cells}
    before = {name: record(folder, name) for name in CELLS}
    code = tool.main(arguments)
    after = {name: record(folder, name) for name in CELLS}
    return SimpleNamespace(
        folder=folder, seen=seen, before=before, after=after, code=code
    )


@pytest.mark.slow
def test_a_killed_matrix_goes_on(killed_and_resumed):
    done = killed_and_resumed
    # the two that had begun are dead, and the report knows
    assert list(done.seen.values())[:2] == ['done', 'done']
    assert set(list(done.seen.values())[2:]) <= {'killed', 'missing', 'failed'}
    for name in list(CELLS)[:2]:
        assert done.after[name] == done.before[name]
    after = {name: found['status'] for name, found in done.after.items()}
    assert after == CELLS
    assert done.code == 1  # the broken config


@pytest.mark.slow
def test_what_real_trainings_leave(killed_and_resumed):
    folder, after = killed_and_resumed.folder, killed_and_resumed.after
    done = after['small.fp32.seed1']
    assert done['steps'] == 2
    assert 0 <= done['final']['accuracy/top1'] <= 100
    assert 2.0 < done['final_loss'] < 2.6  # ln 10 = 2.3
    assert 0 < done['seconds_per_step'] < 60
    assert 100 < done['memory_mb'] < 5000
    assert after['wild.fp32.lr1e9.seed0']['first_diverged_step'] == 2
    assert 'NoSuchDataset' in after['broken.fp32.seed0']['reason']
    losses = {after[name]['final_loss'] for name in CELLS if 'l.fp' in name}
    assert len(losses) == 2  # the seed reaches the training
    config = next((folder / results.CELLS / 'large.fp32.seed1').glob('*.py'))
    assert "'d_state': 4" in config.read_text() or (
        'd_state=4' in config.read_text()
    )


@pytest.mark.slow
def test_report_on_real_trainings(killed_and_resumed, capsys):
    folder, after = killed_and_resumed.folder, killed_and_resumed.after
    assert tool.main(['report', str(folder)]) == 0
    out = folder / 'report'
    assert f'Report: {out / "report.html"}' in capsys.readouterr().out
    text = (out / 'report.md').read_text()
    assert 'Cells: 6: 4 done, 1 failed, 1 diverged' in text
    scores = [
        after[f'small.fp32.seed{seed}']['final']['accuracy/top1']
        for seed in (0, 1)
    ]
    assert f'| small | of config | {sum(scores) / 2:.2f} ± ' in text
    assert (out / 'figures' / 'curves.png').stat().st_size > 10_000


def test_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ['--dry-run', '--precisions', 'fp32', 'bf16', '--seeds', '5']
    options = ['--only', 'small.*', '--lrs', '1e-3']
    assert tool.main(['run', str(MATRIX), *arguments, *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        'start    small.fp32.lr1e-3.seed5',
        'start    small.bf16.lr1e-3.seed5',
        '0 keep, 0 skip, 0 resume, 0 replace, 2 start',
    ]
    assert list(tmp_path.iterdir()) == []


def imports_of(module):
    """Modules of the package that one imports when it is imported."""
    path = ROOT.joinpath(*module.split('.'))
    path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            for alias in node.names:
                name = f'{node.module}.{alias.name}'
                if ROOT.joinpath(*name.split('.')).with_suffix('.py').exists():
                    yield name


def test_a_report_needs_no_model():
    """It can be written where the rest of the package does not load."""
    seen, waiting = set(), {'mmstabvim.ablation.report'}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        found = {m for m in imports_of(module) if m.startswith('mmstabvim.')}
        waiting |= found - seen
    assert 'mmstabvim.ablation.statistics' in seen
    parts = {name.split('.')[1] for name in seen}
    assert parts == {'ablation', 'reporting', 'visualization', 'version'}


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['run', 'absent.py'], FileNotFoundError),
        (['report', 'absent'], FileNotFoundError),
        (['run', str(MATRIX), '--only', 'x'], ValueError),
        (['run', str(MATRIX), '--cfg-options', 'modle.x=1'], ValueError),
        (['run', str(MATRIX), '--precisions', 'fp8'], SystemExit),
        ([], SystemExit),
    ],
)
def test_bad_calls(arguments, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        tool.main(arguments)
    assert list(tmp_path.iterdir()) == []

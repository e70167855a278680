"""Running cells: outcomes, resuming, interrupts, several at once.

The trainings are stand-ins (fake_train.py); a real matrix runs in
test_ablation_tool.py.
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmstabvim.ablation import job, progress, results, run, tied_child
from mmstabvim.ablation.matrix import Cell, load_matrix


def log(study, name):
    return (study / results.CELLS / name / results.LOG).read_text()


def ended(study, name):
    """Whether the worker that a training started has ended."""
    return has_ended((study / results.CELLS / name / 'worker').read_text())


def has_ended(pid):
    """Wait for a process to go, or to wait for its parent's notice."""
    status = Path('/proc', str(pid), 'status')
    for _ in range(100):
        if not status.exists() or 'State:\tZ' in status.read_text():
            return True
        time.sleep(0.05)
    return False


def test_outcomes(start, study):
    """None stops the others; the failed one decides the exit code."""
    behaviours = ['fail', 'nan', 'report', 'ok']
    code, records = start(behaviours)
    assert code == 1
    found = {name.split('.')[0]: record for name, record in records.items()}
    assert {name: record['status'] for name, record in found.items()} == {
        'fail': 'failed',
        'nan': 'diverged',
        'report': 'diverged',
        'ok': 'done',
    }
    assert found['fail']['reason'] == 'exit code 1: RuntimeError: no more data'
    assert found['nan']['reason'] == 'loss not finite at iteration 3'
    assert found['nan']['first_diverged_step'] == 3
    expected = 'stopped by DivergenceHook at iteration 3'
    assert found['report']['reason'] == expected
    assert found['report']['first_diverged_step'] == 3


def test_what_a_record_holds(start, study):
    code, records = start(seeds=[1])
    record = records['ok.fp32.seed1']
    assert code == 0
    assert record['labels'] == {'behaviour': 'ok'}
    assert record['final'] == record['best'] == {'accuracy/top1': 41.0}
    assert record['final_loss'] == 0.25
    assert record['steps'] == 4
    assert record['seconds_per_step'] == pytest.approx(0.25)
    assert 1 < record['memory_mb'] < 500
    assert record['memory_kind'] == 'resident'
    assert record['exit_code'] == 0
    assert record['attempts'] == record['jobs'] == 1
    assert record['versions']['torch'] == torch.__version__.split('+')[0]
    assert record['machine']['cores'] == len(os.sched_getaffinity(0))
    assert '--resume --seed 1' in record['command']
    assert log(study, 'ok.fp32.seed1').startswith('$ python ')


def test_a_divergence_is_not_trained_to_the_end(start, study):
    """After its NaN the stand-in waits for a minute."""
    _, records = start(['nan'])
    assert records['nan.fp32.seed0']['exit_code'] == -signal.SIGTERM
    assert records['nan.fp32.seed0']['seconds'] < 30


@pytest.mark.parametrize(
    ('action', 'status'), [('rollback', 'done'), ('continue', 'diverged')]
)
def test_a_hook_decides_about_a_divergence(
    action, status, write_matrix, run_file
):
    """A rollback that ends well is no divergence; nothing is cut short."""
    path = write_matrix(['back']).with_name('fake_back.py')
    hook = f"dict(type='mmstabvim.DivergenceHook', action={action!r})"
    # slow enough that the NaN is seen while it runs
    plain = path.read_text().replace('pause=0.0', 'pause=0.4')
    path.write_text(f'{plain}custom_hooks = [{hook}]\n')
    code, records = run_file(path.with_name('matrix.py'))
    (record,) = records.values()
    assert code == 0
    assert record['status'] == status
    assert record['exit_code'] == 0
    assert record['first_diverged_step'] == 3


def test_finished_cells_are_kept(start, study):
    """Failed ones are tried again, from their checkpoint."""
    start(['ok', 'fail', 'nan'])
    before = log(study, 'ok.fp32.seed0')
    _, records = start(['ok', 'fail', 'nan'])
    assert log(study, 'ok.fp32.seed0') == before
    assert records['nan.fp32.seed0']['attempts'] == 1
    assert records['fail.fp32.seed0']['attempts'] == 2
    assert 'from 2' in log(study, 'fail.fp32.seed0')


def test_other_configs_replace_results(start, study):
    start(cfg_options={'model.pause': 0.0})
    first = log(study, 'ok.fp32.seed0')
    _, records = start(cfg_options={'model.pause': 0.001})
    assert records['ok.fp32.seed0']['attempts'] == 1
    assert 'from 0' in log(study, 'ok.fp32.seed0')
    kept = study / run.REPLACED / 'ok.fp32.seed0-1'
    assert (kept / results.LOG).read_text() == first
    start(cfg_options={'model.pause': 0.002})
    assert (study / run.REPLACED / 'ok.fp32.seed0-2').is_dir()


@pytest.fixture
def ctrl_c():
    """As at a terminal: jobs in the background of a script ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_go_on(number, start, study, ctrl_c):
    """Children end with their workers; the next call goes on."""
    place = study / results.CELLS / 'ok.fp32.seed0'

    def interrupt():
        while not (place / 'checkpoint').exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    options = dict(seeds=[0, 1], cfg_options={'model.pause': 0.7})
    code, records = start(**options)
    assert code == 130
    assert list(records) == ['ok.fp32.seed0']
    assert records['ok.fp32.seed0']['status'] == 'killed'
    assert records['ok.fp32.seed0']['reason'] == 'interrupted'
    assert ended(study, 'ok.fp32.seed0')
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done = int((place / 'checkpoint').read_text())
    assert 0 < done < 4
    code, records = start(**options, only='*.seed0')
    assert code == 0
    assert records['ok.fp32.seed0']['status'] == 'done'
    assert records['ok.fp32.seed0']['attempts'] == 2
    assert f'from {done}' in log(study, 'ok.fp32.seed0')
    steps = [s['step'] for s in results.read_curves(place).train]
    assert steps == [1, 2, 3, 4]


def test_nohup_stays_in_force(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP))
        timer.start()
        assert start(cfg_options={'model.pause': 0.3})[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_that_takes_too_long(start, study, monkeypatch):
    """One that does not end when asked to ends by force."""
    monkeypatch.setattr(job, 'GRACE', 0.3)
    code, records = start(['stubborn'], settings=dict(timeout=1.0))
    record = records['stubborn.fp32.seed0']
    assert code == 1
    assert record['status'] == 'failed'
    assert record['reason'] == 'took longer than 1 s'
    assert record['exit_code'] == -signal.SIGKILL
    assert ended(study, 'stubborn.fp32.seed0')


def test_workers_of_a_crashed_training_end(start, study):
    start(['fail'])
    assert ended(study, 'fail.fp32.seed0')


def test_jobs_have_their_gpus_and_threads(start, study, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(job, 'usable_cores', lambda: 6)
    start(
        seeds=[0, 1, 2],
        cfg_options={'model.pause': 0.2},
        settings=dict(gpus='5, GPU-x'),
    )
    seen = []
    for seed in range(3):
        line = log(study, f'ok.fp32.seed{seed}').splitlines()[1]
        seen.append(json.loads(line))
    assert {s['OMP_NUM_THREADS'] for s in seen} == {'3'}
    devices = [s['CUDA_VISIBLE_DEVICES'] for s in seen]
    assert devices[:2] == ['5', 'GPU-x']
    assert devices[2] in devices[:2]


def test_jobs_run_at_once(start, study):
    start(
        seeds=[0, 1, 2],
        settings=dict(jobs=3),
        cfg_options={'model.pause': 0.3},
    )
    found = list(study.glob('cells/*/run_00/vis_data/scalars.json'))
    begun = [path.parents[1].stat().st_ctime for path in found]
    ends = [path.stat().st_mtime for path in found]
    assert len(found) == 3
    assert max(begun) < min(ends)


def test_precisions(start, study, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    precisions = dict(precisions=['fp32', 'bf16', 'fp16'])
    code, records = start(**precisions)
    assert code == 0
    assert 'amp None' in log(study, 'ok.fp32.seed0')
    assert 'amp bfloat16' in log(study, 'ok.bf16.seed0')
    skipped = records['ok.fp16.seed0']
    assert (skipped['status'], skipped['reason']) == ('skipped', 'needs a GPU')
    # where there is a GPU the same cell runs
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    _, records = start(**precisions)
    assert records['ok.fp16.seed0']['status'] == 'done'
    assert 'amp float16' in log(study, 'ok.fp16.seed0')


def test_a_cell_at_work_elsewhere_is_left_alone(start, study):
    place = study / results.CELLS / 'ok.fp32.seed0'
    place.mkdir(parents=True)
    lock = results.try_lock(place)
    code, records = start(seeds=[0, 1])
    os.close(lock)
    assert code == 0
    assert list(records) == ['ok.fp32.seed1']
    assert start(seeds=[0, 1])[1]['ok.fp32.seed0']['status'] == 'done'


def test_choosing_cells(write_matrix, study):
    cells = load_matrix(write_matrix(['ok', 'fail'], seeds=[0, 1])).cells
    chosen = run.select(cells, 'ok.*1')
    assert [cell.name for cell in chosen] == ['ok.fp32.seed1']
    assert run.select(cells, None) == cells
    with pytest.raises(ValueError, match=r"first is called 'ok\.fp32\.seed0'"):
        run.select(cells, 'none')
    text = run.describe_plan(run.plan(cells, study))
    assert 'start    ok.fp32.seed1' in text
    assert text.endswith('0 keep, 0 skip, 0 resume, 0 replace, 4 start')
    assert not study.exists()


def test_children_end_with_a_killed_parent():
    """SIGKILL gives the parent no time to end them."""
    child = [tied_child.__file__, 'PID', 'sleep', '60']
    code = (
        'import os, subprocess, sys, time\n'
        f'command = {child!r}\n'
        'command[1] = str(os.getpid())\n'
        'p = subprocess.Popen([sys.executable, *command])\n'
        'time.sleep(0.5)\n'
        'print(p.pid, flush=True)\n'
        'time.sleep(60)\n'
    )
    parent = subprocess.Popen(
        [sys.executable, '-S', '-c', code], stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    name = Path('/proc', str(pid), 'comm')
    for _ in range(100):
        if name.read_text().strip() == 'sleep':
            break
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone = has_ended(pid)
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert gone


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(jobs=0), 'jobs must be at least 1, got 0'),
        (dict(threads=0), 'threads must be at least 1, got 0'),
        (dict(timeout=-1.0), 'timeout must not be negative'),
    ],
)
def test_settings_that_cannot_be(arguments, message, study):
    with pytest.raises(ValueError, match=message):
        job.make_settings(Path('train.py'), study, **arguments)


def test_settings_left_open(study, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    assert job.make_settings(Path('t'), study).threads == 7
    assert job.make_settings(Path('t'), study, gpus='0,1').jobs == 2
    assert job.make_settings(Path('t'), study, jobs=3, gpus='0').jobs == 3


@pytest.mark.parametrize(
    ('text', 'epochs', 'share'),
    [
        ('', 5, 0.0),
        ('Epoch(train)  [2][10/20]  lr: 1', 5, 0.3),
        ('Epoch(train) [ 5][20/20]\nEpoch(val) [5][1/6]', 5, 1.0),
        ('Iter(train) [ 30/120]  lr: 1', None, 0.25),
        ('Iter(train) [100/100]\n$ python again', None, 0.0),
    ],
)
def test_progress_from_a_log(text, epochs, share, tmp_path):
    path = tmp_path / 'log.txt'
    assert job.read_progress(path, epochs) == 0.0
    path.write_text(f'$ python\n{text}\n')
    assert job.read_progress(path, epochs) == pytest.approx(share)


class FakeJob:
    """As much of a job as the progress looks at."""

    def __init__(self, name, share, seconds):
        self.cell = Cell({'x': name}, 'config.py', 0, 'fp32', None)
        self.share, self.started = share, time.time() - seconds

    def progress(self):
        return self.share


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_in_words(terminal):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=100, highlight=False
    )
    first, second = FakeJob('a', 0.0, 0), FakeJob('b', 0.0, 0)
    record = dict(status='done', final={'acc': 97.314}, seconds=50.0)
    with progress.Progress(5, 1, 2, console) as shown:
        shown.started(first)
        shown.update([first], [second.cell])
        assert 'to go' not in out.getvalue()
        shown.finished(first, record)
        shown.started(second)
        second.share = 0.5
        shown.update([second], [first.cell, first.cell])
        shown.finished(second, record)
    text = out.getvalue()
    assert '1 of 5 cells have a result' in text
    assert 'a.fp32.seed0: done, acc 97.31, in 50 s' in text
    # half a cell and two more of 50 s each, two at once
    assert '[3/5] b.fp32.seed0: done, acc 97.31, in 50 s, 62 s to go' in text
    assert ('\x1b[' in text) == terminal
    assert ('a.fp32.seed0: started' in text) != terminal


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.4, '0 s'), (89, '89 s'), (720, '12 min'), (11100, '3 h 05 min')],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text

"""A matrix of stand-in trainings, and synthetic results."""

import json
from pathlib import Path

import pytest

from mmstabvim.ablation import job, results, run
from mmstabvim.ablation.matrix import load_matrix

FAKE_TRAIN = Path(__file__).with_name('fake_train.py')
CONFIG = """
model = dict(behaviour={behaviour!r}, pause=0.0)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
train_cfg = dict(by_epoch=True, max_epochs=4)
randomness = dict(seed=0)
"""


@pytest.fixture
def write_matrix(tmp_path):
    """Write a matrix of configs with the named behaviours."""

    def write(behaviours=('ok',), text='', **settings):
        for name in behaviours:
            config = tmp_path / f'fake_{name}.py'
            config.write_text(CONFIG.format(behaviour=name))
        group = dict(
            configs='fake_{behaviour}.py',
            labels=dict(behaviour=list(behaviours)),
        )
        settings = {'groups': [group], **settings}
        path = tmp_path / 'matrix.py'
        lines = [f'{name} = {value!r}' for name, value in settings.items()]
        path.write_text('\n'.join([*lines, text]) + '\n')
        return path

    return write


@pytest.fixture
def study(tmp_path):
    return tmp_path / 'study'


@pytest.fixture
def run_file(study, monkeypatch):
    """Run a matrix file with the stand-in; returns exit code and records."""
    monkeypatch.setattr(run, '_POLL', 0.05)

    def begin(path, only=None, settings=None):
        chosen = job.make_settings(FAKE_TRAIN, study, **(settings or {}))
        code = run.run_matrix(load_matrix(path), chosen, only)
        return code, records(study)

    return begin


@pytest.fixture
def start(write_matrix, run_file):
    """Write and run a matrix."""

    def begin(behaviours=('ok',), only=None, settings=None, **changes):
        return run_file(write_matrix(behaviours, **changes), only, settings)

    return begin


def records(study):
    """``cell.json`` of every cell."""
    paths = sorted((study / results.CELLS).glob(f'*/{results.RECORD}'))
    return {path.parent.name: results.read_json(path) for path in paths}


@pytest.fixture(scope='session')
def write_cell():
    """Write what a finished training leaves."""

    def write(
        folder,
        labels,
        seed,
        score=None,
        status='done',
        lr=None,
        train=(),
        stability=(),
        **more,
    ):
        name = '.'.join([*labels.values(), 'fp32'])
        name += ('' if lr is None else f'.lr{lr:g}') + f'.seed{seed}'
        planned = dict(
            cell=name,
            labels=labels,
            config='config.py',
            seed=seed,
            precision='fp32',
            lr=lr,
            lr_used=0.002 if lr is None else lr,
            config_hash='abc',
            epochs=2,
        )
        if status == 'missing':
            return planned
        place = folder / results.CELLS / name
        scalars = place / '20260101_000000' / 'vis_data' / 'scalars.json'
        scalars.parent.mkdir(parents=True)
        scalars.write_text('\n'.join(map(json.dumps, train)))
        lines = '\n'.join(map(json.dumps, stability))
        (scalars.parents[1] / results.STABILITY).write_text(lines)
        final = {} if score is None else {'accuracy/top1': score}
        record = {**planned, 'status': status, 'reason': '', 'final': final}
        record |= {'best': final, 'started': '2026-01-02T03:04:05+00:00'}
        results.write_json(place / results.RECORD, {**record, **more})
        return planned

    return write


@pytest.fixture(scope='session')
def write_study():
    """Write the list of cells that a run leaves."""

    def write(folder, cells, baseline=None, settings=None, **orders):
        content = dict(
            title='Test <study>',
            metric='accuracy/top1',
            baseline=baseline or {},
            orders=orders,
            cells=cells,
            command='python tools/ablation.py run matrix.py',
            **(settings or {}),
        )
        folder.mkdir(exist_ok=True)
        results.write_json(folder / results.MATRIX, content)
        return folder

    return write

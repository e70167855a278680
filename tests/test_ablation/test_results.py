"""Reading what trainings left."""

import json
import math
import os

import pytest

from mmstabvim.ablation import results


def write_scalars(folder, name, lines):
    path = folder / name / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, lines)))
    return path


def train(step, loss, **more):
    return dict(loss=loss, iter=step, step=step, **more)


def val(step, score):
    return {'acc': score, 'data_time': 0.1, 'time': 0.2, 'step': step}


def test_attempts_are_joined(tmp_path):
    """A resumed attempt replaces what came after its checkpoint."""
    first = [train(s, s / 10) for s in (10, 20, 30, 40)]
    write_scalars(tmp_path, '1', [*first, val(1, 50.0), val(2, 60.0)])
    write_scalars(tmp_path, '2', [train(30, 9.0), train(40, 8.0), val(2, 70)])
    write_scalars(tmp_path, '3', [])
    curves = results.read_curves(tmp_path)
    assert curves.series('loss') == ([10, 20, 30, 40], [1.0, 2.0, 9.0, 8.0])
    assert curves.metrics() == [{'acc': 50.0}, {'acc': 70.0}]
    assert curves.best_metrics() == {'acc': 70.0}


def test_lines_cut_short_and_foreign_ones(tmp_path):
    path = write_scalars(
        tmp_path, '1', [train(1, 2.0), {'stab/x': 1.0, 'step': 1}, [1]]
    )
    with path.open('a') as file:
        file.write('\n{"loss": 1.0, "iter": 2, "st')
    curves = results.read_curves(tmp_path)
    assert curves.series('loss') == ([1], [2.0])
    assert curves.val == []
    assert results.read_curves(tmp_path / 'absent').train == []


def test_divergence_in_the_log(tmp_path):
    losses = (1.0, math.inf, math.nan, 2.0)
    lines = [train(s, loss, time=s) for s, loss in enumerate(losses, 1)]
    write_scalars(tmp_path, '1', lines)
    curves = results.read_curves(tmp_path)
    assert curves.first_nonfinite_step() == 2
    assert curves.ends_finite()
    curves.train.pop()
    assert not curves.ends_finite()
    assert curves.median('time') == 2
    assert curves.median('absent') is None
    curves.train.pop()
    assert curves.median('time') == 1.5


def test_nan_metrics_are_no_metrics(tmp_path):
    write_scalars(tmp_path, '1', [val(1, math.nan), val(2, 3.0)])
    assert results.read_curves(tmp_path).metrics() == [{}, {'acc': 3.0}]


def test_stability_records(tmp_path):
    (tmp_path / 'run').mkdir()
    old, new = dict(step=5, x=1), dict(step=5, x=2)
    lines = f'{json.dumps(dict(step=9))}\n{json.dumps(old)}\n{{"step": 1'
    (tmp_path / 'run' / results.STABILITY).write_text(lines)
    (tmp_path / results.STABILITY).write_text(json.dumps(new))
    assert results.read_stability(tmp_path) == [new, dict(step=9)]
    assert results.read_stability(tmp_path / 'absent') == []


def test_a_file_that_grows(tmp_path):
    path = tmp_path / 'scalars.json'
    path.write_text('{"loss": 1}\n{"lo')
    lines, end = results.read_new_lines(path, 0)
    assert (lines, end) == ([{'loss': 1}], 12)
    assert results.read_new_lines(path, end) == ([], 12)
    with path.open('a') as file:
        file.write('ss": NaN, "step": 7}\n')
    lines, end = results.read_new_lines(path, end)
    assert results.first_nonfinite_step(lines) == 7
    assert end == path.stat().st_size


def test_divergence_reports(tmp_path):
    (tmp_path / 'run').mkdir()
    first = tmp_path / 'run' / 'divergence_report.md'
    second = tmp_path / 'run' / 'divergence_report_2.md'
    first.write_text('- Spike: 3 times the last.\n- Iteration 42, epoch 1')
    second.write_text('Nothing said.')
    os.utime(first, (100, 100))
    os.utime(second, (200, 200))
    assert results.divergence_reports(tmp_path) == [first, second]
    assert results.divergence_reports(tmp_path, since=150) == [second]
    assert results.reported_step(first) == 42
    assert results.reported_step(second) is None


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('a\nb\n\n', 'b'),
        ('', ''),
        ('ValueError: x\n  cleaned up\n', 'ValueError: x'),
        (
            'torch.cuda.OutOfMemoryError: y\nbye',
            'torch.cuda.OutOfMemoryError: y',
        ),
        ('x' * 400, 'x' * 300),
    ],
)
def test_last_line_of_a_log(text, line, tmp_path):
    path = tmp_path / 'log.txt'
    assert results.last_line(path) == ''
    path.write_text(text)
    assert results.last_line(path) == line


def test_json_has_no_nan(tmp_path):
    path = tmp_path / 'x.json'
    results.write_json(path, dict(a=math.nan, b=[math.inf, 1.5], c={1: None}))
    assert 'NaN' not in path.read_text()
    expected = dict(a=None, b=[None, 1.5], c={'1': None})
    assert results.read_json(path) == expected
    assert [p.name for p in tmp_path.iterdir()] == ['x.json']


def test_statuses(tmp_path, write_cell, write_study):
    labels = dict(kind='a')
    cells = [
        write_cell(tmp_path, labels, 0, 90.0),
        write_cell(tmp_path, labels, 1, status='missing'),
        write_cell(tmp_path, labels, 2, status='running'),
        write_cell(tmp_path, labels, 3, status='running'),
        {**write_cell(tmp_path, labels, 4, 80.0), 'config_hash': 'new'},
    ]
    write_cell(tmp_path, dict(kind='b'), 5, 70.0)  # of an earlier matrix
    write_study(tmp_path, cells, kind=['a'])
    lock = results.try_lock(tmp_path / results.CELLS / 'a.fp32.seed2')
    study = results.read_study(tmp_path)
    os.close(lock)
    found = {cell.seed: cell.status for cell in study.cells}
    assert found == {
        0: 'done',
        1: 'missing',
        2: 'running',
        3: 'killed',
        4: 'missing',
        5: 'done',
    }
    assert study.orders == dict(kind=['a', 'b'])
    finals = [cell.final('accuracy/top1') for cell in study.cells]
    assert finals == [90.0, None, None, None, None, 70.0]


def test_no_study(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'ablation\.py run'):
        results.read_study(tmp_path)


def test_a_lock_has_one_holder(tmp_path):
    lock = results.try_lock(tmp_path)
    assert results.try_lock(tmp_path) is None
    os.close(lock)
    again = results.try_lock(tmp_path)
    assert again is not None
    os.close(again)

"""Curves and times of real, short trainings."""

import csv
import json
import math

import analyze_logs as tool
import pytest
from small_runs import digits_config, scenes_config, train

KEY = 'stab/backbone.layers.0.mixer.directions.1/horizon'


def small(folder):
    cfg = digits_config(folder)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.indices = 32
    cfg.param_scheduler = []
    cfg.default_hooks.stability.interval = 2
    return cfg


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
    """Two epochs of two iterations; from the first one again to the third."""
    cfg = small(tmp_path_factory.mktemp('resumed'))
    cfg.train_cfg.max_epochs = 2
    train(cfg)
    cfg.load_from, cfg.resume = f'{cfg.work_dir}/epoch_1.pth', True
    cfg.train_cfg.max_epochs = 3
    train(cfg)
    return tool.Path(cfg.work_dir)


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    """A training whose loss is soon NaN, which nothing stops."""
    cfg = small(tmp_path_factory.mktemp('broken'))
    cfg.default_hooks.pop('divergence')
    cfg.train_cfg.update(max_epochs=2, val_interval=9)
    cfg.optim_wrapper.pop('clip_grad', None)
    cfg.optim_wrapper.optimizer.lr = 1e30
    train(cfg)
    return tool.Path(cfg.work_dir)


def run(capsys, *args):
    """What the tool prints."""
    tool.main([*map(str, args)])
    return capsys.readouterr().out


def plot(capsys, folder, *args):
    """Lines of the CSV and what is printed."""
    said = run(capsys, 'plot_curve', *args, f'--out={folder / "curve.png"}')
    with (folder / 'curve.csv').open() as file:
        return list(csv.DictReader(file)), said


def lines_of(work_dir):
    """All lines, by run."""
    return [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
    ]


def points(rows, key):
    return {
        float(r['step']): float(r['value']) for r in rows if r['key'] == key
    }


def test_resumed_runs_are_joined(resumed, tmp_path, capsys):
    """The second run starts behind its checkpoint, after two iterations."""
    rows, _ = plot(
        capsys, tmp_path, resumed, '--keys', 'loss', 'accuracy/top1', KEY
    )
    first, second = lines_of(resumed)
    train_lines = [line for line in first if 'iter' in line]
    later = [line for line in second if 'iter' in line]
    assert [line['step'] for line in later] == [3, 4, 5, 6]
    wanted = {line['step']: line['loss'] for line in train_lines[:2] + later}
    assert points(rows, 'loss') == wanted
    assert sum(row['key'] == 'loss' for row in rows) == 6
    scores = [line for line in second if 'accuracy/top1' in line]
    before = [line for line in first if 'accuracy/top1' in line]
    assert [line['step'] for line in scores] == [2, 3]
    # an epoch has two iterations
    wanted = {
        2.0 * line['step']: line['accuracy/top1']
        for line in before[:1] + scores
    }
    assert points(rows, 'accuracy/top1') == wanted
    watched = [line for line in (*first, *second) if KEY in line]
    assert len(watched) > 1
    assert points(rows, KEY) == {line['step']: line[KEY] for line in watched}
    for ending in ('png', 'pdf', 'svg'):
        assert (tmp_path / f'curve.{ending}').stat().st_size > 5000


def test_a_run_by_itself(resumed, tmp_path, capsys):
    """A folder of a run and its file are not joined with others."""
    run_folder = sorted(resumed.glob('*/vis_data'))[0].parent
    for path in (run_folder, run_folder / 'vis_data/scalars.json'):
        rows, _ = plot(capsys, tmp_path, path, '--keys', 'loss')
        assert sorted(points(rows, 'loss')) == [1, 2, 3, 4]
        assert rows[0]['log'] == run_folder.name


def test_several_logs_and_patterns(resumed, broken, tmp_path, capsys):
    rows, _ = plot(
        capsys,
        tmp_path,
        *(resumed, broken, '--keys', 'stab/*/delta_max'),
        *('--legend', 'one', 'other'),
    )
    assert {row['log'] for row in rows} == {'one', 'other'}
    keys = {row['key'] for row in rows}
    assert len(keys) == 4
    assert all(key.endswith('/delta_max') for key in keys)


def test_not_finite(broken, tmp_path, capsys):
    """Named, in the data, and a gap in the line."""
    rows, said = plot(capsys, tmp_path, broken, '--keys', 'loss')
    (lines,) = lines_of(broken)
    losses = [line['loss'] for line in lines if 'loss' in line]
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    assert 0 < len(bad) < len(losses) == 4
    assert (
        f'loss is not finite in {len(bad)} of 4 lines, first at iteration '
        f'{bad[0] + 1}' in said
    )
    assert len(rows) == 4
    found = points(rows, 'loss')
    assert all(math.isnan(found[i + 1]) for i in bad)
    figure = tool.draw(
        tool.make_curves([tool.read_log(broken)], ['loss'])[0], ''
    )
    line, cross = figure.axes[0].lines[:2]
    assert len(line.get_xdata()) == 4
    assert math.isnan(line.get_ydata()[bad[0]])
    assert cross.get_xdata().tolist() == [bad[0]]


def test_nothing_finite_is_drawn_empty(broken):
    log = tool.read_log(broken)
    for line in log.lines[tool.TRAIN]:
        line['loss'] = math.nan
    figure = tool.draw(tool.make_curves([log], ['loss'])[0], 'title')
    assert [text.get_text() for text in figure.axes[0].texts] == ['no data']
    assert figure.axes[0].get_title() == 'title'


def test_iterations_without_epochs(tmp_path, capsys):
    """A segmentor's steps of validation are iterations."""
    cfg = scenes_config(tmp_path)
    train(cfg)
    rows, _ = plot(capsys, tmp_path, cfg.work_dir, '--keys', 'mIoU', 'loss')
    assert sorted(points(rows, 'mIoU')) == [2, 4]
    assert sorted(points(rows, 'loss')) == [1, 2, 3, 4]
    out = run(capsys, 'cal_train_time', cfg.work_dir)
    assert ' 4 ' in out


def test_times(resumed, tmp_path, capsys):
    out = tmp_path / 'times.csv'
    said = run(
        capsys, 'cal_train_time', resumed, '--include-outliers', '--out', out
    )
    assert 'seconds per iteration' in said
    with out.open() as file:
        rows = list(csv.DictReader(file))
    first, second = lines_of(resumed)
    lines = [line for line in first[:4] + second if 'iter' in line]
    for row, epoch in zip(rows, (1, 2, 3), strict=True):
        own = [
            line['time']
            for line in lines
            if line['epoch'] == epoch and (epoch == 1 or line in second)
        ]
        assert len(own) == 2
        assert float(row['time']) == pytest.approx(sum(own) / 2)
    # without the first line of each epoch, in which workers start
    log = tool.read_log(resumed)
    times = [row['time'] for row in tool.epoch_times(log)]
    ends = [line['time'] for line in lines if line['step'] % 2 == 0]
    assert times == ends[:1] + ends[-2:]
    short = tool.summarize_times(log, tool.epoch_times(log))
    assert short['runs'] == 2
    assert short['iterations'] == 6
    assert short['mean, s'] == pytest.approx(sum(times) / 3)
    assert short['its mean, s'] == min(times)
    assert short['slowest epoch'] == str(times.index(max(times)) + 1)


def test_names(resumed, capsys):
    said = run(capsys, 'list', resumed)
    assert f'{resumed.name}, 2 runs' in said
    assert 'accuracy/top1' in said


def test_an_interrupted_line(resumed, tmp_path, capsys):
    """The last line of a killed training is half a line."""
    path = sorted(resumed.glob('*/vis_data/scalars.json'))[0]
    copy = tmp_path / 'scalars.json'
    copy.write_text(path.read_text() + '{"loss": 1.0, "st')
    rows, _ = plot(capsys, tmp_path, copy, '--keys', 'loss')
    assert len(rows) == 4


def test_short_names():
    keys = [f'stab/a.{w}/horizon' for w in ('0.b.1', '0.b.2', '1.b.1')]
    assert tool.short_names(keys) == ['0.b.1', '0.b.2', '1.b.1']
    assert tool.short_names(keys[:1]) == keys[:1]


def test_errors(resumed, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no 'acuracy/top1'; near names: ac"):
        run(capsys, 'plot_curve', resumed, '--keys', 'acuracy/top1')
    with pytest.raises(FileNotFoundError, match='has no vis_data'):
        run(capsys, 'list', tmp_path)
    with pytest.raises(FileNotFoundError, match=r"log '.*absent\.json'"):
        run(capsys, 'list', tmp_path / 'absent.json')
    (tmp_path / 'empty.json').write_text('')
    with pytest.raises(ValueError, match='must have logged values'):
        run(capsys, 'list', tmp_path / 'empty.json')
    with pytest.raises(SystemExit):
        run(capsys, 'plot_curve', resumed, '--legend', 'a', 'b')
    assert '--legend must have a name for each' in capsys.readouterr().err


def test_mmpretrain_finds_no_score_here(resumed):
    """Why there is a tool of our own."""
    from mmpretrain.utils import load_json_log

    path = sorted(resumed.glob('*/vis_data/scalars.json'))[0]
    lines = load_json_log(str(path))['val']
    # it takes the names of the first line for those of all
    assert 'accuracy/top1' not in lines[0]
    assert any('accuracy/top1' in line for line in lines)

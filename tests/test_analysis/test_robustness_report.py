"""The tool on robustness: one checkpoint, a study, tables and figure."""

import csv
import importlib
import json
import statistics
import sys
from pathlib import Path

import matplotlib.colors
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from small_runs import ROOT, digits_config, scenes_config

from mmstabvim.ablation.matrix import load_matrix
from mmstabvim.analysis.robustness import make_options, report
from mmstabvim.reporting import style
from mmstabvim.visualization import Quantity, robustness_figure

sys.path.insert(0, str(ROOT / 'tools/analysis_tools'))

import eval_robustness as tool

sweeps = importlib.import_module('mmstabvim.analysis.robustness.evaluate')

FEW = ['--frequencies=3', '--amplitude=0.5', '--samples=8']


def save_model(cfg, folder, seed):
    """Config and checkpoint of an untrained model in a folder."""
    folder.mkdir(parents=True)
    cfg.dump(folder / 'config.py')
    cfg = cfg.copy()
    cfg.work_dir = str(folder / 'build')
    cfg.experiment_name = str(folder).replace('/', '_')
    model = Runner.from_cfg(cfg).model
    torch.manual_seed(seed)
    # far from zero, so that predictions differ
    head = getattr(model, 'head', None) or model.decode_head
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    path = folder / 'epoch_1.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    (folder / 'last_checkpoint').write_text(f'/elsewhere/{path.name}')
    return folder / 'config.py', path


def read(path):
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """A study of two starts and two seeds; a fifth cell has no checkpoint."""
    root = tmp_path_factory.mktemp('study')
    cells = []
    for init in ('s4d_real', 'ptd'):
        for seed in (0, 1, 2):
            name = f'{init}.fp32.seed{seed}'
            cell = dict(
                cell=name,
                labels=dict(init=init),
                seed=seed,
                precision='fp32',
                lr=None,
                config_hash='a',
            )
            folder = root / 'cells' / name
            if seed == 2:
                if init == 'ptd':
                    continue
                folder.mkdir()
            else:
                save_model(digits_config(root), folder, 10 * seed + len(init))
            record = dict(cell, status='done', final={'accuracy/top1': 1.0})
            (folder / 'cell.json').write_text(json.dumps(record))
            cells.append(cell)
    matrix = dict(
        title='Starts',
        metric='accuracy/top1',
        baseline=dict(init='s4d_real'),
        orders=dict(init=['s4d_real', 'ptd']),
        cells=cells,
    )
    (root / 'matrix.json').write_text(json.dumps(matrix))
    return root


@pytest.fixture(scope='module')
def reported(study):
    """Folder with the results of the study."""
    tool.main([str(study), *FEW])
    return study / 'robustness'


# ------------------------------------------------------------ one checkpoint


def test_one_segmentor(tmp_path, capsys):
    """Files, and numbers that come from the model of the checkpoint."""
    config, checkpoint = save_model(scenes_config(tmp_path), tmp_path / 'm', 0)
    out = tmp_path / 'out'
    arguments = [str(config), str(checkpoint), FEW[0], f'--out={out}']
    tool.main([*arguments, '--level=pixel', '--amp'])
    names = {path.name for path in out.iterdir()}
    assert {'robustness.png', 'robustness.md'} <= names
    assert {'mIoU.tex', 'flip_rate.tex', 'logit_shift.tex'} <= names
    rows = read(out / 'all.csv')
    assert [row['kind'] for row in rows][:2] == ['clean', 'fourier']
    assert float(rows[0]['mIoU']) > 0
    assert {row['images'] for row in rows} == {'8'}
    assert 'mean IoU (%)' in capsys.readouterr().out
    assert 'level pixel' in (out / 'robustness.md').read_text()


def test_a_checkpoint_must_fit(tmp_path):
    cfg = digits_config(tmp_path)
    config, checkpoint = save_model(cfg, tmp_path / 'm', 0)
    arguments = [str(config), str(checkpoint), *FEW]
    options = ['--cfg-options', 'model.head.num_classes=7']
    with pytest.raises(RuntimeError, match='of another shape'):
        tool.main([*arguments, *options])


# ------------------------------------------------------------------ a study


def test_results_of_a_study(reported, capsys):
    """Mean and deviation over the seeds that are there."""
    kept = {path.name for path in (reported / 'cells').iterdir()}
    assert kept == {
        f'{init}.fp32.seed{seed}.json'
        for init in ('s4d_real', 'ptd')
        for seed in (0, 1)
    }
    rows = [
        row
        for row in read(reported / 'all.csv')
        if row['series'] == 'ptd' and row['kind'] == 'jpeg'
    ]
    values = [float(row['logit_shift']) for row in rows]
    assert len(set(values)) == 2
    (drawn,) = (
        row
        for row in read(reported / 'others.csv')
        if row['series'] == 'ptd'
        and row['name'] == 'jpeg'
        and row['quantity'] == 'logit_shift'
    )
    mean, std = statistics.mean(values), statistics.stdev(values)
    assert float(drawn['mean']) == pytest.approx(mean)
    assert float(drawn['high']) == pytest.approx(mean + std)
    page = (reported / 'robustness.md').read_text()
    assert f'{mean:.3f} ± {std:.3f}' in page
    assert '8 test images' in page


def test_modes_are_means_over_phases_and_seeds(reported):
    rows = [
        row
        for row in read(reported / 'all.csv')
        if row['series'] == 's4d_real' and row['frequency'] == '0.25'
    ]
    assert len(rows) == 4  # two phases, two seeds
    (drawn,) = (
        row
        for row in read(reported / 'modes.csv')
        if row['series'] == 's4d_real'
        and row['x'] == '0.25'
        and row['quantity'] == 'logit_shift'
    )
    expected = statistics.mean(float(row['logit_shift']) for row in rows)
    assert float(drawn['mean']) == pytest.approx(expected)
    assert drawn['n'] == '2'


def test_a_second_call_keeps_what_is_there(
    study, reported, monkeypatch, capsys
):
    """Other options, or another checkpoint, are computed anew."""
    done = []

    def fake(config, checkpoint, options, progress):
        done.append(Path(checkpoint).parent.name)
        return read_rows(reported)

    monkeypatch.setattr(sweeps, 'evaluate', fake)
    tool.main([str(study), *FEW])
    assert not done
    out = ['--out', str(reported.parent / 'other')]
    tool.main([str(study), *FEW, *out, '--only', '*.seed1'])
    assert done == ['s4d_real.fp32.seed1', 'ptd.fp32.seed1']
    tool.main([str(study), *FEW, *out, '--only', '*.seed1', '--clip'])
    assert len(done) == 4
    said = capsys.readouterr().err
    assert 's4d_real.fp32.seed2: left out, done, no checkpoint' in said


def read_rows(folder):
    path = folder / 'cells' / 'ptd.fp32.seed0.json'
    return json.loads(path.read_text())['rows']


def test_a_study_without_checkpoints(study):
    with pytest.raises(ValueError, match='got none in 1 cells'):
        tool.main([str(study), '--only', '*.seed2'])


def test_seeds_must_have_the_same_frequencies(reported):
    rows = read_rows(reported)
    other = [dict(row) for row in rows]
    for row in other:
        if row['frequency'] == 0.25:
            row['frequency'] = 0.2
    measured = [
        sweeps.Sweep('', 'a', seed, found)
        for seed, found in enumerate((rows, other))
    ]
    with pytest.raises(ValueError, match=r'got \[0.2, 0.25\]'):
        report.mode_rows(measured)


# ------------------------------------------------------------------- options


def test_the_command_line_reaches_the_wrapper():
    flags = ['--absolute', '--clip', '--level=embed', '--patch-size=8']
    drawn = ['--random-phases=3', '--corruptions', 'jpeg']
    args = tool.parse_args(['config.py', 'model.pth', *flags, *drawn])
    options = make_options(args)
    assert options.wrapper == dict(
        frequencies=None,
        phases=3,
        level='embed',
        amplitude=0.1,
        relative=False,
        clip=True,
        value_range=255.0,
        corruptions=['jpeg'],
        patch_size=8,
    )
    # the wrapper knows all of them
    args = tool.parse_args(['config.py', 'model.pth', '--phases', '0', '1'])
    found = make_options(args).wrapper['phases']
    assert found == pytest.approx([0, torch.pi])


@pytest.mark.parametrize('arguments', [['config.py'], [str(ROOT), 'a.pth']])
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(arguments)
    assert 'wants CONFIG CHECKPOINT' in capsys.readouterr().err


def test_samples_are_drawn_from_those_of_the_config(tmp_path):
    cfg = digits_config(tmp_path)
    dataset = cfg.test_dataloader.dataset
    dataset.indices = list(range(100, 140))
    sweeps.choose_samples(cfg, 6, seed=0)
    first = list(dataset.indices)
    assert len(set(first)) == 6
    assert set(first) < set(range(100, 140))
    dataset.indices = 40
    sweeps.choose_samples(cfg, 6, seed=0)
    assert [100 + i for i in dataset.indices] == first
    with pytest.raises(ValueError, match='1 to 6, the test images, got 7'):
        sweeps.choose_samples(cfg, 7, seed=0)


# -------------------------------------------------------------------- figure


def test_figure_draws_the_rows():
    """Lines over frequency with bands; points with bars beside them."""
    modes, others = [], []
    for n, series in enumerate(['a', 'b']):
        for x in (0.0, 0.5):
            value = dict(mean=n + x, low=n + x - 0.1, high=n + x + 0.1)
            modes.append(
                dict(quantity='top1', facet='F', series=series, x=x, **value)
            )
        value = dict(mean=n, low=n - 0.2, high=n + 0.4)
        others.append(
            dict(quantity='top1', facet='F', series=series, name='jpeg')
            | value
        )
    figure = robustness_figure(
        modes, others, ['a', 'b'], 'init', [Quantity('top1', 'accuracy')]
    )
    wide, narrow = figure.axes
    assert wide.get_title() == 'F'
    assert [line.get_ydata().tolist() for line in wide.lines] == [
        [0.0, 0.5],
        [1.0, 1.5],
    ]
    edges = [
        [band.get_paths()[0].get_extents().y0 for band in wide.collections],
        [band.get_paths()[0].get_extents().y1 for band in wide.collections],
    ]
    assert edges == [
        pytest.approx([-0.1, 0.9]),
        pytest.approx([0.6, 1.6]),
    ]
    bars = [bar.get_segments()[0][:, 1].tolist() for bar in narrow.collections]
    assert bars == [pytest.approx([-0.2, 0.4]), pytest.approx([0.8, 1.4])]
    colours = [
        matplotlib.colors.to_hex(line.get_color()) for line in wide.lines
    ]
    assert colours == [c.lower() for c in style.COLORS[:2]]
    assert [t.get_text() for t in narrow.get_xticklabels()] == ['jpeg']
    marks = [line.get_marker() for line in figure.legends[0].get_lines()]
    assert marks == [line.get_marker() for line in wide.lines] == ['o', 's']


# -------------------------------------------------------------------- matrix


def test_the_matrix_of_starts():
    """18 trainings; each model starts as its label says."""
    path = ROOT / 'configs/ablation/robustness.py'
    found = load_matrix(path)
    assert len(found.cells) == 18
    assert found.orders['init'] == ['s4d_real', 's4d_legs', 'ptd']
    reals = {}
    for cell in found.cells:
        if cell.seed or cell.labels['data'] != 'digits':
            continue
        cfg = Config.fromfile(cell.config)
        cfg.merge_from_dict(cell.options)
        backbone = dict(cfg.model.backbone)
        backbone['arch'] = dict(backbone['arch'], num_layers=1)
        model = MODELS.build(backbone)
        matrix = model.layers[0].mixer.ssm.state_matrix
        values = matrix.eigenvalues().detach()
        reals[cell.labels['init']] = values[0].real
    legs = torch.full((8,), -0.5, dtype=reals['s4d_legs'].dtype)
    torch.testing.assert_close(reals['s4d_legs'], legs)
    assert reals['s4d_real'].min() == pytest.approx(-8.0)
    assert reals['ptd'].max() < -0.05
    assert not torch.allclose(reals['ptd'], legs)

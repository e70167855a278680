"""The script on the sensitivity framework: numbers, files, a study."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from small_runs import digits_config, train

TOOLS = Path(__file__).parents[2] / 'tools/reproduce'
sys.path.insert(0, str(TOOLS))

import sensitivity as tool  # noqa: E402


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp('toy')
    patch = pytest.MonkeyPatch()
    patch.setattr(tool, 'STEPS', 60)
    tool.main(['toy', '--samples=8', '--seeds', '0', '1', f'--out={out}'])
    patch.undo()
    return out


def test_first_order(toy):
    """Small changes do what the Jacobian says, to a tenth."""
    rows = read(toy / 'scaling.csv')
    assert len(rows) == 2 * len(tool.EPSILONS)
    for row in rows:
        found = {k: float(v) for k, v in row.items() if k != 'facet'}
        assert found['typical'] <= found['entropy_bound'] * (1 + 1e-9)
        assert found['norm_bound'] <= found['index_bound'] * (1 + 1e-9)
        if found['epsilon'] < 0.1:
            assert found['rms'] == pytest.approx(found['typical'], rel=0.1)
            assert found['rms'] < found['largest'] < found['norm_bound']


def test_files(toy):
    assert len(read(toy / 'images.csv')) == 16
    for name in ('scaling', 'images'):
        assert (toy / f'{name}.png').stat().st_size > 5000
    rows = read(toy / 'correlations.csv')
    assert [row['seed'] for row in rows] == ['0', '1']
    assert all(abs(float(row['entropy'])) <= 1 for row in rows)
    (first, _) = (
        row for row in read(toy / 'scaling.csv') if row['epsilon'] == '0.1'
    )
    text = (toy / 'scaling.md').read_text()
    assert '| quantity | seed 0 | seed 1 |' in text
    assert f'| ‖J‖ | {10 * float(first["norm_bound"]):.3g} |' in text
    text = (toy / 'correlations.md').read_text()
    assert '| digits, 64 pixels, 0 | 0 | 8 |' in text


def test_network_learns():
    args = tool.parse_args(['toy'])
    images, labels = tool.digits(args)
    model = tool.train_small(images[:1000], labels[:1000], 0)
    right = model(images[1000:]).argmax(1) == labels[1000:]
    assert right.double().mean() > 0.85


# ------------------------------------------------------------------ studies


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """Two tiny trainings, as tools/ablation.py leaves them."""
    folder = tmp_path_factory.mktemp('study')
    cells = []
    for name, score in (('plain', 50.0), ('other', 60.0)):
        cell = folder / 'cells' / name
        cfg = digits_config(folder)
        cfg.work_dir = str(cell)
        cfg.train_cfg.update(max_epochs=1, val_interval=9)
        cfg.param_scheduler = []
        cfg.randomness.seed = len(cells)
        train(cfg)
        cfg.dump(cell / 'config.py')
        for path in cell.glob('vim*.py'):
            path.unlink()
        entry = dict(
            cell=name,
            labels=dict(data='digits', regularizer=name),
            seed=0,
            precision='fp32',
            lr=None,
            lr_used=None,
            config_hash='x',
        )
        record = dict(entry, status='done', final={'accuracy/top1': score})
        (cell / 'cell.json').write_text(json.dumps(record))
        cells.append(entry)
    cells.append(dict(cells[0], cell='absent'))
    matrix = dict(
        title='A study',
        metric='accuracy/top1',
        baseline=dict(regularizer='plain'),
        orders=dict(data=['digits'], regularizer=['plain', 'other']),
        cells=cells,
    )
    (folder / 'matrix.json').write_text(json.dumps(matrix))
    return folder


def test_table(study, capsys):
    tool.main(['table', str(study), '--samples=6'])
    assert 'absent: left out, missing' in capsys.readouterr().err
    out = study / 'sensitivity'
    plain, other = read(out / 'cells.csv')
    assert (plain['series'], other['series']) == ('plain', 'other')
    assert other['accuracy'] == '60.0'
    text = (out / 'table.md').read_text()
    line = text.splitlines()[-1]
    assert line.startswith('| digits | other | 1 | 60.00 |')
    share = float(other['entropy']) / float(plain['entropy']) - 1
    assert f'{100 * share:+.1f}'.replace('-', '\N{MINUS SIGN}') in line
    images = read(out / 'images.csv')
    assert len(images) == 12
    mean = sum(float(row['entropy']) for row in images[:6]) / 6
    assert mean == pytest.approx(float(plain['entropy']))
    assert len(read(out / 'correlations.csv')) == 2


def test_nothing_to_measure(study, tmp_path):
    matrix = json.loads((study / 'matrix.json').read_text())
    matrix['cells'] = matrix['cells'][2:]
    (tmp_path / 'matrix.json').write_text(json.dumps(matrix))
    with pytest.raises(ValueError, match='must have a finished training'):
        tool.main(['table', str(tmp_path)])


def test_summary_of_seeds():
    """Mean, deviation and change, by hand."""
    names = dict.fromkeys(tool.COLUMNS, 2.0)
    cells = [
        dict(names, facet='a', series=series, entropy=entropy, seed=seed)
        for series, values in (('plain', (1, 3)), ('new', (2, 3)))
        for seed, entropy in enumerate(values)
    ]
    plain, new = tool.seed_means(cells, 'plain')
    assert plain['entropy'] == f'2.00 ± {math.sqrt(2):.2f}'
    assert plain['entropy_change'] == ''
    assert new['entropy_change'] == '+25.0'
    assert new['frechet_distance_change'] == '+0.0'


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(['toy', '--samples=1'])
    assert '--samples must be at least 2' in capsys.readouterr().err

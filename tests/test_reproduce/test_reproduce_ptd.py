"""The script on perturb-then-diagonalize: numbers, files, figures."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmstabvim.analysis import perturbation as measurements
from mmstabvim.stability import hippo_legs, perturb_then_diagonalize
from mmstabvim.visualization import Quantity, line_figure

TOOLS = Path(__file__).parents[2] / 'tools/reproduce'
sys.path.insert(0, str(TOOLS))

import ptd as tool  # noqa: E402

SMALL = measurements.PtdOptions(
    sizes=(4, 8),
    search_size=4,
    draws=5,
    steps=10,
    points=120,
    seed=0,
    device='cpu',
)
ARGUMENTS = [
    '--sizes',
    '4',
    '8',
    '--search-size=4',
    '--steps=10',
    '--points=120',
    '--formats=pdf',
]


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Folder of a run with few, small matrices."""
    out = tmp_path_factory.mktemp('ptd')
    tool.main([*ARGUMENTS, f'--out={out}'])
    return out


def read(path):
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------- numbers


def test_condition_numbers():
    """Printed to eight digits; LAPACK agrees while it can."""
    rows = {row['N']: row for row in measurements.condition_rows([8, 16, 64])}
    assert rows[8]['exact'] == pytest.approx(7.7032418e4, rel=6e-8)
    assert rows[64]['exact'] == pytest.approx(3.2003977e47, rel=6e-8)
    assert rows[8]['lapack'] == pytest.approx(rows[8]['exact'], rel=1e-6)
    assert rows[64]['lapack'] < 1e22


def test_random_perturbations(results):
    """Near the medians of five other draws, and stable where proven."""
    rows = {
        (int(row['N']), row['E']): {
            key: float(row[key])
            for key in ('condition', 'abscissa', 'deviation')
        }
        for row in read(results / 'table_random.csv')
    }
    assert len(rows) == 10
    wanted = {
        (4, '‖E‖ = 0.1 ‖A‖'): (12, 0.45),
        (4, '‖E‖ = 0.001 ‖A‖'): (92, 0.0033),
        (8, '‖E‖ = 0.01 ‖A‖'): (114, 0.17),
        (8, '‖E‖ = 0.001 ‖A‖'): (800, 0.018),
        (8, '‖E‖ = 0.0001 ‖A‖'): (5.9e3, 0.0018),
        (4, '‖E‖ = 0.4'): (19, 0.20),
        (8, '‖E‖ = 0.4'): (81, 0.17),
    }
    for key, (condition, deviation) in wanted.items():
        assert 1 / 3 < rows[key]['condition'] / condition < 3, key
        assert 1 / 3 < rows[key]['deviation'] / deviation < 3, key
    for (_, name), row in rows.items():
        if name == '‖E‖ = 0.4':
            assert row['abscissa'] <= -0.1
            assert row['deviation'] <= 0.4 / (0.5 - 0.4)


def test_medians_are_of_the_draws():
    rows = [
        dict(N=4, E='a', condition=c, abscissa=-c, deviation=2 * c)
        for c in (1.0, 9.0, 2.0)
    ]
    wanted = dict(N=4, E='a', condition=2.0, abscissa=-2.0, deviation=4.0)
    assert measurements.medians(rows) == [wanted]


def test_spikes(results):
    """S4D-LegS answers to one mode 14 times louder, PTD does not."""
    (row,) = read(results / 'table_spikes.csv')
    assert row['N'] == '8'
    assert float(row['omega']) == pytest.approx(19.857410, abs=6e-7)
    assert float(row['HiPPO']) == pytest.approx(0.37369, abs=6e-6)
    assert float(row['S4D-LegS']) == pytest.approx(5.15681, abs=6e-6)
    assert float(row['PTD']) == pytest.approx(0.374, abs=3e-3)


def test_initializations(results):
    """What the state matrices start with, and what they may start with."""
    rows = read(results / 'table_starts.csv')
    for plain, better in zip(rows[::2], rows[1::2], strict=True):
        size = int(plain['N'])
        basis = perturb_then_diagonalize(hippo_legs(size)[0])
        assert float(plain['condition']) == pytest.approx(basis.condition)
        assert float(plain['abscissa']) == pytest.approx(basis.abscissa)
        assert float(plain['norm']) == pytest.approx(0.4)
        assert float(better['condition']) < float(plain['condition'])
        assert float(better['norm']) <= 0.49 * (1 + 1e-9)
        for row in (plain, better):
            assert float(row['abscissa']) <= -0.01
            assert size / 2 < float(row['radius']) < 2 * size


def test_optimized_perturbations(results):
    """Each objective improves on its start, and ends stable."""
    start = {}
    for row in read(results / 'optimization.csv'):
        key = row['series'], row['quantity']
        start.setdefault(key, float(row['value']))
    rows = read(results / 'table_optimized.csv')
    assert [row['objective'] for row in rows] == list(measurements.SEARCHES)
    for row in rows:
        assert float(row['condition']) < start[row['objective'], 'condition']
        assert float(row['abscissa']) <= -0.01
        relative = float(row['norm']) / 10.279989
        assert float(row['relative']) == pytest.approx(relative, rel=1e-6)
    assert float(rows[-1]['norm']) <= 0.49 * (1 + 1e-9)


def test_seed(results):
    """The same numbers again; others for another seed."""
    first = (results / 'table_random.csv').read_text()
    omega = measurements.frequencies(SMALL)
    again, other = (
        measurements.random_rows(
            SMALL._replace(seed=seed), omega, lambda: None
        )
        for seed in (0, 1)
    )
    assert tool.to_csv(measurements.medians(again)) == first
    assert tool.to_csv(measurements.medians(other)) != first


# ------------------------------------------------------------------- files


def test_tables_are_well_formed(results):
    text = (results / 'tables.md').read_text(encoding='utf-8')
    tables = [
        block.strip().split('\n')
        for block in text.split('\n\n')
        if block.startswith('|')
    ]
    assert [len(table) - 2 for table in tables] == [2, 10, 4, 4, 1]
    for head, *rows in tables:
        assert {row.count('|') for row in rows} == {head.count('|')}


@pytest.mark.parametrize('name', ['sizes', 'optimization', 'responses'])
def test_figures_with_their_data(results, name):
    assert (results / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    assert (results / f'{name}.pdf').read_bytes().startswith(b'%PDF')
    assert not (results / f'{name}.svg').exists()
    rows = read(results / f'{name}.csv')
    values = np.array([float(row['value']) for row in rows])
    assert np.isfinite(values).all()


def test_response_curves(results):
    """HiPPO never amplifies, PTD stays near, S4D-LegS peaks at its modes."""
    rows = read(results / 'responses.csv')
    curves = {}
    for row in rows:
        if row['facet'] == 'N = 8':
            key = row['series'], row['quantity']
            point = float(row['x']), float(row['value'])
            curves.setdefault(key, []).append(point)
    assert ('HiPPO', 'distance') not in curves
    hippo, ptd, s4d = (
        np.array(curves[name, 'response'])
        for name in ('HiPPO', 'PTD', 'S4D-LegS')
    )
    assert hippo[:, 1].max() <= 1 + 1e-4
    assert (np.diff(hippo[:, 0]) >= 0).all()
    distance = np.array(curves['PTD', 'distance'])
    assert (np.abs(ptd - hippo)[:, 1] <= distance[:, 1] + 1e-4).all()
    assert distance[:, 1].max() <= 4
    peak = s4d[s4d[:, 1].argmax()]
    assert peak == pytest.approx([19.857, 5.1568], abs=1e-3)


# ----------------------------------------------------------------- figures


def example_rows():
    return [
        dict(quantity=q, facet=f, series=s, x=x, value=scale * x)
        for q, scale in (('a', 1.0), ('b', -2.0))
        for f in ('left', 'right')
        for s in ('one', 'two')
        for x in (1.0, 10.0, 100.0)
    ]


QUANTITIES = [Quantity('a', 'unit a'), Quantity('b', 'unit b', -1.0)]


def test_lines_are_the_rows():
    figure = line_figure(
        example_rows(), ['one', 'two'], 'series', QUANTITIES, 'x', log_x=True
    )
    axes = figure.axes
    assert [a.get_title() for a in axes] == ['left', 'right', '', '']
    assert [a.get_ylabel() for a in axes] == ['unit a', '', 'unit b', '']
    assert [a.get_xlabel() for a in axes] == ['', '', 'x', 'x']
    for panel, scale in zip(axes, (1, 1, -2, -2), strict=True):
        for line in panel.lines[:2]:
            assert list(line.get_xdata()) == [1, 10, 100]
            assert list(line.get_ydata()) == [scale, 10 * scale, 100 * scale]
    # and the border across the lower ones
    assert [len(a.lines) for a in axes] == [2, 2, 3, 3]
    assert axes[0].get_xscale() == axes[0].get_yscale() == 'log'


def test_lines_across():
    rows = [row for row in example_rows() if row['facet'] == 'left']
    figure = line_figure(
        rows,
        ['one', 'two'],
        '',
        QUANTITIES,
        'x',
        across=True,
        limits={'a': (2.0, 50.0)},
    )
    left, right = figure.axes
    assert left.get_xlabel() == right.get_xlabel() == 'x'
    assert left.get_ylim() == (2.0, 50.0)
    assert list(right.lines[0].get_ydata()) == [-2, -20, -200]


def test_values_around_zero():
    """Ticks at whole powers, from that of a typical value on."""
    rows = [
        dict(quantity='a', facet='', series='one', x=x, value=value)
        for x, value in ((1, -0.9), (2, -1.2), (3, 120.0))
    ]
    figure = line_figure(rows, ['one'], '', [Quantity('a', '')], 'x')
    scale = figure.axes[0].yaxis.get_transform()
    assert figure.axes[0].get_yscale() == 'symlog'
    assert scale.linthresh == 1


# --------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'arguments',
    [['--sizes', '7'], ['--search-size=0'], ['--draws=0'], ['--points=0']],
    ids=' '.join,
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert 'must be' in capsys.readouterr().err


def test_device_is_used(monkeypatch):
    """Transfer functions are computed where the frequencies are."""
    omega = measurements.frequencies(SMALL._replace(device='meta'))
    assert omega.device.type == 'meta'
    seen = []

    def look(A, B, omega):
        seen.append((A.device.type, B.device.type))
        return torch.zeros(len(omega), len(A), device='meta')

    monkeypatch.setattr(measurements, 'state_response', look)
    A, B = hippo_legs(4)
    with pytest.raises((RuntimeError, NotImplementedError)):
        measurements.deviation(A, B, 0 * A, omega)  # meta has no number
    assert seen == [('meta', 'meta')]

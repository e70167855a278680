"""The script on stable rank normalization: numbers, files, figures."""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmstabvim.stability import kernel_stable_rank, squared_gains
from mmstabvim.stability.weights.kernel_baselines import SphereObjective
from mmstabvim.stability.weights.sphere import random_points
from mmstabvim.visualization import sphere_figure, target_figure

TOOLS = Path(__file__).parents[2] / 'tools/reproduce'
sys.path.insert(0, str(TOOLS))

import srn_analysis as tool  # noqa: E402

FIGURES = ['eigenvalues', 'descent', 'trajectory', 'srn_c']


def make(folder, *arguments):
    """Two short descents with a large step."""
    tool.main(
        [
            f'--out={folder}',
            '--steps=40',
            '--step=1e-2',
            '--formats=svg',
            *arguments,
        ]
    )
    return folder


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    return make(tmp_path_factory.mktemp('srn') / 'new')


def read(path):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [{key: number(value) for key, value in r.items()} for r in rows]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


# ----------------------------------------------------------------- numbers


def test_eigenvalues_of_the_forms():
    """At zero and at the highest frequency one wave, of gain 3."""
    rows = tool.form_eigenvalues(3, 64)
    assert [row['frequency'] for row in rows] == list(range(64))
    for k, row in enumerate(rows):
        turn = 2 * math.pi * k / 64
        spread = abs(1 + 2 * math.cos(2 * turn))
        assert row['largest'] == pytest.approx((3 + spread) / 2)
        assert row['second'] == pytest.approx((3 - spread) / 2, abs=1e-12)
    assert [k for k, row in enumerate(rows) if row['largest'] == 3] == [0, 32]


def test_descents(results):
    """From one random start; the objective is the paper's."""
    rows = read(results / 'descent.csv')
    series = ['alpha = 10', 'alpha = 200']
    assert [row['series'] for row in rows] == 41 * series[:1] + 41 * series[1:]
    assert [row['step'] for row in rows] == 2 * list(range(41))
    kernel = torch.tensor(tool.KERNEL).double()
    start = random_points(1, 3, 0)
    for name, alpha in zip(series, (10.0, 200.0), strict=True):
        own = [row for row in rows if row['series'] == name]
        objective = SphereObjective(kernel, 64, 32.0, alpha, 0.1)
        value = objective.value_and_gradient(start)[0].item()
        assert own[0]['objective'] == pytest.approx(value, rel=1e-5)
        rank = kernel_stable_rank(start, 64).item()
        assert own[0]['stable_rank'] == pytest.approx(rank, rel=1e-5)
        assert own[-1]['objective'] < own[0]['objective']


def test_summary(results):
    """The exact solver meets the target; descents end far from it."""
    exact, *descents = read(results / 'summary.csv')
    assert exact['solver'] == 'exact'
    assert exact['stable_rank'] == 32
    assert exact['distance'] == pytest.approx(6**-0.5, rel=1e-5)
    assert [row['solver'] for row in descents] == [
        'descent, alpha = 10',
        'descent, alpha = 200',
    ]
    ends = {
        row['series']: row['stable_rank']
        for row in read(results / 'descent.csv')
    }
    for row in descents:
        assert row['stable_rank'] > 40
        wanted = ends[row['solver'].removeprefix('descent, ')]
        assert row['stable_rank'] == pytest.approx(wanted)
        gain = math.sqrt(32 / row['stable_rank'])
        assert row['gain'] == pytest.approx(gain, rel=1e-4)
        taps = torch.tensor([float(x) for x in row['kernel'].split()])
        rank = kernel_stable_rank(taps, 64).item()
        assert rank == pytest.approx(row['stable_rank'], rel=1e-3)


def test_surface_and_marks(results):
    """Stable ranks of points on the sphere; the solution is on the border."""
    surface = read(results / 'trajectory_surface.csv')
    ranks = np.array([row['stable_rank'] for row in surface])
    assert 64 / 3 - 1e-3 <= ranks.min() < 22
    assert 60 < ranks.max() <= 64
    marks = {
        row['name']: row
        for row in read(results / 'trajectory_marks.csv')
        if row['facet'] == 'detail'
    }
    detail = [row for row in surface if row['facet'] == 'detail']
    solution = marks['exact solution']
    near = min(
        detail,
        key=lambda row: math.dist(
            (row['x'], row['y']), (solution['x'], solution['y'])
        ),
    )
    assert near['stable_rank'] == pytest.approx(32, abs=1)
    path = read(results / 'trajectory.csv')
    whole = [row for row in path if row['facet'] == 'unit sphere']
    for row in whole:
        length = math.hypot(row['x'], row['y'], row['depth'])
        assert length == pytest.approx(1, abs=1e-4)
    assert len(whole) == 41


def test_srn_c_misses_and_the_exact_solver_does_not(results):
    rows = read(results / 'srn_c.csv')
    for facet in ('blur', 'random'):
        chosen = [row for row in rows if row['facet'] == facet]
        exact = [row for row in chosen if row['series'] == 'exact']
        assert min(row['target'] for row in exact) >= 64 / 9 - 1e-5
        for row in exact:
            assert row['stable_rank'] == pytest.approx(row['target'], rel=1e-5)
            assert row['gain'] == pytest.approx(1, rel=1e-5)
        *wrong, last = [r for r in chosen if r['series'] == 'SRN-C']
        assert len(wrong) == 100
        for row in wrong:
            assert row['gain'] > 1.001
        # with the stable rank of the kernel nothing is to be done
        assert last['gain'] == pytest.approx(1, rel=1e-5)
        assert last['stable_rank'] == pytest.approx(last['target'], rel=1e-5)
    lowest = next(row for row in rows if row['series'] == 'SRN-C')
    assert lowest['target'] == 1
    assert lowest['stable_rank'] == pytest.approx(64 / 9, rel=1e-5)
    assert lowest['gain'] == 9
    spectrum = [
        row['value']
        for row in read(results / 'srn_c_spectra.csv')
        if row['facet'] == 'blur'
    ]
    assert len(spectrum) == 64
    assert spectrum[0] == 9
    assert min(spectrum) > 0.1
    assert spectrum == sorted(spectrum, reverse=True)


def test_seed(results, tmp_path):
    """The same files again; with another seed other starts and kernels."""
    again = make(tmp_path / 'again')
    other = make(tmp_path / 'other', '--seed=1')
    for path in sorted(results.iterdir()):
        if path.suffix != '.png':
            assert path.read_bytes() == (again / path.name).read_bytes()
    for name in ('descent', 'trajectory', 'srn_c'):
        path = f'{name}.csv'
        assert (other / path).read_text() != (results / path).read_text()


def test_kernels_are_scaled():
    for kernel in tool.images(3).values():
        gains = squared_gains(kernel, tool.IMAGE)
        assert gains.max().item() == pytest.approx(1)


# ------------------------------------------------------------------ figures


@pytest.mark.parametrize('name', FIGURES)
def test_files(results, name):
    with Image.open(results / f'{name}.png') as image:
        assert min(image.size) > 300
        assert len(image.convert('RGB').getcolors(2**24)) > 50
    assert '</svg>' in (results / f'{name}.svg').read_text()
    assert read(results / f'{name}.csv')


def test_eigenvalue_figure_draws_the_rows():
    rows = tool.form_eigenvalues(3, 16)
    largest, second, bound = tool.draw_eigenvalues(rows, 3).axes[0].get_lines()
    assert largest.get_ydata().tolist() == [row['largest'] for row in rows]
    assert second.get_ydata().tolist() == [row['second'] for row in rows]
    assert list(bound.get_ydata()) == [3, 3]


def test_descent_figure_draws_the_rows():
    rows = [
        dict(series=name, step=k, objective=1 + k + shift, stable_rank=k**2)
        for shift, name in enumerate('ab')
        for k in range(5)
    ]
    left, right = tool.draw_descents(rows, ['a', 'b'], 7).axes
    assert left.get_lines()[1].get_ydata().tolist() == [2, 3, 4, 5, 6]
    assert right.get_lines()[0].get_ydata().tolist() == [0, 1, 4, 9, 16]
    assert list(right.get_lines()[2].get_ydata()) == [7, 7]


def test_sphere_figure_hides_what_is_behind():
    """Dotted line and hollow mark."""
    x, y = tool.square(0.5)
    surface = tool.lattice('f', torch.eye(3).double(), x, y)
    path = [dict(facet='f', x=0.1 * k, y=0.0, depth=1.0 - k) for k in range(4)]
    marks = [
        dict(facet='f', x=0.0, y=0.0, depth=depth, name=name)
        for depth, name in ((1.0, 'start'), (-1.0, 'given kernel'))
    ]
    axes = sphere_figure(surface, path, marks, 50).axes[0]
    front, behind, start, given = axes.get_lines()
    assert np.isnan(front.get_xdata()).tolist() == [False, False, True, True]
    assert np.isnan(behind.get_xdata()).tolist() == [True, False, False, False]
    assert behind.get_linestyle() == ':'
    assert given.get_color() == 'none'
    assert start.get_color() != 'none'


def test_target_figure_draws_the_rows():
    rows = [
        dict(facet='f', series=name, target=k, stable_rank=k + 1, gain=2.0)
        for name in ('one', 'two')
        for k in range(1, 4)
    ]
    spectra = [dict(facet='f', index=i, value=3.0 / i) for i in (1, 2, 3)]
    ranks, gains, spectrum = target_figure(rows, spectra, ['one', 'two']).axes
    assert ranks.get_lines()[1].get_ydata().tolist() == [2, 3, 4]
    assert gains.get_lines()[2].get_ydata().tolist() == [2, 2, 2]
    heights = [bar.get_height() for bar in spectrum.patches]
    assert heights == [3.0, 1.5, 1.0]

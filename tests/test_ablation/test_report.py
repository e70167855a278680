"""Reports of synthetic results: numbers computed by hand, files complete."""

import base64
import csv
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from mmstabvim.ablation import (
    figures,
    report,
    report_tables,
    results,
    statistics,
)
from mmstabvim.reporting import style, tables
from mmstabvim.visualization import eigenvalue_figure

STABILIZERS = ['none', 'sn', 'all']
LAYERS = [f'backbone.layers.{i}.mixer.ssm.{d}' for i in (0, 1) for d in (0, 1)]
SCORES = {
    'none': {0: 90.0, 1: 92.0, 2: 94.0},
    'sn': {0: 91.0, 1: 94.0, 2: 97.0},
    'all': {0: 80.0},
}


def train_lines(shift, last=30, diverges=False):
    lines = [
        dict(loss=s / 10 + shift, grad_norm=2.0, time=0.5, iter=s, step=s)
        for s in range(10, last + 1, 10)
    ]
    if diverges:
        lines[1]['loss'] = math.nan  # finite again afterwards
    for epoch in (1, 2):
        score = {'accuracy/top1': 10.0 * epoch, 'data_time': 0.1}
        lines.append({**score, 'step': epoch})
    return lines


def stability_lines(imag=0.5):
    return [
        dict(
            step=step,
            layers=LAYERS,
            spectral_abscissa=[-1.0, -0.5, 0.25, None],
            decay_max=[0.9, 0.95, 1.05, None],
            eigenvalues={LAYERS[1]: [[-1.0, imag], [-1.0, -imag]]},
        )
        for step in (1, 11)
    ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, write_cell, write_study):
    """Two state matrices; full/sn diverged once, full/all is incomplete."""
    place = tmp_path_factory.mktemp('study')
    cells = []
    for matrix in ('neg_exp', 'full'):
        for name, scores in SCORES.items():
            labels = dict(state_matrix=matrix, stabilizer=name)
            for seed, score in scores.items():
                diverged = (matrix, name, seed) == ('full', 'sn', 2)
                cells.append(
                    write_cell(
                        place,
                        labels,
                        seed,
                        score,  # of its last validation, diverged or not
                        'diverged' if diverged else 'done',
                        train=train_lines(seed, diverges=diverged),
                        stability=stability_lines() if seed == 0 else (),
                        first_diverged_step=25 if diverged else None,
                        seconds_per_step=0.010 * (seed + 1),
                        memory_mb=100.0 * (seed + 1),
                        memory_kind='resident',
                        machine=dict(cpu='CPU <1>', cores=2, gpus=[]),
                        versions=dict(torch='2.11'),
                        jobs=2,
                        threads=1,
                    )
                )
    failed = dict(state_matrix='full', stabilizer='all')
    reason = 'exit code 1: ValueError: <b>|'
    cells.append(write_cell(place, failed, 1, None, 'failed', reason=reason))
    cells.append(write_cell(place, failed, 2, status='missing'))
    orders = dict(state_matrix=['neg_exp', 'full'], stabilizer=STABILIZERS)
    write_study(place, cells, dict(stabilizer='none'), **orders)
    assert report.write_report(place, place / 'report').is_file()
    return place


def rows_of(folder, name):
    path = folder / 'report' / 'tables' / f'{name}.csv'
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_tables_have_the_numbers(folder):
    rows = rows_of(folder, 'results')
    assert [(r['state_matrix'], r['stabilizer']) for r in rows] == [
        (m, s) for m in ('neg_exp', 'full') for s in STABILIZERS
    ]
    first, diverged, lone = rows[0], rows[4], rows[5]
    # 90, 92, 94: mean 92, squares of the distances 4 + 0 + 4 over 2
    assert (float(first['mean']), float(first['std'])) == (92.0, 2.0)
    assert (first['n'], first['planned']) == ('3', '3')
    assert float(first['step_ms']) == pytest.approx(20.0)
    assert float(first['memory_mb']) == 300.0
    # 91, 94 of three, the last one diverged
    assert float(diverged['mean']) == 92.5
    assert float(diverged['std']) == pytest.approx(math.sqrt(4.5))
    assert (diverged['diverged'], diverged['ended']) == ('1', '3')
    assert diverged['first_diverged_steps'] == '25'
    assert (lone['n'], lone['planned'], lone['std']) == ('1', '3', '')
    text = (folder / 'report' / 'tables' / 'results.md').read_text()
    assert (
        '| full | sn | 92.50 ± 2.12 | 2 of 3 | 1/3 | 25 | 20.0 | 300 |' in text
    )
    assert '| full | all | 80.00 | 1 of 3 | 0/1 | — | 10.0 | 100 |' in text


def test_differences_are_paired(folder):
    rows = rows_of(folder, 'differences')
    sn, lone, short, last = rows
    # 1, 2, 3: mean 2, std 1, half width 4.302653 / sqrt(3)
    assert (float(sn['difference']), sn['pairs']) == (2.0, '3')
    assert float(sn['low']) == pytest.approx(2 - 2.48414, abs=1e-4)
    assert float(sn['high']) == pytest.approx(2 + 2.48414, abs=1e-4)
    assert sn['verdict'] == 'no clear difference'
    assert (lone['pairs'], lone['verdict']) == ('1', 'too few pairs')
    # 1, 2: mean 1.5, std sqrt(1/2), t(0.975, 1) = 12.7062
    assert (float(short['difference']), short['pairs']) == (1.5, '2')
    assert float(short['low']) == pytest.approx(1.5 - 12.7062 / 2, abs=1e-4)
    # two tests in all: the smaller p counts twice
    assert float(sn['p_holm']) == pytest.approx(2 * float(sn['p']))
    assert last['verdict'] == 'too few pairs'


def test_unfinished_cells_are_named(folder):
    rows = rows_of(folder, 'unfinished')
    assert [(r['cell'], r['status']) for r in rows] == [
        ('full.all.fp32.seed1', 'failed'),
        ('full.all.fp32.seed2', 'missing'),
    ]
    text = (folder / 'report' / 'report.md').read_text()
    assert r'ValueError: <b>\|' in text
    assert 'Cells: 16: 13 done, 1 diverged, 1 failed, 1 missing' in text


def test_every_figure_is_there(folder):
    found = {p.name for p in (folder / 'report' / 'figures').iterdir()}
    names = ['score', 'curves', 'stability']
    names += [
        f'{kind}_{matrix}'
        for kind in ('eigenvalues', 'decay')
        for matrix in ('neg_exp', 'full')
    ]
    expected = {
        f'{n}.{end}' for n in names for end in ('png', 'pdf', 'svg', 'csv')
    }
    assert found == expected


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.ids, self.links = [], [], set(), []
        self.open, self.text = [], ''

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in ('meta', 'img'):
            self.open.append(tag)
        self.sources += [attrs[n] for n in ('src',) if n in attrs]
        self.links += [attrs['href']] if 'href' in attrs else []
        self.ids |= {attrs['id']} if 'id' in attrs else set()
        if tag == 'img':
            assert attrs['alt']
        if tag == 'table':
            assert self.box == 'scroll'
        self.box = attrs.get('class')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else(folder):
    text = (folder / 'report' / 'report.html').read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert 'script' not in page.tags
    assert 'link' not in page.tags
    assert 'url(' not in text
    assert '@import' not in text
    for link in page.links:
        assert link[0] == '#'
        assert link[1:] in page.ids
    figures_there = sorted((folder / 'report' / 'figures').glob('*.png'))
    head = 'data:image/png;base64,'
    shown = [base64.b64decode(s.removeprefix(head)) for s in page.sources]
    assert sorted(shown) == sorted(p.read_bytes() for p in figures_there)
    assert 'Test <study>' in page.text
    assert 'CPU <1>, 2 cores, 2 training(s) at once' in page.text
    assert 'ValueError: <b>|' in page.text
    assert page.tags.count('table') == 4
    # a figure of half a line is not blown up
    widths = [int(x) for x in re.findall(r'max-width: (\d+)px" src', text)]
    assert len(widths) == len(figures_there)
    assert max(widths) == round(133 * style.WIDTH)


def test_latex(folder):
    text = (folder / 'report' / 'tables' / 'results.tex').read_text()
    assert r'\begin{tabular}{llrrrrrr}' in text
    assert r'neg\_exp & none & 92.00 $\pm$ 2.00 & 3 of 3 & 0/3 & ---' in text
    assert text.count(r'\addlinespace') == 1
    assert (
        re.search(r'(?<!\\)_', text.replace(r'\label{tab:results}', ''))
        is None
    )
    assert text.count('{') == text.count('}')
    for rule in (r'\toprule', r'\midrule', r'\bottomrule'):
        assert text.count(rule) == 1
    assert tables.latex_text('a_b<5 % \\') == (r'a\_b$<$5 \% \textbackslash{}')


def pictures_of(folder):
    study = results.read_study(folder)
    found = figures.make_pictures(study, statistics.combine(study))
    return {picture.name: picture for picture in found}


@pytest.fixture(scope='module')
def pictures(folder):
    return pictures_of(folder)


def test_curves_are_mean_and_range(pictures):
    picture = pictures['curves']
    rows = [
        row
        for row in picture.rows
        if row['facet'] == 'full' and row['series'] == 'sn'
    ]
    loss = [row for row in rows if row['quantity'].startswith('loss')]
    # seeds 0, 1, 2 are shifted by as much; the last one ends at 10
    assert [(r['step'], r['n'], r['mean']) for r in loss] == [
        (10, 3, 2.0),
        (20, 2, 2.5),
        (30, 2, 3.5),
    ]
    assert [(r['low'], r['high']) for r in loss][1:] == [(2, 3), (3, 4)]
    assert [r['ended'] for r in loss] == [1, 0, 0]
    score = [row for row in rows if row['quantity'].endswith('by epoch')]
    assert [(r['step'], r['mean']) for r in score] == [(1, 10.0), (2, 20.0)]
    axes = picture.figure.axes
    assert [a.get_title() for a in axes[:2]] == ['neg_exp', 'full']
    assert [a.get_xlabel() for a in axes] == ['training iteration'] * 4 + [
        'epoch'
    ] * 2
    line = axes[1].get_lines()[1]  # none, sn, and their marks
    assert list(line.get_ydata()) == [2.0, 2.5, 3.5]


def test_one_step_is_no_curve(tmp_path, write_cell, write_study):
    """A single validation stays out, and its panels with it."""
    train = [dict(loss=x, step=x, iter=x) for x in (1, 2)]
    val = [{'accuracy/top1': 50.0, 'step': 1}]
    cells = [write_cell(tmp_path, dict(kind='a'), 0, 50.0, train=train + val)]
    write_study(tmp_path, cells, kind=['a'])
    picture = pictures_of(tmp_path)['curves']
    quantities = {row['quantity'] for row in picture.rows}
    assert quantities == {'loss by training iteration'}
    (axes,) = picture.figure.axes
    assert axes.get_xlabel() == 'training iteration'


def test_other_scores(tmp_path, write_cell, write_study):
    """A column for each metric that a pattern names, over the seeds."""
    finals = ([50.0, 1.0, 7.0], [60.0, 3.0, 7.0])
    names = ['accuracy/top1', 'IoU/Sky', 'loss_x']
    cells = [
        write_cell(
            tmp_path,
            dict(kind='a'),
            seed,
            final[0],
            final=dict(zip(names, final, strict=True)),
        )
        for seed, final in enumerate(finals)
    ]
    write_study(
        tmp_path, cells, settings=dict(more_metrics=['IoU/*']), kind=['a']
    )
    report.write_report(tmp_path, tmp_path / 'report')
    (row,) = rows_of(tmp_path, 'scores')
    assert (row['metric'], row['mean'], row['n']) == ('IoU/Sky', '2.0', '2')
    text = (tmp_path / 'report' / 'report.md').read_text()
    assert '| kind | IoU/Sky |' in text
    assert '| a | 2.00 ± 1.41 |' in text
    assert 'loss_x' not in text


def test_labels_of_an_earlier_spelling(tmp_path, write_cell, write_study):
    """Reported as they were stored, beside those of a later run."""

    def cell(label, score):
        return write_cell(tmp_path, dict(stabilizers=label), 0, score)

    old = [cell('none', 50.0), cell('sn-ec', 60.0)]
    baseline = dict(stabilizers='none')
    write_study(tmp_path, old, baseline, stabilizers=['none', 'sn-ec'])
    report.write_report(tmp_path, tmp_path / 'report')
    found = [r['stabilizers'] for r in rows_of(tmp_path, 'results')]
    assert found == ['none', 'sn-ec']
    new = [old[0], cell('sn_ec', 70.0)]
    write_study(tmp_path, new, baseline, stabilizers=['none', 'sn_ec'])
    report.write_report(tmp_path, tmp_path / 'report')
    rows = rows_of(tmp_path, 'results')
    assert [(r['stabilizers'], float(r['mean'])) for r in rows] == [
        ('none', 50.0),
        ('sn_ec', 70.0),
        ('sn-ec', 60.0),
    ]
    text = (tmp_path / 'report' / 'report.md').read_text()
    assert '- Names: sn: spectral normalization' in text


def test_notes_are_told(tmp_path, write_cell, write_study):
    cells = [write_cell(tmp_path, dict(kind='a'), 0, 50.0)]
    settings = dict(notes=['One & two.', 'Three.'])
    write_study(tmp_path, cells, settings=settings, kind=['a'])
    page = report.write_report(tmp_path, tmp_path / 'report').read_text()
    assert '<dt>Notes</dt><dd>One &amp; two. Three.</dd>' in page
    text = (tmp_path / 'report' / 'report.md').read_text()
    assert '- Notes: One & two. Three.\n' in text


def test_stability_takes_the_worst_layer(pictures):
    rows = [
        row
        for row in pictures['stability'].rows
        if row['facet'] == 'full' and row['series'] == 'none'
    ]
    assert [(row['step'], row['mean']) for row in rows] == [
        (1, 0.25),
        (11, 0.25),
        (1, 1.05),
        (11, 1.05),
    ]
    decay = pictures['decay_full'].rows
    assert len(decay) == 3 * 2 * 4  # series, steps, layers
    values = {row['layer']: row['value'] for row in decay}
    assert list(values) == ['0 fwd', '0 bwd', '1 fwd', '1 bwd']
    assert list(values.values())[:3] == [0.9, 0.95, 1.05]
    assert math.isnan(values['1 bwd'])
    mesh = pictures['decay_full'].figure.axes[0].collections[0]
    drawn = mesh.get_array()
    assert drawn.shape == (4, 2)
    assert drawn[2, 1] == pytest.approx(0.05)  # from 1
    eigenvalues = pictures['eigenvalues_full'].rows
    assert {row['layer'] for row in eigenvalues} == {'0 bwd'}
    assert len(eigenvalues) == 3 * 2 * 2


def test_time_without_a_record_is_grey(tmp_path, write_cell, write_study):
    """As it is after a divergence; near 1 the map is white."""
    cells = [
        write_cell(
            tmp_path,
            dict(kind=kind),
            0,
            50.0,
            stability=stability_lines()[:count],
        )
        for kind, count in (('a', 2), ('b', 1))
    ]
    write_study(tmp_path, cells, kind=['a', 'b'])
    figure = pictures_of(tmp_path)['decay'].figure
    b = figure.axes[1]
    assert b.get_facecolor() == to_rgba('#D0D0D0')
    assert b.collections[0].get_array().shape == (4, 1)


def test_gradients_are_the_monitor_s(tmp_path, write_cell, write_study):
    """The log has them where they are clipped only."""
    lines = [
        dict(line, grad_norm=[0.1, 0.4, None, 0.2])
        for line in stability_lines()
    ]
    cell = write_cell(tmp_path, dict(kind='a'), 0, 50.0, stability=lines)
    write_study(tmp_path, [cell], kind=['a'])
    picture = pictures_of(tmp_path)['stability']
    rows = [r for r in picture.rows if r['quantity'].startswith('gradient')]
    assert [(r['step'], r['mean']) for r in rows] == [(1, 0.4), (11, 0.4)]
    assert picture.figure.axes[-1].get_ylabel() == 'gradient norm of A'


def test_gradients_of_layers_are_not_those_of_a(
    tmp_path, write_cell, write_study
):
    """Where there is no state matrix the monitor records the layers."""
    layers = [
        dict(step=step, layers=['conv', 'fc'], grad_norm=[0.1, 0.4])
        for step in (1, 11)
    ]
    lines = dict(a=stability_lines(), b=layers)
    cells = [
        write_cell(tmp_path, dict(kind=kind), 0, 50.0, stability=lines[kind])
        for kind in lines
    ]
    write_study(tmp_path, cells, kind=list(lines))
    rows = pictures_of(tmp_path)['stability'].rows
    assert {row['series'] for row in rows} == {'a'}


def test_scores_are_drawn_at_their_places(pictures):
    picture = pictures['score']
    assert [row['value'] for row in picture.rows[:3]] == [90.0, 92.0, 94.0]
    axes = picture.figure.axes[1]
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == STABILIZERS
    points = [p for c in axes.collections for p in c.get_offsets().tolist()]
    heights = {round(x): y for x, y in points if abs(x - round(x)) < 1e-9}
    assert heights[2] == 80.0  # a lone seed sits in the middle
    assert sorted(y for x, y in points if round(x) == 1) == [91.0, 94.0]


def test_real_eigenvalues_are_drawn_over_the_steps():
    rows = [
        dict(series='none', step=s, layer='0', real=-r, imag=0.0)
        for s in (1, 50)
        for r in (1.0, 2.0)
    ]
    figure = eigenvalue_figure(rows, ['none', 'sn'])
    points = figure.axes[0].collections[0].get_offsets().tolist()
    assert points == [[1, -1], [1, -2], [50, -1], [50, -2]]
    assert figure.axes[0].get_ylim()[1] > 0
    assert 'no data' in [t.get_text() for t in figure.axes[1].texts]


def test_ladder(tmp_path, write_cell, write_study):
    cells = []
    for name, limit in (('none', 0.01), ('sn', 1.0)):
        for lr in (0.001, 0.01, 0.1):
            for seed in (0, 1):
                status = 'diverged' if lr > limit else 'done'
                if (name, lr, seed) == ('sn', 0.1, 1):
                    status = 'missing'
                cells.append(
                    write_cell(
                        tmp_path,
                        dict(stabilizer=name),
                        seed,
                        90.0 + seed if status == 'done' else None,
                        status,
                        lr=lr,
                        first_diverged_step=7 + seed,
                    )
                )
    baseline = dict(stabilizer='none')
    write_study(tmp_path, cells, baseline, stabilizer=['none', 'sn'])
    report.write_report(tmp_path, tmp_path / 'report')
    none, sn = rows_of(tmp_path, 'divergence')
    assert (none['diverged'], none['ended']) == ('2', '6')
    assert none['largest_stable_lr'] == '0.01'
    assert none['median_first_diverged_step'] == '7'
    assert (sn['diverged'], sn['ended']) == ('0', '5')
    text = (tmp_path / 'report' / 'tables' / 'divergence.md').read_text()
    assert '| none | 2/6 | 10 to 70 % | 7 | 0.01 |' in text
    assert '| sn | 0/5 | 0 to 43 % | — | ≥0.1* |' in text
    picture = pictures_of(tmp_path)['lr_ladder']
    image = picture.figure.axes[0].images[0].get_array()
    assert image.tolist() == [[0, 0, 1], [0, 0, 0]]
    texts = [t.get_text() for t in picture.figure.axes[0].texts]
    assert texts[0] == '0/2\n90.50'
    assert texts[2] == '2/2'
    assert texts[5] == '0/1 of 2\n90.00'
    # what a ladder is there for comes first
    text = (tmp_path / 'report' / 'report.md').read_text()
    assert text.index('## Divergence') < text.index('## Results')


def test_scores_by_learning_rate(tmp_path, write_cell, write_study):
    cells = [
        write_cell(
            tmp_path,
            dict(stabilizer=name),
            seed,
            None if lr > limit else 50.0 + seed,
            'diverged' if lr > limit else 'done',
            lr=lr,
        )
        for name, limit in (('none', 0.01), ('sn', 1.0))
        for lr in (0.01, 0.1)
        for seed in (0, 2)
    ]
    write_study(
        tmp_path,
        cells,
        settings=dict(collapse_below=20),
        stabilizer=['none', 'sn'],
    )
    picture = pictures_of(tmp_path)['score']
    (axes,) = picture.figure.axes
    none, sn = (container.lines[0] for container in axes.containers)
    assert list(none.get_ydata()) == [51.0]
    assert list(sn.get_ydata()) == [51.0, 51.0]
    # beside one another around the rate
    left, right = none.get_xdata()[0], sn.get_xdata()[0]
    assert left < 0.01 < right
    assert left * right == pytest.approx(0.01**2)
    bars = axes.containers[0].lines[2][0].get_segments()
    half = math.sqrt(2)  # of 50 and 52
    assert bars[0][:, 1].tolist() == pytest.approx([51 - half, 51 + half])
    lost = [
        list(line.get_xdata())
        for line in axes.get_lines()
        if line.get_marker() == 'x'
    ]
    assert lost[0] == pytest.approx([0.1 / 1.07**0.5])
    assert lost[1] == []
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        '0.01',
        '0.1',
    ]
    dashed = [x for x in axes.get_lines() if x.get_linestyle() == '--']
    assert list(dashed[0].get_ydata()) == [20, 20]
    assert 'below which nothing was learnt' in picture.caption


def test_spectra_at_the_border_of_divergence(
    tmp_path, write_cell, write_study
):
    """The last learning rate before, and the first at which one diverged."""
    rates = (0.001, 0.01, 0.1, 1.0)
    cells = [
        write_cell(
            tmp_path,
            dict(matrix=matrix, kind='a'),
            0,
            50.0 if lr <= limit else None,
            'done' if lr <= limit else 'diverged',
            lr=lr,
            stability=stability_lines(),
        )
        for matrix, limit in (('full', 0.01), ('signed', 1.0))
        for lr in rates
    ]
    write_study(tmp_path, cells, matrix=['full', 'signed'], kind=['a'])
    names = [n for n in pictures_of(tmp_path) if n.startswith('decay')]
    assert names == [
        'decay_full_lr_0_01',
        'decay_full_lr_0_1',
        'decay_signed_lr_0_001',
        'decay_signed_lr_1',
    ]


def test_eigenvalues_of_the_start_alone_are_no_picture(
    tmp_path, write_cell, write_study
):
    lines = stability_lines()
    del lines[1]['eigenvalues']
    cell = write_cell(tmp_path, dict(kind='a'), 0, 50.0, stability=lines)
    write_study(tmp_path, [cell], kind=['a'])
    names = [*pictures_of(tmp_path)]
    assert 'decay' in names
    assert 'eigenvalues' not in names


def test_eigenvalues_are_those_of_a_seed_that_has_several(
    tmp_path, write_cell, write_study
):
    once, often = stability_lines(), stability_lines()
    del once[1]['eigenvalues']
    cells = [
        write_cell(tmp_path, dict(kind='a'), seed, 50.0, stability=lines)
        for seed, lines in enumerate((once, often, often))
    ]
    write_study(tmp_path, cells, kind=['a'])
    pictures = pictures_of(tmp_path)
    assert {row['seed'] for row in pictures['eigenvalues'].rows} == {1}
    assert {row['seed'] for row in pictures['decay'].rows} == {0}


@pytest.mark.parametrize('imag', [0.01, 0.5])
def test_small_imaginary_parts_are_left_out(
    imag, tmp_path, write_cell, write_study
):
    """And told; over the steps more is seen than in a flat plane."""
    lines = stability_lines(imag)
    cell = write_cell(tmp_path, dict(kind='a'), 0, 50.0, stability=lines)
    write_study(tmp_path, [cell], kind=['a'])
    picture = pictures_of(tmp_path)['eigenvalues']
    axes = picture.figure.axes[0]
    points = axes.collections[0].get_offsets().tolist()
    told = 'Imaginary parts, at most 0.01, are left out.' in picture.caption
    assert told == (imag < 0.02)
    steps = [[1, -1], [1, -1], [11, -1], [11, -1]]
    plane = [[-1, 0.5], [-1, -0.5]] * 2
    assert points == (steps if told else plane)


@pytest.mark.parametrize(
    ('count', 'most', 'wanted'),
    [
        (1, 4, (1, 1)),
        (3, 4, (1, 3)),
        (4, 4, (1, 4)),
        (5, 4, (2, 3)),
        (8, 4, (2, 4)),
        (4, 3, (2, 2)),
        (7, 3, (3, 3)),
    ],
)
def test_panels_are_in_even_lines(count, most, wanted):
    assert style.rows_and_columns(count, most) == wanted


def test_ticks_are_written_above_a_gap():
    figure, grid = style.panels(2, 3, 1.0, sharex=True)
    used = style.hide_rest(grid, 5)
    figure.draw_without_rendering()
    written = [
        any(t.label1.get_visible() for t in a.xaxis.get_major_ticks())
        for a in used
    ]
    assert written == [False, False, True, True, True]
    assert not grid[1, 2].get_visible()


def test_axis_of_a_few_powers_has_more_ticks():
    figure, grid = style.panels(1, 2, 2.0)
    for axes, values in zip(
        grid[0], ([2.0, 25.0], [0.001, 25.0]), strict=True
    ):
        axes.plot(values)
        style.scale(axes, np.array(values))
    figure.draw_without_rendering()
    few, many = (
        [t.get_text() for t in axes.get_yticklabels()] for axes in grid[0]
    )
    assert {'2', '5', '10', '20'} <= set(few)
    assert '5' not in many


def test_a_study_without_any_result(tmp_path, write_cell, write_study):
    cells = [write_cell(tmp_path, dict(kind='a'), 0, status='missing')]
    write_study(tmp_path, cells, kind=['a'])
    report.write_report(tmp_path, tmp_path / 'out')
    text = (tmp_path / 'out' / 'report.md').read_text()
    assert '| a | — | 0 of 1 | — | — | — | — |' in text
    assert list((tmp_path / 'out' / 'figures').iterdir()) == []


def test_a_second_report_replaces_the_first(tmp_path, write_cell, write_study):
    cell = write_cell(tmp_path, dict(kind='a'), 0, 90.0)
    write_study(tmp_path, [cell], kind=['a'])
    page = report.write_report(tmp_path, tmp_path / 'out')
    stale = tmp_path / 'out' / 'figures' / 'lr_ladder.png'
    other = tmp_path / 'out' / 'notes.txt'
    stale.write_text('')
    other.write_text('')
    before = page.read_bytes()
    report.write_report(tmp_path, tmp_path / 'out')
    assert not stale.exists()
    assert other.exists()
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ('value', 'text'),
    [(0.01234, '0.0123'), (12.345, '12.3'), (1234.5, '1234'), (0.0, '0')],
)
def test_significant_digits(value, text):
    assert report_tables.number(value, 3) == text


def test_names_of_layers():
    assert figures.short_layer('layers.3.mixer.directions.1') == '3 bwd'
    assert figures.short_layer('module.layers.10.x.0') == '10 fwd'
    assert figures.short_layer('encoder') == 'encoder'
    assert figures.short_layer('a.1.b.7') == 'a.1.b.7'


@pytest.mark.parametrize('limit', [None, 50.0])
def test_trainings_that_learnt_nothing(
    limit, tmp_path, write_cell, write_study
):
    """A finite loss is no success: chance level is said and stops a climb."""
    scores = {0.01: (90.0, 80.0), 0.1: (10.0, 90.0)}
    cells = [
        write_cell(tmp_path, dict(kind='a'), seed, score, lr=lr)
        for lr, found in scores.items()
        for seed, score in enumerate(found)
    ]
    settings = dict(collapse_below=limit)
    write_study(tmp_path, cells, settings=settings, kind=['a'])
    report.write_report(tmp_path, tmp_path / 'report')
    text = (tmp_path / 'report' / 'report.md').read_text()
    (row,) = rows_of(tmp_path, 'divergence')
    collapsed = [r['collapsed'] for r in rows_of(tmp_path, 'results')]
    texts = pictures_of(tmp_path)['lr_ladder'].figure.axes[0].texts
    if limit is None:
        assert row['largest_stable_lr'] == row['largest_learning_lr'] == '0.1'
        assert collapsed == ['0', '0']
        assert 'may have learnt nothing' in text
        assert 'learns up to' not in text
        assert texts[1].get_text() == '0/2\n50.00'
    else:
        # none diverged; those of one rate have learnt nothing
        assert row['largest_stable_lr'] == '0.1'
        assert row['largest_learning_lr'] == '0.01'
        assert collapsed == ['0', '1']
        assert '| a | 0/4 | 0 to 49 % | — | ≥0.1 | 0.01 |' in text
        assert '| a | 0.1 | 50.00 ± 56.57 | 2 of 2 | 0/2 | 1/2 |' in text
        assert 'whose score is below 50;' in text
        assert texts[1].get_text() == '0/2\n50.00\n1 collapsed'


def test_where_there_is_no_score(tmp_path, write_cell, write_study):
    cells = [
        write_cell(tmp_path, dict(kind=kind), 0, score, status)
        for kind, score, status in (
            ('a', 90.0, 'done'),
            ('b', None, 'diverged'),
            ('c', None, 'failed'),
        )
    ]
    write_study(tmp_path, cells, dict(kind='b'), kind=['a', 'b', 'c'])
    (picture,) = pictures_of(tmp_path).values()
    texts = [t.get_text() for t in picture.figure.axes[0].texts]
    assert texts == ['diverged', 'no result']

"""Rows of the figures, from the results of a study."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from mmstabvim import visualization
from mmstabvim.ablation import results, statistics
from mmstabvim.ablation.layout import Layout, Rows, make_layout
from mmstabvim.ablation.results import Result, Study
from mmstabvim.ablation.statistics import Combination, known
from mmstabvim.reporting import Picture, style
from mmstabvim.visualization import spectra
from mmstabvim.visualization.curves import Quantity

_FACETS = 3  # beside one another in a figure of curves
_POINTS = 1500  # eigenvalues drawn in a panel
_DIRECTIONS = ('fwd', 'bwd')


def make_pictures(
    study: Study, combinations: Sequence[Combination]
) -> Iterator[Picture]:
    """Draw everything there is data for.

    Args:
        study (Study): Finished or not.
        combinations (Sequence[Combination]): Result of
            ``statistics.combine``.

    Yields:
        Picture: One after the other, in the order of the report.
    """
    layout = make_layout(study, combinations)
    yield from _score_pictures(study, combinations, layout)
    yield from _ladder_pictures(study, combinations, layout)
    yield from _curve_pictures(study, combinations, layout)
    yield from _stability_pictures(combinations, layout)


def _score_pictures(
    study: Study, combinations: Sequence[Combination], layout: Layout
) -> Iterator[Picture]:
    if 'lr' in layout.panels:
        yield from _rate_pictures(study, combinations, layout)
        return
    rows = []
    for c in combinations:
        for cell in c.cells:
            value = cell.final(study.metric)
            if value is not None:
                rows.append(
                    dict(
                        facet=layout.facet(c),
                        series=layout.name(c),
                        seed=cell.seed,
                        value=value,
                        mean=c.metric.mean,
                        std=known(c.metric.std),
                        n=c.metric.n,
                        note='',
                    )
                )
        if not c.metric.n:
            rows.append(
                dict(
                    facet=layout.facet(c),
                    series=layout.name(c),
                    n=0,
                    note='diverged' if c.rate.count else 'no result',
                )
            )
    if any(row['n'] for row in rows):
        figure = visualization.score_figure(
            rows,
            layout.names,
            layout.series,
            metric_text(study.metric),
            study.baseline.get(layout.series),
        )
        yield Picture(
            'score',
            f'Final {study.metric}',
            'Filled mark and bar: mean and standard deviation over the seeds '
            'that finished; rings: the seeds. Dotted: mean of the baseline. '
            'The axes do not start at zero, and each panel has its own.',
            figure,
            rows,
        )


def _rate_pictures(
    study: Study, combinations: Sequence[Combination], layout: Layout
) -> Iterator[Picture]:
    """Scores over the learning rates, where these vary."""
    rows = []
    for c in combinations:
        about = dict(
            facet=layout.facet(c, without='lr'),
            series=layout.name(c),
            lr=c.cells[0].lr_used,
            mean=known(c.metric.mean),
            std=known(c.metric.std),
            n=c.metric.n,
            diverged=c.rate.count,
        )
        values = {cell.seed: cell.final(study.metric) for cell in c.cells}
        found = {s: v for s, v in values.items() if v is not None}
        rows += [dict(about, seed=s, value=v) for s, v in found.items()]
        if not found:
            rows.append(dict(about, seed=None, value=None))
    rows = [row for row in rows if row['lr'] is not None]
    if any(row['n'] for row in rows):
        border = study.collapse_below
        dashed = (
            ''
            if border is None
            else f' Dashed: {border:g}, below which nothing was learnt.'
        )
        yield Picture(
            'score',
            f'Final {study.metric} by learning rate',
            'Filled mark and bar: mean and standard deviation over the seeds '
            'that finished; rings: the seeds, where there are several. Cross '
            f'at the bottom: at least one diverged.{dashed} Series stand '
            'beside one another so that equal ones are seen.',
            visualization.rate_figure(
                rows,
                layout.names,
                layout.series,
                metric_text(study.metric),
                border,
            ),
            rows,
        )


def metric_text(name: str) -> str:
    """Label of a metric on an axis.

    Args:
        name (str): Logged by an evaluator of MMPretrain or MMSegmentation.

    Returns:
        str: With its unit where that is known.
    """
    known = {
        'accuracy/top1': 'top-1 accuracy (%)',
        'accuracy/top5': 'top-5 accuracy (%)',
        'mIoU': 'mIoU (%)',
        'mAcc': 'mean class accuracy (%)',
        'aAcc': 'pixel accuracy (%)',
    }
    return known.get(name, name)


def _ladder_pictures(
    study: Study, combinations: Sequence[Combination], layout: Layout
) -> Iterator[Picture]:
    rows = []
    for c in combinations:
        used = c.cells[0].lr_used
        if used is not None:
            rows.append(
                dict(
                    facet=layout.facet(c, without='lr'),
                    series=layout.name(c),
                    lr=used,
                    diverged=c.rate.count,
                    collapsed=c.collapsed,
                    n=c.rate.n,
                    planned=len(c.cells),
                    rate=c.rate.count / c.rate.n if c.rate.n else None,
                    mean=known(c.metric.mean),
                )
            )
    if len({row['lr'] for row in rows}) > 1:
        yield Picture(
            'lr_ladder',
            'Divergence by learning rate',
            'Share of the trainings that diverged, of those that ended. '
            'Grey: none ended.',
            visualization.ladder_figure(
                rows, layout.names, layout.series, metric_text(study.metric)
            ),
            rows,
        )


Pairs = list[tuple[float, float]]  # of a step and a value
Read = Callable[[Result], Pairs]


def _curve_pictures(
    study: Study, combinations: Sequence[Combination], layout: Layout
) -> Iterator[Picture]:
    def validation(cell: Result) -> Pairs:
        lines = zip(cell.curves.val, cell.curves.metrics(), strict=True)
        return [
            (float(line['step']), metrics[study.metric])
            for line, metrics in lines
            if study.metric in metrics
        ]

    def training(name: str) -> Read:
        return lambda cell: [*zip(*cell.curves.series(name), strict=True)]

    by_epoch = any(
        cell.record.get('epochs') for c in combinations for cell in c.cells
    )
    unit = 'epoch' if by_epoch else 'training iteration'
    clipped = any(
        cell.curves.series('grad_norm')[0]
        for c in combinations
        for cell in c.cells
    )
    quantities: list[tuple[Quantity, Read]] = [
        (
            Quantity('loss by training iteration', 'training loss'),
            training('loss'),
        ),
        (
            Quantity('gradient norm by training iteration', 'gradient norm'),
            training('grad_norm'),
        ),
        (
            Quantity(f'{study.metric} by {unit}', metric_text(study.metric)),
            validation,
        ),
    ]
    yield from _draw_curves(
        'curves',
        'Training curves',
        'The gradient norm is that before clipping.' if clipped else '',
        quantities,
        combinations,
        layout,
    )


def _stability_pictures(
    combinations: Sequence[Combination], layout: Layout
) -> Iterator[Picture]:
    def largest(key: str) -> Read:
        return lambda cell: [
            (float(record['step']), max(values))
            for record in cell.stability
            # without state matrices the monitor records layers
            if 'spectral_abscissa' in record
            and (values := _finite(record.get(key)))
        ]

    quantities = [
        (
            Quantity(
                'abscissa by training iteration', 'max Re λ (1/step)', 0.0
            ),
            largest('spectral_abscissa'),
        ),
        (
            Quantity('decay by training iteration', 'max |exp(ΔA)|', 1.0),
            largest('decay_max'),
        ),
        (
            Quantity('gradient by training iteration', 'gradient norm of A'),
            largest('grad_norm'),
        ),
    ]
    yield from _draw_curves(
        'stability',
        'Stability over training',
        'Largest value over all layers and directions: real part of the '
        'eigenvalues of A; factor by which one token changes the state, above '
        '1 a state grows; norm of the gradient of A as the optimizer sees it.',
        quantities,
        combinations,
        layout,
    )
    for c_group, suffix, facet in _facets(combinations, layout):
        yield from _spectrum(c_group, layout, suffix, facet)


def _finite(values: Any) -> list[float]:
    return [v for v in values or [] if v is not None and math.isfinite(v)]


def _draw_curves(
    name: str,
    title: str,
    caption: str,
    quantities: Sequence[tuple[Quantity, Read]],
    combinations: Sequence[Combination],
    layout: Layout,
) -> Iterator[Picture]:
    """Figures with up to three facets each."""
    rows = [
        row
        for quantity, read in quantities
        for c in combinations
        for row in _band(c, read, quantity.name, layout)
    ]
    steps: dict[str, set[float]] = {}
    for row in rows:
        steps.setdefault(row['quantity'], set()).add(row['step'])
    # one step is no curve: the last score has a figure of its own
    drawn = [q for q, _ in quantities if len(steps.get(q.name, ())) > 1]
    rows = [row for row in rows if row['quantity'] in {q.name for q in drawn}]
    facets = [
        facet
        for facet in dict.fromkeys(layout.facet(c) for c in combinations)
        if any(row['facet'] == facet for row in rows)
    ]
    _, width = style.rows_and_columns(len(facets), _FACETS)
    for start in range(0, len(facets), width):
        chosen = facets[start : start + width]
        part = [row for row in rows if row['facet'] in chosen]
        part.sort(key=lambda row: chosen.index(row['facet']))
        suffix = f'_{start // width + 1}' if len(facets) > width else ''
        yield Picture(
            name + suffix,
            title + (f' ({"; ".join(chosen)})' if suffix else ''),
            'Line: mean over the seeds; band: from the smallest to the '
            'largest; cross: a training diverged, its values are left out '
            f'from there on. {caption}',
            visualization.curve_figure(
                part, layout.names, layout.series, drawn
            ),
            part,
        )


def _band(
    combination: Combination, read: Read, quantity: str, layout: Layout
) -> Iterator[dict[str, Any]]:
    """Mean and band of a quantity over the seeds, step by step."""
    values: dict[float, list[float]] = {}
    ends: dict[float, int] = {}
    for cell in combination.cells:
        pairs = [*takewhile(lambda pair: math.isfinite(pair[1]), read(cell))]
        for step, value in pairs:
            values.setdefault(step, []).append(value)
        if pairs and cell.status == results.DIVERGED:
            ends[pairs[-1][0]] = ends.get(pairs[-1][0], 0) + 1
    for step in sorted(values):
        found = statistics.sample(values[step])
        yield dict(
            quantity=quantity,
            facet=layout.facet(combination),
            series=layout.name(combination),
            step=step,
            n=found.n,
            mean=found.mean,
            low=min(values[step]),
            high=max(values[step]),
            ended=ends.get(step, 0),
        )


def _facets(
    combinations: Sequence[Combination], layout: Layout
) -> Iterator[tuple[list[Combination], str, str]]:
    """Groups that share a panel; of the learning rates two.

    Those at the border: the last before, and the first at which a training
    diverged; the end ones where there is no border.
    """
    groups: dict[str, list[Combination]] = {}
    by_rest: dict[str, list[str]] = {}
    for c in combinations:
        if any(cell.stability for cell in c.cells):
            groups.setdefault(layout.facet(c), []).append(c)
            rest = by_rest.setdefault(layout.facet(c, without='lr'), [])
            if layout.facet(c) not in rest:
                rest.append(layout.facet(c))
    for facets in by_rest.values():
        lost = [any(c.rate.count for c in groups[f]) for f in facets]
        place = lost.index(True) if True in lost else 0
        ends = (place - 1, place) if place else (0, -1)
        for facet in dict.fromkeys(facets[i] for i in ends):
            suffix = re.sub(r'[^\w+-]+', '_', facet)
            yield groups[facet], f'_{suffix}' if suffix else '', facet


def _spectrum(
    group: Sequence[Combination], layout: Layout, suffix: str, facet: str
) -> Iterator[Picture]:
    """Eigenvalues and heat map of the combinations of one facet."""
    rows: Rows = []
    decays: Rows = []
    for c in group:
        cells = [cell for cell in c.cells if cell.stability]
        # a single spectrum is that of the start
        several = [cell for cell in cells if _count_spectra(cell) > 1]
        rows += _eigenvalue_rows((several or cells)[0], layout.name(c))
        decays += _decay_rows(cells[0], layout.name(c))
    present = {layout.name(c) for c in group}
    series = [name for name in layout.names if name in present]
    where = f' ({facet})' if facet else ''
    seed = 'The first seed of each combination with records'
    # the start alone is no training
    if len({row['step'] for row in rows}) > 1:
        left_out = max(abs(row['imag']) for row in rows)
        if spectra.is_plane(rows):
            left_out = 0.0
        aside = f' Imaginary parts, at most {left_out:.2g}, are left out.'
        yield Picture(
            f'eigenvalues{suffix}',
            f'Eigenvalues of A over training{where}',
            f'{seed} of several iterations. All layers and directions, at '
            f'random at most {_POINTS} eigenvalues a panel; the axes '
            'hold the middle 99 % of them. Dashed: border of stability, '
            f'Re λ = 0; tinted: unstable.{aside if left_out else ""}',
            visualization.eigenvalue_figure(rows, series),
            rows,
        )
    if decays:
        yield Picture(
            f'decay{suffix}',
            f'Largest |exp(ΔA)| by layer and iteration{where}',
            f'{seed}. Over the channels, states and tokens of a batch; fwd '
            'and bwd are the directions of a layer. Blue: states forget; '
            'red: they grow; grey: no record. The scale is logarithmic in '
            'the distance from 1.',
            visualization.decay_figure(decays, series),
            decays,
        )


def _count_spectra(cell: Result) -> int:
    return sum(bool(record.get('eigenvalues')) for record in cell.stability)


def _eigenvalue_rows(cell: Result, series: str) -> Rows:
    """Draw a sample of the eigenvalues of all records that have some."""
    rows = [
        dict(
            series=series,
            seed=cell.seed,
            step=record['step'],
            layer=short_layer(layer),
            real=float(f'{real:.6g}'),
            imag=float(f'{imag:.6g}'),
        )
        for record in cell.stability
        for layer, values in (record.get('eigenvalues') or {}).items()
        for real, imag in values
        if math.isfinite(real) and math.isfinite(imag)
    ]
    if len(rows) <= _POINTS:
        return rows
    # every so many would be the same few modes of each channel
    drawn = np.random.default_rng(0).permutation(len(rows))[:_POINTS]
    return [rows[i] for i in np.sort(drawn)]


def _decay_rows(cell: Result, series: str) -> Rows:
    return [
        dict(
            series=series,
            seed=cell.seed,
            step=record['step'],
            layer=short_layer(layer),
            value=math.nan if value is None else value,
        )
        for record in cell.stability
        for layer, value in zip(
            record.get('layers', []),
            record.get('decay_max') or [],
            strict=False,
        )
    ]


def short_layer(name: str) -> str:
    """Number and direction of a layer.

    Args:
        name (str): For instance ``backbone.layers.3.mixer.directions.1``.

    Returns:
        str: For instance ``3 bwd``; the name itself without two numbers.
    """
    numbers = re.findall(r'\.(\d+)(?=\.|$)', f'.{name}')
    if len(numbers) < 2 or int(numbers[-1]) > 1:
        return name
    return f'{numbers[-2]} {_DIRECTIONS[int(numbers[-1])]}'

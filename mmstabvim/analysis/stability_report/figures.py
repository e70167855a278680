"""Figures of the report, from the rows of one or two models."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from mmstabvim.ablation.figures import metric_text
from mmstabvim.analysis.mixers import WAYS
from mmstabvim.analysis.ranges import LIMITS, bound_figure, bound_marks
from mmstabvim.analysis.stability_report.directions import NAMES
from mmstabvim.analysis.stability_report.measure import StabilityReport
from mmstabvim.analysis.stability_report.source import curve_rows, decay_rows
from mmstabvim.analysis.weights import norm_figure, norm_marks
from mmstabvim.reporting import Picture
from mmstabvim.reporting.style import unique
from mmstabvim.visualization import Quantity, decay_figure, line_figure
from mmstabvim.visualization.layers import (
    heat_figure,
    histogram_figure,
    plane_figure,
    quantile_figure,
    small_line_figure,
    spectrum_figure,
)

Row = dict[str, Any]
Rows = list[Row]

CURVES = {
    quantity.name: quantity
    for quantity in (
        Quantity('loss', 'loss'),
        Quantity('grad_norm', 'gradient norm'),
        Quantity('spectral_abscissa', 'max Re λ (1/step)', 0.0),
        Quantity('spectral_radius', 'max |λ| (1/step)'),
        Quantity('decay_max', 'max |exp(ΔA)|', 1.0),
        Quantity('delta_max', 'max Δ (steps)'),
        Quantity('horizon', 'max memory (tokens)'),
        Quantity('condition', 'max condition'),
        Quantity('stability_penalty', 'penalty'),
        Quantity('projected_share', 'share projected'),
    )
}
"""Panels of the training curves, in their order."""

BORDERS = {q.unit: q.border for q in CURVES.values() if q.border is not None}
"""Values at which a curve's panel has a line across."""

QUIET = {
    'condition': 1.0,
    'stability_penalty': 0.0,
    'projected_share': 0.0,
}
"""Values at which a curve says nothing."""


def picture(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[], Figure],
    rows: Rows,
) -> Picture:
    """Make a picture, drawn only where it has rows."""
    figure = draw() if rows else Figure()
    return Picture(name, title, caption, figure, rows)


def panel(row: Row) -> str:
    """Title of a layer's panel."""
    return f'layer {row["layer"]}'


def facets(rows: Sequence[Row]) -> Rows:
    """Put each layer into a panel, each direction into a series."""
    return [dict(facet=panel(r), series=r['direction'], **r) for r in rows]


def eigenvalue_picture(report: StabilityReport) -> Picture:
    """Draw the eigenvalues of each layer and direction."""
    rows = facets(report.eigenvalues)
    return picture(
        'eigenvalues',
        'Eigenvalues of each layer and direction',
        _plane_caption(rows)
        + ' Of a layer and direction with more than 512 eigenvalues whole '
        'channels are drawn, evenly spread, and the slowest one.',
        lambda: plane_figure(rows, WAYS),
        rows,
    )


def _plane_caption(rows: Rows) -> str:
    if any(abs(row['imag']) > 1e-6 * abs(row['real']) for row in rows):
        return 'Horizontal Re λ, vertical Im λ.'
    return (
        'All eigenvalues are real, Im λ = 0; so that they do not hide one '
        'another each is drawn at the height of its channel.'
    )


def decay_picture(report: StabilityReport) -> Picture:
    """Draw histograms of ``|exp(delta A)|``."""
    rows = facets(report.decays)
    # the last bin is drawn where something is in it
    used = any(row['share'] for row in rows if row['low'] >= 1)
    shown = rows if used else [row for row in rows if row['high'] <= 1]
    return picture(
        'decay',
        'Histograms of |exp(ΔA)|',
        'Over all tokens, channels and modes; the last bin has no upper end.'
        if used
        else 'Over all tokens, channels and modes; nothing is above 1.',
        lambda: histogram_figure(shown, WAYS, '|exp(ΔA)|', border=1.0),
        rows,
    )


def delta_picture(report: StabilityReport) -> Picture:
    """Draw histograms of the step sizes."""
    rows = facets(report.deltas)
    used = [row for row in rows if row['share'] and row['low'] > 0]
    low = min((row['low'] for row in used), default=1e-3)
    high = max((row['high'] for row in used), default=1.0)
    shown = [row for row in rows if low <= row['low'] and row['high'] <= high]
    return picture(
        'delta',
        'Histograms of the step size Δ',
        'Over all tokens and channels, ten bins for each power of ten.',
        lambda: histogram_figure(shown, WAYS, 'Δ (steps)', log_x=True),
        rows,
    )


def horizon_picture(found: Sequence[StabilityReport]) -> Picture:
    """Draw quantiles of the memory over the layers."""
    names = series_names(found)
    rows = [
        dict(
            facet=row['direction'],
            series=name,
            x=row['layer'],
            **{q: row[f'horizon_{q}'] for q in NAMES},
        )
        for name, report in zip(names, found, strict=True)
        for row in report.directions
        if row.get('horizon_q50') is not None
    ]
    length = max(
        (row['tokens'] for row in found[0].directions if 'tokens' in row),
        default=1.0,
    )
    return picture(
        'horizon',
        'Memory in tokens',
        'Line: median over channels and modes; bands: from 25 to 75 and from '
        '5 to 95 percent. Modes that do not decay have no end and leave a '
        'gap.',
        lambda: quantile_figure(
            rows,
            names,
            'memory (tokens)',
            border=(length, f'sequence: {length:.0f} tokens'),
        ),
        rows,
    )


def flow_picture(report: StabilityReport) -> Picture:
    """Draw shares of vanished and exploding gradients over the layers."""
    rows = [
        dict(
            quantity=name,
            facet='',
            series=row['direction'],
            x=row['layer'],
            value=100 * row[name],
        )
        for row in report.directions
        for name in ('vanished', 'exploding')
        if row.get(name) is not None
    ]
    quantities = [
        Quantity('vanished', 'vanished (%)'),
        Quantity('exploding', 'exploding (%)'),
    ]
    limits = {'vanished': (-4.0, 104.0)}
    if not any(r['value'] for r in rows if r['quantity'] == 'exploding'):
        limits['exploding'] = (-0.04, 1.04)
    return picture(
        'gradient_flow',
        'Vanishing and exploding gradients',
        'Share of (channel, mode) whose gradient from the last token walked '
        'to the first is below e^-20, and above e^5.',
        lambda: line_figure(
            rows, WAYS, '', quantities, 'layer', across=True, limits=limits
        ),
        rows,
    )


def token_picture(report: StabilityReport) -> Picture:
    """Draw the gradient of a logit by layer and token."""
    largest: dict[int, float] = {}
    for row in report.gradients:
        layer = row['layer']
        largest[layer] = max(row['value'], largest.get(layer, 0.0))
    rows = [
        dict(
            facet='',
            x=row['token'],
            y=row['layer'],
            value=math.log10(row['value'] / largest[row['layer']])
            if row['value'] > 0
            else None,
            gradient=row['value'],
        )
        for row in report.gradients
    ]
    return picture(
        'token_gradients',
        "Gradient at each layer's tokens",
        'Norm of the gradient of the largest logit (of a segmentor: of its '
        "mean over the pixels) with respect to each mixer's input, on the "
        "first image, over the layer's largest. Black: exactly 0.",
        lambda: heat_figure(
            rows,
            'token, in the order of the forward direction',
            'layer',
            'log10 of share of largest',
            (-4.0, 0.0),
        ),
        rows,
    )


def range_picture(report: StabilityReport) -> Picture:
    """Draw largest values of all tensors over float16's limit."""
    rows = [
        dict(
            facet='',
            x=row['layer'],
            y=tensor_name(row),
            value=math.log10(row['observed'] / LIMITS['float16'])
            if row['observed'] and row['observed'] > 0
            else None,
            largest=row['observed'],
        )
        for row in report.tensors
        if row['observed'] is not None
    ]
    return picture(
        'activations',
        'Largest values on the images',
        "log10 of the largest absolute value over float16's largest number: "
        '0 is the limit, -1 a tenth of it; below -7 all is one colour. Black: '
        'NaN or infinite, or exactly 0.',
        lambda: heat_figure(
            rows,
            'layer',
            '',
            'log10 of the share of the limit',
            (-7.0, 0.0),
        ),
        rows,
    )


def tensor_name(row: Row) -> str:
    """Name of a tensor with its direction, if it has one."""
    way = {'forward': ' fwd', 'backward': ' bwd'}.get(row['direction'], '')
    return f'{row["tensor"]}{way}'


def bound_picture(report: StabilityReport) -> Picture:
    """Draw certified bounds and the largest values over the layers."""
    marks = bound_marks(report.tensors)
    return picture(
        'bounds',
        'Bounds and largest values seen',
        'Dotted line: the largest float16, for the output of the scan, which '
        'autocast keeps in half precision.',
        lambda: bound_figure(marks),
        marks,
    )


def weight_picture(report: StabilityReport) -> Picture:
    """Draw norms and stable ranks over the layers."""
    marks = norm_marks(report.weights)
    return picture(
        'weights',
        'Norms and stable ranks of the weights',
        'in_proj and out_proj are shared by both directions.',
        lambda: norm_figure(marks, unique(marks, 'series')),
        marks,
    )


def spectrum_picture(report: StabilityReport) -> Picture:
    """Draw all singular values."""
    return picture(
        'singular_values',
        'Singular values',
        'Each over the largest of its weight, in falling order; a line that '
        'falls at once is a weight that acts in few directions. The colour is '
        'the layer, black what is outside of the layers. Depthwise '
        'convolutions are no matrices and are left out.',
        lambda: spectrum_figure(report.spectra),
        report.spectra,
    )


# ------------------------------------------------------------- training


def training_pictures(found: Sequence[StabilityReport]) -> Iterator[Picture]:
    """Draw curves of one or two runs, and the decay of each layer."""
    names = series_names(found)
    rows = [
        dict(series=name, **row)
        for name, report in zip(names, found, strict=True)
        for row in curve_rows(report.source.training)
    ]
    drawn = told_curves(rows)
    if drawn:
        yield Picture(
            'training',
            'Training curves',
            'Loss and gradient from the log, the rest from the stability '
            'monitor: the largest over all layers and directions (of the '
            'penalty the sum). Values that are not finite are left out, and '
            'curves that stay at what says nothing.',
            small_line_figure(drawn, names, 'training iteration', BORDERS),
            drawn,
        )
    if len(found) == 1:
        decays = decay_rows(found[0].source.training, names[0])
        if len({row['step'] for row in decays}) > 1:
            yield Picture(
                'training_decay',
                'Largest |exp(ΔA)| over training',
                'Blue states forget, red ones grow; the scale is logarithmic '
                'around 1.',
                decay_figure(decays, names),
                decays,
            )


def told_curves(rows: Rows) -> Rows:
    """Choose curves of several steps that are not quiet; a facet each."""
    found: dict[str, Rows] = {name: [] for name in CURVES}
    for row in rows:
        found.setdefault(row['quantity'], []).append(row)
    metrics = sorted(found.keys() - CURVES.keys())
    drawn: Rows = []
    for name in (*CURVES, *metrics):
        values = {row['value'] for row in found[name]}
        several = len({row['step'] for row in found[name]}) > 1
        if several and values != {QUIET.get(name)}:
            unit = CURVES[name].unit if name in CURVES else metric_text(name)
            drawn += [
                dict(
                    quantity='value',
                    facet=unit,
                    series=row['series'],
                    x=row['step'],
                    value=row['value'],
                )
                for row in found[name]
            ]
    return drawn


# ------------------------------------------------------------- two runs


def series_names(found: Sequence[StabilityReport]) -> list[str]:
    """Names of the runs, told apart where they are equal."""
    names = [report.source.name for report in found]
    if len(set(names)) < len(names):
        return [
            f'{name} ({word})'
            for name, word in zip(names, ('this', 'other'), strict=False)
        ]
    return names


def compared_eigenvalues(found: Sequence[StabilityReport]) -> Picture:
    """Draw eigenvalues of two runs over one another."""
    names = series_names(found)
    rows = [
        dict(facet=panel(row), series=name, **row)
        for name, report in zip(names, found, strict=True)
        for row in report.eigenvalues
    ]
    return picture(
        'eigenvalues_of_both',
        'Eigenvalues of both',
        _plane_caption(rows) + ' Both directions of a layer are in its panel.',
        lambda: plane_figure(rows, names),
        rows,
    )

"""Tables of the report."""

from collections.abc import Sequence
from typing import Any

from certify_ranges import MAIN, summarize

from _stability_report.directions import NAMES, QUANTILES
from _stability_report.findings import (
    Finding,
    condense,
    percent,
)
from _stability_report.measure import Measured
from _stability_report.tensors import LIMITS, largest_shares, overflows
from _stability_report.thresholds import THRESHOLDS, WORDS
from mmstabvim.reporting.tables import Table
from mmstabvim.reporting.writing import number

Row = dict[str, Any]
Rows = list[Row]

PROFILE = {
    'input_jacobian': ('P1', 'norm of the input Jacobian'),
    'parameter_jacobian': ('P2', 'norm of the parameter Jacobian'),
    'tangent_kernel': ('P3', 'largest eigenvalue of the tangent kernel'),
    'hessian': ('P4', "norm of the loss's Hessian"),
    'hessian_error': ('', 'error of P4'),
    'hessian_max': ('', 'largest eigenvalue of the Hessian'),
    'hessian_min': ('', 'smallest eigenvalue of the Hessian'),
    'index': ('S', 'sensitivity index, the largest of P1 to P4'),
    'entropy': ('', 'spectral entropy of the input Jacobian, nats'),
    'effective_rank': ('', 'effective rank, e to the entropy'),
    'condition_number': ('ACN', 'attribution condition number'),
    'typical_gain': ('', 'mean square gain of a random change, ‖J‖²/d'),
    'instability': ('', 'relative change of attributions under noise'),
    'frechet_distance': ('', 'Fréchet distance of attributions under noise'),
}
"""Symbol and meaning of each number of the sensitivity."""


def cell(value: Any, digits: int = 3) -> str:
    """Text of a number, or of nothing."""
    if isinstance(value, str):
        return value
    return number(value, digits)


def make(
    name: str,
    title: str,
    caption: str,
    heads: dict[str, str],
    rows: Rows,
    texts: Sequence[Sequence[str]] | None = None,
    words: int = 1,
) -> Table:
    """A table of some columns of rows; the first ``words`` hold words."""
    lines = texts or [[cell(row.get(key)) for key in heads] for row in rows]
    align = 'l' * words + 'r' * (len(heads) - words)
    return Table(name, title, caption, [*heads.values()], lines, rows, align)


def finding_table(found: Sequence[Finding]) -> Table:
    """The findings as people read them."""
    lines = [[row['severity'], row['text']] for row in condense(found)]
    return Table(
        'findings',
        'Findings',
        '',
        ['severity', 'finding'],
        lines,
        [finding.row() for finding in found],
        'll',
    )


def threshold_table() -> Table:
    """What would have been remarked on."""
    lines = [
        [WORDS[severity], words]
        for severity, _, words in sorted(
            THRESHOLDS.values(), key=lambda entry: -entry[0]
        )
    ]
    rows = [
        dict(kind=kind, severity=WORDS[s], threshold=level, words=words)
        for kind, (s, level, words) in THRESHOLDS.items()
    ]
    return Table(
        'thresholds',
        'Thresholds',
        '',
        ['severity', 'remarked on where'],
        lines,
        rows,
        'll',
    )


def eigenvalue_table(measured: Measured) -> Table:
    """Extremes by layer and direction."""
    heads = dict(
        layer='layer',
        direction='direction',
        abscissa='max Re λ',
        radius='max |λ|',
        unstable='Re λ > 0',
        condition='condition',
        kind='scan in',
    )
    return make(
        'eigenvalues',
        'Extremes of the eigenvalues',
        '1/step; condition: of the eigenvectors, 1 for a diagonal matrix.',
        heads,
        measured.directions,
        [
            _line(
                row, heads, dict(unstable=share_cell, kind=lambda v: v or '')
            )
            for row in measured.directions
        ],
        2,
    )


def share_cell(value: float | None) -> str:
    """A share in percent."""
    return '' if value is None else percent(value)


def _line(row: Row, heads: dict[str, str], special: dict[str, Any]) -> list:
    """Texts of a row; layers are names, not numbers."""
    known = dict(special, layer=str)
    return [
        known.get(key, cell)(row.get(key)) if key in row else ''
        for key in heads
    ]


def memory_table(measured: Measured) -> Table:
    """Quantiles of the memory."""
    quantile_heads = {
        f'horizon_{name}': f'{100 * q:g} %'
        for name, q in zip(NAMES, QUANTILES, strict=True)
    }
    heads = dict(
        layer='layer',
        direction='direction',
        **quantile_heads,
        short='within 2 tokens',
        long='over 10 lengths',
    )
    shares = dict(short=share_cell, long=share_cell)
    rows = measured.directions
    return make(
        'memory',
        'Memory in tokens',
        'Quantiles over channels and modes, and the shares at both ends.',
        heads,
        rows,
        [_line(row, heads, shares) for row in rows],
        2,
    )


def delta_table(measured: Measured) -> Table:
    """Step sizes, and what they make of the eigenvalues."""
    heads = dict(
        layer='layer',
        direction='direction',
        delta_min='min',
        **{
            f'delta_{name}': f'{100 * q:g} %'
            for name, q in zip(NAMES, QUANTILES, strict=True)
        },
        delta_max='max',
        skipped='skipped',
        decay_max='max |exp(ΔA)|',
        growing='above 1',
        growth='Γ',
        growth_4x='Γ, 4 L',
        growth_16x='Γ, 16 L',
        max_phase='max phase',
    )
    shares = dict(
        skipped=share_cell,
        growing=share_cell,
        decay_max=lambda v: cell(v, 4),
    )
    rows = measured.directions
    return make(
        'delta',
        'Step size',
        'Skipped: share below 1e-4. Above 1: share of (token, channel, mode) '
        'whose state grows. Γ: the largest exponent by which a mode grows '
        'between two tokens of the sequence, of length L, and of longer ones. '
        'Phase: Δ |Im λ|; above π it aliases.',
        heads,
        rows,
        [_line(row, heads, shares) for row in rows],
        2,
    )


def flow_table(measured: Measured) -> Table:
    """Vanishing and exploding gradients."""
    heads = dict(
        layer='layer',
        direction='direction',
        vanished='vanished',
        exploding='exploding',
    )
    shares = dict(vanished=share_cell, exploding=share_cell)
    rows = measured.directions
    lines = [_line(row, heads, shares) for row in rows]
    return make('gradient_flow', 'Gradient flow', '', heads, rows, lines, 2)


def range_table(measured: Measured) -> Table:
    """Per layer what comes closest to the limits."""
    rows = [
        dict(
            layer=str(row['layer']),
            tensor=f'{row["tensor"]}, {row["direction"]}',
            largest=row['observed'],
            fp16=row['observed'] / LIMITS['float16'],
            bf16=row['observed'] / LIMITS['bfloat16'],
        )
        for row in largest_shares(measured.tensors)
    ]
    small: dict[str, Row] = {}
    for row in measured.tensors:
        if row['small'] is not None:
            old = small.get(str(row['layer']))
            if old is None or row['small'] > old['small']:
                small[str(row['layer'])] = row
    for line in rows:
        least = small[line['layer']]
        line['small'] = percent(least['small']) + f' of {least["tensor"]}'
    heads = dict(
        layer='layer',
        tensor='largest tensor',
        largest='largest value',
        fp16='of float16',
        bf16='of bfloat16',
        small='below 6e-5, most',
    )
    return make(
        'activations',
        'Closest to the limits',
        'Of the tensors that autocast keeps in half precision. Last column: '
        'the tensor of which the largest share is below the normal numbers '
        'of float16; bfloat16 has those of float32.',
        heads,
        rows,
        words=2,
    )


def bound_table(measured: Measured) -> Table:
    """Certified bounds, as ``certify_ranges.py`` shows them."""
    rows = summarize(measured.tensors)
    heads = dict(layer='layer', direction='direction', **MAIN)
    heads |= dict(worst='worst, of its limit', overflow='float16 overflow')
    return Table(
        'bounds',
        'Certified ranges',
        'Bound, and in parentheses the largest value on the images. Worst: '
        'the tensor whose bound comes closest to the largest number of its '
        'dtype, or exceeds it.',
        [*heads.values()],
        [[cell(row[key]) for key in heads] for row in rows],
        measured.tensors,
        'll' + 'r' * len(MAIN) + 'll',
    )


def certified(measured: Measured) -> str:
    """The verdict for both dtypes."""
    parts = []
    count = measured.facts['layers']
    for dtype in ('float16', 'bfloat16'):
        risky = overflows(measured.tensors, dtype)
        parts.append(
            f'{dtype}: not certified in {len(risky)} of {count} layers'
            if risky
            else f'{dtype}: certified in all {count} layers'
        )
    return '; '.join(parts) + '.'


def weight_table(measured: Measured) -> Table:
    """Norms and ranks."""
    heads = dict(
        name='weight',
        shape='shape',
        sigma='σ₁',
        stable_rank='stable rank',
        effective_rank='effective rank',
        full_rank='of',
        condition='σ₁ / last',
    )
    lines = []
    for row in measured.weights:
        line = [cell(row.get(key)) for key in heads]
        if not row['finite']:
            line[2] = 'NaN'
        elif not row.get('exact', True):
            line[2] = f'≤ {line[2]}'
        lines.append(line)
    return make(
        'weights',
        'Weights',
        'σ₁: largest singular value; a bound where it says ≤. The stable '
        'rank of a depthwise convolution is per token.',
        heads,
        measured.weights,
        lines,
        2,
    )


def sensitivity_table(measured: Measured) -> Table:
    """Profile, index and the others."""
    found = measured.sensitivity
    rows = [
        dict(symbol=symbol, quantity=words, value=found[key], name=key)
        for key, (symbol, words) in PROFILE.items()
        if key in found
    ]
    heads = dict(symbol='', quantity='quantity', value='value')
    classes, total = int(found['classes']), int(found['total_classes'])
    some = (
        f'of the {classes} largest logits of {total}'
        if classes < total
        else f'of all {total} logits'
    )
    caption = (
        f'{int(found["samples"])} images, Jacobians {some}, labels '
        f'{found["labels"]}. P1, P2 and P4 are the largest over the images, '
        'P3 is over all of them; the others are means. P4 and its signs: '
        'estimates from below by Lanczos steps with differences of gradients.'
    )
    return make('sensitivity', 'Sensitivity', caption, heads, rows, words=2)


def image_table(measured: Measured) -> Table:
    """The same of each image."""
    heads = {
        'image': 'image',
        'prediction': 'prediction',
        'input_jacobian': 'P1',
        'parameter_jacobian': 'P2',
        'hessian': 'P4',
        'entropy': 'entropy',
        'effective_rank': 'effective rank',
        'condition_number': 'ACN',
        'instability': 'instability',
    }
    rows = [dict(image=str(i), **row) for i, row in enumerate(measured.images)]
    lines = [
        [
            str(row[key]) if key in ('image', 'prediction') else cell(row[key])
            for key in heads
        ]
        for row in rows
    ]
    return make('sensitivity_images', 'Each image', '', heads, rows, lines, 2)

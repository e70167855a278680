"""Tables of the report."""

from collections.abc import Callable, Sequence
from typing import Any

from mmstabvim.analysis.ranges import LIMITS, bound_table, overflows
from mmstabvim.analysis.stability_report.directions import NAMES, QUANTILES
from mmstabvim.analysis.stability_report.findings import (
    StabilityFinding,
    condense,
    largest_shares,
)
from mmstabvim.analysis.stability_report.measure import StabilityReport
from mmstabvim.analysis.stability_report.thresholds import THRESHOLDS, WORDS
from mmstabvim.reporting import Table, make_table, number, percent

Row = dict[str, Any]
Rows = list[Row]
Formats = dict[str, str | Callable[[Any], str]]

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


def finding_table(found: Sequence[StabilityFinding]) -> Table:
    """List the findings as readers see them."""
    heads = dict(severity='severity', text='finding')
    return make_table(
        'findings',
        'Findings',
        '',
        heads,
        condense(found),
        data=[f.row() for f in found],
    )


def threshold_table() -> Table:
    """List all thresholds, the worst first."""
    rows = [
        dict(kind=kind, severity=WORDS[s], threshold=level, words=words)
        for kind, (s, level, words) in sorted(
            THRESHOLDS.items(), key=lambda item: -item[1][0]
        )
    ]
    heads = dict(severity='severity', words='remarked on where')
    return make_table('thresholds', 'Thresholds', '', heads, rows)


PLACE = dict(layer='layer', direction='direction')
TABLES: dict[str, tuple[str, str, dict[str, str], Formats]] = {
    'eigenvalues': (
        'Extremes of the eigenvalues',
        '1/step; condition: of the eigenvectors, 1 for a diagonal matrix.',
        dict(
            abscissa='max Re λ',
            radius='max |λ|',
            unstable='Re λ > 0',
            condition='condition',
            kind='scan in',
        ),
        dict(unstable=percent),
    ),
    'memory': (
        'Memory in tokens',
        'Quantiles over channels and modes, and the shares at both ends.',
        {
            **{
                f'horizon_{name}': f'{100 * q:g} %'
                for name, q in zip(NAMES, QUANTILES, strict=True)
            },
            'short': 'within 2 tokens',
            'long': 'over 10 lengths',
        },
        dict(short=percent, long=percent),
    ),
    'delta': (
        'Step size',
        'Skipped: share below 1e-4. Above 1: share of (token, channel, mode) '
        'whose state grows. Γ: the largest exponent by which a mode grows '
        'between two tokens of the sequence, of length L, and of longer ones. '
        'Phase: Δ |Im λ|; above π it aliases.',
        {
            'delta_min': 'min',
            **{
                f'delta_{name}': f'{100 * q:g} %'
                for name, q in zip(NAMES, QUANTILES, strict=True)
            },
            'delta_max': 'max',
            'skipped': 'skipped',
            'decay_max': 'max |exp(ΔA)|',
            'growing': 'above 1',
            'growth': 'Γ',
            'growth_4x': 'Γ, 4 L',
            'growth_16x': 'Γ, 16 L',
            'max_phase': 'max phase',
        },
        dict(
            skipped=percent, growing=percent, decay_max=lambda v: number(v, 4)
        ),
    ),
    'gradient_flow': (
        'Gradient flow',
        '',
        dict(vanished='vanished', exploding='exploding'),
        dict(vanished=percent, exploding=percent),
    ),
}
"""Title, caption, heads and formats of the tables by layer and direction."""


def direction_table(name: str, report: StabilityReport) -> Table:
    """Tabulate some numbers of each layer and direction; of ``TABLES``."""
    title, caption, heads, formats = TABLES[name]
    return make_table(
        name,
        title,
        caption,
        PLACE | heads,
        report.directions,
        {'layer': str} | formats,
        words=2,
    )


def range_table(report: StabilityReport) -> Table:
    """Tabulate the tensors of each layer that come closest to the limits."""
    rows = []
    for row in largest_shares(report.tensors):
        layer, seen = row['layer'], row['observed']
        own = [r for r in report.tensors if r['layer'] == layer]
        known = [r for r in own if r['small'] is not None]
        least = max(known, key=lambda r: r['small'])
        rows.append(
            dict(
                layer=str(layer),
                tensor=f'{row["tensor"]}, {row["direction"]}',
                largest=seen,
                fp16=seen / LIMITS['float16'],
                bf16=seen / LIMITS['bfloat16'],
                small=f'{percent(least["small"])} of {least["tensor"]}',
            )
        )
    heads = dict(
        layer='layer',
        tensor='largest tensor',
        largest='largest value',
        fp16='of float16',
        bf16='of bfloat16',
        small='below 6e-5, most',
    )
    return make_table(
        'activations',
        'Closest to the limits',
        'Of the tensors that autocast keeps in half precision. Last column: '
        'the tensor of which the largest share is below the normal numbers '
        'of float16; bfloat16 has those of float32.',
        heads,
        rows,
        words=2,
    )


def certified_table(report: StabilityReport) -> Table:
    """Tabulate the certified bounds, under float16."""
    return bound_table(report.tensors, 'float16 overflow')


def certified(report: StabilityReport) -> str:
    """Verdict for both dtypes."""
    count = report.facts['layers']
    parts = []
    for dtype in ('float16', 'bfloat16'):
        risky = len(overflows(report.tensors, dtype))
        parts.append(
            f'{dtype}: not certified in {risky} of {count} layers'
            if risky
            else f'{dtype}: certified in all {count} layers'
        )
    return '; '.join(parts) + '.'


def weight_table(report: StabilityReport) -> Table:
    """Tabulate norms and ranks."""
    heads = dict(
        name='weight',
        shape='shape',
        sigma='σ₁',
        stable_rank='stable rank',
        effective_rank='effective rank',
        full_rank='of',
        condition='σ₁ / last',
    )
    rows = [dict(row, sigma=_sigma(row)) for row in report.weights]
    return make_table(
        'weights',
        'Weights',
        'σ₁: largest singular value; a bound where it says ≤. The stable '
        'rank of a depthwise convolution is per token.',
        heads,
        rows,
        words=2,
        data=report.weights,
    )


def _sigma(row: Row) -> str:
    """Norm of a weight, NaN or a bound."""
    if not row['finite']:
        return 'NaN'
    text = number(row.get('sigma'))
    return text if row.get('exact', True) else f'≤ {text}'


def sensitivity_table(report: StabilityReport) -> Table:
    """Tabulate profile, index and the other numbers over all images."""
    found = report.sensitivity
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
    return make_table('sensitivity', 'Sensitivity', caption, heads, rows)


def image_table(report: StabilityReport) -> Table:
    """Tabulate the sensitivity of each image."""
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
    return make_table(
        'sensitivity_images',
        'Each image',
        '',
        heads,
        [dict(image=str(i), **row) for i, row in enumerate(report.images)],
        dict(prediction=str),
        words=2,
    )

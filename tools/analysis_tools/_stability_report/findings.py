"""What the numbers say, in words; the worst first."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from _stability_report.directions import GROWTH, LONG, SHORT
from _stability_report.measure import Measured
from _stability_report.source import finite
from _stability_report.tensors import LIMITS, largest_shares, overflows
from _stability_report.thresholds import THRESHOLDS, WORDS
from mmstabvim.reporting.writing import number
from mmstabvim.stability.state.steps import SKIPPED

Row = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One remark.

    Attributes:
        kind (str): Key of ``THRESHOLDS``.
        text (str): A sentence.
        value (float): What was compared with the threshold.
        excess (float): How far beyond, to sort by.
        layer (int, optional): Number of the block.
        direction (str): Empty where it is of no direction.
        name (str): Of the tensor or weight, if of one.
    """

    kind: str
    text: str
    value: float
    excess: float
    layer: int | None = None
    direction: str = ''
    name: str = ''

    @property
    def severity(self) -> int:
        """Between ``LOW`` and ``BROKEN``."""
        return THRESHOLDS[self.kind][0]

    @property
    def key(self) -> tuple:
        """What makes it the same remark in two runs."""
        return self.kind, self.layer, self.direction, self.name

    @property
    def where(self) -> str:
        """'layer 3 backward'."""
        return place(self.layer, self.direction)

    def row(self) -> Row:
        """For files."""
        return dict(severity=WORDS[self.severity], **asdict(self))


def place(layer: int | None, direction: str) -> str:
    """Where something is, in words."""
    if layer is None:
        return 'outside of the layers'
    way = direction if direction != 'shared' else ''
    return f'layer {layer} {way}'.rstrip()


def percent(share: float) -> str:
    """A share in words, never 0 or 100 for what is not."""
    if 0 < share < 0.001:
        return 'less than 0.1 %'
    if 0.999 < share < 1:
        return 'more than 99.9 %'
    return f'{100 * share:.2g} %' if share < 0.1 else f'{100 * share:.0f} %'


def find(measured: Measured) -> list[Finding]:
    """Everything to remark on, the worst first.

    Args:
        measured (Measured): Numbers of a model.

    Returns:
        list[Finding]: Empty if there is nothing.
    """
    found = [finding for look in LOOKS for finding in look(measured)]
    return sorted(found, key=lambda f: (-f.severity, -f.excess))


def _nonfinite(measured: Measured) -> Iterator[Finding]:
    for row in measured.broken:
        text = (
            f'{place(row["layer"], row["direction"])}: {row["count"]:,} of '
            f'{row["of"]:,} values of {row["name"]} are NaN or infinite'
        )
        yield Finding(
            'nonfinite_weight',
            text,
            row['count'],
            row['count'] / row['of'],
            row['layer'],
            row['direction'],
            row['name'],
        )
    row = measured.first_nonfinite
    if row:
        where = place(row['layer'], row['direction'])
        yield Finding(
            'nonfinite_tensor',
            f'{where}: {row["tensor"]} is the first tensor of a mixer with '
            f'NaN or infinity on the images ({row["count"]:,} values)',
            row['count'],
            0.0,
            row['layer'],
            row['direction'],
            row['tensor'],
        )


def _direction(
    kind: str, key: str, say: Callable[[Row], str]
) -> Callable[[Measured], Iterator[Finding]]:
    """A look at one number of each layer and direction."""
    level = THRESHOLDS[kind][1]

    def look(measured: Measured) -> Iterator[Finding]:
        for row in measured.directions:
            value = row.get(key)
            if value is None or not (value >= level and value > 0):
                continue
            where = place(row['layer'], row['direction'])
            yield Finding(
                kind,
                f'{where}: {say(row)}',
                value,
                value / (level or 1.0),
                row['layer'],
                row['direction'],
            )

    return look


def _say_unstable(row: Row) -> str:
    text = (
        f'{percent(row["unstable"])} of the eigenvalues have a positive real '
        f'part, up to {number(row["abscissa"])} per step'
    )
    decay = row.get('decay_max')
    if decay is None:
        return text
    return f'{text}: one token multiplies a state by up to {number(decay, 4)}'


def _say_growth(row: Row) -> str:
    text = ', '.join(
        f'{number(row[key])} at {times * row["tokens"]:,.0f}'
        for key, times in GROWTH.items()
    )
    return (
        'a mode can grow along the sequence, by a factor of e to the power '
        f'of (tokens): {text}. Larger images may overflow where these did not'
    )


def _say_short(row: Row) -> str:
    return (
        f'{percent(row["short"])} of the modes forget within {SHORT:g} tokens '
        f'(median memory {number(row["horizon_q50"])} tokens)'
    )


def _say_long(row: Row) -> str:
    return (
        f'{percent(row["long"])} of the modes remember more than '
        f'{LONG * row["tokens"]:,.0f} tokens, {LONG:g} times the sequence: '
        'they add up rather than forget'
    )


def _say_flow(word: str, key: str) -> Callable[[Row], str]:
    def say(row: Row) -> str:
        return (
            f'the gradient from the last token to the first has {word} in '
            f'{percent(row[key])} of the modes'
        )

    return say


def _overflow(measured: Measured) -> Iterator[Finding]:
    limit = LIMITS['float16']
    for row in largest_shares(measured.tensors):
        value = row['observed']
        share = value / limit
        kind = 'overflow' if share >= 1 else 'near_overflow'
        if not share >= THRESHOLDS['near_overflow'][1]:
            continue
        where = place(row['layer'], row['direction'])
        yield Finding(
            kind,
            f'{where}: {row["tensor"]} reaches {number(value)} on the images, '
            f'{number(share)} times the largest float16',
            share,
            share,
            row['layer'],
            row['direction'],
            row['tensor'],
        )


def _certified(measured: Measured) -> Iterator[Finding]:
    rows = measured.tensors
    for row in rows:
        seen = row['observed']
        if seen is not None and seen > row['bound'] * (1 + 1e-5):
            where = place(row['layer'], row['direction'])
            yield Finding(
                'above_bound',
                f'{where}: {row["tensor"]} reaches {number(seen)}, above its '
                f'bound {number(row["bound"])}',
                seen / row['bound'],
                seen / row['bound'],
                row['layer'],
                row['direction'],
                row['tensor'],
            )
    infinite = sorted({r['layer'] for r in rows if math.isinf(r['bound'])})
    if infinite:
        yield Finding(
            'uncertified',
            f'{listed(infinite)}: the state has no bound that holds for all '
            'images, as an eigenvalue (or the norm of a full matrix) does not '
            'decay',
            len(infinite),
            len(infinite),
            infinite[0],
        )
    risky = [i for i in overflows(rows, 'float16') if i not in infinite]
    risky = [i for i in risky if not _has_nan(rows, i)]
    if risky:
        yield Finding(
            'may_overflow',
            f'{listed(risky)}: float16 is not certified, a bound exceeds its '
            'largest number; that is no overflow, only not excluded',
            len(risky),
            len(risky),
            risky[0],
        )


def _has_nan(rows: Sequence[Row], layer: int) -> bool:
    return any(
        math.isnan(row['bound']) for row in rows if row['layer'] == layer
    )


def listed(layers: Sequence[int]) -> str:
    """'layers 1, 2 and 5', by ranges where they are many."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    parts = [
        str(a) if a == b else f'{a}, {b}' if b == a + 1 else f'{a} to {b}'
        for a, b in spans
    ]
    word = 'layer' if len(layers) == 1 else 'layers'
    return f'{word} {", ".join(parts)}'


def _small(measured: Measured) -> Iterator[Finding]:
    level = THRESHOLDS['small_values'][1]
    for row in measured.tensors:
        share = row['small']
        if share is not None and share >= level:
            where = place(row['layer'], row['direction'])
            yield Finding(
                'small_values',
                f'{where}: {percent(share)} of {row["tensor"]} is below '
                '6.1e-05, where float16 loses digits',
                share,
                share / level,
                row['layer'],
                row['direction'],
                row['tensor'],
            )


def _weights(measured: Measured) -> Iterator[Finding]:
    for row in measured.weights:
        if row.get('sigma') is None:
            continue
        middle = _typical(measured.weights, row)
        for kind, value, excess, text in _weight_remarks(row, middle):
            yield Finding(
                kind,
                f'{place(row["layer"], row["direction"])}: '
                f'{row["name"]} {text}',
                value,
                excess,
                row['layer'],
                row['direction'],
                row['name'],
            )


def _typical(rows: Sequence[Row], row: Row) -> float | None:
    """Median norm of the weights of the same kind, of three or more."""
    alike = sorted(
        r['sigma']
        for r in rows
        if r['kind'] == row['kind'] and r.get('sigma') is not None
    )
    return alike[len(alike) // 2] if len(alike) > 2 else None


def _weight_remarks(
    row: Row, middle: float | None
) -> Iterator[tuple[str, float, float, str]]:
    sigma = row['sigma']
    if sigma == 0:
        yield 'zero_weight', 0.0, 0.0, 'is zero'
        return
    rank, full = row.get('stable_rank'), row.get('full_rank', 0)
    level = THRESHOLDS['low_rank'][1]
    if full > level and rank is not None and rank <= level:
        text = f'has a stable rank of {number(rank)} of {full} possible'
        yield 'low_rank', rank, level / rank, text
    level = THRESHOLDS['large_weight'][1]
    if middle and sigma >= level * middle:
        times = sigma / middle
        text = (
            f'has a norm of {number(sigma)}, {number(times)} times the '
            'median of its kind'
        )
        yield 'large_weight', times, times / level, text


def _attribution(measured: Measured) -> Iterator[Finding]:
    value = measured.sensitivity.get('instability')
    level = THRESHOLDS['unstable_attribution'][1]
    if value is not None and value >= level:
        yield Finding(
            'unstable_attribution',
            f'attributions change by {percent(value)} of their norm when '
            'noise with a standard deviation of 0.02 is added to the images',
            value,
            value / level,
        )


def _training(measured: Measured) -> Iterator[Finding]:
    training = measured.source.training
    curves = training.curves
    step = curves.first_nonfinite_step()
    if step is not None:
        yield Finding(
            'nonfinite_loss',
            f'training: the loss was first NaN or infinite at iteration '
            f'{step:,}',
            step,
            0.0,
        )
    yield from _loss_rise(finite(curves.series('loss')[1]))
    yield from _spikes(*curves.series('grad_norm'))
    for record in training.stability:
        values = finite(record.get('spectral_abscissa'))
        if values and max(values) > 0:
            yield Finding(
                'unstable_before',
                'training: an eigenvalue had a positive real part, '
                f'{number(max(values))} per step, first recorded at '
                f'iteration {record["step"]:,}',
                max(values),
                max(values),
            )
            break


def _loss_rise(losses: Sequence[float]) -> Iterator[Finding]:
    """Compare means over a twentieth of the run, so that noise is none."""
    size = max(len(losses) // 20, 1)
    means = [
        sum(losses[i : i + size]) / size for i in range(len(losses) - size + 1)
    ]
    level = THRESHOLDS['loss_rise'][1]
    if means and min(means) > 0 and means[-1] >= level * min(means):
        ratio = means[-1] / min(means)
        yield Finding(
            'loss_rise',
            f'training: the loss ended at {number(means[-1])}, '
            f'{number(ratio)} times its lowest, {number(min(means))}',
            ratio,
            ratio / level,
        )


def _spikes(
    steps: Sequence[float], norms: Sequence[float]
) -> Iterator[Finding]:
    known = [
        (norm, step)
        for step, norm in zip(steps, norms, strict=True)
        if math.isfinite(norm)
    ]
    if not known:
        return
    largest, step = max(known)
    middle = sorted(norm for norm, _ in known)[len(known) // 2]
    level = THRESHOLDS['spikes'][1]
    if middle > 0 and largest >= level * middle:
        ratio = largest / middle
        yield Finding(
            'spikes',
            f"training: the gradient's norm reached {number(largest)} at "
            f'iteration {step:,.0f}, {number(ratio)} times its median',
            ratio,
            ratio / level,
        )


LOOKS: tuple[Callable[[Measured], Iterator[Finding]], ...] = (
    _nonfinite,
    _direction('unstable', 'unstable', _say_unstable),
    _direction('growth', 'growth_16x', _say_growth),
    _direction('exploding', 'exploding', _say_flow('grown', 'exploding')),
    _direction('vanishing', 'vanished', _say_flow('vanished', 'vanished')),
    _direction('short_memory', 'short', _say_short),
    _direction('integrators', 'long', _say_long),
    _direction(
        'skipped',
        'skipped',
        lambda row: (
            f'{percent(row["skipped"])} of the step sizes are below '
            f'{SKIPPED:g}, so that tokens leave the state as it is'
        ),
    ),
    _direction(
        'aliasing',
        'max_phase',
        lambda row: (
            f'a mode turns by {number(row["max_phase"])} in one '
            'step, more than π: it cannot be told from a slower one'
        ),
    ),
    _direction(
        'underflow',
        'max_decay_exponent',
        lambda row: (
            f'Δ|Re λ| reaches {number(row["max_decay_exponent"])}: '
            'exp(ΔA) underflows, and the mode forgets everything at once'
        ),
    ),
    _direction(
        'ill_conditioned',
        'condition',
        lambda row: (
            'the eigenbasis has a condition number of '
            f'{number(row["condition"])}, by which rounding errors grow'
        ),
    ),
    _overflow,
    _certified,
    _small,
    _weights,
    _attribution,
    _training,
)


def condense(found: Sequence[Finding], most: int = 3) -> list[Row]:
    """At most some of a kind, and a line that counts the others.

    Args:
        found (Sequence[Finding]): Sorted, of :func:`find`.
        most (int): Of each kind. Defaults to 3.

    Returns:
        list[Row]: ``severity`` and ``text``.
    """
    lines: list[Row] = []
    kinds = dict.fromkeys(f.kind for f in found)
    for kind in kinds:
        own = [f for f in found if f.kind == kind]
        word = WORDS[own[0].severity]
        lines += [dict(severity=word, text=f.text) for f in own[:most]]
        rest = own[most:]
        if rest:
            layers = sorted({f.layer for f in rest if f.layer is not None})
            lines.append(
                dict(
                    severity=word,
                    text=f'… and {len(rest)} more of this kind, in '
                    f'{listed(layers) if layers else "the model"}',
                )
            )
    return lines

"""Findings: numbers beyond a threshold, in words; the worst first."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmstabvim.analysis.ranges import LIMITS, overflows
from mmstabvim.analysis.stability_report.directions import GROWTH, LONG, SHORT
from mmstabvim.analysis.stability_report.measure import StabilityReport
from mmstabvim.analysis.stability_report.source import finite
from mmstabvim.analysis.stability_report.thresholds import THRESHOLDS, WORDS
from mmstabvim.layers.mixer_ranges import FLOAT32
from mmstabvim.reporting import number, percent
from mmstabvim.stability.state.steps import SKIPPED

Row = dict[str, Any]

NOTHING = 'Nothing to remark: no number is beyond a threshold.'


@dataclass(frozen=True)
class StabilityFinding:
    """A number beyond its threshold.

    Attributes:
        kind (str): Key of ``THRESHOLDS``.
        text (str): A sentence.
        value (float): Compared with the threshold.
        excess (float): Factor beyond it, to sort by.
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
        """Identity of the finding in two runs."""
        return self.kind, self.layer, self.direction, self.name

    def row(self) -> Row:
        """Entries of the files."""
        return dict(severity=WORDS[self.severity], **asdict(self))


Findings = Iterator[StabilityFinding]


def _found(
    kind: str,
    row: Row,
    text: str,
    value: float,
    excess: float | None = None,
    name: str = '',
) -> StabilityFinding:
    """Make a finding of a row with layer and direction."""
    layer, direction = row['layer'], row['direction']
    way = direction if direction != 'shared' else ''
    where = (
        'outside of the layers' if layer is None else f'layer {layer} {way}'
    )
    if excess is None:
        excess = value / (THRESHOLDS[kind][1] or 1.0)
    text = f'{where.rstrip()}: {text}'
    return StabilityFinding(kind, text, value, excess, layer, direction, name)


def find(report: StabilityReport) -> list[StabilityFinding]:
    """Compare the numbers of a model with all thresholds.

    Args:
        report (StabilityReport): Numbers of a model.

    Returns:
        list[StabilityFinding]: The worst first; empty if there is nothing.
    """
    found = [finding for look in LOOKS for finding in look(report)]
    return sorted(found, key=lambda f: (-f.severity, -f.excess))


def _nonfinite(report: StabilityReport) -> Findings:
    for row in report.broken:
        text = (
            f'{row["count"]:,} of {row["of"]:,} values of {row["name"]} are '
            'NaN or infinite'
        )
        share = row['count'] / row['of']
        count, name = row['count'], row['name']
        yield _found('nonfinite_weight', row, text, count, share, name)
    row = report.first_nonfinite or {}
    if row:
        text = (
            f'{row["tensor"]} is the first tensor of a mixer with NaN or '
            f'infinity on the images ({row["count"]:,} values)'
        )
        count, name = row['count'], row['tensor']
        yield _found('nonfinite_tensor', row, text, count, 0.0, name)


def _direction(
    kind: str, key: str, say: Callable[[Row], str]
) -> Callable[[StabilityReport], Findings]:
    """Compare one number of each layer and direction."""
    level = THRESHOLDS[kind][1]

    def look(report: StabilityReport) -> Findings:
        for row in report.directions:
            value = row.get(key)
            if value is not None and value >= level and value > 0:
                yield _found(kind, row, say(row), value)

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


def largest_shares(rows: Sequence[Row]) -> list[Row]:
    """Find in each layer the tensor that comes closest to float16's limit."""
    layers: dict[int, list[Row]] = {}
    for row in rows:
        if row['observed'] is not None and row['tensor'] not in FLOAT32:
            layers.setdefault(row['layer'], []).append(row)

    def size(row: Row) -> float:  # NaN is the worst
        seen = row['observed']
        return math.inf if math.isnan(seen) else seen

    return [max(layers[layer], key=size) for layer in sorted(layers)]


def _overflow(report: StabilityReport) -> Findings:
    for row in largest_shares(report.tensors):
        value = row['observed']
        share = value / LIMITS['float16']
        if share >= THRESHOLDS['near_overflow'][1]:
            kind = 'overflow' if share >= 1 else 'near_overflow'
            text = (
                f'{row["tensor"]} reaches {number(value)} on the images, '
                f'{number(share)} times the largest float16'
            )
            yield _found(kind, row, text, share, share, row['tensor'])


def _certified(report: StabilityReport) -> Findings:
    rows = report.tensors
    for row in rows:
        seen, bound = row['observed'], row['bound']
        if seen is not None and seen > bound * (1 + 1e-5):
            text = (
                f'{row["tensor"]} reaches {number(seen)}, above its bound '
                f'{number(bound)}'
            )
            share = seen / bound
            yield _found('above_bound', row, text, share, name=row['tensor'])
    infinite = sorted({r['layer'] for r in rows if math.isinf(r['bound'])})
    if infinite:
        yield _of_layers(
            'uncertified',
            infinite,
            'the state has no bound that holds for all images, as an '
            'eigenvalue (or the norm of a full matrix) does not decay',
        )
    broken = {r['layer'] for r in rows if math.isnan(r['bound'])}
    known = {*infinite, *broken}
    risky = [i for i in overflows(rows, 'float16') if i not in known]
    if risky:
        yield _of_layers(
            'may_overflow',
            risky,
            'float16 is not certified, a bound exceeds its largest number; '
            'that is no overflow, only not excluded',
        )


def _of_layers(
    kind: str, layers: Sequence[int], text: str
) -> StabilityFinding:
    count = len(layers)
    text = f'{listed(layers)}: {text}'
    return StabilityFinding(kind, text, count, count, layers[0])


def listed(layers: Sequence[int]) -> str:
    """Name layers, by ranges where they are many.

    Example:
        >>> listed([0, 1, 2, 5])
        'layers 0 to 2, 5'
    """
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


def _small(report: StabilityReport) -> Findings:
    for row in report.tensors:
        share = row['small']
        if share is not None and share >= THRESHOLDS['small_values'][1]:
            text = (
                f'{percent(share)} of {row["tensor"]} is below 6.1e-05, where '
                'float16 loses digits'
            )
            yield _found('small_values', row, text, share, name=row['tensor'])


def _weights(report: StabilityReport) -> Findings:
    for row in report.weights:
        if row.get('sigma') is not None:
            middle = _typical(report.weights, row)
            for kind, value, excess, text in _weight_remarks(row, middle):
                text = f'{row["name"]} {text}'
                yield _found(kind, row, text, value, excess, row['name'])


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


def _attribution(report: StabilityReport) -> Findings:
    value = report.sensitivity.get('instability')
    level = THRESHOLDS['unstable_attribution'][1]
    if value is not None and value >= level:
        text = (
            f'attributions change by {percent(value)} of their norm when '
            'noise with a standard deviation of 0.02 is added to the images'
        )
        kind = 'unstable_attribution'
        yield StabilityFinding(kind, text, value, value / level)


def _training(report: StabilityReport) -> Findings:
    training = report.source.training
    curves = training.curves
    step = curves.first_nonfinite_step()
    if step is not None:
        text = f'the loss was first NaN or infinite at iteration {step:,}'
        yield _of_training('nonfinite_loss', step, text, 0.0)
    yield from _loss_rise(finite(curves.series('loss')[1]))
    yield from _spikes(*curves.series('grad_norm'))
    for record in training.stability:
        values = finite(record.get('spectral_abscissa'))
        if values and max(values) > 0:
            text = (
                'an eigenvalue had a positive real part, '
                f'{number(max(values))} per step, first recorded at '
                f'iteration {record["step"]:,}'
            )
            yield _of_training('unstable_before', max(values), text)
            break


def _of_training(
    kind: str, value: float, text: str, excess: float | None = None
) -> StabilityFinding:
    if excess is None:
        excess = value / (THRESHOLDS[kind][1] or 1.0)
    return StabilityFinding(kind, f'training: {text}', value, excess)


def _loss_rise(losses: Sequence[float]) -> Findings:
    """Compare means over a twentieth of the run, so that noise is none."""
    size = max(len(losses) // 20, 1)
    means = [
        sum(losses[i : i + size]) / size for i in range(len(losses) - size + 1)
    ]
    level = THRESHOLDS['loss_rise'][1]
    if means and min(means) > 0 and means[-1] >= level * min(means):
        ratio = means[-1] / min(means)
        text = (
            f'the loss ended at {number(means[-1])}, {number(ratio)} times '
            f'its lowest, {number(min(means))}'
        )
        yield _of_training('loss_rise', ratio, text)


def _spikes(steps: Sequence[float], norms: Sequence[float]) -> Findings:
    known = [
        (norm, step)
        for step, norm in zip(steps, norms, strict=True)
        if math.isfinite(norm)
    ]
    if not known:
        return
    largest, step = max(known)
    middle = sorted(norm for norm, _ in known)[len(known) // 2]
    if middle > 0 and largest >= THRESHOLDS['spikes'][1] * middle:
        ratio = largest / middle
        text = (
            f"the gradient's norm reached {number(largest)} at iteration "
            f'{step:,.0f}, {number(ratio)} times its median'
        )
        yield _of_training('spikes', ratio, text)


LOOKS: tuple[Callable[[StabilityReport], Findings], ...] = (
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


def condense(found: Sequence[StabilityFinding], most: int = 3) -> list[Row]:
    """Keep some findings of a kind, and count the others.

    Args:
        found (Sequence[StabilityFinding]): Sorted, of :func:`find`.
        most (int): Of each kind. Defaults to 3.

    Returns:
        list[dict]: ``severity`` and ``text``.
    """
    lines: list[Row] = []
    for kind in dict.fromkeys(f.kind for f in found):
        own = [f for f in found if f.kind == kind]
        texts = [f.text for f in own[:most]]
        if rest := own[most:]:
            layers = sorted({f.layer for f in rest if f.layer is not None})
            where = listed(layers) if layers else 'the model'
            texts.append(f'… and {len(rest)} more of this kind, in {where}')
        word = WORDS[own[0].severity]
        lines += [dict(severity=word, text=text) for text in texts]
    return lines


def headline(found: Sequence[StabilityFinding]) -> str:
    """Count the findings by severity, in words."""
    if not found:
        return NOTHING
    counts = [
        f'{count} {word}'
        for severity, word in WORDS.items()
        if (count := sum(f.severity == severity for f in found))
    ]
    plural = 's' if len(found) > 1 else ''
    return f'{len(found)} finding{plural}: {", ".join(counts)}'

"""Eigenvalues, step sizes, memory and decay, by layer and direction."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmstabvim.analysis.mixers import WAYS
from mmstabvim.layers import SelectiveSSM, VisionMambaBlock, scan_kind
from mmstabvim.stability import (
    count_nonfinite,
    gradient_flow,
    growth_exponent,
    step_ranges,
)

Row = dict[str, Any]
Rows = list[Row]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NAMES = tuple(f'q{round(100 * q):02d}' for q in QUANTILES)

GROWTH = {'growth': 1, 'growth_4x': 4, 'growth_16x': 16}
"""Growth exponents, and at how many lengths of the sequence."""

SHORT = 2.0
"""Tokens within which a mode counts as forgetting at once."""
LONG = 10.0
"""Lengths of the sequence beyond which a mode counts as an integrator."""

DECAY_BINS, DECAY_TOP = 50, 60  # to 1, and to 1.2
DELTA_LOW, DELTA_DECADES, DELTA_BINS = -6, 8, 10  # 1e-6 to 100

DRAWN = 512
"""Eigenvalues of a layer and direction that are drawn."""
KEPT = 1 << 16
"""Step sizes of an image and direction that enter quantiles."""


class Direction:
    """One direction of one layer, and its steps on images.

    Args:
        layer (int): Place of its block in the model.
        way (str): ``'forward'`` or ``'backward'``.
        name (str): Of the module.
        ssm (SelectiveSSM): The layer.
        number (int): Of the direction in it.
    """

    def __init__(
        self, layer: int, way: str, name: str, ssm: SelectiveSSM, number: int
    ) -> None:
        self.layer, self.way, self.name = layer, way, name
        self.reverse = ssm.order.reverse[number]
        self.values, self.condition = spectrum(ssm, number)
        self.kind = None
        if self.values is not None:
            self.kind = scan_kind(ssm.state_matrix)
        self.images = self.tokens = 0
        self.nonfinite = 0
        self.sums: Tensor | None = None  # of the steps, by channel
        self.growth = dict.fromkeys(GROWTH, -math.inf)
        self.flows: list[tuple[float, float]] = []
        self.ranges: list[dict[str, float]] = []
        self.kept: list[Tensor] = []
        self.decays = torch.zeros(DECAY_TOP + 1, dtype=torch.int64)
        self.deltas = torch.zeros(DELTA_DECADES * DELTA_BINS + 2).long()

    @property
    def place(self) -> Row:
        """Begin each of its rows."""
        return dict(layer=self.layer, direction=self.way)

    @torch.no_grad()
    def add(self, delta: Tensor) -> None:
        """Take the step sizes (1, length, d_inner) of an image."""
        delta = delta.float().cpu()
        bad = int(count_nonfinite(dict(delta=delta))['delta'])
        self.nonfinite += bad
        if bad or self.values is None:
            return
        values = channels(self.values, delta.shape[-1])
        self.images += 1
        self.tokens += delta.shape[1]
        steps = delta.double().sum((0, 1))
        self.sums = steps if self.sums is None else self.sums + steps
        for key, times in GROWTH.items():
            length = times * delta.shape[1]
            found = float(growth_exponent(delta, values.real, length))
            self.growth[key] = max(self.growth[key], found)
        flow = gradient_flow(delta, values, self.reverse)
        self.flows.append((float(flow.vanished), float(flow.exploding)))
        ranges = step_ranges(delta, values)._asdict()
        self.ranges.append({k: float(v) for k, v in ranges.items()})
        self.kept.append(some(delta.flatten(), KEPT, self.images))
        self.deltas += delta_counts(delta)
        self.decays += decay_counts(delta[0], values.real)

    # ------------------------------------------------------------- rows

    def row(self) -> Row:
        """All numbers of this direction; None where there are none."""
        row: Row = dict(**self.place, name=self.name)
        row |= spectrum_row(self.values, self.condition)
        row['kind'] = self.kind
        row['nonfinite_steps'] = self.nonfinite
        if self.sums is None or self.values is None:
            return row
        row |= combine_ranges(self.ranges)
        row |= named('delta', torch.cat(self.kept))
        vanished, exploding = torch.tensor(self.flows).mean(0).tolist()
        row |= dict(vanished=vanished, exploding=exploding)
        row |= self.growth
        row |= self.horizon_row(self.values, self.sums)
        # share of (token, channel, mode)
        grown = int(self.decays[DECAY_BINS:].sum())
        row['growing'] = grown / int(self.decays.sum())
        return row

    def horizon_row(self, values: Tensor, sums: Tensor) -> Row:
        """Memory in tokens: quantiles, and the shares at both ends."""
        tokens = horizons(values, sums / self.tokens)
        length = self.tokens / self.images
        row = named('horizon', tokens.flatten())
        row['short'] = float((tokens < SHORT).double().mean())
        row['long'] = float((tokens > LONG * length).double().mean())
        row['tokens'] = length
        return row

    def eigenvalue_rows(self) -> Rows:
        """Some eigenvalues, whole channels, the slowest one among them."""
        if self.values is None:
            return []
        count = len(self.values)
        most = max(DRAWN // self.values.shape[1], 1)
        chosen = torch.linspace(0, count - 1, min(most, count)).long()
        slowest = self.values.real.amax(1).argmax()[None]
        rows = []
        for i in torch.cat([chosen, slowest]).unique().tolist():
            where = (i + 0.5) / count
            for value in self.values[i].tolist():
                value = complex(value)
                point = dict(real=value.real, imag=value.imag, place=where)
                rows.append(self.place | point)
        return rows

    def decay_rows(self) -> Rows:
        """Histogram of ``|exp(delta A)|``; the last bin has no end."""
        edges = [i / DECAY_BINS for i in range(DECAY_TOP + 1)] + [math.inf]
        return self.histogram(self.decays, edges)

    def delta_rows(self) -> Rows:
        """Histogram of the step sizes, by powers of ten."""
        inner = [
            10.0 ** (DELTA_LOW + i / DELTA_BINS)
            for i in range(DELTA_DECADES * DELTA_BINS + 1)
        ]
        return self.histogram(self.deltas, [0.0, *inner, math.inf])

    def histogram(self, counts: Tensor, edges: list[float]) -> Rows:
        """Rows of a histogram, none of nothing."""
        total = int(counts.sum())
        if not total:
            return []
        bins = zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
        return [
            self.place | dict(low=low, high=high, share=count / total)
            for count, low, high in bins
        ]


def all_directions(
    blocks: Mapping[str, VisionMambaBlock],
) -> list[list[Direction]]:
    """The directions of every block, in the model's order."""
    return [
        [
            Direction(layer, way, f'{name}.mixer.ssm.{i}', block.mixer.ssm, i)
            for i, way in enumerate(WAYS)
        ]
        for layer, (name, block) in enumerate(blocks.items())
    ]


@torch.no_grad()
def spectrum(
    ssm: SelectiveSSM, number: int
) -> tuple[Tensor | None, float | None]:
    """Eigenvalues (rows, d_state) on the CPU, and the worst condition number.

    Of a pair both; None where a parameter of the matrix is not finite.
    """
    matrix = ssm.state_matrix
    if not all(torch.isfinite(p).all() for p in matrix.free):
        return None, None
    values = matrix.by_direction(matrix.eigenvalues())[number].detach().cpu()
    if matrix.multiplicity == 2:
        values = torch.cat([values, values.conj()], 1)
    condition = matrix.by_direction(matrix.condition())[number]
    return values, float(condition.amax())


def spectrum_row(values: Tensor | None, condition: float | None) -> Row:
    """Extremes of the eigenvalues."""
    if values is None:
        return dict(abscissa=None, radius=None, condition=None, unstable=None)
    return dict(
        abscissa=float(values.real.max()),
        radius=float(values.abs().max()),
        condition=condition,
        unstable=float((values.real > 0).double().mean()),
    )


def channels(values: Tensor, d_inner: int) -> Tensor:
    """Eigenvalues (rows, N) as (d_inner, N)."""
    return values.repeat_interleave(d_inner // len(values), 0)


def horizons(values: Tensor, mean_delta: Tensor) -> Tensor:
    """Tokens until a mode has decayed to 1/e; infinite unless it decays.

    Args:
        values (Tensor): (rows, N), eigenvalues.
        mean_delta (Tensor): (d_inner,), step size.

    Returns:
        Tensor: (d_inner, N), float64.
    """
    real = channels(values, len(mean_delta)).real.double()
    rate = -real * mean_delta.double()[:, None]
    return torch.where(rate > 0, 1 / rate, torch.inf)


def quantiles(values: Tensor) -> list[float]:
    """``QUANTILES`` of a vector, of an infinite one without NaN."""
    ordered = values.double().sort().values
    spots = [q * (len(ordered) - 1) for q in QUANTILES]
    found = []
    for spot in spots:
        low, high = ordered[math.floor(spot)], ordered[math.ceil(spot)]
        part = spot - math.floor(spot)
        # not inf - inf
        step = part * float(high - low) if part and high > low else 0.0
        found.append(float(low) + step)
    return found


def named(prefix: str, values: Tensor) -> Row:
    """Quantiles by their names."""
    pairs = zip(NAMES, quantiles(values), strict=True)
    return {f'{prefix}_{name}': value for name, value in pairs}


def some(values: Tensor, most: int, seed: int) -> Tensor:
    """All of a vector, or as many drawn from it."""
    if len(values) <= most:
        return values
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), (most,), generator=generator)]


def decay_counts(delta: Tensor, real: Tensor) -> Tensor:
    """Count ``exp(delta Re lambda)`` by bin.

    Bins are closed at their upper ends, so that 1 is no growth.

    Args:
        delta (Tensor): (length, d_inner).
        real (Tensor): (d_inner, N).
    """
    decay = torch.exp(delta[..., None] * real)
    place = decay.mul_(DECAY_BINS).ceil_().sub_(1).clamp_(0, DECAY_TOP)
    return torch.bincount(place.flatten().long(), minlength=DECAY_TOP + 1)


def delta_counts(delta: Tensor) -> Tensor:
    """Count step sizes by bin; the ends have bins, too."""
    top = DELTA_DECADES * DELTA_BINS + 1
    spot = (delta.double().log10() - DELTA_LOW) * DELTA_BINS
    place = spot.floor().add(1).clamp(0, top).flatten().long()
    return torch.bincount(place, minlength=top + 1)


def combine_ranges(found: list[dict[str, float]]) -> Row:
    """Ranges over all images."""

    def each(name: str) -> list[float]:
        return [ranges[name] for ranges in found]

    return dict(
        delta_min=min(each('delta_min')),
        delta_max=max(each('delta_max')),
        delta_mean=sum(each('delta_mean')) / len(found),
        skipped=sum(each('skipped')) / len(found),
        max_decay_exponent=max(each('max_decay_exponent')),
        max_phase=max(each('max_phase')),
        decay_min=min(each('decay_min')),
        decay_max=max(each('decay_max')),
    )

"""What every tensor of the mixers reaches: seen on images, and proven."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from certify_ranges import DTYPES, ORDER, PARTS, make_rows
from rich.progress import Progress
from torch import Tensor

from mmstabvim.layers import VisionMambaBlock
from mmstabvim.layers.mixer_ranges import (
    DIRECTED,
    FLOAT32,
    SHARED,
    MixerRanges,
    certify_mixer,
    largest_values,
)

Row = dict[str, Any]
Rows = list[Row]
Values = list[dict[str, float]]

LIMITS = {name: torch.finfo(getattr(torch, name)).max for name in DTYPES}
SMALLEST = torch.finfo(torch.float16).tiny
"""Below it a float16 loses digits."""


class Seen:
    """Largest values of a mixer's tensors, and what is not finite."""

    def __init__(self) -> None:
        self.largest: Values = []
        self.small: Values = []
        self.images = 0
        self.nonfinite: tuple[str, str, int] | None = None

    @torch.no_grad()
    def add(self, traced: MixerRanges) -> None:
        """Take the tensors of an image."""
        parts = [traced.shared, *traced.directions]
        largest = largest_values(traced)
        values = [value for part in largest for value in part.values()]
        # most often there is none, and nothing to search for
        if self.nonfinite is None and not all(map(math.isfinite, values)):
            self.nonfinite = first_nonfinite(parts)
        self.largest = merge(self.largest, largest, worse)
        small = [
            {n: small_share(t) for n, t in part.items() if n not in FLOAT32}
            for part in parts
        ]
        self.small = merge(self.small, small, lambda a, b: a + b)
        self.images += 1


def worse(a: float, b: float) -> float:
    """The larger one; NaN stays NaN."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def merge(old: Values, new: Values, combine: Any) -> Values:
    """Join two lists of numbers by name."""
    if not old:
        return new
    return [
        {k: combine(a[k], v) if k in a else v for k, v in b.items()}
        for a, b in zip(old, new, strict=True)
    ]


def small_share(tensor: Tensor) -> float:
    """Share of the elements that a float16 would hold with fewer digits."""
    size = tensor.abs()
    return float(((size > 0) & (size < SMALLEST)).float().mean())


def first_nonfinite(
    parts: Sequence[Mapping[str, Tensor]],
) -> tuple[str, str, int] | None:
    """Direction, name and count of the first tensor with a NaN."""
    given = dict(zip(PARTS, parts, strict=True))
    for part, names in ORDER:
        for name in names:
            tensor = given[part].get(name)
            if tensor is None:
                continue
            count = int((~torch.isfinite(tensor)).sum())
            if count:
                return part, name, count
    return None


def bounds_of(
    blocks: Mapping[str, VisionMambaBlock], progress: Progress
) -> dict[str, Values]:
    """Bounds under float16 of every block; NaN of one that is not finite."""
    bar = progress.add_task('certified ranges', total=len(blocks))
    found = {}
    for name, block in blocks.items():
        try:
            ranges = certify_mixer(block.mixer, block.norm, torch.float16)
            found[name] = largest_values(ranges)
        except ValueError:  # a weight that is not finite
            found[name] = [
                dict.fromkeys(names, math.nan)
                for names in (SHARED, DIRECTED, DIRECTED)
            ]
        progress.advance(bar)
    return found


def tensor_rows(bounds: dict[str, Values], seen: Mapping[str, Seen]) -> Rows:
    """A row for each tensor with bound, largest value and limit."""
    observed = {
        name: found.largest for name, found in seen.items() if found.images
    }
    rows = make_rows(bounds, observed, torch.float16)
    for row in rows:
        found = seen.get(row['name'])
        half = row['tensor'] not in FLOAT32
        row['small'] = None
        if found is not None and found.images and half:
            part = found.small[PARTS.index(row['direction'])]
            row['small'] = part[row['tensor']] / found.images
    return rows


def overflows(rows: Rows, dtype: str) -> list[int]:
    """Layers that this proof does not exclude from overflowing."""
    limit = LIMITS[dtype]
    return sorted(
        {
            row['layer']
            for row in rows
            if not row['bound']
            <= (LIMITS['float32'] if row['tensor'] in FLOAT32 else limit)
        }
    )


def largest_shares(rows: Rows) -> Rows:
    """Per layer the tensor that comes closest to float16's limit."""
    found = []
    for layer in sorted({row['layer'] for row in rows}):
        own = [
            row
            for row in rows
            if row['layer'] == layer
            and row['observed'] is not None
            and row['tensor'] not in FLOAT32
        ]
        if own:
            # NaN is the worst
            found.append(max(own, key=lambda row: rank(row['observed'])))
    return found


def rank(value: float) -> float:
    """NaN above everything."""
    return math.inf if math.isnan(value) else value

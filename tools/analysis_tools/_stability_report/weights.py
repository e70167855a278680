"""Weights: what is not finite, singular values, stable ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmstabvim.stability import (
    count_nonfinite,
    effective_rank,
    find_layers,
    layer_norms,
    singular_values,
)
from mmstabvim.stability.weights.layers import current_weight, operator_of

Row = dict[str, Any]
Rows = list[Row]

POINTS = 64
"""Of a spectrum that are drawn."""


def layer_of(name: str, blocks: Sequence[str]) -> int | None:
    """Number of the block that a parameter or module belongs to."""
    for number, block in enumerate(blocks):
        if name.startswith(f'{block}.'):
            return number
    return None


def way_of(name: str) -> str:
    """Direction that a name belongs to, empty for none."""
    for number, way in enumerate(('forward', 'backward')):
        if f'.directions.{number}.' in name:
            return way
    return ''


def nonfinite_rows(model: nn.Module, blocks: Sequence[str]) -> Rows:
    """Parameters and buffers with a NaN or an infinity, in their order."""
    tensors = {n: t for n, t in model.state_dict().items() if t.numel()}
    counts = count_nonfinite(tensors)
    return [
        dict(
            layer=layer_of(name, blocks),
            direction=way_of(name),
            name=name,
            count=int(count),
            of=tensors[name].numel(),
        )
        for name, count in counts.items()
        if int(count)
    ]


def weight_rows(model: nn.Module, blocks: Sequence[str]) -> tuple[Rows, Rows]:
    """A row for each linear layer and convolution, and spectra to draw."""
    layers = find_layers(model, ['*'])
    fine = {
        name: layer
        for name, layer in layers.items()
        if torch.isfinite(current_weight(layer)).all()
    }
    norms = known_norms(fine)
    rows: Rows = []
    spectra: Rows = []
    for name, layer in layers.items():
        row: Row = dict(
            layer=layer_of(name, blocks),
            direction=way_of(f'{name}.'),
            name=name,
            kind=name.rpartition('.')[2],
            shape='x'.join(map(str, current_weight(layer).shape)),
            finite=name in fine,
        )
        if name in norms:
            found, values = measure_weight(layer, norms[name])
            row |= found
            spectra += spectrum_rows(row, values)
        rows.append(row)
    return rows, spectra


def known_norms(layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Norms of the layers that there is a bound for."""
    known = {}
    for name, layer in layers.items():
        try:
            operator_of(layer)
        except ValueError:  # of its padding
            continue
        known[name] = layer
    return layer_norms(known) if known else {}


@torch.no_grad()
def measure_weight(
    layer: nn.Module, sigma: float
) -> tuple[Row, Tensor | None]:
    """Norm and ranks; singular values where the weight is one matrix."""
    operator, weight = operator_of(layer), current_weight(layer).double()
    energy = float(weight.square().sum())
    exact = operator.factor == 1 and not operator.depthwise
    row: Row = dict(sigma=sigma, exact=exact)
    if operator.depthwise:  # per token
        return row | dict(stable_rank=energy / (sigma**2 or 1.0)), None
    if operator.groups > 1:
        return row, None
    values = singular_values(weight.flatten(1)).cpu()
    largest = float(values[0])
    return row | dict(
        stable_rank=energy / (largest**2 or 1.0),
        effective_rank=float(effective_rank(values)),
        full_rank=len(values),
        condition=largest / float(values[-1]) if values[-1] else torch.inf,
    ), values


def spectrum_rows(row: Row, values: Tensor | None) -> Rows:
    """Singular values over the largest, at most ``POINTS`` of them."""
    if values is None or len(values) < 2 or not values[0]:
        return []
    last = len(values) - 1
    places = torch.linspace(0, last, min(POINTS, last + 1)).long().tolist()
    return [
        dict(
            facet=row['kind'],
            layer=row['layer'],
            name=row['name'],
            x=i / last,
            value=float(values[i] / values[0]),
        )
        for i in places
    ]

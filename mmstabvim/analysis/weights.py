"""Weights of a model: not finite values, singular values, stable ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mmstabvim.analysis.mixers import WAYS, layer_of, way_of
from mmstabvim.stability import (
    count_nonfinite,
    effective_rank,
    find_layers,
    layer_norms,
    singular_values,
    spectral_norm,
)
from mmstabvim.stability.weights.layers import (
    Operator,
    current_weight,
    operator_of,
    weight_parts,
)
from mmstabvim.visualization import Quantity, line_figure

Row = dict[str, Any]
Rows = list[Row]

POINTS = 64
"""Points of a spectrum that are drawn."""


def nonfinite_rows(model: nn.Module, blocks: Sequence[str]) -> Rows:
    """List parameters and buffers with a NaN or an infinity."""
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
    """Measure each linear layer and convolution; spectra to draw."""
    layers = find_layers(model, ['*'])
    fine = {
        name: layer
        for name, layer in layers.items()
        if torch.isfinite(current_weight(layer)).all()
    }
    norms = known_norms(fine)
    rows: Rows = []
    spectra: Rows = []
    for layer_name, layer in layers.items():
        kind = layer_name.rpartition('.')[2]
        parts = weight_parts(layer_name, layer, current_weight(layer))
        for name, part in parts.items():
            weight = part.view()
            row: Row = dict(
                layer=layer_of(name, blocks),
                direction=way_of(name),
                name=name,
                kind=kind,
                shape='x'.join(map(str, weight.shape)),
                finite=layer_name in fine,
            )
            if name in norms:
                operator = operator_of(layer)
                found, values = measure_weight(operator, weight, norms[name])
                row |= found
                spectra += spectrum_rows(row, values)
            rows.append(row)
    return rows, spectra


def known_norms(layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Norms of the layers that have a bound."""
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
    operator: Operator, weight: Tensor, sigma: float
) -> tuple[Row, Tensor | None]:
    """Measure norm and ranks of a linear layer or convolution.

    Args:
        operator (Operator): Linear map of the weight.
        weight (Tensor): Finite weight, of one direction.
        sigma (float): Its largest singular value, or a bound.

    Returns:
        tuple[dict, Tensor | None]: ``sigma, exact, stable_rank`` (per token
        of a depthwise convolution), of one matrix also ``effective_rank,
        full_rank, condition``, and its singular values in falling order.
    """
    weight = weight.detach().double()
    energy = float(weight.square().sum())
    row: Row = dict(sigma=sigma, exact=operator.factor == 1)
    if operator.depthwise:
        row['exact'] = False
        return row | dict(stable_rank=energy / (sigma**2 or 1.0)), None
    if operator.groups > 1:
        peak = float(spectral_norm(operator.matrices(weight[None])[0]).amax())
        return row | dict(stable_rank=energy / (peak**2 or 1.0)), None
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


def norm_figure(rows: Rows, kinds: Sequence[str]) -> Figure:
    """Draw norms and stable ranks over the layers.

    Args:
        rows (list[dict]): Of :func:`norm_marks`.
        kinds (Sequence[str]): Order of the legend.

    Returns:
        Figure: A column of panels for shared weights, one per direction.
    """
    quantities = (
        Quantity('sigma', r'spectral norm $\sigma_1$'),
        Quantity('stable_rank', 'stable rank'),
    )
    return line_figure(rows, kinds, '', quantities, 'layer')


def norm_marks(rows: Sequence[Row]) -> Rows:
    """Marks of :func:`norm_figure`: weights of blocks, shared ones first."""
    marks = [
        dict(
            quantity=name,
            facet=row['direction'] or 'both directions',
            series=row['kind'],
            x=row['layer'],
            value=row[name],
        )
        for name in ('sigma', 'stable_rank')
        for row in rows
        if row['layer'] is not None and row.get(name) is not None
    ]
    order = ('both directions', *WAYS)
    return sorted(marks, key=lambda mark: order.index(mark['facet']))

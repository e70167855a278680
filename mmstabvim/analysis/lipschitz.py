"""Lipschitz bounds of a Vision Mamba, where they exist, and local gains."""

import math
import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from mmstabvim.analysis.mixers import (
    WAYS,
    find_mixer_blocks,
    last_output,
    layer_of,
    no_progress,
    run_to_mixers,
    way_of,
)
from mmstabvim.analysis.weights import measure_weight, norm_figure, norm_marks
from mmstabvim.layers import RMSNorm, VisionMambaBlock
from mmstabvim.reporting import make_table, number, render, save
from mmstabvim.stability import (
    find_layers,
    layer_norms,
    local_jacobian_norm,
    spectral_norm,
)
from mmstabvim.stability.weights.layers import (
    current_weight,
    operator_of,
    weight_parts,
)

Row = dict[str, Any]
Rows = list[Row]

SILU_LIPSCHITZ = 1.0998393201
"""Largest slope of SiLU, at 2.39936."""

LOCAL = 'mixer, on images'
SERIES = ('in_proj', 'conv1d', 'x_proj', 'dt_proj', 'out_proj', LOCAL)
NOT_LIPSCHITZ = (
    'not globally Lipschitz: step size, B and C depend on the input, and '
    'multiply it, as the gate does'
)


HEADS = {
    'layer': 'layer',
    'kind': 'kind',
    'sigma': 'σ₁',
    'stable_rank': 'stable rank',
    'lipschitz': 'Lipschitz bound',
    'statement': 'of',
    'local': 'local',
}


@dataclass
class LipschitzReport:
    """Norms, bounds and local gains of a model.

    Attributes:
        rows (list[dict]): A row for each weight, norm and statement.
        blocks (list[str]): Names of the blocks.
        facts (dict): Of the page and the JSON file.
    """

    rows: Rows
    blocks: list[str]
    facts: Row = field(default_factory=dict)

    @property
    def local(self) -> str:
        """Local Jacobian norms of the whole model, in words."""
        return _spread(self.facts['local_jacobian_norms'])


def lipschitz_report(
    model: Any,
    images: Iterable[Tensor],
    steps: int = 20,
    method: str = 'difference',
    progress: Progress | None = None,
    **facts: str,
) -> LipschitzReport:
    """Bound what can be bounded; measure the Jacobians on images.

    Args:
        model (nn.Module): With blocks of a Vision Mamba, in evaluation mode;
            changed to float64, without gradients of its parameters.
        images (Iterable[Tensor]): (1, channels, height, width) each, as the
            model reads them.
        steps (int): Of power iteration. Defaults to 20.
        method (str): Products with the Jacobian, ``'difference'`` or
            ``'double_backward'``. Defaults to ``'difference'``.
        progress (Progress, optional): Gets bars. Defaults to None.
        **facts (str): Of the page: ``config, checkpoint, origin`` of the
            images.

    Returns:
        LipschitzReport: For :func:`write`.

    Raises:
        ValueError: If the model has no block.

    Example:
        >>> report = lipschitz_report(model, images)  # doctest: +SKIP
        >>> write(report, Path('lipschitz'))  # doctest: +SKIP
    """
    progress = progress or no_progress()
    blocks = find_mixer_blocks(model)
    rows = weight_rows(model, progress)
    product = sum(
        math.log10(row['sigma']) if row['sigma'] else -math.inf for row in rows
    )
    rows += norm_rows(model)
    bar = progress.add_task('mixers', total=len(blocks))
    for name, block in blocks.items():
        rows += mixer_rows(name, block)
        progress.advance(bar)
    local = list(local_norms(model, images, steps, method, progress))
    for row in rows:
        if row['kind'] == 'MambaMixer':
            row['local'] = max(found[row['name']] for found in local)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order[_module_name(row['name'], order)])
    origin = facts.pop('origin', 'the caller')
    about: Row = dict(config=type(model).__name__, checkpoint='given weights')
    about |= facts
    about |= dict(
        images=f'{len(local)} images of {origin}',
        steps=steps,
        method=method,
        blocks=len(blocks),
        globally_lipschitz=False,
        log10_linear_norm_product=product,
        local_jacobian_norms=[found[''] for found in local],
    )
    return LipschitzReport(rows, list(blocks), about)


def _module_name(name: str, known: Collection[str]) -> str:
    """Name the layer of a direction's weight."""
    return name if name in known else name.rpartition('.')[0]


def weight_rows(model: nn.Module, progress: Progress) -> Rows:
    """Measure each linear layer and convolution."""
    layers = find_layers(model, ['*'])
    bar = progress.add_task('weights', total=len(layers))
    rows = []
    for name, layer in layers.items():
        # one by one, for the bar: those of a large model take a while
        norms = layer_norms({name: layer})
        parts = weight_parts(name, layer, current_weight(layer))
        for part, sigma in norms.items():
            weight = parts[part].view()
            found, _ = measure_weight(operator_of(layer), weight, sigma)
            row = _row(part, type(layer).__name__, 'linear', sigma)
            rows.append(row | {key: found[key] for key in found if key in row})
        progress.advance(bar)
    return rows


def norm_rows(model: nn.Module) -> list[Row]:
    """Bound each root-mean-square norm."""
    return [
        _row(
            name,
            'RMSNorm',
            'largest scale / sqrt(eps)',
            float(module.weight.detach().abs().max()) / math.sqrt(module.eps),
        )
        for name, module in model.named_modules()
        if isinstance(module, RMSNorm)
    ]


def _row(name: str, kind: str, statement: str, lipschitz: float | None) -> Row:
    """Make a row without a weight of its own."""
    return dict(
        name=name,
        kind=kind,
        sigma=None,
        exact=False,
        stable_rank=None,
        lipschitz=lipschitz,
        statement=statement,
        local=None,
    )


def mixer_rows(name: str, block: VisionMambaBlock) -> Iterator[Row]:
    """List what is and what is not Lipschitz in a mixer."""
    mixer = f'{name}.mixer'
    yield _row(mixer, 'MambaMixer', NOT_LIPSCHITZ, None)
    weight = block.mixer.in_proj.weight.detach().chunk(2)[0]
    read = float(spectral_norm(weight))
    norms = layer_norms({'conv1d': block.mixer.conv1d}).values()
    each = zip(WAYS, norms, block.mixer.direction_weights(), strict=True)
    for way, norm, weights in each:
        u = read * norm * SILU_LIPSCHITZ
        wide = [w.detach().double() for w in weights]
        _, _, dt_rows, B_rows, C_rows, dt_proj, *_ = wide
        step = dt_proj @ dt_rows
        gains = dict(u=1.0, delta=float(spectral_norm(step)))
        gains |= {
            n: float(spectral_norm(w))
            for n, w in zip('BC', (B_rows, C_rows), strict=True)
        }
        for target, gain in gains.items():
            statement = f'normalized tokens to {target}, {way}'
            yield _row(mixer, 'product bound', statement, u * gain)


def local_norms(
    model: Any,
    images: Iterable[Tensor],
    steps: int,
    method: str,
    progress: Progress,
) -> Iterator[dict[str, float]]:
    """Measure Jacobian norms on each image, in float64.

    Args:
        model (nn.Module): Changed to float64.
        images (Iterable[Tensor]): (1, channels, height, width) each.
        steps (int): Of power iteration.
        method (str): Products with the Jacobian.
        progress (Progress): Gets a bar.

    Yields:
        dict[str, float]: Of each mixer by name, and ``''`` of the model.
    """
    blocks = find_mixer_blocks(model)
    inputs = [image.double() for image in images]
    model.double().requires_grad_(False)
    if method == 'double_backward':
        # exact products with the Jacobian differentiate twice
        for module in model.modules():
            if isinstance(getattr(module, 'backend', None), str):
                module.backend = 'reference'
    options: Any = dict(steps=steps, method=method)
    bar = progress.add_task('Jacobians', total=len(inputs) * (len(blocks) + 1))
    for image in inputs:
        found = {}
        with torch.no_grad():
            tokens = run_to_mixers(model, blocks, image)[1]
        for name, block in blocks.items():
            norm = local_jacobian_norm(block.mixer, tokens[name], **options)
            found[f'{name}.mixer'] = float(norm)
            progress.advance(bar)
        norm = local_jacobian_norm(
            lambda x: last_output(model(x, mode='tensor')), image, **options
        )
        progress.advance(bar)
        yield found | {'': float(norm)}


# -------------------------------------------------------------------- results


def _describe(line: Row) -> Row:
    """Format a row for readers."""
    sigma = number(line['sigma'], 4)
    if line['sigma'] is not None and not line['exact']:
        sigma = f'≤ {sigma}'
    bound = line['lipschitz']
    return dict(
        layer=f'`{line["name"]}`',
        kind=line['kind'],
        sigma=sigma,
        stable_rank=number(line['stable_rank'], 4),
        lipschitz='none' if bound is None else number(bound, 4),
        statement=line['statement'],
        local=number(line['local'], 4),
    )


def report_marks(report: LipschitzReport) -> Rows:
    """Marks of the figure: weights, and the Jacobians of the mixers."""
    rows = [
        dict(
            row,
            kind=re.sub(r'\.\d$', '', row['name'])
            .split('.')[-1]
            .replace('mixer', LOCAL),
            layer=layer_of(row['name'], report.blocks),
            direction=way_of(row['name']),
            sigma=row['sigma'] if row['local'] is None else row['local'],
        )
        for row in report.rows
    ]
    return norm_marks([row for row in rows if row['kind'] in SERIES])


def _spread(values: Sequence[float]) -> str:
    """Median and ends of several values, in words."""
    text = number(statistics.median(values), 4)
    if len(values) == 1:
        return text
    ends = ' to '.join(number(f(values), 4) for f in (min, max))
    return f'{text} in the median, {ends}'


def write(
    report: LipschitzReport, folder: Path, formats: Sequence[str] = ()
) -> None:
    """Write lipschitz.md, .csv, .json and .png.

    Args:
        report (LipschitzReport): Of :func:`lipschitz_report`.
        folder (Path): Created where it is missing.
        formats (Sequence[str]): Of the figure besides PNG. Defaults to none.
    """
    rows = [_describe(row) for row in report.rows]
    table = make_table('lipschitz', '', '', HEADS, rows)
    page = render(
        'lipschitz.md', table=table, local=report.local, **report.facts
    )
    figure = norm_figure(report_marks(report), SERIES)
    save(folder, 'lipschitz', page, report.rows, report.facts, figure, formats)

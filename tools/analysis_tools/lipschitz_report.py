"""Report how much a trained Vision Mamba can enlarge small changes.

For every layer the largest singular value of its weight and its stable rank;
Lipschitz bounds where they exist (single layers, and products up to the
scan's input, step size, B and C) and where they do not; and, on images, the
largest singular value of the Jacobian of each mixer and of the whole model.

Writes lipschitz.md, .csv, .json, .png, .pdf and .svg.
"""

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mmstabvim.apis import trained
from mmstabvim.engine import launch
from mmstabvim.layers import RMSNorm, SelectiveSSM, VisionMambaBlock
from mmstabvim.reporting import writing
from mmstabvim.stability import (
    find_layers,
    layer_norms,
    local_jacobian_norm,
    spectral_norm,
    stable_rank,
)
from mmstabvim.stability.weights.layers import operator_of
from mmstabvim.stability.weights.lipschitz import JACOBIANS
from mmstabvim.visualization import line_figure
from mmstabvim.visualization.curves import Quantity

Row = dict[str, Any]

SILU_LIPSCHITZ = 1.0998393201
"""Largest slope of SiLU, at 2.39936."""

SERIES = ('in_proj', 'conv1d', 'x_proj', 'dt_proj', 'out_proj', 'mixer')
DIRECTIONS = ('forward', 'backward')
QUANTITIES = (
    Quantity('sigma', r'spectral norm $\sigma_1$'),
    Quantity('stable_rank', 'stable rank'),
    Quantity('local', 'local Jacobian norm'),
)
NOT_LIPSCHITZ = (
    'not globally Lipschitz: step size, B and C depend on the input, and '
    'multiply it, as the gate does'
)

PAGE = """\
# Lipschitz report

`{config}`, `{checkpoint}`.

**The model is not globally Lipschitz**: in each of its {blocks} mixers step
size, B and C of the scan depend on the tokens that they multiply, and the gate
multiplies once more, so no finite constant holds for all inputs. What can be
said:

- Locally: on {images} the Jacobian of the output by the normalized image has
  a largest singular value of {local}. These are estimates from below
  ({steps} steps of power iteration) and hold for these images only.
- Layer by layer: the largest singular value of each weight, below.
- From a mixer's normalized tokens to the scan's input u, step size Δ, B and C
  there are Lipschitz bounds: products of norms and of SiLU's largest slope.
- `linear_norm_product`, the product of the norms of all linear layers and
  convolutions, is 10^{product:.1f}. It is no bound of anything: it counts
  neither residual streams nor norms, gates or scans.

{table}

σ₁: exact for linear layers and for patches that do not overlap, at most
0.07 % too large for a depthwise convolution of a sequence of any length, an
upper bound where it says ≤. The stable rank of a depthwise convolution is
per token. Local: the largest over the images of the Jacobian norm of a mixer
at its own tokens. A norm's bound is reached at tokens near zero only.

![By layer](lipschitz.png)
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained.add_options(parser, samples=4)
    parser.add_argument(
        '--steps',
        type=int,
        default=20,
        help='of power iteration (default: %(default)s)',
    )
    parser.add_argument(
        '--method',
        choices=JACOBIANS,
        default='difference',
        help='products with the Jacobian: exact ones need the slow reference '
        'scan (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    trained.check_samples(parser, args, 1)
    if args.steps < 1:
        parser.error(f'--steps must be at least 1, got {args.steps}')
    return args


# ------------------------------------------------------------------- weights


def weight_rows(model: nn.Module, progress: Progress) -> list[Row]:
    """A row for each linear layer and convolution."""
    layers = find_layers(model, ['*'])
    bar = progress.add_task('weights', total=len(layers))
    rows = []
    for name, layer in layers.items():
        # one by one, for the bar: those of a large model take a while
        sigma = layer_norms({name: layer})[name]
        operator = operator_of(layer)
        weight: Any = layer.weight
        if operator.depthwise:
            rank = float(weight.detach().double().square().sum()) / (
                sigma**2 or 1.0
            )
        else:
            matrices = operator.matrices(weight.detach()[None])[0]
            rank = _block_rank(matrices)
        rows.append(
            dict(
                name=name,
                kind=type(layer).__name__,
                sigma=sigma,
                exact=operator.factor == 1,
                stable_rank=rank,
                lipschitz=sigma,
                statement='linear',
                local=None,
            )
        )
        progress.advance(bar)
    return rows


def _block_rank(matrices: Tensor) -> float:
    """Stable rank of a block-diagonal matrix, (groups, m, n)."""
    if len(matrices) == 1:
        return float(stable_rank(matrices[0]))
    peak = spectral_norm(matrices).amax()
    total = matrices.double().square().sum()
    return float(total / peak.square()) if peak else 0.0


def norm_rows(model: nn.Module) -> list[Row]:
    """A row for each root-mean-square norm."""
    return [
        row(
            name,
            'RMSNorm',
            'largest scale / sqrt(eps)',
            float(module.weight.detach().abs().max()) / math.sqrt(module.eps),
        )
        for name, module in model.named_modules()
        if isinstance(module, RMSNorm)
    ]


def row(name: str, kind: str, statement: str, lipschitz: float | None) -> Row:
    """A row without a weight of its own."""
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
    """What is and what is not Lipschitz in a mixer."""
    mixer = f'{name}.mixer'
    yield row(mixer, 'MambaMixer', NOT_LIPSCHITZ, None)
    weight = block.mixer.in_proj.weight.detach().chunk(2)[0]
    read = float(spectral_norm(weight))
    for way, direction in zip(DIRECTIONS, block.mixer.directions, strict=True):
        norms = layer_norms({'conv1d': direction.conv1d})
        u = read * norms['conv1d'] * SILU_LIPSCHITZ
        parts = direction.x_proj.weight.detach().split(direction.sizes)
        step = direction.dt_proj.weight.detach().double() @ parts[0].double()
        gains = dict(u=1.0, delta=float(spectral_norm(step)))
        gains |= {
            n: float(spectral_norm(w))
            for n, w in zip('BC', parts[1:], strict=True)
        }
        for target, gain in gains.items():
            statement = f'normalized tokens to {target}, {way}'
            yield row(mixer, 'product bound', statement, u * gain)


# ------------------------------------------------------------------ Jacobians


def last_output(output: Any) -> Tensor:
    """Logits, or the last of several features."""
    while isinstance(output, (tuple, list)):
        output = output[-1]
    return output


def use_reference_scan(model: nn.Module) -> None:
    """Exact products with the Jacobian differentiate twice."""
    for module in model.modules():
        if isinstance(module, SelectiveSSM):
            module.backend = 'reference'


def normed_tokens(
    model: Any, blocks: dict[str, VisionMambaBlock], image: Tensor
) -> dict[str, Tensor]:
    """What each mixer reads."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable:
        return lambda _, inputs: found.update({name: inputs[0].detach()})

    handles = [
        block.mixer.register_forward_pre_hook(keeper(name))
        for name, block in blocks.items()
    ]
    try:
        with torch.no_grad():
            model(image, mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
    return found


def local_norms(
    args: argparse.Namespace, cfg: Any, model: Any, progress: Progress
) -> Iterator[dict[str, float]]:
    """Of each image: the Jacobian norm of each mixer, and ``''`` of all."""
    blocks = trained.find_blocks(model)
    # in float64, for differences
    images = [
        image.double() for image in trained.load_images(args, cfg, model)
    ]
    model.double().requires_grad_(False)
    if args.method == 'double_backward':
        use_reference_scan(model)
    options = dict(steps=args.steps, method=args.method)
    bar = progress.add_task('Jacobians', total=len(images) * (len(blocks) + 1))
    for image in images:
        found = {}
        tokens = normed_tokens(model, blocks, image)
        for name, block in blocks.items():
            norm = local_jacobian_norm(block.mixer, tokens[name], **options)
            found[f'{name}.mixer'] = float(norm)
            progress.advance(bar)
        norm = local_jacobian_norm(
            lambda x: last_output(model(x, mode='tensor')), image, **options
        )
        progress.advance(bar)
        yield found | {'': float(norm)}


def add_local(rows: Sequence[Row], local: Sequence[dict[str, float]]) -> None:
    """Put the largest of each mixer into its row."""
    for line in rows:
        if line['kind'] == 'MambaMixer':
            line['local'] = max(found[line['name']] for found in local)


# -------------------------------------------------------------------- results


def describe(line: Row) -> Row:
    """A row for people."""
    sigma = writing.number(line['sigma'], 4)
    if line['sigma'] is not None and not line['exact']:
        sigma = f'≤ {sigma}'
    bound = line['lipschitz']
    return dict(
        layer=f'`{line["name"]}`',
        kind=line['kind'],
        sigma=sigma,
        stable_rank=writing.number(line['stable_rank'], 4),
        lipschitz='none' if bound is None else writing.number(bound, 4),
        statement=line['statement'],
        local=writing.number(line['local'], 4),
    )


def draw(rows: Sequence[Row], blocks: Sequence[str]) -> Any:
    """Norms, stable ranks and local norms over the layers."""
    marks = []
    for number, block in enumerate(blocks):
        for line in rows:
            if not line['name'].startswith(f'{block}.mixer'):
                continue
            kind = line['name'].split('.')[-1]
            ways = [
                way
                for i, way in enumerate(DIRECTIONS)
                if 'directions' not in line['name']
                or f'.directions.{i}.' in line['name']
            ]
            marks += [
                dict(
                    quantity=quantity.name,
                    facet=way,
                    series=kind,
                    x=number,
                    value=line[quantity.name],
                )
                for quantity in QUANTITIES
                for way in ways
                if line[quantity.name] is not None
            ]
    return line_figure(marks, SERIES, '', QUANTITIES, 'layer')


def spread(values: Sequence[float]) -> str:
    """Median and ends."""
    text = writing.number(statistics.median(values), 4)
    if len(values) == 1:
        return text
    ends = ' to '.join(writing.number(f(values), 4) for f in (min, max))
    return f'{text} in the median, {ends}'


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, draw, write."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with launch.explain_errors(), Progress(console=console) as progress:
        cfg, model = trained.load_model(args)
        blocks = trained.find_blocks(model)
        rows = weight_rows(model, progress)
        sigmas = [line['sigma'] for line in rows]
        rows += norm_rows(model)
        bar = progress.add_task('mixers', total=len(blocks))
        for name, block in blocks.items():
            rows += mixer_rows(name, block)
            progress.advance(bar)
        local = list(local_norms(args, cfg, model, progress))
    add_local(rows, local)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda line: order[line['name']])
    whole = [found[''] for found in local]
    where = 'the test set' if args.images is None else str(args.images)
    product = sum(
        math.log10(sigma) if sigma else -math.inf for sigma in sigmas
    )
    facts = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        images=f'{len(whole)} images of {where}',
        steps=args.steps,
        method=args.method,
        blocks=len(blocks),
        globally_lipschitz=False,
        log10_linear_norm_product=product,
        local_jacobian_norms=whole,
    )
    columns = dict(layer='layer', kind='kind', sigma='σ₁')
    columns |= dict(stable_rank='stable rank', lipschitz='Lipschitz bound')
    columns |= dict(statement='of', local='local')
    table = writing.markdown([describe(line) for line in rows], columns)
    local_text = spread(whole)
    page = PAGE.format(**facts, table=table, local=local_text, product=product)
    folder = trained.out_folder(args, 'lipschitz')
    writing.save(
        folder, 'lipschitz', page, rows, facts, draw(rows, list(blocks))
    )
    print(f'{len(blocks)} mixers: not globally Lipschitz')
    print(f'local Jacobian norm on {facts["images"]}: {local_text}')
    print(f'Written: {folder / "lipschitz.md"}')


if __name__ == '__main__':
    main(sys.argv[1:])

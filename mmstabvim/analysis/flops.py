"""Floating-point operations of a model, by part and operator.

One multiply-add is two operations, as for PyTorch's counter; papers often
print multiply-adds and call them FLOPs. For images of ``height`` x ``width``
a Vision Mamba has ``L`` tokens (patches and class tokens); with D channels,
E = expand * D, state size N, rank R of the step size and a convolution of K
tokens a block of two directions takes::

    in_proj      2 L D (2 E)
    conv1d       2 directions * 2 L E K
    x_proj       2 directions * 2 L E (R + 2 N)
    dt_proj      2 directions * 2 L R E
    scan         2 directions * L E (7 N + 6)
    out_proj     2 L E D

beside the patch embedding, 2 * patches * (3 * patch_size**2) D, and the head,
2 D * classes. The scan takes per token, channel and state 7 operations
(complex states: 28): delta A, exp, (delta u) B, multiply and add into the
state, multiply and add into the output; per token and channel 6: softplus 3,
delta u 1, D u 2. It is linear in L; an attention layer is quadratic.

As usual, operations done once per value are not counted (norms, activations,
gates, residuals, position embedding, resizing), nor the eigenvectors of dense
state matrices, which are computed once per batch. A segmentor's auxiliary
heads are left out: it does not need them to predict.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils import flop_counter

from mmstabvim.layers import MambaMixer, SelectiveSSM
from mmstabvim.reporting import writing

Row = dict[str, Any]
Counts = dict[str, dict[str, int]]

_SCANS = {'selective_scan', 'selective_scan_triton'}
_TITLES = {
    **dict.fromkeys(('mm', 'addmm'), 'matrix product'),
    **dict.fromkeys(('bmm', 'baddbmm'), 'matrix products'),
    'causal_conv1d': 'causal convolution, both directions',
    **dict.fromkeys(_SCANS, 'scan, both directions'),
}

# PyTorch counts every fused attention but that of the CPU
for _ending, _formula in {
    '': flop_counter.sdpa_flop,
    '_backward': flop_counter.sdpa_backward_flop,
}.items():
    _name = f'_scaled_dot_product_flash_attention_for_cpu{_ending}'
    flop_counter.flop_registry.setdefault(
        getattr(torch.ops.aten, _name), _formula
    )


@torch.no_grad()
def count_flops(model: Any, image: Tensor) -> Counts:
    """Count the operations of each module, without those of its parts.

    Args:
        model (nn.Module): Classifier, segmentor or backbone in evaluation
            mode. Its scans are set to the backend ``'auto'``: in plain
            PyTorch they would be many small operations.
        image (Tensor): (1, channels, height, width).

    Returns:
        dict[str, dict[str, int]]: Operations by operator, by the name of the
        module, ``''`` for those that the model does outside of its parts.

    Raises:
        ValueError: If a mixer runs without a scan that can be counted.

    Example:
        >>> from mmstabvim import VisionMamba
        >>> counts = count_flops(VisionMamba('tiny').eval(),
        ...                      torch.zeros(1, 3, 224, 224))
        >>> sum(sum(part.values()) for part in counts.values())
        3013521408
    """
    for module in model.modules():
        if isinstance(module, SelectiveSSM):
            module.backend = 'auto'
    with flop_counter.FlopCounterMode(display=False) as counter:
        model(image)
    root = type(model).__name__
    found = {
        name.removeprefix(root).removeprefix('.'): {
            str(operator).split('.')[-1]: number
            for operator, number in counts.items()
        }
        for name, counts in counter.get_flop_counts().items()
        if name != 'Global'
    }
    _check_scans(model, found)
    return _without_parts(found)


def _check_scans(model: nn.Module, found: Counts) -> None:
    """Refuse a model with a scan that the counter has not seen."""
    for name, module in model.named_modules():
        operators = found.get(name, {}).keys()
        if isinstance(module, MambaMixer) and not operators & _SCANS:
            raise ValueError(
                f'{name} must run a scan, got only {sorted(operators)}: a '
                'dense state matrix without eigenvectors needs matrix '
                'exponentials, which cannot be counted'
            )


def _without_parts(found: Counts) -> Counts:
    """Subtract from each module's counts those of the modules below it."""
    own = {name: dict(counts) for name, counts in found.items()}
    for name in filter(None, found):
        for operator, number in found[name].items():
            own[_module_around(name, found)][operator] -= number
    return {
        name: {operator: n for operator, n in counts.items() if n}
        for name, counts in own.items()
    }


def _module_around(name: str, known: Collection[str]) -> str:
    """Return the nearest known module above; a list is never called."""
    above = name.rpartition('.')[0]
    while above and above not in known:
        above = above.rpartition('.')[0]
    return above


def flops_rows(
    model: nn.Module, counts: Counts, depth: int | None = None
) -> list[Row]:
    """Add up counts of equal layers.

    Args:
        model (nn.Module): The model.
        counts (dict[str, dict[str, int]]): From :func:`count_flops`.
        depth (int, optional): Words of a part's name that count. Defaults to
            None, all.

    Returns:
        list[dict]: ``part, operator, modules, parameters, flops, share``, in
        the order of the model. The parameters of a part stand in its first
        row; a parameter with two names counts once.
    """
    sizes = _parameters(model, counts)
    rows: dict[str, dict[str, Row]] = {}
    for name, _ in model.named_modules():
        if not counts.get(name) and name not in sizes:
            continue
        part = _open_numbers(name, depth)
        for operator, number in (counts.get(name) or {'': 0}).items():
            row = rows.setdefault(part, {}).setdefault(
                _TITLES.get(operator, operator),
                dict(modules=0, parameters=0, flops=0),
            )
            row['modules'] += 1
            row['flops'] += number
            row['parameters'] += sizes.pop(name, 0)
    total = sum(sum(own.values()) for own in counts.values()) or 1
    return [
        dict(part=part, operator=operator) | row | {'share': flops / total}
        for part, own in rows.items()
        for operator, row in own.items()
        for flops in [row['flops']]
    ]


def _parameters(model: nn.Module, counts: Counts) -> dict[str, int]:
    """Count parameters by the nearest module around them that is called."""
    called = {name for name, own in counts.items() if own}
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        place = _module_around(name, called) or name.rpartition('.')[0]
        found[place] = found.get(place, 0) + parameter.numel()
    return found


def _open_numbers(name: str, depth: int | None) -> str:
    """Replace the numbers of layers by ``*``."""
    words = ['*' if word.isdigit() else word for word in name.split('.')]
    return '.'.join(words[:depth]) or '(model)'


def image_shape(cfg: Config) -> tuple[int, int]:
    """Find the height and width of a config's images; 224 where it is silent.

    Args:
        cfg (Config): With ``model``.

    Returns:
        tuple[int, int]: Height and width, pixels.
    """
    for size in (
        (cfg.model.get('data_preprocessor') or {}).get('size'),
        cfg.model.get('backbone', {}).get('img_size'),
        cfg.get('crop_size'),
    ):
        if isinstance(size, int):
            return size, size
        if isinstance(size, Sequence) and len(size) == 2:
            return size[0], size[1]
    return 224, 224


def make_page(
    config: str, shape: tuple[int, int], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Describe the operations of a model in Markdown.

    Args:
        config (str): Path of the config.
        shape (tuple[int, int]): Height and width of the image, pixels.
        rows (Sequence[Mapping]): From :func:`flops_rows`.

    Returns:
        str: A sentence with the sums, and a table.
    """
    keys = ('parameters', 'flops', 'share')
    total = {key: sum(row[key] for row in rows) for key in keys}
    total |= dict(part='total', operator='', modules='')
    lines = [
        dict(
            part=row['part'],
            operator=row['operator'],
            modules=f'{row["modules"]}',
            parameters=f'{row["parameters"]:,}' if row['parameters'] else '',
            gflop=f'{row["flops"] / 1e9:.4g}',
            gmac=f'{row["flops"] / 2e9:.4g}',
            share=f'{100 * row["share"]:.1f}',
        )
        for row in [*rows, total]
    ]
    heads = {key: key for key in lines[0]}
    heads |= dict(gflop='GFLOP', gmac='G multiply-adds', share='%')
    height, width = shape
    return (
        f'`{config}`, one image of {height} x {width} pixels: '
        f'{total["flops"] / 1e9:.4g} GFLOP, which are '
        f'{total["flops"] / 2e9:.4g} G multiply-adds; '
        f'{total["parameters"]:,} parameters.\n\n'
        f'{writing.markdown(lines, heads)}\n'
    )

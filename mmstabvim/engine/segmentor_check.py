"""Check that backbone, neck and heads of a segmentor fit."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from mmstabvim.engine.runner_access import model_with
from mmstabvim.registry import MODELS


def check_segmentor(model: nn.Module) -> None:
    """Raise where a Vision Mamba's maps do not suit the neck or a head.

    The first image would raise too, but after the data are loaded, and mostly
    without the name of the argument.

    Args:
        model (nn.Module): An ``EncoderDecoder`` or the like, in wrappers or
            not. Any other model, another backbone and another neck pass
            unchecked.

    Raises:
        ValueError: If ``out_type``, ``out_indices``, ``stride``,
            ``in_channels`` or ``in_index`` does not match.
    """
    model = model_with(model, 'backbone')
    backbone: Any = getattr(model, 'backbone', None)
    neck: Any = getattr(model, 'neck', None)
    heads = list(_heads(model))
    if not _is(backbone, 'VisionMamba') or not heads:
        return
    if backbone.out_type != 'featmap':
        raise ValueError(
            "the backbone's out_type must be 'featmap' for a segmentor, got "
            f'{backbone.out_type!r}'
        )
    count = len(backbone.out_indices)
    source = f"the backbone's out_indices {backbone.out_indices}"
    if _is(neck, 'SimpleFeaturePyramid'):
        _check_neck(neck, backbone)
        count = len(neck.out_strides)
        source = f"the neck's out_strides {neck.out_strides}"
    elif neck is not None:
        return
    for name, head in heads:
        _check_head(name, head, count, backbone.embed_dims, source)


def _is(module: Any, name: str) -> bool:
    """Tell a module of a registered class: hooks do not import models."""
    kind = MODELS.get(name)
    return kind is not None and isinstance(module, kind)


def _heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the heads that read maps by index, with their names."""
    for name in ('decode_head', 'auxiliary_head'):
        head: Any = getattr(model, name, None)
        parts = head if isinstance(head, nn.ModuleList) else [head]
        for part in parts:
            if hasattr(part, 'in_index') and hasattr(part, 'in_channels'):
                yield name, part


def _check_neck(neck: Any, backbone: Any) -> None:
    neck.check_count(len(backbone.out_indices))
    stride = backbone.patch_embed.projection.stride[0]
    for name, got, wanted in (
        ('in_channels', neck.in_channels, backbone.embed_dims),
        ('stride', neck.stride, stride),
    ):
        if got != wanted:
            raise ValueError(
                f"the neck's {name} must be {wanted}, as the backbone's "
                f'maps have it, got {got}'
            )


def _check_head(
    name: str, head: Any, count: int, channels: int, source: str
) -> None:
    several = isinstance(head.in_index, (list, tuple))
    indices = list(head.in_index) if several else [head.in_index]
    if any(not -count <= i < count for i in indices):
        raise ValueError(
            f'{name}: in_index must be below {count}, the number of maps of '
            f'{source}, got {head.in_index}'
        )
    each = isinstance(head.in_channels, (list, tuple))
    got = list(head.in_channels) if each else [head.in_channels]
    # one int for several maps is for all of them, concatenated
    wanted = [channels] * len(indices) if each else [channels * len(indices)]
    if got != wanted:
        raise ValueError(
            f'{name}: in_channels must be {wanted}, as the backbone has '
            f'embed_dims {channels}, got {got}'
        )

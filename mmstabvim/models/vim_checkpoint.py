"""Names of the official Vim checkpoints and of this project's, both ways.

Classifiers keep the place of their class token to themselves: the published
``midclstok`` models have it at index ``num_patches // 2`` of the sequence and
of the position embedding.
"""

import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmstabvim.layers import PatchEmbed
from mmstabvim.layers.earlier_layout import stack_directions
from mmstabvim.layers.position_embedding import (
    num_cls_tokens,
    resize_position_embedding,
    split_tokens,
)

# official name -> name in an ImageClassifier with a LinearClsHead
_OUTSIDE_LAYERS = {
    'patch_embed.proj.weight': 'backbone.patch_embed.projection.weight',
    'patch_embed.proj.bias': 'backbone.patch_embed.projection.bias',
    'pos_embed': 'backbone.pos_embed',
    'cls_token': 'backbone.cls_token',
    'norm_f.weight': 'backbone.norm.weight',
    'head.weight': 'head.fc.weight',
    'head.bias': 'head.fc.bias',
}
_SHARED = {
    'norm.weight': 'norm.weight',
    'mixer.in_proj.weight': 'mixer.in_proj.weight',
    'mixer.out_proj.weight': 'mixer.out_proj.weight',
}
# official names of both directions by the name of their joint weight
_DIRECTED = {
    'mixer.conv1d.weight': ('mixer.conv1d.weight', 'mixer.conv1d_b.weight'),
    'mixer.conv1d.bias': ('mixer.conv1d.bias', 'mixer.conv1d_b.bias'),
    'mixer.ssm.x_proj.weight': (
        'mixer.x_proj.weight',
        'mixer.x_proj_b.weight',
    ),
    'mixer.ssm.dt_proj.weight': (
        'mixer.dt_proj.weight',
        'mixer.dt_proj_b.weight',
    ),
    'mixer.ssm.dt_bias': ('mixer.dt_proj.bias', 'mixer.dt_proj_b.bias'),
    'mixer.ssm.D': ('mixer.D', 'mixer.D_b'),
    'mixer.ssm.state_matrix.A_log': ('mixer.A_log', 'mixer.A_b_log'),
}
_IN_LAYER = {*_SHARED, *itertools.chain(*_DIRECTED.values())}
_LAYER = re.compile(r'(backbone\.)?layers\.(\d+)\.(.+)')
_SCALE = re.compile(r'(neck|backbone)\.(fpn\d+\..+)')
_HEADS = ('decode_head.', 'auxiliary_head.')
_OFFICIAL = re.compile(r'layers\.\d+\.mixer\.A(_b)?_log$')
_TWO_TOKENS = ('cls_token_head', 'cls_token_tail')


def from_official(
    state: Mapping[str, Tensor],
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Rename the weights of an official Vim classifier.

    Args:
        state (Mapping[str, Tensor]): The official ``state_dict``.

    Returns:
        tuple[OrderedDict[str, Tensor], list[str]]: Weights of an
        ``ImageClassifier`` with a ``LinearClsHead``, and the names that were
        not used.

    Raises:
        ValueError: If this is no bidirectional Vim, or weights are missing.
    """
    converted: OrderedDict[str, Tensor] = OrderedDict()
    unused, layers = [], OrderedDict[str, dict[str, Tensor]]()
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if match and match[3] in _IN_LAYER:
            layers.setdefault(match[2], {})[match[3]] = tensor
        elif name in _OUTSIDE_LAYERS:
            converted[_OUTSIDE_LAYERS[name]] = tensor
        elif name not in _TWO_TOKENS:
            unused.append(name)
    _check_complete(state, layers)
    for number, layer in layers.items():
        for new, tensor in _join_layer(layer).items():
            converted[f'backbone.layers.{number}.{new}'] = tensor
    if all(name in state for name in _TWO_TOKENS):
        converted['backbone.cls_token'] = torch.cat(
            [state[name] for name in _TWO_TOKENS], dim=1
        )
    return converted, unused


def _join_layer(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a layer; those of both directions become one."""
    joint = {new: layer[old] for old, new in _SHARED.items()}
    for new, pair in _DIRECTED.items():
        joint[new] = torch.cat([layer[name] for name in pair])
        if new == 'mixer.conv1d.weight':
            joint[new] = joint[new].squeeze(1)
    return joint


def _split_weight(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Undo :func:`_join_layer` for one weight; empty if it has no place."""
    shared = {new: old for old, new in _SHARED.items()}
    if name in shared:
        return {shared[name]: tensor}
    if name not in _DIRECTED:
        return {}
    if name == 'mixer.conv1d.weight':
        tensor = tensor.unsqueeze(1)
    return dict(zip(_DIRECTED[name], tensor.chunk(2), strict=True))


def to_official(
    state: Mapping[str, Tensor],
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Undo :func:`from_official`.

    Args:
        state (Mapping[str, Tensor]): Weights of an ``ImageClassifier``.

    Returns:
        tuple[OrderedDict[str, Tensor], list[str]]: The official
        ``state_dict``, and the names that were not used.

    Raises:
        ValueError: If the weights hold no Vision Mamba.
    """
    outside = {new: old for old, new in _OUTSIDE_LAYERS.items()}
    official: OrderedDict[str, Tensor] = OrderedDict()
    unused, layers = [], OrderedDict[str, dict[str, Tensor]]()
    state = dict(state)
    stack_directions(state)
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        parts = _split_weight(match[3], tensor) if match else {}
        if match and parts:
            layers.setdefault(match[2], {}).update(parts)
        elif name == 'backbone.cls_token' and tensor.shape[1] == 2:
            halves = tensor.split(1, dim=1)
            official.update(zip(_TWO_TOKENS, halves, strict=True))
        elif name in outside:
            official[outside[name]] = tensor
        else:
            unused.append(name)
    for number, layer in layers.items():
        for name, tensor in layer.items():
            official[f'layers.{number}.{name}'] = tensor
    _check_complete(official, layers)
    return official, unused


def official_part(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Find an official Vim in a state dict, without what precedes its names.

    Args:
        state (Mapping[str, Tensor]): Any weights; the names may begin with
            ``module.`` or the like.

    Returns:
        dict[str, Tensor] | None: The official ``state_dict`` of a classifier
        or segmentor; None if there is none.
    """
    match = next(filter(None, map(_OFFICIAL.search, state)), None)
    if match is None:
        return None
    outer = match.string[: match.start()].removesuffix('backbone.')
    return {
        name.removeprefix(outer): tensor
        for name, tensor in state.items()
        if name.startswith(outer)
    }


def is_official_segmentor(state: Mapping[str, Tensor]) -> bool:
    """Tell a checkpoint of the official segmentation code by its names."""
    return 'backbone.patch_embed.proj.weight' in state


def is_converted(state: Mapping[str, Tensor]) -> bool:
    """Tell a checkpoint that has this project's names already."""
    return 'backbone.patch_embed.projection.weight' in state


def from_official_segmentor(
    state: Mapping[str, Tensor],
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Rename the weights of an official segmentor.

    Args:
        state (Mapping[str, Tensor]): The official ``state_dict``: a backbone
            with ``fpn1`` and so on inside, a decode head and an auxiliary
            head.

    Returns:
        tuple[OrderedDict[str, Tensor], list[str]]: Weights of an
        ``EncoderDecoder`` with a ``SimpleFeaturePyramid``, and the names that
        were not used.

    Raises:
        ValueError: If this is no bidirectional Vim, or weights are missing.
    """
    inside = {
        name.removeprefix('backbone.'): tensor
        for name, tensor in state.items()
        if name.startswith('backbone.') and not _SCALE.fullmatch(name)
    }
    converted, left = from_official(inside)
    unused = [f'backbone.{name}' for name in left]
    unused += _move_scales_and_heads(state, converted, 'backbone', 'neck')
    return converted, unused


def to_official_segmentor(
    state: Mapping[str, Tensor],
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Undo :func:`from_official_segmentor`.

    Args:
        state (Mapping[str, Tensor]): Weights of an ``EncoderDecoder``.

    Returns:
        tuple[OrderedDict[str, Tensor], list[str]]: The official
        ``state_dict``, and the names that were not used.

    Raises:
        ValueError: If the weights hold no Vision Mamba.
    """
    backbone = {k: v for k, v in state.items() if k.startswith('backbone.')}
    inside, unused = to_official(backbone)
    official = OrderedDict((f'backbone.{k}', v) for k, v in inside.items())
    unused += _move_scales_and_heads(state, official, 'neck', 'backbone')
    return official, unused


def _move_scales_and_heads(
    source: Mapping[str, Tensor],
    target: OrderedDict[str, Tensor],
    old: str,
    new: str,
) -> list[str]:
    """Copy all but the backbone; return the names that have no place."""
    unused = []
    for name, tensor in source.items():
        match = _SCALE.fullmatch(name)
        if match and match[1] == old:
            target[f'{new}.{match[2]}'] = tensor
        elif name.startswith(_HEADS):
            target[name] = tensor
        elif not name.startswith('backbone.'):
            unused.append(name)
    return unused


def cls_token_place(
    state: Mapping[str, Tensor], single: str = 'middle'
) -> str | None:
    """Place of the class token of a converted model.

    Args:
        state (Mapping[str, Tensor]): Weights named as in this project.
        single (str): Place of a single one, which the weights do not tell.
            Defaults to ``'middle'``, as in the published models.

    Returns:
        str | None: See :func:`.position_embedding.num_cls_tokens`.
    """
    tokens = state.get('backbone.cls_token')
    count = 0 if tokens is None else tokens.shape[1]
    return {0: None, 1: single, 2: 'double'}[count]


def patch_grid(
    state: Mapping[str, Tensor],
    cls_token: str | None,
    grid: tuple[int, int] | None = None,
) -> tuple[int, int] | None:
    """Rows and columns of the position embedding of a converted model.

    Args:
        state (Mapping[str, Tensor]): Weights named as in this project.
        cls_token (str | None): Place of the class token.
        grid (tuple[int, int], optional): Rows and columns, needed where the
            patches are no square. Defaults to None.

    Returns:
        tuple[int, int] | None: None without a position embedding.

    Raises:
        ValueError: If the number of patches does not tell the grid, or
            contradicts ``grid``.
    """
    if 'backbone.pos_embed' not in state:
        return None
    count = state['backbone.pos_embed'].shape[1] - num_cls_tokens(cls_token)
    side = math.isqrt(count)
    rows, columns = grid or (side, side)
    if rows * columns != count:
        wanted = f'{rows}x{columns}' if grid else 'a square number of'
        raise ValueError(
            f'the position embedding must have {wanted} patches beside its '
            f'class tokens ({num_cls_tokens(cls_token)}), got {count}: give '
            'the grid, rows and columns'
        )
    return rows, columns


def make_dense(
    state: Mapping[str, Tensor],
    cls_token: str | None,
    keep_cls_token: bool = False,
) -> OrderedDict[str, Tensor]:
    """Leave out of a converted classifier what dense prediction does not use.

    Args:
        state (Mapping[str, Tensor]): Weights named as in this project.
        cls_token (str | None): Place of the class token.
        keep_cls_token (bool): Leave the class token where it is. Defaults to
            False: it goes, with its vector of the position embedding.

    Returns:
        OrderedDict[str, Tensor]: The weights without ``head``.
    """
    dense = OrderedDict(
        (k, v) for k, v in state.items() if not k.startswith('head.')
    )
    if keep_cls_token:
        return dense
    dense.pop('backbone.cls_token', None)
    if 'backbone.pos_embed' in dense:
        patches = split_tokens(dense['backbone.pos_embed'], cls_token)[1]
        dense['backbone.pos_embed'] = patches.contiguous()
    return dense


def resize_patch_grid(
    state: dict[str, Tensor],
    cls_token: str | None,
    grid: tuple[int, int],
    img_size: tuple[int, int],
    patch_stride: int | None = None,
) -> tuple[int, int]:
    """Interpolate a position embedding for another image size, in place.

    Bicubic, without aligned corners; class tokens keep their vectors.

    Args:
        state (dict[str, Tensor]): Weights named as in this project.
        cls_token (str | None): Place of the class token in it.
        grid (tuple[int, int]): Rows and columns so far.
        img_size (tuple[int, int]): Height and width wanted, pixels.
        patch_stride (int, optional): Distance of two patches, pixels; the
            size of a patch if None. Defaults to None.

    Returns:
        tuple[int, int]: The new rows and columns.
    """
    size = state['backbone.patch_embed.projection.weight'].shape[-1]
    patches = PatchEmbed(1, 1, size, patch_stride or size)
    wanted = patches.grid_size(*img_size)
    resized = resize_position_embedding(
        state['backbone.pos_embed'], grid, wanted, cls_token
    )
    state['backbone.pos_embed'] = resized.contiguous()
    return wanted


def describe(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of a converted model, as ``arch`` and friends want them.

    Args:
        state (Mapping[str, Tensor]): Weights named as in this project.

    Returns:
        dict[str, int]: embed_dims, num_layers, d_state, patch_size,
        num_classes (0 without a head), num_tokens (0 without position
        embedding) and num_cls_tokens.
    """
    patch = state['backbone.patch_embed.projection.weight']
    a_log = state['backbone.layers.0.mixer.ssm.state_matrix.A_log']
    head, cls_token, pos_embed = (
        state.get(name)
        for name in (
            'head.fc.weight',
            'backbone.cls_token',
            'backbone.pos_embed',
        )
    )
    return dict(
        embed_dims=patch.shape[0],
        num_layers=_num_layers(state),
        d_state=a_log.shape[1],
        patch_size=patch.shape[-1],
        num_classes=0 if head is None else head.shape[0],
        num_tokens=0 if pos_embed is None else pos_embed.shape[1],
        num_cls_tokens=0 if cls_token is None else cls_token.shape[1],
    )


def _num_layers(state: Mapping[str, Tensor]) -> int:
    layers = [_LAYER.fullmatch(name) for name in state]
    return 1 + max((int(m[2]) for m in layers if m), default=-1)


def _check_complete(
    official: Mapping[str, Tensor], layers: Mapping[str, Any]
) -> None:
    """Raise unless every layer of an official state is there, whole."""
    count = 1 + max(map(int, layers), default=-1)
    wanted = ['patch_embed.proj.weight', 'norm_f.weight'] + [
        f'layers.{i}.{leaf}' for i in range(count) for leaf in _IN_LAYER
    ]
    missing = [name for name in wanted if name not in official]
    if count == 0 or len(missing) == len(wanted):
        raise ValueError(
            'no Vim weights: wanted names like layers.0.mixer.A_b_log, got '
            f'{sorted(official)[:5]} ...'
        )
    if missing:
        raise ValueError(
            'not a complete bidirectional Vim: '
            f'{len(missing)} weights are missing, such as {missing[:3]}'
        )

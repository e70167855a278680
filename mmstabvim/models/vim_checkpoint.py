"""Names of the official Vim checkpoints and of this project's, both ways."""

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

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
_IN_LAYER = {
    'norm.weight': 'norm.weight',
    'mixer.in_proj.weight': 'mixer.in_proj.weight',
    'mixer.out_proj.weight': 'mixer.out_proj.weight',
    'mixer.A_log': 'mixer.directions.0.state_matrix.A_log',
    'mixer.A_b_log': 'mixer.directions.1.state_matrix.A_log',
    **{
        f'mixer.{module}{suffix}{leaf}': (
            f'mixer.directions.{direction}.{module}{leaf}'
        )
        for direction, suffix in enumerate(('', '_b'))
        for module, leaf in (
            ('conv1d', '.weight'),
            ('conv1d', '.bias'),
            ('x_proj', '.weight'),
            ('dt_proj', '.weight'),
            ('dt_proj', '.bias'),
            ('D', ''),
        )
    },
}
_LAYER = re.compile(r'(backbone\.)?layers\.(\d+)\.(.+)')
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
    unused = []
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if match and match[3] in _IN_LAYER:
            new = f'backbone.layers.{match[2]}.{_IN_LAYER[match[3]]}'
            converted[new] = tensor
        elif name in _OUTSIDE_LAYERS:
            converted[_OUTSIDE_LAYERS[name]] = tensor
        elif name not in _TWO_TOKENS:
            unused.append(name)
    if all(name in state for name in _TWO_TOKENS):
        converted['backbone.cls_token'] = torch.cat(
            [state[name] for name in _TWO_TOKENS], dim=1
        )
    _check_complete(state, converted)
    return converted, unused


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
    in_layer = {new: old for old, new in _IN_LAYER.items()}
    official: OrderedDict[str, Tensor] = OrderedDict()
    unused = []
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if match and match[3] in in_layer:
            official[f'layers.{match[2]}.{in_layer[match[3]]}'] = tensor
        elif name == 'backbone.cls_token' and tensor.shape[1] == 2:
            halves = tensor.split(1, dim=1)
            official.update(zip(_TWO_TOKENS, halves, strict=True))
        elif name in outside:
            official[outside[name]] = tensor
        else:
            unused.append(name)
    _check_complete(official, state)
    return official, unused


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
    a_log = state['backbone.layers.0.mixer.directions.0.state_matrix.A_log']
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
    official: Mapping[str, Tensor], converted: Mapping[str, Tensor]
) -> None:
    """Every layer must be there, whole, under both kinds of names."""
    count = _num_layers(official)
    wanted = ['patch_embed.proj.weight', 'norm_f.weight'] + [
        f'layers.{i}.{leaf}' for i in range(count) for leaf in _IN_LAYER
    ]
    missing = [name for name in wanted if name not in official]
    if count == 0 or not converted or len(missing) == len(wanted):
        raise ValueError(
            'no Vim weights: wanted names like layers.0.mixer.A_b_log, got '
            f'{sorted(official or converted)[:5]} ...'
        )
    if missing:
        raise ValueError(
            'not a complete bidirectional Vim: '
            f'{len(missing)} weights are missing, such as {missing[:3]}'
        )

"""Bring a checkpoint to a Vision Mamba, or say why it does not fit.

MMEngine loads pre-trained weights without ``strict``: what does not fit is a
line in the log, and the model trains from random weights. So a checkpoint of
another model is refused here.
"""

import re
from collections import OrderedDict
from itertools import chain
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

from mmstabvim.layers.earlier_layout import stack_directions
from mmstabvim.layers.position_embedding import (
    guess_grid,
    resize_position_embedding,
    split_tokens,
)
from mmstabvim.models.vim_checkpoint import (
    from_official,
    from_official_segmentor,
    is_official_segmentor,
    official_part,
)

_BLOCK = re.compile(r'layers\.(\d+)\.')


def convert_foreign(
    model: Any, state: dict[str, Tensor]
) -> tuple[OrderedDict[str, Tensor], list[str], list[str]] | None:
    """Rename the weights of an official Vim, or of an earlier version.

    Args:
        model (VisionMamba): The model that is about to load.
        state (dict[str, Tensor]): Any weights.

    Returns:
        tuple | None: Weights of an ``ImageClassifier`` or an
        ``EncoderDecoder``, the names not used, and notes for the user; None
        if the names are those of today.

    Raises:
        ValueError: If weights of a bidirectional Vim are missing.
    """
    inside = official_part(state)
    if inside is None:
        renamed = OrderedDict(state)
        if not stack_directions(renamed):
            return None
        return renamed, [], ['directions of the earlier layout joined']
    dense = is_official_segmentor(inside)
    convert = from_official_segmentor if dense else from_official
    renamed, unused = convert(inside)
    kind = 'segmentor' if dense else 'classifier'
    notes = [f'official Vim {kind}, names converted']
    tokens = renamed.get('backbone.cls_token')
    if tokens is not None and tokens.shape[1] == 1:
        place = _layout(model, 1, {})
        notes.append(
            f'class token taken to be at {place!r}, which the file does not '
            "tell (published: 'middle')"
        )
    return renamed, unused, notes


def token_layout(model: Any) -> dict[str, Any]:
    """Describe the tokens, which a ``state_dict`` does not tell."""
    return dict(cls_token=model.cls_token_place, grid=tuple(model.grid))


def fit_checkpoint(
    model: Any,
    state_dict: dict[str, Any],
    prefix: str,
    recorded: dict[str, Any],
) -> None:
    """Fit the position embedding in place, refuse another kind of model.

    Args:
        model (VisionMamba): The model that is about to load.
        state_dict (dict): Weights, those of other modules among them.
        prefix (str): What precedes the model's own names.
        recorded (dict): :func:`token_layout` of the checkpoint; empty where
            it is not known.

    Raises:
        ValueError: If the checkpoint has another width, patch size, number of
            blocks, layout of tokens, or size of any weight.
    """
    stack_directions(state_dict, prefix)
    if f'{prefix}patch_embed.projection.weight' in state_dict:
        _check_patches(model, state_dict, prefix)
        _check_blocks(model, state_dict, prefix)
    _fit_tokens(model, state_dict, prefix, recorded)
    _check_shapes(model, state_dict, prefix)


def _check_patches(
    model: Any, state_dict: dict[str, Tensor], prefix: str
) -> None:
    theirs = state_dict[f'{prefix}patch_embed.projection.weight'].shape
    ours = model.patch_embed.projection.weight.shape
    cure = {
        'embed_dims': 'choose the arch of the checkpoint',
        'in_channels': 'choose the in_channels of the checkpoint',
        'patch_size': 'choose the patch_size of the checkpoint',
    }
    for name, got, wanted in zip(cure, theirs, ours, strict=False):
        if got != wanted:
            raise ValueError(
                f'the checkpoint has {name} {got}, the model {wanted}: '
                f'{cure[name]}'
            )


def _check_blocks(
    model: Any, state_dict: dict[str, Tensor], prefix: str
) -> None:
    names = (n.removeprefix(prefix) for n in state_dict)
    blocks = {int(match[1]) for n in names if (match := _BLOCK.match(n))}
    if blocks != set(range(model.num_layers)):
        raise ValueError(
            f'the checkpoint has {len(blocks)} layers, the model '
            f'{model.num_layers}: choose the num_layers of the checkpoint'
        )


def _fit_tokens(
    model: Any,
    state_dict: dict[str, Tensor],
    prefix: str,
    recorded: dict[str, Any],
) -> None:
    """Leave the class token out where the model has none, resize the grid."""
    pos_key, cls_key = f'{prefix}pos_embed', f'{prefix}cls_token'
    whole = f'{prefix}patch_embed.projection.weight' in state_dict
    if not whole and not {pos_key, cls_key} & state_dict.keys():
        return
    extra = state_dict[cls_key].shape[1] if cls_key in state_dict else 0
    place = _layout(model, extra, recorded)
    if place != model.cls_token_place:
        if model.cls_token_place is not None:
            raise ValueError(
                f'the checkpoint has cls_token {place!r}, the model '
                f'{model.cls_token_place!r}: choose the cls_token of the '
                'checkpoint, or None to leave its class tokens out'
            )
        del state_dict[cls_key]
    if model.pos_embed is None or pos_key not in state_dict:
        return
    pos_embed = state_dict[pos_key]
    if place != model.cls_token_place:
        pos_embed = split_tokens(pos_embed, place)[1]
    state_dict[pos_key] = _fit_grid(model, pos_embed, recorded)


def _layout(model: Any, extra: int, recorded: dict[str, Any]) -> str | None:
    """Place of a checkpoint's class tokens, from their number."""
    if extra != 1:
        return {0: None}.get(extra, 'double')
    assumed = model.checkpoint_cls_token
    if model.num_extra_tokens == 1:
        assumed = model.cls_token_place
    return recorded.get('cls_token') or assumed


def _fit_grid(
    model: Any, pos_embed: Tensor, recorded: dict[str, Any]
) -> Tensor:
    """Resize a position embedding, with the model's class tokens."""
    num_patches = pos_embed.shape[1] - model.num_extra_tokens
    grid = tuple(recorded.get('grid', (0, 0)))
    if grid[0] * grid[1] != num_patches:
        grid = guess_grid(num_patches, model.grid)
    if grid != model.grid:
        print_log(
            f'position embedding resized from {grid} to {model.grid}',
            logger='current',
        )
    return resize_position_embedding(
        pos_embed,
        grid,
        model.grid,
        model.cls_token_place,
        model.interpolate_mode,
    )


def _check_shapes(
    model: Any, state_dict: dict[str, Tensor], prefix: str
) -> None:
    """Refuse other sizes, such as another d_state or expand."""
    for name, ours in chain(model.named_parameters(), model.named_buffers()):
        theirs = state_dict.get(prefix + name)
        if theirs is not None and theirs.shape != ours.shape:
            raise ValueError(
                f'{name} is {tuple(theirs.shape)} in the checkpoint, '
                f'{tuple(ours.shape)} in the model: choose the arch and '
                'options of the checkpoint'
            )

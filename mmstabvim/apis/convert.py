"""Checkpoints of the official Vim for MMPretrain or MMSegmentation, and back.

The toolkits' loading converts official files in memory
(:func:`mmstabvim.load_weights`); these functions are for files that are kept.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mmstabvim.models import vim_checkpoint as names
from mmstabvim.models.vim_conversion import pick_weights

State = OrderedDict[str, Tensor]
Checkpoint = dict[str, Any]


class Conversion(NamedTuple):
    """Outcome of a conversion."""

    key: str
    """Under which the weights are to be saved."""
    weights: Mapping[str, Tensor]
    sizes: dict[str, Any]
    """Sizes of the model, in words and numbers."""
    unused: list[str]
    """Names of the source that have no place in the result."""
    notes: Sequence[str] = ()
    """Assumptions that the user may have to correct."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Content of the file to save."""
        meta: Checkpoint = {'meta': {}} if self.key == 'state_dict' else {}
        return {self.key: self.weights, **meta}


def to_mmpretrain(checkpoint: Checkpoint, ema: bool = False) -> Conversion:
    """Convert an official classifier for an ``ImageClassifier``.

    Args:
        checkpoint (dict): Content of the file, or its weights.
        ema (bool): Take the averaged weights. Defaults to False.

    Returns:
        Conversion: Loads strictly into ``mmstabvim.VisionMamba`` with a
        ``LinearClsHead``.

    Raises:
        ValueError: If it is no complete bidirectional Vim.

    Example:
        >>> from mmstabvim.checkpoint import load_checkpoint_tensors
        >>> official = load_checkpoint_tensors('vim.pth')  # doctest: +SKIP
        >>> to_mmpretrain(official).sizes['embed_dims']  # doctest: +SKIP
        192
    """
    state = pick_weights(checkpoint, 'model_ema' if ema else 'model')
    converted, unused = names.from_official(state)
    sizes = names.describe(converted)
    return Conversion('state_dict', converted, sizes, unused)


def to_mmseg(
    checkpoint: Checkpoint,
    ema: bool = False,
    cls_token: str | None = None,
    keep_cls_token: bool = False,
    img_size: Sequence[int] | None = None,
    patch_stride: int | None = None,
    grid: Sequence[int] | None = None,
) -> Conversion:
    """Convert an official classifier or segmentor for dense use.

    The two are told apart by their names. Of a classifier the backbone alone
    is kept, for ``init_cfg`` with ``prefix='backbone.'``.

    Args:
        checkpoint (dict): Content of the file, or its weights.
        ema (bool): Take the averaged weights. Defaults to False.
        cls_token (str, optional): Place of the class token, ``'middle'`` or
            ``'head'``, which the file does not tell where there is one.
            Defaults to None, the middle.
        keep_cls_token (bool): Leave the class token in the sequence; else it
            goes, with its vector of the position embedding. Defaults to
            False.
        img_size (Sequence[int], optional): Height and width, or one for both,
            pixels, to which the position embedding is resized. Defaults to
            None: loading resizes.
        patch_stride (int, optional): Distance of two patches, pixels, for
            ``img_size``. Defaults to None, their size.
        grid (Sequence[int], optional): Rows and columns of the patches, where
            they are no square. Defaults to None.

    Returns:
        Conversion: Of a segmentor it loads strictly into an
        ``EncoderDecoder`` with the same heads.

    Raises:
        ValueError: If it is no complete bidirectional Vim, or an option does
            not suit it.
    """
    state, segmentor = _find_weights(checkpoint, ema)
    convert = (
        names.from_official_segmentor if segmentor else names.from_official
    )
    renamed, unused = convert(state)
    left_out = ('head.',) if keep_cls_token else ('head.', 'cls_token')
    unused += [name for name in state if name.startswith(left_out)]
    place = names.cls_token_place(renamed, cls_token or 'middle')
    if cls_token and place != cls_token:
        count = 0 if place is None else 2
        raise ValueError(
            f'--cls-token {cls_token} wants one class token, got {count}'
        )
    notes = []
    if cls_token is None and place == 'middle':
        notes.append(
            'class token taken to be in the middle, as in the published '
            "midclstok models; '--cls-token head' if it is in front"
        )
    known = None if grid is None else (grid[0], grid[1])
    found = names.patch_grid(renamed, place, known)
    converted = names.make_dense(renamed, place, keep_cls_token)
    place = place if keep_cls_token else None
    if img_size:
        if found is None:
            raise ValueError('--img-size: there is no position embedding')
        size = (img_size[0], img_size[-1])
        found = names.resize_patch_grid(
            converted, place, found, size, patch_stride
        )
    # what a dense model would otherwise have to assume
    layout = {'version': 1, 'cls_token': place, 'grid': found or (0, 0)}
    metadata = OrderedDict(backbone=layout)
    converted._metadata = metadata  # type: ignore[attr-defined]
    sizes = names.describe(converted) | {'cls_token': place, 'grid': found}
    return Conversion('state_dict', converted, sizes, unused, notes)


def _find_weights(checkpoint: Checkpoint, ema: bool) -> tuple[State, bool]:
    """Find the weights, and tell a segmentor's."""
    inside = checkpoint.get('state_dict', checkpoint)
    if names.is_converted(inside):
        raise ValueError(
            'must have the official names, got those of this project: give '
            "the file to init_cfg, with the prefix 'backbone.'"
        )
    segmentor = names.is_official_segmentor(inside)
    if segmentor and ema:
        raise ValueError("an official segmentor has no 'model_ema': no --ema")
    key = 'model_ema' if ema else 'model'
    state = pick_weights(checkpoint, 'state_dict' if segmentor else key)
    return OrderedDict(state), segmentor


def to_official(checkpoint: Checkpoint) -> Conversion:
    """Convert a classifier, a segmentor or a backbone to the official names.

    Args:
        checkpoint (dict): Content of the file, or its weights.

    Returns:
        Conversion: A backbone alone becomes an official classifier's.

    Raises:
        ValueError: If it is no Vim of this project.
    """
    state = pick_weights(checkpoint, 'state_dict')
    segmentor = any(name.startswith('decode_head.') for name in state)
    convert = names.to_official_segmentor if segmentor else names.to_official
    converted, unused = convert(state)
    key = 'state_dict' if segmentor else 'model'
    return Conversion(key, converted, names.describe(state), unused)

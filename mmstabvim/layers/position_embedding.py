"""Class tokens and the position embedding of a token grid.

The class token has a declared place in the sequence. Splitting a sequence or
a position embedding into class tokens and patches, and joining them again,
is done here and nowhere else.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

CLS_TOKENS = ('middle', 'head', 'double', None)


def num_cls_tokens(cls_token: str | None) -> int:
    """Number of class tokens of a layout.

    Args:
        cls_token (str | None): ``'middle'`` (index ``num_patches // 2``),
            ``'head'``, ``'double'`` (first and last) or None.

    Raises:
        ValueError: If the layout is unknown.
    """
    if cls_token not in CLS_TOKENS:
        raise ValueError(
            f'cls_token must be one of {CLS_TOKENS}, got {cls_token!r}'
        )
    return {'double': 2, None: 0}.get(cls_token, 1)


def cls_token_positions(cls_token: str | None, num_patches: int) -> list[int]:
    """Indices of the class tokens in the whole sequence."""
    positions = {
        'middle': [num_patches // 2],
        'head': [0],
        'double': [0, num_patches + 1],
    }
    return positions.get(cls_token or '', [])


def split_tokens(x: Tensor, cls_token: str | None) -> tuple[Tensor, Tensor]:
    """Split a sequence into class tokens and patches.

    Args:
        x (Tensor): (batch, num_patches + class tokens, channels).
        cls_token (str | None): Layout.

    Returns:
        tuple[Tensor, Tensor]: (batch, class tokens, channels) and
        (batch, num_patches, channels).
    """
    extra = num_cls_tokens(cls_token)
    if not extra:
        return x[:, :0], x
    at = cls_token_positions(cls_token, x.shape[1] - extra)
    tokens = torch.cat([x[:, i : i + 1] for i in at], dim=1)
    bounds = [-1, *at, x.shape[1]]
    pieces = [x[:, a + 1 : b] for a, b in pairwise(bounds)]
    return tokens, torch.cat(pieces, dim=1)


def join_tokens(
    tokens: Tensor, patches: Tensor, cls_token: str | None
) -> Tensor:
    """Put class tokens at their place: the inverse of :func:`split_tokens`."""
    at = cls_token_positions(cls_token, patches.shape[1])
    if not at:
        return patches
    pieces, used = [], 0
    for k, position in enumerate(at):
        stop = position - k  # class tokens before this one take no patch
        pieces += [patches[:, used:stop], tokens[:, k : k + 1]]
        used = stop
    return torch.cat([*pieces, patches[:, used:]], dim=1)


def resize_position_embedding(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    cls_token: str | None,
    mode: str = 'bicubic',
) -> Tensor:
    """Interpolate the patch grid; class tokens keep their embedding.

    Args:
        pos_embed (Tensor): (1, rows * columns + class tokens, channels).
        old_grid (tuple[int, int]): Rows and columns of ``pos_embed``.
        new_grid (tuple[int, int]): Rows and columns wanted.
        cls_token (str | None): Layout.
        mode (str): Mode of ``torch.nn.functional.interpolate``. Defaults to
            ``'bicubic'``.

    Returns:
        Tensor: (1, new rows * new columns + class tokens, channels), dtype of
        ``pos_embed``; ``pos_embed`` itself where the grids are equal.

    Raises:
        ValueError: If the length does not belong to ``old_grid``.
    """
    if old_grid == new_grid:
        return pos_embed
    tokens, patches = split_tokens(pos_embed, cls_token)
    if patches.shape[1] != old_grid[0] * old_grid[1]:
        raise ValueError(
            f'pos_embed must hold a {old_grid[0]}x{old_grid[1]} grid, got '
            f'{patches.shape[1]} patches'
        )
    grid = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)
    wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
    align = None if mode in ('nearest', 'area') else False
    resized = F.interpolate(wide, new_grid, mode=mode, align_corners=align)
    patches = resized.to(grid.dtype).flatten(2).transpose(1, 2)
    return join_tokens(tokens, patches, cls_token)


def guess_grid(num_patches: int, like: tuple[int, int]) -> tuple[int, int]:
    """Grid of a position embedding whose shape was not recorded.

    The grid ``like`` where it has that many patches; else a square number is
    taken as a square grid; else the factors whose ratio is nearest to that of
    ``like``.
    """
    if like[0] * like[1] == num_patches:
        return like
    side = math.isqrt(num_patches)
    if side * side == num_patches:
        return side, side
    wanted = math.log(like[0] / like[1])
    rows = min(
        (r for r in range(1, num_patches + 1) if num_patches % r == 0),
        key=lambda r: abs(math.log(r * r / num_patches) - wanted),
    )
    return rows, num_patches // rows

"""Class tokens and patches: taken apart, put together, resized."""

import pytest
import torch

from mmstabvim.layers import RotaryEmbedding2d
from mmstabvim.layers.position_embedding import (
    CLS_TOKENS,
    cls_token_positions,
    guess_grid,
    join_tokens,
    num_cls_tokens,
    resize_position_embedding,
    split_tokens,
)


@pytest.mark.parametrize('cls_token', CLS_TOKENS)
@pytest.mark.parametrize('num_patches', [1, 2, 12, 15])
def test_split_and_join_are_inverse(num_patches, cls_token):
    extra = num_cls_tokens(cls_token)
    x = torch.arange(float(num_patches + extra))[None, :, None]
    tokens, patches = split_tokens(x, cls_token)
    at = cls_token_positions(cls_token, num_patches)
    assert tokens.flatten().tolist() == at
    assert patches.flatten().tolist() == [
        i for i in range(num_patches + extra) if i not in at
    ]
    assert torch.equal(join_tokens(tokens, patches, cls_token), x)


def test_positions_in_the_sequence():
    assert cls_token_positions('middle', 196) == [98]
    assert cls_token_positions('head', 196) == [0]
    assert cls_token_positions('double', 196) == [0, 197]
    assert cls_token_positions(None, 196) == []


def test_misspelt_position_is_an_error():
    with pytest.raises(ValueError, match=r"cls_token must be .*'midle'"):
        num_cls_tokens('midle')


@pytest.mark.parametrize('cls_token', CLS_TOKENS)
def test_resize_moves_patches_only(cls_token):
    """Class tokens are kept, the grid is interpolated row by row."""
    old, new = (4, 6), (7, 5)
    extra = num_cls_tokens(cls_token)
    grid = torch.randn(1, 3, *old)
    tokens = torch.randn(1, extra, 3)
    patches = grid.flatten(2).transpose(1, 2)
    resized = resize_position_embedding(
        join_tokens(tokens, patches, cls_token), old, new, cls_token
    )
    kept, moved = split_tokens(resized, cls_token)
    assert torch.equal(kept, tokens)
    exact = torch.nn.functional.interpolate(
        grid, new, mode='bicubic', align_corners=False
    )
    assert torch.equal(moved.transpose(1, 2).unflatten(2, new), exact)


def test_resize_to_the_same_grid_is_the_identity():
    pos_embed = torch.randn(1, 17, 3)
    same = resize_position_embedding(pos_embed, (4, 4), (4, 4), 'middle')
    assert same is pos_embed


def test_resize_refuses_another_length():
    with pytest.raises(ValueError, match='4x5 grid, got 16 patches'):
        resize_position_embedding(
            torch.zeros(1, 17, 3), (4, 5), (4, 4), 'middle'
        )


def test_grid_is_guessed_from_the_aspect_ratio():
    assert guess_grid(196, (32, 64)) == (14, 14)
    assert guess_grid(512, (16, 32)) == (16, 32)
    assert guess_grid(512, (32, 16)) == (32, 16)
    assert guess_grid(13, (1, 9)) == (1, 13)


def naive_rotation(x, rows, columns, base):
    """Complex numbers, one token and one pair at a time."""
    out = x.clone()
    dim = x.shape[-1]
    for token in range(rows * columns):
        r, c = divmod(token, columns)
        for pair in range(dim // 2):
            half = dim // 2
            i = pair % (half // 2)
            place = r / rows if pair < half // 2 else c / columns
            angle = place * base / 10000 ** (2 * i / half)
            z = torch.complex(x[token, 2 * pair], x[token, 2 * pair + 1])
            z = z * torch.exp(torch.tensor(1j * angle))
            out[token, 2 * pair], out[token, 2 * pair + 1] = z.real, z.imag
    return out


@pytest.mark.parametrize('cls_token', ['middle', None])
def test_rotary_turns_patches_by_row_and_column(cls_token):
    torch.manual_seed(0)
    rows, columns, dim = 3, 4, 8
    rotary = RotaryEmbedding2d(dim, base_size=14)
    patches = torch.randn(1, rows * columns, dim)
    tokens = torch.randn(1, num_cls_tokens(cls_token), dim)
    x = join_tokens(tokens, patches, cls_token)
    turned = rotary(x, (rows, columns), cls_token)
    kept, moved = split_tokens(turned, cls_token)
    assert torch.equal(kept, tokens)
    exact = naive_rotation(patches[0], rows, columns, 14)
    torch.testing.assert_close(moved[0], exact, rtol=1e-5, atol=1e-5)


def test_rotary_wants_pairs_for_both_axes():
    with pytest.raises(ValueError, match='embed_dims % 4 == 0, got 6'):
        RotaryEmbedding2d(6)

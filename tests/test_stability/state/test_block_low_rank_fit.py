"""Fit of blocks plus low rank to dense matrices."""

from itertools import pairwise

import pytest
import torch
from stability_oracles import assert_printed, batch_of, detmat

from mmstabvim.stability import (
    clamp_matrix,
    fit_block_low_rank,
    spectral_abscissa,
)


def coupled_blocks():
    blocks = torch.stack((detmat(4, 4, 0), detmat(4, 4, 5)))
    U, V = 0.7 * detmat(8, 1, 1), detmat(8, 1, 2)
    return torch.block_diag(*blocks) + U @ V.T, U, V


def two_blocks(tag):
    blocks = (detmat(4, 4, 10 * tag), detmat(4, 4, 10 * tag + 1))
    low_rank = detmat(8, 1, tag + 0.3) @ detmat(8, 1, tag + 0.6).T
    return torch.block_diag(*blocks) + 0.7 * low_rank


def assembled(blocks, U, V):
    dense = torch.stack([torch.block_diag(*b) for b in blocks.unbind()])
    return dense + U @ V.mT


def test_fit_of_a_matrix_with_the_structure():
    A, U, V = coupled_blocks()
    found = fit_block_low_rank(A, 4, 1)
    assert [tuple(x.shape) for x in found] == [(2, 4, 4), (8, 1), (8, 1), ()]
    assert found[3] < 1e-12
    # the parts themselves are not unique
    torch.testing.assert_close(assembled(found[0][None], *found[1:3])[0], A)
    assert_printed(found[1].norm(), found[2].norm().item())
    once = fit_block_low_rank(A, 4, 1, sweeps=1, start=(U, V))
    assert once[3] < 1e-12


@pytest.mark.parametrize('start', [None, 'zero U'])
def test_fit_does_not_stay_at_a_saddle(start):
    """Two blocks: a first low-rank part that sees only one of them."""
    A = torch.stack([two_blocks(tag) for tag in range(20)])
    if start:
        start = torch.zeros(20, 8, 1), torch.ones(20, 8, 1)
    assert (fit_block_low_rank(A, 4, 1, 200, start)[3] < 1e-9).all()


@pytest.mark.parametrize(
    ('method', 'printed'), [('eig', 0.138), ('schur', 0.129), ('shift', 0)]
)
def test_fit_after_clamping(method, printed):
    """Inexact in general, exact for the shift, which keeps the structure."""
    A, *_ = coupled_blocks()
    clamped = clamp_matrix(A, 0.1, method=method)
    *parts, residual = fit_block_low_rank(clamped, 4, 1)
    assert residual.item() == pytest.approx(printed, abs=5e-4)
    back = assembled(parts[0][None], parts[1], parts[2])[0]
    error = torch.linalg.matrix_norm(back - clamped)
    norm = torch.linalg.matrix_norm(clamped)
    torch.testing.assert_close(residual, error / norm, rtol=1e-6, atol=1e-12)
    # so a shift has to follow
    final = clamp_matrix(back, 0.1, method='shift')
    assert spectral_abscissa(final) <= -0.1 + 1e-5


def test_more_sweeps_fit_better():
    A = detmat(8, 8, 3)
    residuals = [
        fit_block_low_rank(A, 2, 2, sweeps)[3] for sweeps in (1, 2, 5, 20, 80)
    ]
    assert all(b <= a + 1e-15 for a, b in pairwise(residuals))
    assert residuals[-1] < residuals[0] * 0.99


def test_fit_of_batches_and_edges():
    A = batch_of(6, 6).reshape(2, 3, 6, 6)
    for block_size, rank in ((2, 0), (1, 2), (3, 1), (6, 0), (2, 6)):
        *parts, residual = fit_block_low_rank(A, block_size, rank, 20)
        blocks, U, V = (x.flatten(0, 1) for x in parts)
        assert blocks.shape == (6, 6 // block_size, block_size, block_size)
        assert U.shape == V.shape == (6, 6, rank)
        error = assembled(blocks, U, V).reshape(A.shape) - A
        relative = torch.linalg.matrix_norm(error)
        relative = relative / torch.linalg.matrix_norm(A)
        torch.testing.assert_close(residual, relative, atol=1e-12, rtol=1e-9)
        exact = block_size == 6 or rank == 6
        assert (residual < 1e-12).all() == exact
    zero = fit_block_low_rank(torch.zeros(4, 4), 2, 1)
    assert not any(x.any() for x in zero)
    assert zero[0].dtype == torch.float32
    assert not fit_block_low_rank(A.requires_grad_(), 2, 1, 2)[3].requires_grad


def test_bad_arguments():
    A = detmat(4, 4)
    for args, message in (
        ((A, 3, 1), 'block_size must divide N=4, got 3'),
        ((A, 0, 1), 'block_size must divide N=4, got 0'),
        ((A, 2, 5), 'rank must be in 0..4, got 5'),
        ((A, 2, -1), 'rank must be in 0..4, got -1'),
        ((A, 2, 1, 0), 'sweeps must be positive, got 0'),
        ((A + 0j, 2, 1), 'A must be real'),
        ((A[:3], 2, 1), 'A must be'),
        ((A / 0, 2, 1), 'A must be finite'),
        ((A, 2, 1, 5, (A[:, :2], A[:, :1])), 'start U must be'),
        ((A, 2, 1, 5, (A[:, :1], A[:, :2])), 'start V must be'),
        ((A, 2, 1, 5, (A[:, :1], A[:, :1] / 0)), 'start V must be finite'),
    ):
        with pytest.raises(ValueError, match=message):
            fit_block_low_rank(*args)

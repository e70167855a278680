"""State matrices by the name of their parametrization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmstabvim.layers.state_matrix.diagonal import Complex, NegExp, Signed
from mmstabvim.layers.state_matrix.fixed_basis import FixedBasis
from mmstabvim.layers.state_matrix.full import Full
from mmstabvim.layers.state_matrix.initialization import (
    check_init,
    diagonal_start,
    full_start,
    pack_perturbation,
)
from mmstabvim.layers.state_matrix.matrix import StateMatrix
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.state.hippo import s4d_real
from mmstabvim.stability.state.perturbation import Perturbation


def neg_exp(
    d_inner: int, d_state: int, directions: int, init: str = 's4d_real'
) -> StateMatrix:
    """Build matrices ``A = -exp(A_log)``, initialized to ``-(n + 1)``.

    Args:
        d_inner (int): Channels of a direction.
        d_state (int): State size N.
        directions (int): Directions of the layer.
        init (str): ``'s4d_real'``, as the eigenvalues are real. Defaults to
            it.

    Source: arXiv:2206.11893, Sec. 4 (S4D-Real).
    """
    check_init(init, 'neg_exp')
    rates = -s4d_real(d_state, torch.float32)
    params = (rates.log().repeat(directions * d_inner, 1),)
    return StateMatrix(NegExp(directions), params, d_inner, d_state)


def signed(
    d_inner: int, d_state: int, directions: int, init: str = 's4d_real'
) -> StateMatrix:
    """Build a real diagonal of any sign, initialized to S4D-Real.

    Args:
        d_inner (int): Channels of a direction.
        d_state (int): State size N.
        directions (int): Directions of the layer.
        init (str): ``'s4d_real'``, as the eigenvalues are real. Defaults to
            it.
    """
    check_init(init, 'signed')
    values = s4d_real(d_state, torch.float32)
    params = (values.repeat(directions * d_inner, 1),)
    return StateMatrix(Signed(directions), params, d_inner, d_state)


def complex_pairs(
    d_inner: int,
    d_state: int,
    directions: int,
    real_part: str = 'neg_exp',
    init: str = 's4d_lin',
    with_basis: bool | None = None,
    hippo_bias: bool = False,
    ptd: Perturbation | None = None,
) -> StateMatrix:
    """Build a complex diagonal.

    With a basis the eigenvalues are all those of a real matrix ``X
    diag(lambda) X^-1``, B_t and C_t are real and change to the eigenbasis X,
    and the output is ``Re(sum C h)``: the initialization is the selective SSM
    of that matrix. X stays as it is in training, and is kept in checkpoints.

    Args:
        d_inner (int): Channels of a direction.
        d_state (int): Stored eigenvalues, each for two real states; with a
            basis each for one.
        directions (int): Directions of the layer.
        real_part (str): ``'neg_exp'``: the real part is ``-exp(log_re)``;
            ``'free'``: the parameter ``re`` itself, of any sign. Defaults to
            ``'neg_exp'``.
        init (str): ``'s4d_lin'``, ``'s4d_inv'``, ``'s4d_legs'`` or ``'ptd'``:
            the d_state eigenvalues of a perturbed HiPPO-LegS. Defaults to
            ``'s4d_lin'``.
        with_basis (bool, optional): Keep the eigenbasis of ``'ptd'``; without
            it B_t and C_t are complex and only the eigenvalues are PTD's. The
            others have none. Defaults to None, for with ``'ptd'`` only.
        hippo_bias (bool): Add to each B_t a trainable constant, initialized
            to HiPPO's B over N; for ``'s4d_legs'`` and ``'ptd'``. Defaults to
            False.
        ptd (Perturbation, optional): Perturbation of ``'ptd'``; in configs
            its fields are options such as ``ptd_norm=0.4``. Defaults to None,
            for its defaults.

    Raises:
        ValueError: If a choice is unknown, or does not go with the others.

    Source: arXiv:2206.11893, Sec. 4, for S4D; arXiv:2310.01698 for PTD.
    """
    check_choice('real_part', real_part, ('neg_exp', 'free'))
    check_init(init, 'complex')
    if with_basis and init != 'ptd':
        raise ValueError(f"with_basis needs init='ptd', got {init!r}")
    start = diagonal_start(init, d_state, with_basis is not False, ptd)
    if hippo_bias and start.input_matrix is None:
        raise ValueError(
            f"hippo_bias needs init='s4d_legs' or 'ptd', got {init!r}"
        )
    values = start.eigenvalues.to(
        torch.get_default_device(), torch.get_default_dtype().to_complex()
    )
    real = values.real if real_part == 'free' else (-values.real).log()
    rows = directions * d_inner
    return StateMatrix(
        Complex(real_part, directions),
        (real.repeat(rows, 1), values.imag.repeat(rows, 1)),
        d_inner,
        d_state,
        None if start.vectors is None else FixedBasis(start.vectors),
        start.input_matrix if hippo_bias else None,
    )


def full(
    d_inner: int,
    d_state: int,
    directions: int,
    block_size: int = 2,
    rank: int = 1,
    groups: int = 1,
    kappa_max: float = 1e3,
    init: str = 's4d_real',
    ptd: Perturbation | None = None,
    on_defective: str = 'exponential',
) -> StateMatrix:
    """Build matrices ``blkdiag(A_1, ..., A_b) + U V^T``, shared by channels.

    Initialized to ``-diag(1, ..., N)`` with ``U = 0`` and a small random V;
    other initializations are blocks too, HiPPO-LegS and PTD in a rotated
    basis with ``-p p^T`` in the low-rank term.

    Args:
        d_inner (int): Channels of a direction.
        d_state (int): Size N of each matrix.
        directions (int): Directions of the layer.
        block_size (int): Size b of a block, a divisor of d_state. Defaults
            to 2.
        rank (int): Rank r of the low-rank term; 0 leaves it out. Defaults to
            1.
        groups (int): Number of matrices G of a direction, a divisor of
            d_inner; d_inner gives every channel its own. Decompositions and
            the memory of the scan grow with it. Defaults to 1.
        kappa_max (float): Condition number of the eigenbasis up to which it
            is used in complex64, and that clamping keeps. Defaults to 1e3.
        init (str): ``'s4d_real'``, ``'s4d_lin'``, ``'s4d_inv'``,
            ``'s4d_legs'``, ``'hippo'`` or ``'ptd'``. Defaults to
            ``'s4d_real'``.
        ptd (Perturbation, optional): Perturbation of the blocks by ``'ptd'``;
            in configs its fields are options such as ``ptd_norm=0.4``.
            Defaults to None, for its defaults.
        on_defective (str): Choice for a matrix whose eigenvectors even
            complex128 cannot use: ``'exponential'`` runs the scan with the
            matrix exponential, exact and very slow; ``'raise'`` stops.
            Defaults to ``'exponential'``.

    Raises:
        ValueError: If a size does not divide or is out of range, or the
            structure cannot hold the initialization.

    Source: arXiv:2111.00396 for diagonal plus low rank; arXiv:2310.01698 for
    the perturbation.
    """
    _check_divides('block_size', block_size, 'd_state', d_state)
    _check_divides('groups', groups, 'd_inner', d_inner)
    if not 0 <= rank <= d_state:
        raise ValueError(
            f'rank must be from 0 to d_state = {d_state}, got {rank!r}'
        )
    parametrization = Full(
        d_inner, rank > 0, kappa_max, on_defective, directions
    )
    check_init(init, 'full')
    start = full_start(init, d_state, block_size, rank, kappa_max, ptd)
    blocks = start.blocks.to(torch.get_default_device(), torch.float32)
    rows = directions * groups
    params: tuple[Tensor, ...] = (blocks.repeat(rows, 1, 1, 1),)
    if rank:
        U = torch.zeros(rows, d_state, rank)
        # U moves first: its gradient is proportional to V
        V = 0.1 * d_state**-0.5 * torch.randn(rows, d_state, rank)
        if start.rank_one is not None:
            U[..., 0], V[..., 0] = -start.rank_one, start.rank_one
        params = (*params, U, V)
    return StateMatrix(parametrization, params, d_inner, d_state)


STATE_MATRICES: dict[str, Callable[..., StateMatrix]] = {
    'neg_exp': neg_exp,
    'signed': signed,
    'complex': complex_pairs,
    'full': full,
}
"""Functions that build state matrices, by the name of the parametrization."""


def build_state_matrix(
    d_inner: int,
    d_state: int,
    type: str = 'neg_exp',
    directions: int = 1,
    **options: Any,
) -> StateMatrix:
    """Build the state matrices of a layer by their parametrization's name.

    Args:
        d_inner (int): Channels of a direction.
        d_state (int): Eigenvalues of each matrix.
        type (str): Name in ``STATE_MATRICES``. Defaults to ``'neg_exp'``.
        directions (int): Directions of the layer. Defaults to 1.
        **options (Any): Further arguments of that function; those that begin
            with ``ptd_`` are fields of :class:`Perturbation`.

    Returns:
        StateMatrix: The module.

    Raises:
        TypeError: If the parametrization does not know an option.
        ValueError: If the name is unknown, or an option is out of range.

    Example:
        >>> build_state_matrix(8, 4, 'signed').eigenvalues()[0].tolist()
        [-1.0, -2.0, -3.0, -4.0]
    """
    if type not in STATE_MATRICES:
        raise ValueError(
            f'state_matrix type must be one of {sorted(STATE_MATRICES)}, '
            f'got {type!r}'
        )
    build = STATE_MATRICES[type]
    return build(d_inner, d_state, directions, **pack_perturbation(options))


def _check_divides(name: str, size: int, of: str, total: int) -> None:
    if size < 1 or total % size:
        raise ValueError(
            f'{name} must be a divisor of {of} = {total}, got {size!r}'
        )

"""Initializations of the state matrices, by name.

``s4d_real`` -1, ..., -N; ``s4d_lin``, ``s4d_inv``, ``s4d_legs`` conjugate
pairs with real part -1/2; ``hippo`` HiPPO-LegS itself; ``ptd`` a matrix near
HiPPO-LegS with a good eigenbasis (perturb, then diagonalize).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mmstabvim.layers.state_matrix.fixed_basis import as_real
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.state.eigenbasis import COMPLEX64, decompose
from mmstabvim.stability.state.hippo import (
    S4D_PAIRS,
    hippo_legs,
    legs_normal_form,
    s4d_legs_input,
    s4d_real,
)
from mmstabvim.stability.state.perturbation import (
    Perturbation,
    PerturbedBasis,
    perturb_then_diagonalize,
)

INITS: dict[str, tuple[str, ...]] = {
    's4d_real': ('neg_exp', 'signed', 'full'),
    's4d_lin': ('complex', 'full'),
    's4d_inv': ('complex', 'full'),
    's4d_legs': ('complex', 'full'),
    'hippo': ('full',),
    'ptd': ('complex', 'full'),
}
"""Initializations, and the types of state matrix that can hold them."""

_MARGIN = 0.01
"""Distance from instability that HiPPO keeps once it is perturbed, 1/step."""

Start = TypeVar('Start', bound=Callable[..., NamedTuple])

PREFIX = 'ptd_'
"""Prefix of the options that are fields of ``Perturbation``."""


def check_init(init: str, type: str) -> None:
    """Raise ValueError unless a type of state matrix can start so.

    Args:
        init (str): Name of the initialization.
        type (str): Name of the parametrization.

    Raises:
        ValueError: If the name is unknown or does not fit.
    """
    check_choice('init', init, INITS)
    if type not in INITS[init]:
        fit = [name for name, types in INITS.items() if type in types]
        raise ValueError(
            f'init={init!r} needs a state matrix of type '
            f'{" or ".join(map(repr, INITS[init]))}, got type {type!r}, '
            f'which starts as {" or ".join(map(repr, fit))}'
        )


def pack_perturbation(options: dict[str, Any]) -> dict[str, Any]:
    """Put the options ``ptd_norm``, ``ptd_optimize``, ... into one ``ptd``.

    Args:
        options (dict[str, Any]): Of a state matrix.

    Returns:
        dict[str, Any]: The others, and ``ptd`` if there was one of these.

    Raises:
        TypeError: If a name after the prefix is not known.
        ValueError: If the initialization has no use for them, or a value is
            out of range.
    """
    given = [name for name in options if name.startswith(PREFIX)]
    if not given:
        return options
    if options.get('init') != 'ptd':
        raise ValueError(
            f"{given[0]} needs init='ptd', got init={options.get('init')!r}"
        )
    fields = {name.removeprefix(PREFIX): options[name] for name in given}
    others = {k: v for k, v in options.items() if k not in given}
    return dict(others, ptd=Perturbation(**fields))


def on_cpu(start: Start) -> Start:
    """Compute on the CPU though a model is built on another device."""

    @functools.wraps(start)
    def wrapped(*args: Any, **options: Any) -> Any:
        with torch.device('cpu'):
            return start(*args, **options)

    return wrapped  # type: ignore[return-value]


class DiagonalStart(NamedTuple):
    """Start of a complex diagonal matrix, mostly in double precision."""

    eigenvalues: Tensor
    """(N,), complex, 1/step."""
    input_matrix: Tensor | None = None
    """HiPPO's B over N, real as B_t is projected; None without a HiPPO."""
    vectors: Tensor | None = None
    """(N, N), complex, the eigenbasis that B_t changes to, if any."""


@on_cpu
def diagonal_start(
    init: str,
    size: int,
    with_basis: bool = True,
    ptd: Perturbation | None = None,
) -> DiagonalStart:
    """Complex eigenvalues, and what belongs to them.

    Args:
        init (str): Of those that ``'complex'`` can hold.
        size (int): Eigenvalues; conjugate pairs except for ``'ptd'``.
        with_basis (bool): Keep the eigenbasis of ``'ptd'``. Defaults to
            True.
        ptd (Perturbation, optional): Of ``'ptd'``. Defaults to None.

    Returns:
        DiagonalStart: The start, on the CPU.
    """
    if init == 'ptd':
        basis = _perturbed_legs(size, ptd or Perturbation())
        B = hippo_legs(size)[1] / size
        if with_basis:
            return DiagonalStart(basis.eigenvalues, B, basis.vectors)
        B = torch.linalg.solve(basis.vectors, B.to(basis.vectors.dtype))
        return DiagonalStart(basis.eigenvalues, as_real(B))
    # in the precision of the parameters, which decides the last bit
    values = S4D_PAIRS[init](size, torch.get_default_dtype())
    if init != 's4d_legs':
        return DiagonalStart(values)
    return DiagonalStart(values, as_real(s4d_legs_input(size) / (2 * size)))


class FullStart(NamedTuple):
    """Start ``blocks - p p^T`` of a full matrix, in double precision."""

    blocks: Tensor
    """(N / b, b, b), the diagonal blocks, 1/step."""
    rank_one: Tensor | None
    """(N,), the p above; None without."""


@on_cpu
def full_start(
    init: str,
    size: int,
    block_size: int,
    rank: int,
    kappa_max: float,
    ptd: Perturbation | None = None,
) -> FullStart:
    """Blocks and rank-one term of a full matrix.

    HiPPO-LegS is 2 x 2 blocks and a rank-one term after a rotation, which
    the projections of B and C absorb. PTD's E fills the blocks.

    Args:
        init (str): Of those that ``'full'`` can hold.
        size (int): N.
        block_size (int): Of the blocks; even but for ``'s4d_real'``.
        rank (int): Of the low-rank term; HiPPO needs one unless one block
            is the whole matrix.
        kappa_max (float): Condition number up to which an eigenbasis is used.
        ptd (Perturbation, optional): Of ``'ptd'``. Defaults to None.

    Returns:
        FullStart: The start, on the CPU.

    Raises:
        ValueError: If the structure cannot hold it, or it would not be
            stable in the eigenbasis that the scan uses.
    """
    if init == 's4d_real':
        return FullStart(_cut(torch.diag(s4d_real(size)), block_size), None)
    if block_size % 2:
        raise ValueError(
            f'init={init!r} needs an even block_size, got {block_size}'
        )
    if init in S4D_PAIRS:
        values = S4D_PAIRS[init](size // 2, torch.float64)
        return FullStart(_cut(_real_blocks(values), block_size), None)
    whole = rank == 0 and block_size == size
    if rank == 0 and not whole:
        raise ValueError(
            f'init={init!r} needs rank >= 1 for its rank-one term, or one '
            f'block of size {size}, got rank {rank}, block_size {block_size}'
        )
    form = legs_normal_form(size)
    dense, p = form.dense, form.rank_one
    if init == 'ptd':
        E = _perturbed_blocks(size, block_size, ptd or Perturbation())
        dense = dense + E.perturbation
    _check_usable(init, dense, kappa_max)
    if whole:
        return FullStart(dense[None], None)
    return FullStart(_cut(dense + torch.outer(p, p), block_size), p)


def _cut(dense: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal, (N, N) to (N / size, size, size)."""
    blocks = dense.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _real_blocks(values: Tensor) -> Tensor:
    """Real 2 x 2 blocks with these eigenvalues and their conjugates."""
    a, w = values.real, values.imag
    rows = torch.stack([a, w, -w, a], -1).unflatten(-1, (2, 2))
    return torch.block_diag(*rows)


@torch.no_grad()
def _check_usable(init: str, dense: Tensor, kappa_max: float) -> None:
    """Look at the matrix as parameters in float32 will hold it."""
    basis = decompose(dense.float())
    abscissa = float(basis.eigenvalues.real.amax())
    if init == 'ptd' and basis.kind(kappa_max) != COMPLEX64:
        raise ValueError(
            f"init='ptd' gives an eigenbasis of condition number "
            f'{float(basis.condition):.3g}, '
            f'which kappa_max = {kappa_max:g} refuses: set ptd_optimize=True, '
            'a larger ptd_norm or a larger kappa_max'
        )
    if abscissa > -_MARGIN:
        raise ValueError(
            f'init={init!r} must have real parts of at most {-_MARGIN} when '
            f'it is rounded to float32, got {abscissa:.3g} with d_state = '
            f"{len(dense)}: choose init='ptd' with ptd_norm=0.4 or less"
        )


@functools.lru_cache(maxsize=16)
def _perturbed_legs(size: int, ptd: Perturbation) -> PerturbedBasis:
    """The same for all layers; never changed in place."""
    return perturb_then_diagonalize(hippo_legs(size)[0], ptd)


@functools.lru_cache(maxsize=16)
def _perturbed_blocks(
    size: int, block_size: int, ptd: Perturbation
) -> PerturbedBasis:
    """Perturb the rotated HiPPO-LegS, with E within the blocks."""
    block = torch.ones(block_size, block_size)
    mask = torch.block_diag(*[block] * (size // block_size))
    dense = legs_normal_form(size).dense
    return perturb_then_diagonalize(dense, ptd, mask.bool())

"""Dense state matrices: their eigenbasis, and the scan that needs none."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability.inputs import (
    check_choice,
    check_finite,
    dense,
    perturbation,
    real_dtype,
)

EXACT, PERTURBED, FAILED = 0, 1, 2

_PERTURBATIONS = (1e-3, 1e-2, 1e-1)
"""Of a matrix with an ill-conditioned eigenbasis, relative to its norm."""


class Eigenbasis(NamedTuple):
    """Eigendecomposition ``A + E = X diag(lambda) X^-1`` of each matrix."""

    eigenvalues: Tensor
    """(..., N), complex128, 1/step."""
    vectors: Tensor
    """(..., N, N), complex128, unit columns: the X above."""
    condition: Tensor
    """(...), float64, 2-norm condition number of ``vectors``, no gradient."""
    kind: Tensor
    """(...), int8: ``EXACT`` (E = 0), ``PERTURBED`` or ``FAILED``."""
    perturbation: Tensor
    """(...), float64, ``||E|| / ||A||``."""

    @property
    def ok(self) -> Tensor:
        """(...), bool: False where the matrix exponential is needed."""
        return self.kind != FAILED


def decompose(
    A: Tensor,
    kappa_max: float = 1e3,
    precision: torch.dtype = torch.float64,
) -> Eigenbasis:
    """Diagonalize matrices, perturbing those that cannot be.

    A scan in complex64 loses ``2e-7 kappa`` and the gradient about
    ``1e-16 kappa^3`` to the condition number kappa of the eigenvectors, and
    nothing tells so: LAPACK returns kappa near 1e16 for a defective matrix.
    A matrix with ``kappa > kappa_max`` is therefore replaced by ``A + E``
    with a fixed Gaussian E, ``||E|| = 1e-3 ||A||``, 1e-2 or 1e-1, the first
    that helps. One with (nearly) equal eigenvalues but good eigenvectors has
    no usable gradient of these: the rounding of the scan is divided by the
    gap (measured: all of the gradient is lost at a gap of 1e-6 in float32).
    With the rounding unit u of ``precision``, a gap below ``sqrt(u) / 10`` is
    opened by a perturbation of ``sqrt(u)``, and the matrix shifted so that
    its spectral abscissa stays at most that of A. A matrix that nothing
    helps is marked ``FAILED``; its eigenvalues are those of A, its
    vectors the identity, both without gradient, and not to be used in a scan.

    All matrices are decomposed in one call on the CPU. Gradients flow by
    plain autograd; they are right for functions that do not depend on the
    scale of an eigenvector, such as the scan.

    Args:
        A (Tensor): (..., N, N), real, 1/step.
        kappa_max (float): Largest condition number, >= 1. Defaults to 1e3.
        precision (torch.dtype): Real dtype of the scan that will use the
            basis. Defaults to float64.

    Returns:
        Eigenbasis: On the device of ``A``.

    Raises:
        ValueError: If ``A`` is not square, not finite or complex, or
            ``kappa_max`` below 1.

    Source: arXiv:2310.01698, Sec. 3.2 (perturb, then diagonalize).
    """
    if A.is_complex():
        raise ValueError(f'A must be real, got {A.dtype}')
    if not kappa_max >= 1:
        raise ValueError(f'kappa_max must be >= 1, got {kappa_max}')
    matrix = dense('A', A)
    size = matrix.shape[-1]
    flat = matrix.reshape(-1, size, size)
    separation = math.sqrt(torch.finfo(precision).eps)
    values, vectors = torch.linalg.eig(flat)
    with torch.no_grad():
        condition, gap = condition_number(vectors), eigenvalue_gap(values)
        norm = _size(flat)
        relative, failed = torch.zeros_like(norm), torch.zeros_like(norm) > 0
        ill = ~((condition <= kappa_max) & (gap >= separation / 10 * norm))
        if ill.any():
            relative[ill], failed[ill] = _perturb(
                flat[ill],
                condition[ill] <= kappa_max,
                kappa_max,
                separation,
            )
    if ill.any():
        moved = flat + (relative * norm)[:, None, None] * perturbation(
            size, flat
        )
        # a dead end for gradients: the first pass would put a NaN into them
        benign = torch.diag(torch.arange(1, size + 1, dtype=flat.dtype))
        moved = torch.where(failed[:, None, None], benign, moved)
        own = values.detach()
        values, vectors = torch.linalg.eig(moved)
        excess = (values.real.amax(-1) - own.real.amax(-1)).detach()
        shift = torch.where(relative == separation, excess.clamp(min=0), 0.0)
        values = torch.where(failed[:, None], own, values - shift[:, None])
        condition = torch.where(
            failed, condition, condition_number(vectors.detach())
        )
    kind = torch.where(relative > 0, PERTURBED, EXACT)
    kind = torch.where(failed, FAILED, kind).to(torch.int8)
    lead = A.shape[:-2]
    return Eigenbasis(
        values.reshape(*lead, size).to(A.device),
        vectors.reshape(A.shape).to(A.device),
        condition.reshape(lead).to(A.device),
        kind.reshape(lead).to(A.device),
        relative.reshape(lead).to(A.device),
    )


def condition_number(vectors: Tensor) -> Tensor:
    """2-norm condition number, (..., N, N) to (...); singular gives inf."""
    singular_values = torch.linalg.svdvals(vectors)
    return singular_values[..., 0] / singular_values[..., -1]


def eigenvalue_gap(eigenvalues: Tensor) -> Tensor:
    """Smallest distance of two eigenvalues, (..., N) to (...).

    Infinite for a single eigenvalue.
    """
    distance = (eigenvalues[..., :, None] - eigenvalues[..., None, :]).abs()
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return distance.amin((-2, -1))


def _size(A: Tensor) -> Tensor:
    """Spectral norm that a perturbation refers to; 1 for the zero matrix."""
    norm = torch.linalg.matrix_norm(A, 2)
    return torch.where(norm == 0, 1.0, norm)


def _perturb(
    A: Tensor, separate: Tensor, kappa_max: float, separation: float
) -> tuple[Tensor, Tensor]:
    """Relative size of the first perturbation that helps, and failures.

    Args:
        A (Tensor): (M, N, N), float64.
        separate (Tensor): (M,), bool: only the eigenvalues are too close.
        kappa_max (float): Largest condition number.
        separation (float): Perturbation that is tried for these.
    """
    relative, todo = A.new_zeros(len(A)), torch.ones(len(A)) > 0
    norm = _size(A)
    noise = perturbation(A.shape[-1], A)
    for step in (separation, *_PERTURBATIONS):
        index = (todo & separate if step == separation else todo).nonzero()
        index = index[:, 0]
        scale = norm[index]
        moved = A[index] + step * scale[:, None, None] * noise
        values, vectors = torch.linalg.eig(moved)
        good = condition_number(vectors) <= kappa_max
        good &= eigenvalue_gap(values) >= separation / 10 * scale
        relative[index[good]] = step
        todo[index[good]] = False
    return relative, todo


def matrix_exponential_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    b_disc: str = 'euler',
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Selective scan with dense state matrices, one token at a time.

    For channel d of group g::

        h[t] = exp(delta[t, d] A[g]) h[t-1] + B_bar[t, d] u[t, d],  h[-1] = 0
        y[t, d] = C[t] . h[t] + D[d] u[t, d]

    where ``B_bar = delta B`` (``'euler'``) or the integral of ``exp(s A) B``
    over the step (``'zoh'``). Exact for every matrix, its gradient too, also
    where it has no eigenbasis; O(batch * length * dim * N^3), so a fallback
    and a reference.

    Args:
        u (Tensor): (batch, length, dim), input.
        delta (Tensor): (batch, length, dim), step size after softplus, >= 0.
        A (Tensor): (groups, N, N), real, 1/step; channel d uses matrix
            ``d // (dim / groups)``.
        B (Tensor): (batch, length, N) or (batch, length, groups, N), real.
        C (Tensor): As ``B``.
        D (Tensor, optional): (dim,), skip weight.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.
        reverse (bool): Walk from the last token to the first. Defaults to
            False.

    Returns:
        tuple[Tensor, Tensor]: y (batch, length, dim) and the state after the
        last token walked (batch, dim, N), float32, or float64 if an input is
        wider.

    Raises:
        ValueError: If a shape does not fit, ``A`` is not finite, a tensor is
            complex, or ``b_disc`` is unknown.

    Source: arXiv:2312.00752, Eq. 2 and 4; the augmented matrix for ``'zoh'``
    is Van Loan, IEEE TAC 23(3), 1978.
    """
    check_choice('b_disc', b_disc, ('euler', 'zoh'))
    _check_scan(u, delta, A, B, C, D)
    dtype = real_dtype(u, delta, A, B, C, D)
    with torch.autocast(u.device.type, enabled=False):
        u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
        (batch, length, dim), (groups, size, _) = u.shape, A.shape
        channels = dim // groups
        B, C = (_per_channel(x, groups, channels) for x in (B, C))
        A = A.repeat_interleave(channels, dim=0)  # (dim, N, N)
        state = u.new_zeros(batch, dim, size)
        rows: list[Tensor] = [u] * length
        for t in range(length - 1, -1, -1) if reverse else range(length):
            step = delta[:, t, :, None]  # (batch, dim, 1)
            if b_disc == 'zoh':
                decay, B_bar = _zero_order_hold(step, A, B[:, t])
            else:
                decay = torch.linalg.matrix_exp(step[..., None] * A)
                B_bar = step * B[:, t]
            moved = (decay @ state[..., None])[..., 0]
            state = moved + B_bar * u[:, t, :, None]
            rows[t] = (state * C[:, t]).sum(-1)
        y = torch.stack(rows, dim=1)
        if D is not None:
            y = y + u * D.to(dtype)
    return y, state


def _check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
) -> None:
    if u.dim() != 3 or u.shape[1] == 0 or delta.shape != u.shape:
        raise ValueError(
            'u and delta must be (batch, length > 0, dim), got '
            f'{tuple(u.shape)} and {tuple(delta.shape)}'
        )
    batch, length, dim = u.shape
    if A.dim() != 3 or A.shape[1] != A.shape[2] or dim % max(len(A), 1):
        raise ValueError(
            f'A must be (groups, N, N) with groups dividing dim={dim}, got '
            f'{tuple(A.shape)}'
        )
    groups, size = A.shape[:2]
    if not (groups and size):
        raise ValueError(f'A must not be empty, got {tuple(A.shape)}')
    wanted = (batch, length, size), (batch, length, groups, size)
    for name, matrix in (('B', B), ('C', C)):
        if matrix.shape not in wanted:
            raise ValueError(
                f'{name} must be {wanted[0]} or {wanted[1]}, got '
                f'{tuple(matrix.shape)}'
            )
    if D is not None and D.shape != (dim,):
        raise ValueError(f'D must be ({dim},), got {tuple(D.shape)}')
    for name, tensor in zip('uABC', (u, A, B, C), strict=True):
        if tensor.is_complex():
            raise ValueError(f'{name} must be real, got {tensor.dtype}')
    check_finite('A', A)


def _per_channel(matrix: Tensor, groups: int, channels: int) -> Tensor:
    """B or C as (batch, length, dim, N), without a copy where shared."""
    if matrix.dim() == 3:
        return matrix[:, :, None].expand(-1, -1, groups * channels, -1)
    return matrix.repeat_interleave(channels, dim=2)


def _zero_order_hold(
    step: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """``exp(step A)`` and the integral of ``exp(s A) B`` over the step.

    Both are blocks of ``exp(step [[A, B], [0, 0]])``, which exists for a
    singular A too.
    """
    size = A.shape[-1]
    A = A.expand(len(B), -1, -1, -1)
    augmented = torch.cat((A, B[..., None]), dim=-1)
    augmented = torch.nn.functional.pad(augmented, (0, 0, 0, 1))
    exponential = torch.linalg.matrix_exp(step[..., None] * augmented)
    return exponential[..., :size, :size], exponential[..., :size, size]

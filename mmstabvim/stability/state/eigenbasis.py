"""Dense state matrices: their eigenbasis, and a scan without one."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mmstabvim.stability.inputs import (
    check_choice,
    check_finite,
    dense,
    real_dtype,
)

COMPLEX64, COMPLEX128, EXPONENTIAL = 0, 1, 2
KINDS = ('complex64', 'complex128', 'exponential')
"""Arithmetic of the scan with a matrix, in the order of these numbers."""

KAPPA_LIMIT = 1e11
"""Condition number up to which a scan in complex128 is accurate to 2e-5."""

_SINGLE_ERROR, _DOUBLE_ERROR = 1.0, 0.01
"""Largest ``u kappa^2 / gap`` for a gradient with respect to A through the
eigenvectors, u the rounding of the scan, in complex64 and in complex128.
Errors are typically a hundredth of it, and a quarter for 2 x 2."""

_SINGLE_GAP, _DOUBLE_GAP = 3.5e-5, 1.5e-9
"""Least relative distance of two eigenvalues for such a gradient, in complex64
and in complex128."""

_SEPARATION = 1e-8  # relative to the norm; rounding to float32 is 6e-8


class Eigenbasis(NamedTuple):
    """Eigendecomposition ``A = X diag(lambda) X^-1`` of each matrix.

    It belongs to ``A`` itself; nothing is perturbed.

    Example:
        >>> A = torch.tensor([[-1.0, 1e6], [0.0, -2.0]])
        >>> KINDS[decompose(A).kind()]
        'complex128'
    """

    eigenvalues: Tensor
    """(..., N), complex128, 1/step."""
    vectors: Tensor
    """(..., N, N), complex128, unit columns: the X above."""
    inverse: Tensor
    """(..., N, N), complex128; the identity where X cannot be inverted."""
    condition: Tensor
    """(...), float64, 2-norm condition number of ``vectors``, >= 1."""
    gap: Tensor
    """(...), float64, least distance of two eigenvalues over ``norm``."""
    cosine: Tensor
    """(...), float64, in [0, 1]: least ``|y^H x|`` of a left and a right unit
    eigenvector; 1 for a normal matrix, 0 for a defective one."""
    norm: Tensor
    """(...), float64, Frobenius norm of A; 1 for the zero matrix."""

    def kind(self, kappa_max: float = 1e3, gradient: bool = False) -> Tensor:
        """Choose the arithmetic of the scan for each matrix.

        Args:
            kappa_max (float): Condition number up to which complex64 is
                used. Defaults to 1e3.
            gradient (bool): The gradient with respect to A is wanted too. It
                loses ``u kappa^2 / gap``, more than the values do. Defaults
                to False.

        Returns:
            Tensor: (...), int8, index into :data:`KINDS`.
        """
        single = self.condition <= kappa_max
        double = self.condition <= KAPPA_LIMIT
        if gradient:
            single = single & (self.gap >= _SINGLE_GAP)
            gap = self.gap.clamp(min=_DOUBLE_GAP)  # after separated()
            lost = self.condition.square() / gap
            single = single & (lost * 6e-8 <= _SINGLE_ERROR)
            double = double & (lost * 2.2e-16 <= _DOUBLE_ERROR)
        kind = torch.where(double, COMPLEX128, EXPONENTIAL)
        return torch.where(single & double, COMPLEX64, kind).to(torch.int8)

    def separated(self) -> Tensor:
        """Separate equal eigenvalues, for the gradient of a complex128 scan.

        Where eigenvalues of a matrix coincide, the scan has a gradient but
        the eigenvectors have none. Those eigenvalues are moved apart,
        downward, by ``1e-8 ||A||`` in all, less than the rounding of the
        parameters.

        Returns:
            Tensor: (..., N), complex128, 1/step.
        """
        size = self.eigenvalues.shape[-1]
        place = torch.arange(size, dtype=self.norm.dtype)
        step = _SEPARATION * self.norm[..., None] * place / max(size - 1, 1)
        close = (self.gap < _DOUBLE_GAP)[..., None]
        return self.eigenvalues - torch.where(close, step, 0.0)


def decompose(A: Tensor) -> Eigenbasis:
    """Diagonalize matrices, all in one call, on the CPU in double precision.

    With the condition number kappa of the eigenvectors, a scan in complex64
    loses ``2e-7 kappa`` and one in complex128 ``2e-16 kappa``, silently.
    LAPACK returns kappa near 1e16 for a defective matrix.
    :meth:`Eigenbasis.kind` chooses the arithmetic for each matrix.

    Args:
        A (Tensor): (..., N, N), real, 1/step.

    Returns:
        Eigenbasis: Tensors on the CPU. Eigenvalues and vectors are
        differentiable (:func:`known_eig`), the rest is not.

    Raises:
        ValueError: If ``A`` is not square, not finite or complex.

    Example:
        >>> A = torch.tensor([[-1.0, 100.0], [0.0, -2.0]])
        >>> decompose(A).condition.round().item()
        200.0
    """
    if A.is_complex():
        raise ValueError(f'A must be real, got {A.dtype}')
    given = dense('A', A)
    matrix = given.detach()
    values, vectors = torch.linalg.eig(matrix)
    condition = condition_number(vectors)
    cosine, inverse = eigenvector_cosine(vectors)
    norm = torch.linalg.matrix_norm(matrix)
    norm = torch.where(norm == 0, 1.0, norm)
    gap = eigenvalue_gap(values) / norm
    if given.requires_grad:
        values, vectors = known_eig(given, values, vectors)
    return Eigenbasis(values, vectors, inverse, condition, gap, cosine, norm)


class _KnownEig(torch.autograd.Function):
    """``torch.linalg.eig`` of A with a known result."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, eigenvalues: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(eigenvalues, vectors)
        return eigenvalues.clone(), vectors.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dvalues: Tensor, dvectors: Tensor
    ) -> tuple[Tensor, None, None]:
        values, X = ctx.saved_tensors
        # the second term accounts for the unit norm of columns
        inner = X.mH @ dvectors
        norms = inner.diagonal(dim1=-2, dim2=-1).real
        inner = inner - (X.mH @ X) * norms[..., None, :]
        gap = (values[..., None, :] - values[..., :, None]).conj()
        gap.diagonal(dim1=-2, dim2=-1).fill_(1)
        inner = inner / gap
        inner.diagonal(dim1=-2, dim2=-1).copy_(dvalues)
        return torch.linalg.solve(X.mH, inner @ X.mH).real, None, None


def known_eig(
    A: Tensor, eigenvalues: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Give a known decomposition of A the gradient of ``torch.linalg.eig``.

    One decomposition then serves many forward passes.

    Args:
        A (Tensor): (..., N, N), real, 1/step.
        eigenvalues (Tensor): (..., N), complex, all different, 1/step.
        vectors (Tensor): (..., N, N), complex, unit columns, in that order.

    Returns:
        tuple[Tensor, Tensor]: Copies of both, differentiable once. The
        gradient is right for functions that do not depend on the scale of a
        column.
    """
    known: tuple[Tensor, Tensor]
    known = cast(Any, _KnownEig).apply(A, eigenvalues, vectors)
    return known


def eigenvector_cosine(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Least ``|y^H x|`` of left and right unit eigenvectors, and ``X^-1``.

    Args:
        vectors (Tensor): (..., N, N), complex, unit columns: X.

    Returns:
        tuple[Tensor, Tensor]: The cosine (...), in [0, 1], and the inverse
        (..., N, N). Where X cannot be inverted they are 0 and the identity.
    """
    singular = ~(condition_number(vectors) < 1 / torch.finfo(torch.double).eps)
    eye = torch.eye(vectors.shape[-1]).to(vectors)
    inverse = torch.linalg.inv(
        torch.where(singular[..., None, None], eye, vectors)
    )
    cosine = 1 / torch.linalg.vector_norm(inverse, dim=-1).amax(-1)
    return torch.where(singular, 0.0, cosine.clamp(max=1.0)), inverse


def condition_number(vectors: Tensor) -> Tensor:
    """2-norm condition number, (..., N, N) to (...); inf if singular."""
    singular_values: Tensor = torch.linalg.svdvals(vectors)
    return singular_values[..., 0] / singular_values[..., -1]


def eigenvalue_gap(eigenvalues: Tensor) -> Tensor:
    """Smallest distance of two eigenvalues, (..., N) to (...).

    Infinite for a single eigenvalue.
    """
    distance = (eigenvalues[..., :, None] - eigenvalues[..., None, :]).abs()
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return distance.amin((-2, -1))


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
    over the step (``'zoh'``). Values and gradients are exact for every matrix,
    also without an eigenbasis. The cost is O(batch * length * dim * N^3), so
    it is a fallback and a reference.

    Args:
        u (Tensor): (batch, length, dim), input.
        delta (Tensor): (batch, length, dim), step size after softplus, >= 0.
        A (Tensor): (groups, N, N), real, 1/step; channel d uses matrix
            ``d // (dim / groups)``.
        B (Tensor): (batch, length, N) or (batch, length, groups, N), real.
        C (Tensor): Same shape choices as ``B``.
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

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> A = torch.zeros(1, 1, 1)
        >>> y, last = matrix_exponential_scan(one, one, A, one, one)
        >>> y.flatten(), last.item()
        (tensor([1., 2., 3.]), 3.0)
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
    """Expand B or C to (batch, length, dim, N), without a copy if shared."""
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

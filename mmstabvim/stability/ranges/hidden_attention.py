"""Hidden attention: the selective scan as a matrix between tokens.

With step sizes, B and C held fixed, the scan of one channel is linear in its
input: ``y = alpha u + D u``. The matrix alpha is its hidden attention.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.ops.selective_scan.discretization import B_DISCS, phi1
from mmstabvim.stability.inputs import check_choice, real_dtype
from mmstabvim.stability.state.eigenbasis import matrix_exponential_scan

AGGREGATIONS = ('abs', 'mean', 'norm')

_VALUES = 2**18
"""State values computed at once: about the cache of a CPU core."""


class _Scan(NamedTuple):
    """Inputs of the matrices, with A, B and C for every channel."""

    delta: Tensor  # (batch, length, dim)
    A: Tensor  # (dim, N)
    B: Tensor  # (batch, length, dim, N)
    C: Tensor  # (batch, length, dim, N)
    b_disc: str


@torch.no_grad()
def hidden_attention(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    reverse: bool = False,
    b_disc: str = 'euler',
) -> Tensor:
    """Matrix of the selective scan, for every channel.

    ::

        alpha[t, s] = C[t] . (prod_{r = s+1..t} exp(delta[r] A)) B_bar[s]

    for ``s <= t`` (with ``reverse`` for ``s >= t``, and the product over
    ``r = t..s-1``), else 0; twice the real part for complex ``A``, whose
    modes stand for conjugate pairs. It is the derivative ``d y[t] / d u[s]``
    of the scan while ``delta``, ``B`` and ``C`` are held fixed.

    The recurrence of the scan runs once with every token as a source. No
    difference of sums is exponentiated, so rounding errors are those of the
    scan itself, for unstable ``A`` too. It takes O(batch * dim * length^2 *
    N) operations; the largest tensor is the result.

    Args:
        delta (Tensor): (batch, length, dim), step size after softplus, >= 0,
            in steps.
        A (Tensor): (dim, N), diagonal, real or complex, 1/step; or (groups,
            N, N), real, dense, without an eigenbasis. Dense matrices take
            O(length^2) matrix exponentials for each channel.
        B (Tensor): (batch, length, groups, N), channel d uses group
            ``d // (dim / groups)``; complex where ``A`` is.
        C (Tensor): Same shape and dtype as ``B``.
        D (Tensor, optional): (dim,), skip weight, added to the diagonal.
            Defaults to None, without.
        reverse (bool): The scan walks from the last token to the first.
            Defaults to False.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.

    Returns:
        Tensor: (batch, dim, length, length), output token t first; float32,
        or float64 if an input is wider; without gradient.

    Raises:
        ValueError: If a shape does not fit or ``b_disc`` is unknown.

    Source: arXiv:2403.01590 (there with D left out).

    Example:
        >>> one, A = torch.ones(1, 3, 1), torch.zeros(1, 1)
        >>> hidden_attention(one, A, one[..., None], one[..., None])[0, 0]
        tensor([[1., 0., 0.],
                [1., 1., 0.],
                [1., 1., 1.]])
    """
    parts = _chunks(delta, A, B, C, D, reverse, b_disc)
    return torch.cat(list(parts), dim=1)


@torch.no_grad()
def aggregate_attention(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    reverse: bool = False,
    b_disc: str = 'euler',
    how: str = 'abs',
) -> Tensor:
    """Aggregate the hidden attention of all channels in one matrix.

    The matrices of all channels are never in memory at once.

    Args:
        delta (Tensor): (batch, length, dim), step size after softplus, >= 0,
            in steps.
        A (Tensor): See :func:`hidden_attention`.
        B (Tensor): (batch, length, groups, N).
        C (Tensor): (batch, length, groups, N).
        D (Tensor, optional): (dim,), skip weight. Defaults to None.
        reverse (bool): The scan walks from the last token to the first.
            Defaults to False.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.
        how (str): Aggregation over the channels. ``'abs'`` is the mean of
            ``|alpha|``; ``'mean'`` the mean of alpha, in which signs cancel;
            ``'norm'`` the square root of the sum of squares. Defaults to
            ``'abs'``.

    Returns:
        Tensor: (batch, length, length), output token first; float32, or
        float64 if an input is wider.

    Raises:
        ValueError: If a shape does not fit, or ``b_disc`` or ``how`` is
            unknown.

    Example:
        >>> one, A = torch.ones(1, 2, 1), torch.zeros(1, 1)
        >>> aggregate_attention(one, A, one[..., None], one[..., None])[0]
        tensor([[1., 0.],
                [1., 1.]])
    """
    check_choice('how', how, AGGREGATIONS)
    total: Tensor | float = 0.0
    for part in _chunks(delta, A, B, C, D, reverse, b_disc):
        if how == 'norm':
            part = part.square()
        total = total + (part.abs() if how == 'abs' else part).sum(1)
    total = torch.as_tensor(total)
    return total.sqrt() if how == 'norm' else total / delta.shape[2]


@torch.no_grad()
def attention_rollout(layers: Tensor) -> Tensor:
    """Follow attention through layers, by a product of their matrices.

    Each layer's matrix is scaled to rows of sum 1 (a row of zeros stays) and
    mixed half and half with the identity, for the residual stream. This is a
    heuristic: the half is an assumption, and everything else that a layer
    does to tokens is left out.

    Args:
        layers (Tensor): (layers, batch, length, length), >= 0, first layer
            first, output token before source token.

    Returns:
        Tensor: (batch, length, length): the last layer's tokens by the first
        layer's; rows of sum 1 where no row was 0.

    Raises:
        ValueError: If the shape is wrong, or a value negative or not finite.

    Source: arXiv:2005.00928 (attention rollout).

    Example:
        >>> layer = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> attention_rollout(layer[None, None])[0]
        tensor([[1.0000, 0.0000],
                [0.3750, 0.6250]])
    """
    if layers.dim() != 4 or layers.shape[-1] != layers.shape[-2]:
        raise ValueError(
            'layers must be (layers, batch, length, length), got '
            f'{tuple(layers.shape)}'
        )
    if not (torch.isfinite(layers) & (layers >= 0)).all():
        raise ValueError('layers must be finite and >= 0')
    eye = torch.eye(layers.shape[-1], dtype=layers.dtype, device=layers.device)
    rolled = eye.expand(layers.shape[1:])
    for matrix in layers:
        sums = matrix.sum(-1, keepdim=True)
        share = matrix / torch.where(sums == 0, 1.0, sums)
        rolled = (share + eye) / 2 @ rolled
    return rolled


def _chunks(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    reverse: bool,
    b_disc: str,
) -> Iterator[Tensor]:
    """Yield matrices (batch, some channels, length, length)."""
    check_choice('b_disc', b_disc, B_DISCS)
    _check(delta, A, B, C, D)
    batch, length, dim = delta.shape
    real = real_dtype(delta, A, B, C, D)
    wide = real.to_complex() if A.is_complex() else real
    groups = B.shape[2]
    size = max(1, _VALUES // (batch * length * A.shape[-1]))
    for part in torch.split(torch.arange(dim, device=delta.device), size):
        group = part // (dim // groups)
        with torch.autocast(delta.device.type, enabled=False):
            scan = _Scan(
                delta[..., part].to(real),
                _of_channels(A, part, dim).to(wide),
                B[:, :, group].to(wide),
                C[:, :, group].to(wide),
                b_disc,
            )
            find = _impulse_responses if A.dim() == 3 else _unroll
            alpha = find(scan, reverse)
        if D is not None:
            alpha.diagonal(dim1=-2, dim2=-1).add_(D[part].to(real)[:, None])
        yield alpha


def _of_channels(A: Tensor, part: Tensor, dim: int) -> Tensor:
    """Select the state matrix of each channel."""
    return A[part // (dim // len(A))]


def _unroll(scan: _Scan, reverse: bool) -> Tensor:
    """Diagonal A: walk the states that each source token leaves behind."""
    if reverse:
        delta, B, C = (x.flip(1) for x in (scan.delta, scan.B, scan.C))
        turned = scan._replace(delta=delta, B=B, C=C)
        return _unroll(turned, False).flip(-2, -1)
    step = scan.delta[..., None]
    gain = step * phi1(step * scan.A) if scan.b_disc == 'zoh' else step
    drive = gain * scan.B  # (batch, length, dim, N)
    decay = torch.exp(step * scan.A)
    batch, length, dim, modes = drive.shape
    left = drive.new_zeros(batch, dim, length, modes)  # by source token
    alpha = scan.delta.new_zeros(batch, dim, length, length)
    for t in range(length):
        left[:, :, :t] *= decay[:, t, :, None]
        left[:, :, t] = drive[:, t]
        row = (left[:, :, : t + 1] @ scan.C[:, t, :, :, None])[..., 0]
        alpha[:, :, t, : t + 1] = 2 * row.real if row.is_complex() else row
    return alpha


def _impulse_responses(scan: _Scan, reverse: bool) -> Tensor:
    """Dense A: scan a unit impulse at each token, a batch entry each."""
    _, length, dim = scan.delta.shape
    ones = torch.eye(length, dtype=scan.delta.dtype, device=scan.delta.device)
    ones = ones[..., None].expand(-1, -1, dim)  # (source, token, dim)
    found = []
    for delta, B, C in zip(scan.delta, scan.B, scan.C, strict=True):
        delta, B, C = (x.expand(length, *x.shape) for x in (delta, B, C))
        y, _ = matrix_exponential_scan(
            ones, delta, scan.A, B, C, None, scan.b_disc, reverse
        )
        found.append(y.permute(2, 1, 0))  # (dim, token, source)
    return torch.stack(found).contiguous()


def _check(
    delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> None:
    if delta.dim() != 3 or delta.numel() == 0 or delta.is_complex():
        raise ValueError(
            'delta must be real, (batch, length, dim) and not empty, got '
            f'{tuple(delta.shape)} {delta.dtype}'
        )
    batch, length, dim = delta.shape
    dense = A.dim() == 3
    if dense:
        fits = A.shape[1] == A.shape[2] and not A.is_complex()
    else:
        fits = A.dim() == 2 and len(A) == dim
    if not fits or A.numel() == 0 or dim % len(A):
        raise ValueError(
            f'A must be ({dim}, N), or real (groups, N, N) with groups '
            f'dividing {dim}, got {tuple(A.shape)} {A.dtype}'
        )
    groups = B.shape[2] if B.dim() == 4 else 0
    wanted = (batch, length, groups, A.shape[-1])
    for name, matrix in (('B', B), ('C', C)):
        fits = matrix.shape == wanted and groups > 0 and dim % groups == 0
        if not fits or matrix.is_complex() != A.is_complex():
            raise ValueError(
                f'{name} must be ({batch}, {length}, groups, {wanted[3]}) '
                f'with groups dividing {dim}, complex where A is '
                f'({A.dtype}), got {tuple(matrix.shape)} {matrix.dtype}'
            )
    if D is not None and D.shape != (dim,):
        raise ValueError(f'D must be ({dim},), got {tuple(D.shape)}')

"""The definition of the selective scan, in plain differentiable PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.ops.backend import no_autocast
from mmstabvim.ops.selective_scan.discretization import phi1
from mmstabvim.ops.selective_scan.inputs import ScanInputs, state_dtypes


def scan_ref(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run :func:`selective_scan_ref` for each direction, stacked."""
    results = [
        selective_scan_ref(
            inputs.u[k],
            inputs.delta[k],
            inputs.A[k],
            inputs.B[k],
            inputs.C[k],
            None if inputs.D is None else inputs.D[k],
            None if inputs.delta_bias is None else inputs.delta_bias[k],
            inputs.delta_softplus,
            reverse,
            inputs.b_disc,
        )
        for k, reverse in enumerate(inputs.reverse)
    ]
    y, last = (torch.stack(x) for x in zip(*results, strict=True))
    return y, last


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    b_disc: str = 'euler',
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time.

    With ``dt = softplus(delta + delta_bias)`` (or without softplus)::

        h[t] = exp(dt[t] A) h[t-1] + B_bar[t] u[t],    h[-1] = 0
        y[t] = sum_n C[t] h[t] + D u[t]

    where ``B_bar = dt B`` (``'euler'``) or ``dt phi1(dt A) B`` (``'zoh'``),
    and ``y = 2 Re(sum C h)`` for complex ``A``: N stored modes stand for 2N
    conjugate ones. The state is float32 or wider.

    Args:
        u (Tensor): (batch, length, dim), input.
        delta (Tensor): (batch, length, dim), step size before bias and
            softplus.
        A (Tensor): (dim, state), continuous-time diagonal, real or complex,
            1/step.
        B (Tensor): (batch, length, groups, state), channel d uses group
            ``d // (dim / groups)``; or constant (dim, state).
        C (Tensor): As ``B``.
        D (Tensor, optional): (dim,), skip weight.
        delta_bias (Tensor, optional): (dim,).
        delta_softplus (bool): Apply softplus. Defaults to False.
        reverse (bool): Walk from the last token to the first. Defaults to
            False.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.

    Returns:
        tuple[Tensor, Tensor]: y (batch, length, dim) and the state after the
        last token walked (batch, dim, state), both in the state's precision.

    Source: arXiv:2312.00752, Eq. 2 and Algorithm 2; ``'zoh'`` is Eq. 4,
    ``'euler'`` what the public code computes.
    """
    real, wide = state_dtypes(A, u, delta, B, C, D, delta_bias)
    with no_autocast(u.device):
        u, delta = u.to(real), delta.to(real)
        if delta_bias is not None:
            delta = delta + delta_bias.to(real)
        dt = F.softplus(delta) if delta_softplus else delta
        A, B, C = A.to(wide), B.to(wide), C.to(wide)
        dim, length = u.shape[-1], u.shape[1]
        state = u.new_zeros(u.shape[0], dim, A.shape[1], dtype=wide)
        rows: list[Tensor] = [u] * length
        for t in range(length - 1, -1, -1) if reverse else range(length):
            step = dt[:, t, :, None]  # (batch, dim, 1)
            gain = step * phi1(step * A) if b_disc == 'zoh' else step
            drive = gain * _at(B, t, dim) * u[:, t, :, None]
            state = torch.exp(step * A) * state + drive
            rows[t] = (state * _at(C, t, dim)).sum(-1)
        y = torch.stack(rows, dim=1)
        if A.is_complex():
            y = 2 * y.real
        if D is not None:
            y = y + u * D.to(real)
    return y, state


def _at(matrix: Tensor, t: int, dim: int) -> Tensor:
    """B or C of one token as (batch or 1, dim, state)."""
    if matrix.dim() == 2:
        return matrix[None]
    groups = matrix.shape[2]
    if groups == 1:
        return matrix[:, t]
    return matrix[:, t].repeat_interleave(dim // groups, dim=1)

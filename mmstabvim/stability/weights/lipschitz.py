"""Local amplification of a scan and of a whole network."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice, real_dtype

JACOBIANS = ('double_backward', 'difference')


def scan_gain_bound(
    A: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    b_disc: str = 'euler',
) -> Tensor:
    """Bound the l2 gain of a scan with fixed step sizes, B and C.

    The gain of a channel, over sequences of any length, is at most ``|D| +
    sum_n |C_n| |B_n| g_n`` with ``g = delta / (1 - exp(-delta |A|))`` for
    Euler, at most ``1 / |A| + delta``, and ``g = 1 / |A|`` for zero-order
    hold. A selective scan computes step size, B and C from its input; the
    bound does not apply to that map.

    Args:
        A (Tensor): (d_inner, d_state), real, negative, 1/step.
        delta (Tensor): (d_inner,), > 0, steps.
        B (Tensor): (d_inner, d_state) or (d_state,).
        C (Tensor): (d_inner, d_state) or (d_state,).
        D (Tensor, optional): (d_inner,).
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.

    Returns:
        Tensor: (d_inner,), >= 0, dimensionless, at least float32,
        differentiable.

    Raises:
        ValueError: If ``A`` is complex or not negative, ``delta`` not
            positive, or ``b_disc`` unknown.

    Source: the geometric series of ``h <- exp(delta A) h + B u`` with Young's
    inequality for convolutions.

    Example:
        >>> one = torch.ones(1, 1)
        >>> scan_gain_bound(-2 * one, one[0], one, one, b_disc='zoh')
        tensor([0.5000])
    """
    check_choice('b_disc', b_disc, ('euler', 'zoh'))
    if A.is_complex() or not bool((A < 0).all()):
        raise ValueError('A must be real and negative everywhere')
    if not bool((delta > 0).all()):
        raise ValueError('delta must be positive everywhere')
    if b_disc == 'zoh':
        gains = 1 / A.abs()
    else:
        step = delta[:, None]
        gains = step / -torch.expm1(step * A)
    bound = (C.abs() * B.abs() * gains).sum(-1)
    return bound if D is None else bound + D.abs()


def local_jacobian_norm(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int = 20,
    method: str = 'double_backward',
) -> Tensor:
    """Largest singular value of each sample's Jacobian, by power iteration.

    It is the largest change of an output per small change of its sample. It
    is no Lipschitz constant: another input may have a larger one.

    Args:
        function (Callable): Maps (batch, ...) to (batch, ...), each sample by
            itself: a model in evaluation mode.
        x (Tensor): (batch, ...), float32 or wider.
        steps (int): Steps of power iteration, >= 1. Defaults to 20.
        method (str): ``'double_backward'`` takes exact products with the
            Jacobian, which each operation must allow (the scan with
            ``backend='reference'``). ``'difference'`` takes central
            differences with a step of 3e-4 (float32) or 1e-4 (float64) of the
            sample's norm. Defaults to ``'double_backward'``.

    Returns:
        Tensor: (batch,), >= 0, unit of the output per unit of ``x``, without
        gradient. It is an estimate from below, up to the error of
        differences.

    Raises:
        ValueError: If ``steps`` is not positive, ``method`` unknown, or the
            output has another batch size.

    Example:
        >>> weight = torch.diag(torch.tensor([1.0, 3.0]))
        >>> norm = local_jacobian_norm(lambda x: x @ weight, torch.ones(1, 2))
        >>> round(norm.item(), 4)
        3.0
    """
    check_choice('method', method, JACOBIANS)
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = function(x)
        if y.dim() < 1 or len(y) != len(x):
            raise ValueError(
                f'function must keep the batch of {len(x)}, got an output '
                f'{tuple(y.shape)}'
            )
        product = _PRODUCTS[method](function, x, y)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(x.shape, generator=generator).to(x)
        for _ in range(steps):
            image = product(_unit(v))
            (v,) = torch.autograd.grad(y, x, image, retain_graph=True)
    return _norms(image).to(real_dtype(x))


def _double_backward(
    function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> Callable[[Tensor], Tensor]:
    """Make products ``J v`` from the adjoint of ``w -> J^T w``."""
    w = torch.zeros_like(y, requires_grad=True)
    (transposed,) = torch.autograd.grad(y, x, w, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(transposed, w, v, retain_graph=True)[0]

    return product


def _difference(
    function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> Callable[[Tensor], Tensor]:
    """Make products ``J v`` by central differences."""
    relative = 1e-4 if x.dtype == torch.float64 else 3e-4
    size = _norms(x.detach())
    step = relative * torch.where(size == 0, 1.0, size)
    step = step.reshape(-1, *[1] * (x.dim() - 1))
    scale = step.reshape(-1, *[1] * (y.dim() - 1))

    @torch.no_grad()
    def product(v: Tensor) -> Tensor:
        ahead, behind = function(x + step * v), function(x - step * v)
        return (ahead - behind) / (2 * scale)

    return product


_PRODUCTS = {'double_backward': _double_backward, 'difference': _difference}


def _norms(x: Tensor) -> Tensor:
    """Norm of each sample."""
    norms: Tensor = torch.linalg.vector_norm(x.detach().flatten(1), dim=1)
    return norms


def _unit(x: Tensor) -> Tensor:
    norm = _norms(x).reshape(-1, *[1] * (x.dim() - 1))
    return x.detach() / torch.where(norm == 0, 1.0, norm)

"""Differentiable penalties on the Jacobian of logits, for training."""

import math

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.sensitivity.attribution import Function, check_logits
from mmstabvim.stability.sensitivity.entropy import spectral_entropy
from mmstabvim.stability.sensitivity.jacobian import (
    METHODS,
    check_differentiable,
    input_jacobian,
)


def jacobian_penalty(
    function: Function,
    x: Tensor,
    method: str = 'difference',
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared Frobenius norm of the Jacobians, by one random projection.

    ``E ||J v||**2 = ||J||_F**2`` for Gaussian ``v``, so the estimate is
    unbiased, up to the error of differences.

    Args:
        function (Callable): Maps (batch, ...) to (batch, ...), each sample by
            itself.
        x (Tensor): (batch, ...).
        method (str): ``'difference'`` takes central differences along a
            random perturbation of each sample, so that training needs first
            derivatives only. ``'double_backward'`` takes exact products with
            a random vector of outputs, where every operation has a second
            derivative. Defaults to ``'difference'``.
        generator (torch.Generator, optional): Generator on the CPU. Defaults
            to None, PyTorch's own.

    Returns:
        Tensor: Scalar, >= 0, squared unit of output per input,
        differentiable with respect to the parameters of ``function``.

    Raises:
        ValueError: If ``method`` is unknown.

    Source: arXiv:1908.02729, Eq. 9 (``'double_backward'``).

    Example:
        >>> def penalty(scale):
        ...     seeded = dict(generator=torch.Generator().manual_seed(0))
        ...     return jacobian_penalty(scale.mul, torch.ones(1, 4), **seeded)
        >>> ratio = penalty(torch.tensor(3.0)) / penalty(torch.tensor(1.0))
        >>> round(ratio.item(), 2)
        9.0
    """
    check_choice('method', method, METHODS)
    x = x.detach()
    if method == 'difference':
        v = torch.randn(x.shape, generator=generator).to(x)
        step = relative_step(x) / _norms(v)
        ahead, behind = _both_sides(function, x, v * _column(step, x))
        slope = (ahead - behind) / (2 * _column(step, ahead))
        return slope.flatten(1).square().sum(1).mean()
    x.requires_grad_()
    y = function(x)
    w = torch.randn(y.shape, generator=generator).to(y)
    (row,) = torch.autograd.grad(y, x, w, create_graph=True)
    check_differentiable([row])
    return row.flatten(1).square().sum(1).mean()


def entropy_penalty(
    function: Function,
    x: Tensor,
    power: float = 1.0,
    method: str = 'difference',
) -> Tensor:
    """Mean distance of spectral entropies from their largest value.

    The mean of ``log(min(classes, size)) - H`` over the samples' Jacobians: 0
    where all singular values are equal.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself.
        x (Tensor): (batch, ...).
        power (float): Exponent of the singular values, see
            :func:`spectral_entropy`. Defaults to 1.0.
        method (str): With ``'difference'`` the value is exact, and its
            gradient comes from central differences along the rows of ``dH /
            dJ``, two passes per class, with first derivatives only. With
            ``'double_backward'`` the gradient is exact, where every operation
            has a second derivative. Defaults to ``'difference'``.

    Returns:
        Tensor: Scalar, >= 0, nats, differentiable with respect to the
        parameters of ``function``.

    Raises:
        ValueError: If ``method`` is unknown or there are no logits.

    Example:
        >>> rank_one, x = torch.ones(2, 2), torch.ones(1, 2)
        >>> round(entropy_penalty(lambda x: x @ rank_one, x).item(), 4)
        0.6931
    """
    check_choice('method', method, METHODS)
    if method == 'double_backward':
        return _penalty_of(_differentiable_jacobian(function, x), power)
    jacobian = input_jacobian(function, x).requires_grad_()
    with torch.enable_grad():
        value = _penalty_of(jacobian, power)
    (weight,) = torch.autograd.grad(value, jacobian)
    moving = _inner_product(function, x.detach(), weight)
    return value.detach() + moving - moving.detach()


def _penalty_of(jacobian: Tensor, power: float) -> Tensor:
    """Penalty of Jacobians (batch, classes, size)."""
    values = torch.linalg.svdvals(jacobian.double())
    entropy = spectral_entropy(values, power)
    room = math.log(values.shape[-1]) - entropy
    return room.mean().to(jacobian.dtype)


def _differentiable_jacobian(function: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    logits = check_logits(function(x), x)
    rows = [
        torch.autograd.grad(column.sum(), x, create_graph=True)[0]
        for column in logits.unbind(1)
    ]
    check_differentiable(rows)
    return torch.stack([row.flatten(1) for row in rows], 1)


def _inner_product(function: Function, x: Tensor, weight: Tensor) -> Tensor:
    """``sum_ij weight_ij J_ij`` over all samples, by central differences."""
    classes = weight.shape[1]
    rows = weight.flatten(0, 1)
    copies = x.repeat_interleave(classes, 0)
    size = rows.norm(dim=1)
    step = relative_step(copies) / torch.where(size == 0, 1.0, size)
    change = rows.reshape(copies.shape) * _column(step, copies)
    ahead, behind = _both_sides(function, copies, change)
    # each row of weights belongs to a logit of its own
    slopes = (ahead - behind) / (2 * step[:, None])
    slopes = torch.unflatten(slopes, 0, weight.shape[:2])
    return slopes.diagonal(dim1=1, dim2=2).sum()


def _both_sides(
    function: Function, x: Tensor, change: Tensor
) -> tuple[Tensor, Tensor]:
    y = function(torch.cat([x + change, x - change]))
    return y[: len(x)], y[len(x) :]


def relative_step(x: Tensor) -> Tensor:
    """Length of each sample's step for central differences, (batch,).

    It is 1e-4 (float64) or 1e-3 of the sample's norm, or of 1 for zeros.
    """
    size = _norms(x)
    relative = 1e-4 if x.dtype == torch.float64 else 1e-3
    return relative * torch.where(size == 0, 1.0, size)


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values of samples to broadcast against ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))

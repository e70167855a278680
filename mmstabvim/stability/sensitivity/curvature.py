"""Eigenvalues of the Hessian of a loss, from products with vectors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.sensitivity.jacobian import (
    METHODS,
    check_differentiable,
    check_parameters,
    difference_step,
    differentiate_again,
    flat,
    moved,
    plain_attention,
    unflat,
)
from mmstabvim.stability.sensitivity.lanczos import Extremes, lanczos_extremes


def hessian_product(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    method: str = 'difference',
) -> Callable[[Tensor], Tensor]:
    """Make a function that multiplies the Hessian of a loss with vectors.

    Args:
        loss (Callable): Takes nothing, reads the parameters, returns a
            scalar.
        parameters (Sequence[Tensor]): Leaves with ``requires_grad``.
        method (str): ``'difference'`` takes central differences of gradients.
            Every scan allows them, but a kink (ReLU) within their step counts
            as curvature. ``'double_backward'`` is exact, where every
            operation has a second derivative. Defaults to ``'difference'``.

    Returns:
        Callable: Maps a vector (number of parameters,) to its product, same
        shape, without gradient.

    Raises:
        ValueError: If ``method`` is unknown.
        SecondDerivativeError: For ``'double_backward'``, where an operation
            has no second derivative.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> product = hessian_product(lambda: w.prod(), [w], 'double_backward')
        >>> product(torch.tensor([3.0, 4.0]))
        tensor([4., 3.])
    """
    check_choice('method', method, METHODS)
    parameters = check_parameters(parameters)
    if method == 'difference':
        return _difference_product(loss, parameters)
    with torch.enable_grad():
        with plain_attention():
            value = loss()
        slope = flat(differentiate_again(value, parameters, create_graph=True))
    check_differentiable([slope])

    def product(v: Tensor) -> Tensor:
        if not slope.requires_grad:  # linear in the parameters
            return torch.zeros_like(v)
        return flat(differentiate_again(slope, parameters, v))

    return product


def _difference_product(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    def slope_at(step: Tensor) -> Tensor:
        with moved(parameters, unflat(step, parameters)), torch.enable_grad():
            gradients = torch.autograd.grad(
                loss(), parameters, materialize_grads=True
            )
        return flat(gradients)

    def product(v: Tensor) -> Tensor:
        step = difference_step(parameters, v)
        return (slope_at(step * v) - slope_at(-step * v)) / (2 * step)

    return product


def hessian_extremes(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    method: str = 'difference',
    steps: int = 20,
    seed: int = 0,
) -> Extremes:
    """Smallest and largest eigenvalue of the Hessian of a loss.

    The spectral norm is the larger of their absolute values, which often
    belongs to the negative end.

    Args:
        loss (Callable): Takes nothing, reads the parameters, returns a
            scalar.
        parameters (Sequence[Tensor]): Leaves with ``requires_grad``.
        method (str): ``'difference'`` or ``'double_backward'``, see
            :func:`hessian_product`. Defaults to ``'difference'``.
        steps (int): Products, >= 1: two gradients each, or one backward pass
            through the first gradient. Defaults to 20.
        seed (int): Seed of the random start. Defaults to 0.

    Returns:
        Extremes: Both ends with their errors. They are exact, up to rounding
        and the error of differences, when ``steps`` reaches the number of
        parameters.

    Example:
        >>> w = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> ends = hessian_extremes(lambda: w.prod(), [w], 'double_backward')
        >>> round(ends.smallest, 4), round(ends.largest, 4)
        (-1.0, 1.0)
    """
    product = hessian_product(loss, parameters, method)
    like = flat([p.detach() for p in parameters])
    return lanczos_extremes(product, like, steps, seed)

"""Jacobians of logits with respect to inputs and to parameters.

All functions take logits, not probabilities, of a model in evaluation mode,
and leave no gradients behind.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.sensitivity.attribution import Function, check_logits
from mmstabvim.stability.sensitivity.lanczos import lanczos_extremes

METHODS = ('difference', 'double_backward')


class Estimates(NamedTuple):
    """A number per sample and its error (0 where exact)."""

    values: Tensor
    errors: Tensor


@torch.enable_grad()
def input_jacobian(
    function: Function, x: Tensor, classes: Tensor | None = None
) -> Tensor:
    """Jacobian of every sample's logits, one backward pass per class.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself.
        x (Tensor): (batch, ...).
        classes (Tensor, optional): (batch, k), integers, rows to compute,
            for example ``logits.topk(k).indices``. Defaults to None, all.

    Returns:
        Tensor: (batch, classes or k, size of a sample), without gradient.

    Raises:
        ValueError: If the output is no logits of this batch.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> input_jacobian(lambda x: x @ weight.T, torch.zeros(1, 2))
        tensor([[[1., 2.],
                 [3., 4.]]])
    """
    x = x.detach().requires_grad_()
    logits = check_logits(function(x), x)
    if classes is not None:
        logits = logits.gather(1, classes)
    rows = []
    for i in range(logits.shape[1]):
        # samples are independent, so the sum gives each its own gradient
        (row,) = torch.autograd.grad(
            logits[:, i].sum(), x, retain_graph=True, materialize_grads=True
        )
        rows.append(row.flatten(1))
    return torch.stack(rows, 1)


def singular_values(jacobian: Tensor) -> Tensor:
    """Singular values of Jacobians, in float64.

    They come from the matrices themselves: a product with the transpose would
    lose values below 1e-8 of the largest.

    Args:
        jacobian (Tensor): (..., classes, size).

    Returns:
        Tensor: (..., min(classes, size)), descending. NaN where a Jacobian is
        not finite.

    Example:
        >>> jacobian = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]])
        >>> singular_values(jacobian).float()
        tensor([[4., 3.]])
    """
    wide = jacobian.double()
    finite = torch.isfinite(wide).flatten(-2).all(-1)[..., None]
    values = torch.linalg.svdvals(torch.where(finite[..., None], wide, 0.0))
    return torch.where(finite, values, torch.nan)


def typical_gain(
    function: Function, x: Tensor, draws: int = 16, seed: int = 0
) -> Estimates:
    """Estimate ``||J||_F**2 / d``, the mean square gain of perturbations.

    A perturbation drawn uniformly from the sphere of radius ``epsilon`` moves
    the logits by ``epsilon**2 ||J||_F**2 / d`` in the mean square, to first
    order.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself.
        x (Tensor): (batch, ...).
        draws (int): Random signs of the classes, a backward pass each, >= 2.
            Defaults to 16.
        seed (int): Seed of the generator. Defaults to 0.

    Returns:
        Estimates: Unbiased means and their standard errors, (batch,) each.

    Raises:
        ValueError: If ``draws`` is below 2.

    Source: Hutchinson, "A stochastic estimator of the trace", 1989.

    Example:
        >>> gain = typical_gain(lambda x: x.sum(1, True), torch.zeros(1, 2))
        >>> gain.values.item(), gain.errors.item()
        (1.0, 0.0)
    """
    if draws < 2:
        raise ValueError(f'draws must be at least 2, got {draws}')
    x = x.detach().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    squares = []
    with torch.enable_grad():
        logits = check_logits(function(x), x)
        for _ in range(draws):
            coins = torch.rand(logits.shape, generator=generator) < 0.5
            signs = (2.0 * coins - 1).to(logits)
            (row,) = torch.autograd.grad(
                logits, x, signs, retain_graph=True, materialize_grads=True
            )
            squares.append(row.flatten(1).double().square().mean(1))
    found = torch.stack(squares)
    return Estimates(found.mean(0), found.std(0) / math.sqrt(draws))


# ----------------------------------------------------------- parameters


@torch.enable_grad()
def parameter_jacobian(
    function: Function, x: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Jacobian of logits with respect to parameters, a pass per row.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself; reads the parameters.
        x (Tensor): (batch, ...).
        parameters (Sequence[Tensor]): Leaves with ``requires_grad``.

    Returns:
        Tensor: (batch, classes, number of parameters), in the order given.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> parameter_jacobian(lambda x: x * w, x, [w])
        tensor([[[3., 0.],
                 [0., 4.]]])
    """
    parameters = check_parameters(parameters)
    blocks = []
    for sample in torch.split(x.detach(), 1):
        logits = check_logits(function(sample), sample)[0]
        rows = [
            flat(
                torch.autograd.grad(
                    logit,
                    parameters,
                    retain_graph=True,
                    materialize_grads=True,
                )
            )
            for logit in logits
        ]
        blocks.append(torch.stack(rows))
    return torch.stack(blocks)


def tangent_kernel(jacobian: Tensor) -> Tensor:
    """Gram matrix of the logits' parameter gradients, the tangent kernel.

    Args:
        jacobian (Tensor): (batch, classes, parameters).

    Returns:
        Tensor: (batch * classes, batch * classes), float64.

    Source: arXiv:1806.07572.

    Example:
        >>> tangent_kernel(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])).tolist()
        [[9.0, 0.0], [0.0, 16.0]]
    """
    rows = jacobian.flatten(0, 1)
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    # in parts, so that the copy in float64 stays small
    for part in torch.split(rows, 1 << 18, dim=1):
        gram += part.double() @ part.double().mT
    return gram


def check_parameters(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Raise ValueError unless all are leaves with ``requires_grad``."""
    parameters = list(parameters)
    if not parameters or not all(
        p.is_leaf and p.requires_grad for p in parameters
    ):
        raise ValueError(
            'parameters must be leaf tensors with requires_grad, at least '
            f'one, got {len(parameters)}'
        )
    return parameters


class SecondDerivativeError(RuntimeError):
    """Error of a function that cannot be differentiated twice."""


def plain_attention() -> AbstractContextManager[None]:
    """Compute attention by plain operations.

    The fused ones have first derivatives only.
    """
    return sdpa_kernel(SDPBackend.MATH)


def differentiate_again(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    vectors: Tensor | Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` on the way to a second derivative.

    Args:
        outputs (Tensor or Sequence[Tensor]): Differentiated.
        inputs (Tensor or Sequence[Tensor]): With respect to these.
        vectors (Tensor or Sequence[Tensor], optional): Weights of the
            outputs. Defaults to None, for a scalar.
        create_graph (bool): Keep the graph of the result. Defaults to False.

    Returns:
        tuple[Tensor, ...]: One for each input, zeros where it is not used.

    Raises:
        SecondDerivativeError: If PyTorch cannot compute it.
    """
    try:
        return torch.autograd.grad(
            outputs,
            inputs,
            vectors,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
    except (RuntimeError, NotImplementedError) as error:
        raise SecondDerivativeError(
            "method='double_backward' cannot differentiate this function "
            f"twice, use method='difference': {error}"
        ) from error


def check_differentiable(tensors: Sequence[Tensor]) -> None:
    """Check that first derivatives can be differentiated.

    PyTorch would leave out functions marked ``once_differentiable``, as no
    path through them leads back to an input.

    Args:
        tensors (Sequence[Tensor]): Results with ``create_graph=True``.

    Raises:
        SecondDerivativeError: If a function is marked so.
    """
    todo = {t.grad_fn for t in tensors}
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith(':Error'):
            raise SecondDerivativeError(
                "method='double_backward' meets a function marked "
                "once_differentiable, use method='difference'"
            )
        seen.add(node)
        todo.update(following for following, _ in node.next_functions)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate all values in one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo :func:`flat`."""
    parts = torch.split(vector, [t.numel() for t in like])
    return [
        part.reshape(t.shape).to(t)
        for part, t in zip(parts, like, strict=True)
    ]


@contextmanager
def moved(tensors: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Add to tensors within a context, and restore them bit by bit."""
    # through .data: a graph that holds the tensors stays usable
    before = [t.data.clone() for t in tensors]
    try:
        for tensor, step in zip(tensors, by, strict=True):
            tensor.data.add_(step)
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)


def difference_step(tensors: Sequence[Tensor], direction: Tensor) -> float:
    """Step of a central difference along a direction.

    Its length is 3e-4 (float64) or 3e-3 (float32) of the root mean square of
    the tensors. A fraction of their norm would be too long for many
    parameters: for a digits classifier, 1e-3 of the norm overestimates the
    largest eigenvalue of a Hessian nearly eightfold, whereas this rule
    differs by 0.01 % from a tenth of the step in double precision.
    """
    relative = 3e-4 if direction.dtype == torch.float64 else 3e-3
    start = flat([t.detach() for t in tensors])
    size = float(start.norm()) / len(start) ** 0.5 or 1.0
    return relative * size / (float(direction.norm()) or 1.0)


# ------------------------------------------------- norms without matrices


@torch.enable_grad()
def largest_gain(
    function: Callable[[], Tensor],
    arguments: Sequence[Tensor],
    method: str = 'difference',
    steps: int = 20,
    seed: int = 0,
) -> tuple[float, float]:
    """Largest squared singular value of a Jacobian, without forming it.

    Lanczos' method runs on the side of the outputs. Each step takes a
    backward pass and either two forward passes or a second backward pass.

    Args:
        function (Callable): Takes nothing, reads ``arguments``.
        arguments (Sequence[Tensor]): Leaves with ``requires_grad``.
        method (str): ``'difference'`` takes central differences, which every
            scan allows; ``'double_backward'`` exact products. Defaults to
            ``'difference'``.
        steps (int): Products, >= 1. Defaults to 20.
        seed (int): Seed of the random start. Defaults to 0.

    Returns:
        tuple[float, float]: Estimate from below and its error. Within the
        error lies a squared singular value, up to the error of differences.

    Raises:
        ValueError: If ``method`` is unknown.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> square, _ = largest_gain(lambda: 3 * w, [w], 'double_backward')
        >>> round(square, 4)
        9.0
    """
    check_choice('method', method, METHODS)
    arguments = check_parameters(arguments)
    if method == 'double_backward':
        with plain_attention():
            y = function()
        forward = _exact_product(y, arguments)
    else:
        y = function()
        forward = _difference_product(function, arguments)

    def product(w: Tensor) -> Tensor:
        with torch.enable_grad():
            back = torch.autograd.grad(
                y,
                arguments,
                w.reshape(y.shape).to(y),
                retain_graph=True,
                materialize_grads=True,
            )
        return forward(flat(back)).reshape(-1)

    like = y.detach().reshape(-1)
    ends = lanczos_extremes(product, like, steps, seed)
    return ends.largest, ends.largest_error


def _exact_product(
    y: Tensor, arguments: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Make products ``J v`` from the adjoint of ``w -> J^T w``."""
    w = torch.zeros_like(y, requires_grad=True)
    back = differentiate_again(y, arguments, w, create_graph=True)
    check_differentiable(back)
    # arguments that the output does not depend on have no graph
    used = [g.requires_grad for g in back]

    def product(v: Tensor) -> Tensor:
        parts = zip(back, unflat(v, arguments), used, strict=True)
        rows, vectors = zip(*[(g, u) for g, u, k in parts if k], strict=True)
        return differentiate_again(rows, w, vectors)[0]

    return product


def _difference_product(
    function: Callable[[], Tensor], arguments: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Make products ``J v`` by central differences."""

    @torch.no_grad()
    def product(v: Tensor) -> Tensor:
        step = difference_step(arguments, v)
        with moved(arguments, unflat(step * v, arguments)):
            ahead = function()
        with moved(arguments, unflat(-step * v, arguments)):
            behind = function()
        return (ahead - behind) / (2 * step)

    return product

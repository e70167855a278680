"""Sensitivity profile of a classifier and its index."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.sensitivity.attribution import Function, check_logits
from mmstabvim.stability.sensitivity.curvature import (
    hessian_extremes,
    hessian_product,
)
from mmstabvim.stability.sensitivity.jacobian import (
    METHODS,
    Estimates,
    SecondDerivativeError,
    check_parameters,
    flat,
    input_jacobian,
    largest_gain,
    parameter_jacobian,
    singular_values,
    tangent_kernel,
)

COMBINATIONS = ('max', 'sum')
LOSSES = ('sample', 'mean')
PROFILE_METHODS = ('auto', *METHODS)
MAX_NUMEL = 1 << 28
"""Values of a parameter Jacobian that is formed: 1 GiB in float32."""


@dataclass(frozen=True)
class SensitivityProfile:
    """Four norms with different units, and their parts.

    Attributes:
        input_jacobian (Tensor): (batch,), logits per unit of input.
        parameter_jacobian (Tensor): (batch,), logits per unit of parameter.
        tangent_kernel (float): Largest eigenvalue of the Gram matrix of all
            samples' parameter gradients; it grows with their number.
        hessian (Tensor): (batch,), spectral norms of each sample's loss
            Hessian; (1,) for the mean loss.
        hessian_max (Tensor): Same shape, largest eigenvalues.
        hessian_min (Tensor): Same shape, smallest eigenvalues.
        errors (dict[str, float]): Largest error of each of the four, 0 where
            a matrix was decomposed. An eigenvalue or singular value lies
            within the error of each value, up to the error of differences.
        method (str): Method of the products, ``'double_backward'`` or
            ``'difference'``.

    Example:
        >>> one = torch.ones(1)
        >>> profile = SensitivityProfile(2 * one, 3 * one, 4.0, one, one, -one)
        >>> profile.index(), profile.index(combine='sum')
        (4.0, 10.0)
    """

    input_jacobian: Tensor
    parameter_jacobian: Tensor
    tangent_kernel: float
    hessian: Tensor
    hessian_max: Tensor
    hessian_min: Tensor
    errors: dict[str, float] = field(default_factory=dict)
    method: str = 'difference'

    def values(
        self, quantile: float = 1.0, per_sample: bool = False
    ) -> dict[str, float]:
        """Reduce the four norms over the samples.

        Args:
            quantile (float): Quantile over the samples, in [0, 1]; 1 is the
                largest. Defaults to 1.0.
            per_sample (bool): Divide the kernel's eigenvalue by the number of
                samples. Defaults to False.

        Returns:
            dict[str, float]: By name. Infinite where a sample's value is not
            finite.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f'quantile must be in [0, 1], got {quantile!r}')
        count = len(self.input_jacobian) if per_sample else 1
        kernel = torch.tensor([self.tangent_kernel / count])
        parts = dict(
            input_jacobian=self.input_jacobian,
            parameter_jacobian=self.parameter_jacobian,
            tangent_kernel=kernel.double(),
            hessian=self.hessian,
        )
        return {name: _quantile(v, quantile) for name, v in parts.items()}

    @property
    def finite(self) -> bool:
        """True if every value is finite."""
        return all(v < torch.inf for v in self.values().values())

    def index(
        self,
        quantile: float = 1.0,
        combine: str = 'max',
        per_sample: bool = False,
    ) -> float:
        """Sensitivity index: the largest of the four values, or their sum.

        Their units differ, and the kernel's value grows with the number of
        samples. Compare indices of equal numbers of samples only, and read
        the four values.

        Args:
            quantile (float): Quantile over the samples, in [0, 1]. Defaults
                to 1.0.
            combine (str): ``'max'`` or ``'sum'``. Defaults to ``'max'``.
            per_sample (bool): Divide the kernel's eigenvalue by the number of
                samples. Defaults to False.

        Returns:
            float: Infinite where a value is not finite.

        Source: arXiv:2602.01136, Definition 4.1.
        """
        check_choice('combine', combine, COMBINATIONS)
        values = self.values(quantile, per_sample).values()
        return max(values) if combine == 'max' else sum(values)


def _quantile(values: Tensor, quantile: float) -> float:
    values = values.double()
    if not torch.isfinite(values).all():
        return torch.inf
    return float(torch.quantile(values, quantile))


def sensitivity_profile(
    function: Function,
    x: Tensor,
    labels: Tensor,
    parameters: Sequence[Tensor],
    loss: str = 'sample',
    method: str = 'auto',
    steps: int = 20,
    max_classes: int = 20,
    seed: int = 0,
    watch: Callable[[], None] | None = None,
) -> SensitivityProfile:
    """Measure a classifier's response to input and parameter changes.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself: a model in evaluation mode, see
            :func:`evaluated`.
        x (Tensor): (batch, ...), not empty.
        labels (Tensor): (batch,), integers, for the cross-entropy.
        parameters (Sequence[Tensor]): Leaves with ``requires_grad`` that the
            function reads: all of a model's, or those of its head.
        loss (str): ``'sample'`` for each sample's Hessian, ``'mean'`` for the
            Hessian of the mean loss. Defaults to ``'sample'``.
        method (str): Method of the products with second derivatives and with
            Jacobians. ``'double_backward'`` is exact, where every operation
            allows it; ``'difference'`` works for any model, see
            :func:`hessian_product`; ``'auto'`` takes the former where the
            first sample allows it, else the latter. Defaults to ``'auto'``.
        steps (int): Steps of Lanczos' method. Defaults to 20.
        max_classes (int): Largest number of classes for which matrices are
            decomposed. With more, or with too large a parameter Jacobian,
            norms come from Lanczos' method. Defaults to 20.
        seed (int): Seed of the random starts. Defaults to 0.
        watch (Callable, optional): Called after each Hessian; Hessians take
            most of the time. Defaults to None.

    Returns:
        SensitivityProfile: Norms of all samples. The parameters are restored
        bit by bit.

    Raises:
        ValueError: If the batch is empty or an argument does not fit.

    Source: arXiv:2602.01136, Definition 4.1.

    Example:
        >>> w = torch.eye(2, requires_grad=True)
        >>> profile = sensitivity_profile(
        ...     lambda x: x @ w.T, torch.ones(1, 2), torch.tensor([0]), [w]
        ... )
        >>> round(profile.values()['input_jacobian'], 4), profile.method
        (1.0, 'double_backward')
    """
    check_choice('method', method, PROFILE_METHODS)
    check_choice('loss', loss, LOSSES)
    parameters, x = check_parameters(parameters), x.detach()
    _check_batch(x, labels)
    with torch.no_grad():
        classes = check_logits(function(x[:1]), x[:1]).shape[1]
    if method == 'auto':
        method = best_method(function, x[:1], labels[:1], parameters)
    few = classes <= max_classes
    options: dict[str, Any] = dict(method=method, steps=steps, seed=seed)
    first = input_norms(function, x, few, **options)
    size = len(x) * classes * sum(p.numel() for p in parameters)
    second, kernel = (
        _decomposed(function, x, parameters)
        if few and size <= MAX_NUMEL
        else _iterated(function, x, parameters, options)
    )
    size = len(x) if loss == 'mean' else 1
    batches = zip(torch.split(x, size), torch.split(labels, size), strict=True)
    ends = []
    for batch in batches:
        entropy = partial(_cross_entropy, function, *batch)
        ends.append(hessian_extremes(entropy, parameters, **options))
        if watch:
            watch()
    return SensitivityProfile(
        first.values,
        second.values,
        kernel[0],
        torch.tensor([e.norm for e in ends], dtype=torch.float64),
        torch.tensor([e.largest for e in ends], dtype=torch.float64),
        torch.tensor([e.smallest for e in ends], dtype=torch.float64),
        dict(
            input_jacobian=float(first.errors.max()),
            parameter_jacobian=float(second.errors.max()),
            tangent_kernel=kernel[1],
            hessian=max(e.norm_error for e in ends),
        ),
        method,
    )


def best_method(
    function: Function,
    x: Tensor,
    labels: Tensor,
    parameters: Sequence[Tensor],
) -> str:
    """Choose the method for a classifier's curvature, by one product.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes).
        x (Tensor): (batch, ...), one sample is enough.
        labels (Tensor): (batch,), integers.
        parameters (Sequence[Tensor]): Leaves with ``requires_grad``.

    Returns:
        str: ``'double_backward'``, or ``'difference'`` where an operation has
        no second derivative or memory is short.
    """
    entropy = partial(_cross_entropy, function, x, labels)
    try:
        product = hessian_product(entropy, parameters, 'double_backward')
        product(flat([p.detach() for p in parameters]))
    except (SecondDerivativeError, torch.OutOfMemoryError):
        return 'difference'
    return 'double_backward'


def _check_batch(x: Tensor, labels: Tensor) -> None:
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(
            f'x must be (batch, ...) with batch > 0, got {tuple(x.shape)}'
        )
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f'labels must be ({len(x)},), got {tuple(labels.shape)}'
        )


def input_norms(
    function: Function,
    x: Tensor,
    exact: bool = True,
    method: str = 'difference',
    steps: int = 20,
    seed: int = 0,
) -> Estimates:
    """Largest singular value of each sample's input Jacobian.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself.
        x (Tensor): (batch, ...).
        exact (bool): Decompose the Jacobians, a backward pass for each class;
            else Lanczos' method. Defaults to True.
        method (str): ``'difference'`` or ``'double_backward'``, for Lanczos'
            method. Defaults to ``'difference'``.
        steps (int): Steps of Lanczos' method. Defaults to 20.
        seed (int): Seed of the random starts. Defaults to 0.

    Returns:
        Estimates: (batch,) each, float64 on the CPU.
    """
    if exact:
        values = singular_values(input_jacobian(function, x))[:, 0].cpu()
        return Estimates(values, torch.zeros_like(values))
    found = []
    for sample in torch.split(x.detach(), 1):
        leaf = sample.clone().requires_grad_()
        logits = partial(function, leaf)
        found.append(largest_gain(logits, [leaf], method, steps, seed))
    return _roots(found)


def _roots(squares: Sequence[tuple[float, float]]) -> Estimates:
    """Take roots of squares, with ``|a - b| <= |a^2 - b^2| / a``."""
    values, errors = torch.tensor(squares, dtype=torch.float64).unbind(1)
    roots = values.clamp(min=0).sqrt()
    bound = torch.where(roots == 0, errors.sqrt(), errors / roots)
    return Estimates(roots, torch.minimum(bound, errors.sqrt()))


def _decomposed(
    function: Function, x: Tensor, parameters: Sequence[Tensor]
) -> tuple[Estimates, tuple[float, float]]:
    """Norms of the parameter Jacobians and their kernel, exact."""
    jacobian = parameter_jacobian(function, x, parameters)
    kernel = tangent_kernel(jacobian)
    count, classes = jacobian.shape[:2]
    blocks = kernel.reshape(count, classes, count, classes)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    norms = torch.stack([_largest(block) for block in own])
    exact = Estimates(norms.sqrt(), torch.zeros_like(norms))
    return exact, (float(_largest(kernel)), 0.0)


def _largest(gram: Tensor) -> Tensor:
    """Largest eigenvalue on the CPU, NaN where the matrix is not finite."""
    if not torch.isfinite(gram).all():
        return torch.tensor(torch.nan, dtype=torch.float64)
    largest: Tensor = torch.linalg.eigvalsh(gram.cpu())[-1]
    return largest.clamp(min=0)


def _iterated(
    function: Function,
    x: Tensor,
    parameters: Sequence[Tensor],
    options: Mapping[str, Any],
) -> tuple[Estimates, tuple[float, float]]:
    """Norms of the parameter Jacobians and their kernel, by Lanczos."""
    found = [
        largest_gain(partial(function, sample), parameters, **options)
        for sample in torch.split(x, 1)
    ]
    kernel = largest_gain(partial(function, x), parameters, **options)
    return _roots(found), kernel


def _cross_entropy(function: Function, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(function(x), labels)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put every module of a model into evaluation mode within a context.

    Each module gets its own mode back: some may be in evaluation mode before.

    Args:
        model (nn.Module): Any model.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluated(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Attributions of logits to inputs, and their change under perturbations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.stability.inputs import check_choice, check_finite

ATTRIBUTIONS = ('gradient', 'gradient_x_input', 'integrated')
Function = Callable[[Tensor], Tensor]


def attributions(
    function: Function,
    x: Tensor,
    classes: Tensor | None = None,
    method: str = 'gradient',
    steps: int = 16,
) -> Tensor:
    """Attribution of one logit per sample to every input value.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself: a model in evaluation mode.
        x (Tensor): (batch, ...).
        classes (Tensor, optional): (batch,), integers, the logits to
            attribute. Defaults to None, the largest ones.
        method (str): ``'gradient'``, ``'gradient_x_input'`` or
            ``'integrated'``, gradients integrated from an input of zeros
            (arXiv:1703.01365) with the midpoint rule. Defaults to
            ``'gradient'``.
        steps (int): Points of the midpoint rule, >= 1. Defaults to 16.

    Returns:
        Tensor: Shape of ``x``, without gradient.

    Raises:
        ValueError: If ``method`` is unknown, ``steps`` not positive, or the
            output no logits of this batch.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> attributions(lambda x: x @ weight.T, torch.ones(1, 2))
        tensor([[3., 4.]])
    """
    check_choice('method', method, ATTRIBUTIONS)
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')
    x = x.detach()
    if classes is None:
        classes = predicted_classes(function, x)
    if method != 'integrated':
        gradient = _gradient(function, x, classes)
        return gradient if method == 'gradient' else gradient * x
    total = torch.zeros_like(x)
    for i in range(steps):
        total += _gradient(function, x * ((i + 0.5) / steps), classes)
    return x * total / steps


@torch.no_grad()
def predicted_classes(function: Function, x: Tensor) -> Tensor:
    """Class of the largest logit of each sample, (batch,)."""
    return check_logits(function(x), x).argmax(1)


def check_logits(logits: Tensor, x: Tensor) -> Tensor:
    """Raise ValueError unless ``logits`` are (batch, classes) of ``x``."""
    shape = tuple(getattr(logits, 'shape', ()))
    if len(shape) != 2 or shape[0] != len(x) or shape[1] == 0:
        raise ValueError(
            f'function must give logits ({len(x)}, classes), got '
            f'{shape or type(logits).__name__}'
        )
    return logits


@torch.enable_grad()
def _gradient(function: Function, x: Tensor, classes: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    logits = check_logits(function(x), x)
    # samples are independent, so the sum gives each its own gradient
    chosen = logits.gather(1, classes[:, None]).sum()
    return torch.autograd.grad(chosen, x, materialize_grads=True)[0]


def gaussian_changes(
    x: Tensor, std: float = 0.02, draws: int = 4, seed: int = 0
) -> Tensor:
    """Gaussian perturbations of inputs, the same on every device.

    Args:
        x (Tensor): (batch, ...).
        std (float): Standard deviation, unit of ``x``. Defaults to 0.02.
        draws (int): Perturbations of each sample, >= 1. Defaults to 4.
        seed (int): Seed of the generator. Defaults to 0.

    Returns:
        Tensor: (draws, batch, ...), dtype and device of ``x``.

    Example:
        >>> gaussian_changes(torch.zeros(2, 3), draws=4).shape
        torch.Size([4, 2, 3])
    """
    if draws < 1 or not std >= 0:
        raise ValueError(
            f'draws must be at least 1 and std >= 0, got {draws} and {std!r}'
        )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, *x.shape, generator=generator)
    return std * noise.to(x)


def attribution_instability(
    function: Function,
    x: Tensor,
    changes: Tensor | None = None,
    classes: Tensor | None = None,
    method: str = 'gradient',
    steps: int = 16,
) -> Tensor:
    """Mean relative change of an attribution under input perturbations.

    ``mean ||a(x + change) - a(x)|| / (||a(x)|| + 1e-12)``, where ``a`` always
    belongs to the class predicted for the unperturbed input. It is 0 for the
    gradients of a linear model.

    Args:
        function (Callable): Maps (batch, ...) to logits (batch, classes),
            each sample by itself.
        x (Tensor): (batch, ...).
        changes (Tensor, optional): (draws, batch, ...), perturbations added
            to ``x``. Defaults to None, for :func:`gaussian_changes`.
        classes (Tensor, optional): (batch,), integers, the logits to
            attribute. Defaults to None, the predicted ones.
        method (str): See :func:`attributions`. Defaults to ``'gradient'``.
        steps (int): Points of the midpoint rule, >= 1. Defaults to 16.

    Returns:
        Tensor: (batch,), >= 0, dimensionless, without gradient.

    Raises:
        ValueError: If ``changes`` do not fit ``x``, or an argument of
            :func:`attributions` is out of range.

    Source: arXiv:2602.01136, Section 6.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> attribution_instability(lambda x: x @ weight.T, torch.ones(1, 2))
        tensor([0.])
    """
    changes = gaussian_changes(x) if changes is None else changes
    if changes.shape[1:] != x.shape or len(changes) == 0:
        raise ValueError(
            f'changes must be (draws, *{tuple(x.shape)}) with draws > 0, got '
            f'{tuple(changes.shape)}'
        )
    if classes is None:
        classes = predicted_classes(function, x)
    clean = attributions(function, x, classes, method, steps)
    size = clean.flatten(1).norm(dim=1) + 1e-12
    shares = [
        (attributions(function, x + c, classes, method, steps) - clean)
        .flatten(1)
        .norm(dim=1)
        / size
        for c in changes
    ]
    return torch.stack(shares).mean(0)


def frechet_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared Frechet distance of two sets of vectors, taken as Gaussians.

    ``||m1 - m2||**2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` with the sets' means
    and covariances (divisor n - 1). The trace of the root is the nuclear norm
    of the product of the centred sets. So no covariance is formed, nothing is
    regularized, and there may be more dimensions than vectors. The distance
    has the squared unit of the vectors: compare within one setting only.

    Args:
        first (Tensor): (n1, ...), n1 >= 2, flattened to vectors.
        second (Tensor): (n2, ...), n2 >= 2, vectors of the same size.

    Returns:
        Tensor: Scalar, >= 0, float64.

    Raises:
        ValueError: If a set has fewer than two vectors or a value that is not
            finite, or if the sizes differ.

    Source: arXiv:1706.08500, Eq. 6.

    Example:
        >>> first = torch.tensor([[0.0], [2.0]])
        >>> round(frechet_distance(first, first + 3).item(), 4)
        9.0
    """
    for name, vectors in (('first', first), ('second', second)):
        if vectors.dim() < 2 or len(vectors) < 2:
            raise ValueError(
                f'{name} must be (n, ...) with n >= 2, got '
                f'{tuple(vectors.shape)}'
            )
        check_finite(name, vectors)
    first, second = first.flatten(1).double(), second.flatten(1).double()
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f'sizes differ: first {first.shape[1]}, second {second.shape[1]}'
        )
    means = first.mean(0), second.mean(0)
    a, b = (
        (v - m) / (len(v) - 1) ** 0.5
        for v, m in zip((first, second), means, strict=True)
    )
    root: Tensor = torch.linalg.svdvals(a @ b.mT).sum()
    distance: Tensor = (means[0] - means[1]).square().sum()
    distance = distance + a.square().sum() + b.square().sum() - 2 * root
    return distance.clamp(min=0)


def prepare_attributions(
    values: Tensor, pool: int | None = None, unit: bool = False
) -> Tensor:
    """Make sets of attributions comparable before a Frechet distance.

    Args:
        values (Tensor): (batch, channels, height, width), or (batch, ...)
            where ``pool`` is None.
        pool (int, optional): Side of the squares to average over, such as
            the patch size. Defaults to None, without pooling.
        unit (bool): Divide each sample by its norm; zeros stay. Defaults to
            False.

    Returns:
        Tensor: (batch, size).

    Raises:
        ValueError: If ``pool`` is given for anything but images.

    Example:
        >>> prepare_attributions(torch.ones(1, 1, 4, 4), pool=2, unit=True)
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if pool is not None:
        if values.dim() != 4 or pool < 1:
            raise ValueError(
                'pool must be positive, for (batch, channels, height, width), '
                f'got {pool} for {tuple(values.shape)}'
            )
        values = F.avg_pool2d(values, pool)
    values = values.flatten(1)
    if not unit:
        return values
    size = values.norm(dim=1, keepdim=True)
    return values / torch.where(size == 0, 1.0, size)

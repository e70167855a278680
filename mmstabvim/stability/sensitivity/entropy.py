"""Entropy, effective rank and condition number of singular values."""

import math

import torch
from torch import Tensor

from mmstabvim.stability.inputs import real_dtype


def spectral_entropy(
    singular_values: Tensor, power: float = 1.0, base: float = math.e
) -> Tensor:
    """Entropy of a spectrum, ``-sum_k p_k log p_k``.

    ``p_k = sigma_k**power / sum_j sigma_j**power``. The entropy does not
    depend on the scale. It lies between 0 (one singular value, or none) and
    the logarithm of their number (all equal). It describes the shape of the
    spectrum; the mean amplification of a random perturbation is ``||J||_F**2
    / d``.

    Args:
        singular_values (Tensor): (..., count), >= 0, in any order.
        power (float): Exponent of the singular values, > 0: 1 weighs them, 2
            their squares. Defaults to 1.0.
        base (float): Base of the logarithm, > 1: e for nats, 2 for bits.
            Defaults to e.

    Returns:
        Tensor: (...), >= 0, at least float32, differentiable. NaN where a
        singular value is not finite.

    Raises:
        ValueError: If there are no singular values, or an argument is out of
            range.

    Source: arXiv:2602.01136, Section 3, which leaves the power open; for the
    power 1 Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Example:
        >>> values = torch.tensor([1.0, 1.0, 0.0])
        >>> round(spectral_entropy(values, base=2).item(), 4)
        1.0
    """
    if singular_values.dim() < 1 or singular_values.shape[-1] == 0:
        raise ValueError(
            'singular_values must be (..., count) with count > 0, got '
            f'{tuple(singular_values.shape)}'
        )
    if not power > 0:
        raise ValueError(f'power must be positive, got {power!r}')
    if not base > 1:
        raise ValueError(f'base must be larger than 1, got {base!r}')
    values = singular_values.to(real_dtype(singular_values))
    # scaled first, so that squares neither overflow nor vanish
    largest = values.detach().amax(-1, keepdim=True)
    weights = (values / torch.where(largest == 0, 1.0, largest)) ** power
    total = weights.sum(-1, keepdim=True)
    p = weights / torch.where(total == 0, 1.0, total)
    log = torch.where(p == 0, 1.0, p).log()
    return -(p * log).sum(-1) / math.log(base)


def effective_rank(singular_values: Tensor, power: float = 1.0) -> Tensor:
    """Effective number of directions, ``exp`` of the spectral entropy.

    Args:
        singular_values (Tensor): (..., count), >= 0, in any order.
        power (float): Exponent of the singular values, > 0. With 2 the
            result is at least the stable rank. Defaults to 1.0.

    Returns:
        Tensor: (...), between 1 and count, at least float32, differentiable.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Example:
        >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])).item(), 4)
        2.0
    """
    return spectral_entropy(singular_values, power).exp()


def attribution_condition_number(singular_values: Tensor) -> Tensor:
    """Largest singular value over the median of all.

    Args:
        singular_values (Tensor): (..., count), >= 0, in any order; all
            min(m, n) of an m x n matrix.

    Returns:
        Tensor: (...), >= 1, dimensionless, at least float32; infinite where
        the median, with an even count the mean of the middle two, is 0. NaN
        where a singular value is NaN.

    Raises:
        ValueError: If there are no singular values.

    Source: arXiv:2602.01136, Section 6.

    Example:
        >>> attribution_condition_number(torch.tensor([1.0, 2.0, 6.0]))
        tensor(3.)
    """
    if singular_values.dim() < 1 or singular_values.shape[-1] == 0:
        raise ValueError(
            'singular_values must be (..., count) with count > 0, got '
            f'{tuple(singular_values.shape)}'
        )
    values = singular_values.to(real_dtype(singular_values))
    ordered, last = values.sort(-1).values, values.shape[-1] - 1
    # torch.median would take the lower of two
    median = (ordered[..., last // 2] + ordered[..., -(-last // 2)]) / 2
    zero = median == 0
    ratio = ordered[..., -1] / torch.where(zero, 1.0, median)
    return torch.where(zero, torch.inf, ratio)

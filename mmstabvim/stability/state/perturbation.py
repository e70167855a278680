"""Perturb-then-diagonalize (PTD): a usable eigenbasis near a bad one.

HiPPO-LegS is stable, but its eigenvectors are nearly dependent. Matrices ``A +
E`` close to it have good eigenvectors, and a random E finds one. A large E
makes the matrix unstable: with the numerical abscissa mu(A), -1/2 for HiPPO,
every ``||E|| <= -mu(A) - margin`` is safe.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability.inputs import add_to_diagonal, check_choice, dense
from mmstabvim.stability.state.eigenbasis import condition_number
from mmstabvim.stability.state.spectra import numerical_abscissa

OBJECTIVES = ('log', 'plain')

_NO_BASIS = 1e15
"""Condition number from which float64 gives noise."""

Follow = Callable[[int, float, float, float], None]


@dataclass(frozen=True)
class Perturbation:
    """Size of the perturbation E, and the search for it.

    Args:
        norm (float): Spectral norm of E, in 1/step, at most ``-mu(A) -
            margin``, so that every E of this size gives a stable matrix.
            Defaults to 0.4.
        relative (float, optional): ``||E|| / ||A||`` in place of ``norm``,
            any size. Defaults to None.
        draws (int): Number of random E. The stable one with the smallest
            condition number is taken. If none is stable, which ``relative``
            allows, the last one is shifted by a multiple of the identity.
            Defaults to 20.
        optimize (bool): Improve that E by gradient descent on ``objective``
            and keep the best stable iterate. With ``norm`` all iterates stay
            within the safe size, with ``relative`` E may grow. Defaults to
            False.
        gamma (float): Weight of ``||E||``, >= 0. Defaults to 1.0.
        objective (str): ``'log'`` for ``ln kappa + gamma ||E||`` with the
            condition number kappa of the eigenvectors; ``'plain'`` for
            ``kappa + gamma ||E||`` as published, in which kappa outweighs E.
            Defaults to ``'log'``.
        steps (int): Steps of Adam, with a learning rate of ``1e-3 ||A|| /
            N``. Defaults to 300.
        margin (float): Least distance of the real parts from zero, >= 0,
            1/step. Defaults to 0.01.
        seed (int): Seed of the random E. Defaults to 0.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv:2310.01698, Sec. 4.2.

    Example:
        >>> Perturbation(norm=0.25, draws=5).norm
        0.25
    """

    norm: float = 0.4
    relative: float | None = None
    draws: int = 20
    optimize: bool = False
    gamma: float = 1.0
    objective: str = 'log'
    steps: int = 300
    margin: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice('objective', self.objective, OBJECTIVES)
        for name in ('norm', 'relative'):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f'{name} must be positive and finite, got {value!r}'
                )
        for name in ('gamma', 'margin'):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f'{name} must be at least 0 and finite, got '
                    f'{getattr(self, name)!r}'
                )
        for name in ('draws', 'steps'):
            if getattr(self, name) < 1:
                raise ValueError(
                    f'{name} must be at least 1, got {getattr(self, name)!r}'
                )


class PerturbedBasis(NamedTuple):
    """``A + E = X diag(lambda) X^-1``, in double precision on the CPU.

    Example:
        >>> A = torch.diag(torch.tensor([-1.0, -2.0]))
        >>> diagonalize_perturbed(A, torch.zeros(2, 2)).abscissa
        -1.0
    """

    eigenvalues: Tensor
    """(N,), complex, by descending imaginary part, 1/step."""
    vectors: Tensor
    """(N, N), complex, unit columns: the X above."""
    perturbation: Tensor
    """(N, N), real, the E above, 1/step."""
    condition: float
    """Condition number of ``vectors``."""

    @property
    def norm(self) -> float:
        """Spectral norm of E, 1/step."""
        return float(torch.linalg.matrix_norm(self.perturbation, 2))

    @property
    def abscissa(self) -> float:
        """Largest real part of an eigenvalue, 1/step."""
        return float(self.eigenvalues.real.amax())


def perturb_then_diagonalize(
    A: Tensor,
    options: Perturbation | None = None,
    mask: Tensor | None = None,
    follow: Follow | None = None,
) -> PerturbedBasis:
    """Diagonalize a stable matrix near A that has a usable eigenbasis.

    Args:
        A (Tensor): (N, N), real, 1/step.
        options (Perturbation, optional): Size and search. Defaults to None,
            for ``Perturbation()``.
        mask (Tensor, optional): (N, N), bool, entries of E that may differ
            from zero. Defaults to None, for all.
        follow (Callable, optional): Called in each step of the optimization
            with its number, kappa, ``||E||`` and the spectral abscissa.
            Defaults to None.

    Returns:
        PerturbedBasis: Eigenbasis of ``A + E``, real parts at most
        ``-margin``.

    Raises:
        ValueError: If A is not a real, finite, square matrix, or ``norm`` is
            not safe for it.

    Source: arXiv:2310.01698, Sec. 4.

    Example:
        >>> A = torch.tensor([[-1.0, 1.0], [0.0, -1.0]])  # defective
        >>> basis = perturb_then_diagonalize(A, Perturbation(norm=0.25))
        >>> basis.condition < 10, round(basis.norm, 4)
        (True, 0.25)
    """
    options = options or Perturbation()
    matrix = _check_matrix(A)
    if options.relative is None:
        norm, limit = options.norm, _check_safe(matrix, options)
    else:
        size = float(torch.linalg.matrix_norm(matrix, 2))
        norm, limit = options.relative * size, math.inf
    E = _draw(matrix, norm, mask, options)
    if options.optimize:
        E = _optimize(matrix, E, mask, limit, options, follow)
    return diagonalize_perturbed(matrix, E, options.margin)


@torch.no_grad()
def diagonalize_perturbed(
    A: Tensor, E: Tensor, margin: float = 0.0
) -> PerturbedBasis:
    """Diagonalize ``A + E`` and check the result.

    Args:
        A (Tensor): (N, N), real, 1/step.
        E (Tensor): (N, N), real, 1/step.
        margin (float): Least distance of the real parts from zero, 1/step.
            Defaults to 0.0.

    Returns:
        PerturbedBasis: Eigenbasis of ``A + E``; its product agrees with ``A +
        E`` to ``1e-12 kappa ||A + E||``.

    Raises:
        ValueError: If the eigenvectors are dependent, the product does not
            agree, or a real part is above ``-margin``.

    Example:
        >>> A = torch.tensor([[-1.0, 1.0], [0.0, -1.0]])  # defective
        >>> E = torch.tensor([[0.0, 0.0], [-0.25, 0.0]])
        >>> diagonalize_perturbed(A, E).eigenvalues.imag.tolist()
        [0.5, -0.5]
    """
    A, E = _check_matrix(A), _check_matrix(E)
    moved = A + E
    values, X = torch.linalg.eig(moved)
    order = _order(values)
    values, X = values[order], X[:, order]
    condition = float(condition_number(X))
    if not condition < _NO_BASIS:
        raise ValueError(
            f'A + E has no eigenbasis (condition number {condition:.1e}): '
            'choose another E'
        )
    residual = torch.linalg.solve(X, values * X, left=False) - moved
    error = float(torch.linalg.matrix_norm(residual, 2))
    norm = float(torch.linalg.matrix_norm(moved, 2))
    if error > 1e-12 * condition * norm:
        raise ValueError(
            f'the eigenbasis of A + E reproduces it with an error of '
            f'{error:.1e}, for a norm of {norm:.1e}: choose another E'
        )
    abscissa = float(values.real.amax())
    if abscissa > -margin:
        raise ValueError(
            f'A + E must have real parts of at most {-margin:g}, got '
            f'{abscissa:g}: choose a smaller E'
        )
    return PerturbedBasis(values, X, E, condition)


def random_perturbations(
    size: int, count: int, seed: int = 0, mask: Tensor | None = None
) -> Tensor:
    """Real Gaussian matrices, each scaled to spectral norm 1.

    Args:
        size (int): N.
        count (int): Number of matrices.
        seed (int): The same seed gives the same matrices. Defaults to 0.
        mask (Tensor, optional): (N, N), bool, entries that may differ from
            zero. Defaults to None, for all.

    Returns:
        Tensor: (count, N, N), float64.

    Example:
        >>> E = random_perturbations(size=3, count=2)
        >>> torch.linalg.matrix_norm(E, 2).round(decimals=4).tolist()
        [1.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    shape = count, size, size
    E = torch.randn(
        shape, dtype=torch.float64, generator=generator, device='cpu'
    )
    if mask is not None:
        E = E * mask
    norms: Tensor = torch.linalg.matrix_norm(E, 2, keepdim=True)
    return E / norms


def _check_matrix(A: Tensor) -> Tensor:
    if A.dim() != 2 or A.is_complex():
        raise ValueError(
            f'want a real (N, N) matrix, got {tuple(A.shape)}, {A.dtype}'
        )
    return dense('the matrix', A.detach())


def _check_safe(A: Tensor, options: Perturbation) -> float:
    """Largest norm of E for which every A + E is stable, checked."""
    rounding = 1e-12 * float(torch.linalg.matrix_norm(A))
    limit = -float(numerical_abscissa(A)) - options.margin + rounding
    if options.norm > limit:
        raise ValueError(
            f'norm must be at most {limit:.6g}, so that every perturbation '
            f'of this size is stable, got {options.norm!r}; relative takes '
            'any size and checks the eigenvalues'
        )
    return limit


def _draw(
    A: Tensor, norm: float, mask: Tensor | None, options: Perturbation
) -> Tensor:
    """Draw E: the stable one with the best eigenbasis, or a shifted one."""
    draws = random_perturbations(len(A), options.draws, options.seed, mask)
    draws = norm * draws
    values, vectors = torch.linalg.eig(A + draws)
    excess = values.real.amax(-1) + options.margin
    if (excess <= 0).any():
        kappa = condition_number(vectors)
        return draws[torch.where(excess <= 0, kappa, math.inf).argmin()]
    # plus a bound of the eigenvalues' rounding errors
    hidden = 1e-9 * torch.linalg.matrix_norm(A, 2)
    return add_to_diagonal(draws[-1], -excess[-1] - hidden)


def _optimize(
    A: Tensor,
    E: Tensor,
    mask: Tensor | None,
    limit: float,
    options: Perturbation,
    follow: Follow | None,
) -> Tensor:
    """Descend from E by Adam, and return the best stable iterate."""
    E = E.clone().requires_grad_()
    rate = 1e-3 * float(torch.linalg.matrix_norm(A, 2)) / len(A)
    adam = torch.optim.Adam([E], lr=rate)
    best, lowest = E.detach().clone(), math.inf
    for step in range(options.steps + 1):
        values, X = torch.linalg.eig(A + E)
        kappa, norm = condition_number(X), torch.linalg.matrix_norm(E, 2)
        cost = kappa.log() if options.objective == 'log' else kappa
        cost = cost + options.gamma * norm
        abscissa = values.detach().real.amax().item()
        if cost.item() < lowest and abscissa <= -options.margin:
            best, lowest = E.detach().clone(), cost.item()
        if follow is not None:
            follow(step, kappa.item(), norm.item(), abscissa)
        (gradient,) = torch.autograd.grad(cost, E)
        if not torch.isfinite(gradient).all():
            break  # two eigenvalues coincide
        E.grad = gradient if mask is None else gradient * mask
        adam.step()
        with torch.no_grad():
            E *= (limit / torch.linalg.matrix_norm(E, 2)).clamp(max=1)
    return best


def _order(values: Tensor) -> Tensor:
    """Order by descending imaginary parts, then descending real parts."""
    order = values.real.argsort(descending=True, stable=True)
    imaginary = values.imag[order]
    return order[imaginary.argsort(descending=True, stable=True)]

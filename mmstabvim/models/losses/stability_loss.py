"""The stability loss L_stab."""

import torch
from torch import Tensor, nn

from mmstabvim.layers.state_matrix import StateMatrix, state_matrices
from mmstabvim.registry import MODELS
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.state.penalty import (
    numerical_abscissa_penalty,
    stability_penalty,
)

REDUCTIONS = ('sum', 'mean')
LOSS_WEIGHTS = {'sum': 1e-4, 'mean': 1.0}
"""A sum has hundreds of thousands of terms in a model of the usual size."""


@MODELS.register_module()
class StabilityLoss(nn.Module):
    """Penalty on eigenvalues that come near the unstable half plane.

    ``L_stab = sum_i max(0, Re(lambda_i) - eps)`` over all eigenvalues of all
    state matrices of a model, layers and directions, as their raw parameters
    give them. With ``eps >= 0`` it is zero, with zero gradient, for
    parametrizations that are always stable (``neg_exp``); a negative ``eps``
    asks for a distance from instability and acts there too.

    Args:
        eps (float): Real part above which an eigenvalue is penalized, 1/step.
            Defaults to 0.01.
        reduction (str): ``'sum'`` or ``'mean'`` over the eigenvalues; both
            count a stored conjugate pair twice. Defaults to ``'sum'``.
        loss_weight (float, optional): Factor; None is 1e-4 for a sum and 1
            for a mean. Defaults to None.
        surrogate (str, optional): ``'numerical_abscissa'`` penalizes the
            largest eigenvalue of each matrix's symmetric part instead: never
            smaller than the real parts, and with bounded gradients. Defaults
            to None.

    Raises:
        ValueError: If a name is unknown or the weight is negative.

    Example:
        >>> from mmstabvim import VisionMamba
        >>> model = VisionMamba(dict(embed_dims=8, num_layers=1, d_state=2))
        >>> StabilityLoss(reduction='mean')(model).item()
        0.0
    """

    def __init__(
        self,
        eps: float = 0.01,
        reduction: str = 'sum',
        loss_weight: float | None = None,
        surrogate: str | None = None,
    ) -> None:
        super().__init__()
        check_choice('reduction', reduction, REDUCTIONS)
        if surrogate is not None:
            check_choice('surrogate', surrogate, ('numerical_abscissa',))
        if loss_weight is None:
            loss_weight = LOSS_WEIGHTS[reduction]
        if not loss_weight >= 0:
            raise ValueError(
                f'loss_weight must be at least 0, got {loss_weight!r}'
            )
        self.eps, self.reduction = eps, reduction
        self.loss_weight, self.surrogate = loss_weight, surrogate

    def forward(self, model: nn.Module) -> Tensor:
        """The weighted loss of a model, a scalar, float32 or wider.

        Args:
            model (nn.Module): With at least one state matrix.

        Raises:
            RuntimeError: If the model has no state matrix.
        """
        return self.loss_weight * self.penalty(model)

    def penalty(self, model: nn.Module) -> Tensor:
        """L_stab itself, a scalar."""
        matrices = state_matrices(model).values()
        if not matrices:
            raise RuntimeError(
                f'StabilityLoss found no state matrix in '
                f'{type(model).__name__}: it needs a backbone such as '
                "'mmstabvim.VisionMamba'"
            )
        total = torch.stack([self._sum(m) for m in matrices]).sum()
        if self.reduction == 'sum':
            return total
        return total / sum(self._count(m) for m in matrices)

    def _sum(self, matrix: StateMatrix) -> Tensor:
        if self.surrogate is None:
            values = matrix.eigenvalues(matrix.free)
            penalty = stability_penalty(values, self.eps, 'sum')
            return matrix.multiplicity * penalty
        return numerical_abscissa_penalty(
            matrix.dense(matrix.free), self.eps, 'sum'
        )

    def _count(self, matrix: StateMatrix) -> int:
        rows, size = len(matrix.free[0]), matrix.d_state
        return rows if self.surrogate else rows * size * matrix.multiplicity

"""Jacobian regularization."""

from collections.abc import Callable

from torch import Tensor

from mmstabvim.models.losses.input_loss import InputLoss
from mmstabvim.registry import MODELS
from mmstabvim.stability.sensitivity.regularization import jacobian_penalty


@MODELS.register_module()
class JacobianLoss(InputLoss):
    """Mean squared Frobenius norm of the Jacobians of a model's logits.

    One random projection per step: the images are moved a little along a
    random direction, both ways, and the change of the logits is penalized.
    Logits with respect to images as the model sees them, normalized.

    Args:
        loss_weight (float): Factor, >= 0. Defaults to 0.01.
        samples (int, optional): Images of each batch that enter. Defaults to
            None, all.
        method (str): ``'difference'``, central differences, for any model;
            ``'double_backward'``, exact, where every operation has a second
            derivative. Defaults to ``'difference'``.
        seed (int): Of the directions. Defaults to 0.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv:1908.02729.
    """

    key = 'loss_jacobian'

    def __init__(
        self,
        loss_weight: float = 0.01,
        samples: int | None = None,
        method: str = 'difference',
        seed: int = 0,
    ) -> None:
        super().__init__(loss_weight, samples, method, seed)

    def penalty(
        self, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """Estimate of the mean of ``||J||_F**2``, a scalar."""
        generator = self.generator()
        return jacobian_penalty(function, x, self.method, generator)

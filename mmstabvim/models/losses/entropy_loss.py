"""A penalty on concentrated spectra of the Jacobian."""

from collections.abc import Callable

from torch import Tensor

from mmstabvim.models.losses.input_loss import InputLoss
from mmstabvim.registry import MODELS
from mmstabvim.stability.sensitivity.regularization import entropy_penalty


@MODELS.register_module()
class EntropyLoss(InputLoss):
    """Distance of the spectral entropy of a classifier's Jacobians from full.

    ``log(min(classes, size)) - H``, the mean over some images of each batch.
    It asks for singular values that are alike, not for small ones: beside a
    norm that nothing bounds it may enlarge the lower ones.

    Each step takes a backward pass and two forward passes per class on these
    images.

    Args:
        loss_weight (float): Factor, >= 0. Defaults to 0.1.
        samples (int, optional): Images of each batch that enter, None for
            all. Defaults to 4.
        power (float): 1 or 2: whether singular values or their squares are
            weights. Defaults to 1.0.
        method (str): ``'difference'``, central differences, for any model;
            ``'double_backward'``, exact, where every operation has a second
            derivative. Defaults to ``'difference'``.

    Raises:
        ValueError: If an argument is out of range.

    Source: the entropy of arXiv:2602.01136, Section 3.
    """

    key = 'loss_entropy'

    def __init__(
        self,
        loss_weight: float = 0.1,
        samples: int | None = 4,
        power: float = 1.0,
        method: str = 'difference',
    ) -> None:
        super().__init__(loss_weight, samples, method, seed=0)
        if not power > 0:
            raise ValueError(f'power must be positive, got {power!r}')
        self.power = power

    def penalty(
        self, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """Mean distance of the entropies from full, nats, a scalar."""
        return entropy_penalty(function, x, self.power, self.method)

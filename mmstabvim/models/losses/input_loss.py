"""Base class of the losses on the response to perturbed images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from torch import Tensor, nn

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.sensitivity.jacobian import METHODS
from mmstabvim.stability.sensitivity.profile import evaluated


class InputLoss(nn.Module):
    """A penalty on what a model makes of changed images.

    The model is in evaluation mode for it, in its own precision without
    autocast. Random numbers come from a generator of its own, whose count is
    kept in checkpoints: other randomness of the training stays as it is.

    Args:
        loss_weight (float): Factor, >= 0.
        samples (int, optional): Images of each batch that enter, None for
            all.
        method (str): ``'difference'`` or ``'double_backward'``.
        seed (int): Of the random numbers.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs_inputs = True

    def __init__(
        self, loss_weight: float, samples: int | None, method: str, seed: int
    ) -> None:
        super().__init__()
        check_choice('method', method, METHODS)
        if not loss_weight >= 0:
            raise ValueError(
                f'loss_weight must be at least 0, got {loss_weight!r}'
            )
        if samples is not None and samples < 1:
            raise ValueError(f'samples must be at least 1, got {samples}')
        self.loss_weight, self.samples = loss_weight, samples
        self.method, self.seed, self.count = method, seed, 0

    def penalty(
        self, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """The penalty itself, a scalar."""
        raise NotImplementedError

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The weighted penalty of a model on a batch, a scalar.

        Args:
            model (nn.Module): Called with images it gives its logits.
            inputs (Tensor): (batch, channels, height, width), normalized.

        Raises:
            TypeError: If ``inputs`` or what the model gives is no tensor.
        """
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f'inputs must be a tensor, got {type(inputs).__name__}'
            )

        def function(x: Tensor) -> Tensor:
            y = model(x)
            if not isinstance(y, Tensor):
                raise TypeError(
                    'the model must give one tensor of logits, got '
                    f'{type(y).__name__}'
                )
            return y

        kind = inputs.device.type
        with evaluated(model), torch.autocast(kind, enabled=False):
            x = inputs[: self.samples].float()
            return self.loss_weight * self.penalty(function, x)

    def generator(self) -> torch.Generator:
        """Random numbers of the next step, others on each rank."""
        self.count += 1
        # mixed here, as PyTorch takes the lower 32 bits of a seed only
        mixed = np.random.SeedSequence([self.seed, get_rank(), self.count])
        return torch.Generator().manual_seed(int(mixed.generate_state(1)[0]))

    def get_extra_state(self) -> dict[str, Any]:
        """Count of the steps."""
        return dict(count=self.count)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.count = state['count']

"""Stochastic depth."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a whole sample's branch in training, scale up the kept ones.

    Unlike torchvision's ``StochasticDepth`` it compiles without a graph
    break.

    Args:
        rate (float): Probability of dropping, in [0, 1).

    Raises:
        ValueError: If ``rate`` is out of range.

    Source: arXiv:1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f'drop path rate must be in [0, 1), got {rate}')
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop along the first axis of (batch, ...)."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * mask / keep

    def extra_repr(self) -> str:
        """Show the rate in the module's repr."""
        return f'{self.rate:g}'

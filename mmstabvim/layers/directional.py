"""Layers with weights of their own for each direction of a scan.

Weights are stored flat, those of one direction after those of another, and
viewed with an axis of directions where they are used.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmstabvim.ops import causal_conv1d_directions
from mmstabvim.ops.backend import nearest
from mmstabvim.stability.weights.layers import Operator


class DirectionalLinear(nn.Module):
    """Linear layer without bias for each direction.

    Args:
        in_features (int): Channels that are read.
        out_features (int): Channels of a direction that are written.
        directions (int): Directions K.

    Attributes:
        weight (Parameter): (K * out_features, in_features).
    """

    def __init__(
        self, in_features: int, out_features: int, directions: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.directions = directions
        self.weight = nn.Parameter(
            torch.empty(directions * out_features, in_features)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights as :class:`torch.nn.Linear` does."""
        bound = self.in_features**-0.5
        self.weight.uniform_(-bound, bound)

    @property
    def weight_operator(self) -> Operator:
        """Action of a direction's weight, for norms."""
        return Operator(directions=self.directions)

    def forward(self, x: Tensor) -> Tensor:
        """Map (directions, batch, length, in) to (..., out)."""
        weight = self.weight.unflatten(0, (self.directions, -1))
        product = torch.bmm(x.flatten(1, 2), weight.mT)
        return product.unflatten(1, x.shape[1:3])

    def extra_repr(self) -> str:
        """Show the sizes."""
        sizes = f'{self.in_features}, {self.out_features}'
        return f'{sizes}, directions={self.directions}'


class DirectionalConv1d(nn.Module):
    """Depthwise causal convolution and SiLU for each direction.

    Args:
        channels (int): Channels.
        width (int): Taps, tokens.
        reverse (Sequence[bool]): For each direction, look at the tokens that
            follow instead of those before.
        backend (str): Backend of the model's operators. Defaults to
            ``'auto'``.

    Attributes:
        weight (Parameter): (K * channels, width), the last tap at the token
            itself.
        bias (Parameter): (K * channels,).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        reverse: Sequence[bool],
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.channels, self.reverse = channels, tuple(reverse)
        self.backend = backend
        self.directions = len(self.reverse)
        rows = self.directions * channels
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.bias = nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and biases as :class:`torch.nn.Conv1d` does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)

    @property
    def weight_operator(self) -> Operator:
        """Action of a direction's weight, for norms."""
        return Operator(depthwise=True, directions=self.directions)

    def forward(self, x: Tensor, activation: str | None = 'silu') -> Tensor:
        """Map (batch, length, channels) to (directions, ...)."""
        return causal_conv1d_directions(
            x,
            self.weight.unflatten(0, (self.directions, -1)),
            self.bias.unflatten(0, (self.directions, -1)),
            self.reverse,
            activation=activation,
            backend=nearest('causal_conv1d', self.backend),
        )

    def extra_repr(self) -> str:
        """Show the sizes and the directions."""
        width = self.weight.shape[1]
        return f'{self.channels}, {width}, reverse={self.reverse}'

"""The bidirectional mixer of Vision Mamba."""

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmstabvim.layers.directional import DirectionalConv1d
from mmstabvim.layers.earlier_layout import stack_directions
from mmstabvim.layers.scan_order import BIDIRECTIONAL, ScanOrder
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.ops import gated_merge
from mmstabvim.ops.backend import nearest


class DirectionWeights(NamedTuple):
    """Weights of one direction of a mixer, as views."""

    taps: Tensor  # (d_inner, d_conv)
    conv_bias: Tensor  # (d_inner,)
    dt_rows: Tensor  # (dt_rank, d_inner), of x_proj
    B_rows: Tensor  # (numbers * d_state, d_inner), of x_proj
    C_rows: Tensor  # as B_rows
    dt_proj: Tensor  # (d_inner, dt_rank)
    dt_bias: Tensor  # (d_inner,)
    D: Tensor  # (d_inner,)


class MambaMixer(nn.Module):
    """Projections around convolutions and a selective SSM in two directions.

    ``out = out_proj(mean of the directions' outputs * silu(z))`` with
    ``(x, z) = in_proj(input)``; both directions read the same ``x``.

    Args:
        d_model (int): Channels of the tokens.
        d_state (int): State size N. Defaults to 16.
        d_conv (int): Width of the convolution, tokens. Defaults to 4.
        expand (int): ``d_inner / d_model``. Defaults to 2.
        dt_rank (int | str): Rank of the step size's projection; ``'auto'`` is
            ``ceil(d_model / 16)``. Defaults to ``'auto'``.
        order (ScanOrder): Directions. Defaults to forward and backward.
        backend (str): Backend of the operators; those without it take the
            next slower one. Defaults to ``'auto'``.
        **ssm (Any): ``state_matrix`` and ``b_disc`` of
            :class:`SelectiveSSM`.

    Weights of checkpoints of the earlier layout, whose directions were
    modules, are joined on loading.

    Source: arXiv:2401.09417, Algorithm 1 (the published models divide the sum
    of the two directions by two).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = 'auto',
        order: ScanOrder = BIDIRECTIONAL,
        backend: str = 'auto',
        **ssm: Any,
    ) -> None:
        super().__init__()
        if dt_rank == 'auto':
            dt_rank = math.ceil(d_model / 16)
        if not isinstance(dt_rank, int) or dt_rank < 1:
            raise ValueError(
                f"dt_rank must be 'auto' or a positive int, got {dt_rank!r}"
            )
        d_inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.backend = backend
        self.conv1d = DirectionalConv1d(
            d_inner, d_conv, order.reverse, backend
        )
        self.ssm = SelectiveSSM(
            d_inner, d_state, dt_rank, order, backend=backend, **ssm
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.register_load_state_dict_pre_hook(_join_directions)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens (batch, length, d_model)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        merged = self.merge(self.ssm(self.conv1d(x)), z)
        return self.out_proj(merged)

    def merge(self, y: Tensor, z: Tensor) -> Tensor:
        """Average the directions (K, batch, length, d_inner) and gate them."""
        return gated_merge(y, z, backend=nearest('gated_merge', self.backend))

    def direction_weights(self) -> list[DirectionWeights]:
        """View the weights of each direction."""
        ssm, conv = self.ssm, self.conv1d
        split = ssm.by_direction
        given = zip(
            split(conv.weight),
            split(conv.bias),
            split(ssm.x_proj.weight),
            split(ssm.dt_proj.weight),
            split(ssm.dt_bias),
            split(ssm.D),
            strict=True,
        )
        return [
            DirectionWeights(taps, bias, *rows.split(ssm.sizes), *others)
            for taps, bias, rows, *others in given
        ]


def _join_directions(
    mixer: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    stack_directions(state, prefix)

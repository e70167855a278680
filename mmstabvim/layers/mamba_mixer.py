"""The bidirectional mixer of Vision Mamba."""

import math
from typing import Any, cast

from torch import Tensor, nn

from mmstabvim.layers.selective_ssm import SelectiveSSM, run_directions
from mmstabvim.ops import gated_merge


class MambaMixer(nn.Module):
    """Shared projections around a forward and a backward selective SSM.

    ``out = out_proj(mean of the directions' outputs * silu(z))`` with
    ``(x, z) = in_proj(input)``; both directions read the same ``x``.

    Args:
        d_model (int): Channels of the tokens.
        d_state (int): State size N. Defaults to 16.
        d_conv (int): Width of the convolution, tokens. Defaults to 4.
        expand (int): ``d_inner / d_model``. Defaults to 2.
        dt_rank (int | str): Rank of the step size's projection; ``'auto'`` is
            ``ceil(d_model / 16)``. Defaults to ``'auto'``.
        **ssm (Any): ``state_matrix``, ``b_disc``, ``backend`` of
            :class:`SelectiveSSM`.

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
        self.directions = nn.ModuleList(
            SelectiveSSM(d_inner, d_state, d_conv, dt_rank, reverse, **ssm)
            for reverse in (False, True)
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens (batch, length, d_model)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        directions = cast(list[SelectiveSSM], list(self.directions))
        outputs = run_directions(directions, x)
        return self.out_proj(gated_merge(outputs, z))

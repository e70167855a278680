"""Initial weights of a Vision Mamba.

``default`` is sound: both directions start alike. ``official`` reproduces the
published code, including its accident: the bias of the backward direction's
step-size projection is set to zero and its weight to PyTorch's default, so
that direction starts with step sizes around softplus(0) = 0.69 instead of
0.001 ... 0.1, and forgets within a few tokens. (Weight decay on ``A_log``,
the other accident, belongs to the optimizer: see the official config.)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.init import trunc_normal_


def init_default(model: Any) -> None:
    """Initialize everything that PyTorch's defaults do not serve.

    Patch projection: LeCun normal; position embedding and class tokens:
    normal, standard deviation 0.02, truncated; output projections: PyTorch's
    default divided by the square root of the number of blocks, so that the
    residual stream's variance does not grow with the depth.
    """
    projection = model.patch_embed.projection
    fan_in = projection.weight[0].numel()
    # a normal truncated at two deviations has 0.8796 of its deviation
    deviation = math.sqrt(1 / fan_in) / 0.87962566103423978
    trunc_normal_(
        projection.weight, std=deviation, a=-2 * deviation, b=2 * deviation
    )
    nn.init.zeros_(projection.bias)
    for parameter in (model.pos_embed, model.cls_token):
        if parameter is not None:
            trunc_normal_(parameter, std=0.02)
    with torch.no_grad():
        for block in model.layers:
            block.mixer.out_proj.weight /= math.sqrt(len(model.layers))


def init_official(model: Any) -> None:
    """Initialize as the published code does; see the module's docstring."""
    init_default(model)
    for block in model.layers:
        ssm = block.mixer.ssm
        split = ssm.by_direction
        parts = zip(
            ssm.order.reverse,
            split(ssm.dt_proj.weight.detach()),
            split(ssm.dt_bias.detach()),
            strict=True,
        )
        for reverse, weight, bias in parts:
            if reverse:
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound)
                bias.zero_()


INIT_RECIPES: dict[str, Callable[[Any], None]] = {
    'default': init_default,
    'official': init_official,
}

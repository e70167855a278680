"""The causal convolution in plain differentiable PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reverse: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Compute :func:`mmstabvim.ops.causal_conv1d`, any device and dtype."""
    past = weight.shape[1] - 1
    pad = (0, past) if reverse else (past, 0)
    kernel = weight.flip(-1) if reverse else weight
    out = F.conv1d(
        F.pad(x.transpose(1, 2), pad),
        kernel[:, None],
        bias,
        groups=x.shape[-1],
    )
    out = out.transpose(1, 2)
    return F.silu(out) if activation == 'silu' else out


def causal_conv1d_directions_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reverse: Sequence[bool] = (False, True),
    activation: str | None = None,
) -> Tensor:
    """Compute :func:`mmstabvim.ops.causal_conv1d_directions`."""
    return torch.stack(
        [
            causal_conv1d_ref(
                x if x.dim() == 3 else x[k],
                weight[k],
                None if bias is None else bias[k],
                flag,
                activation,
            )
            for k, flag in enumerate(reverse)
        ]
    )

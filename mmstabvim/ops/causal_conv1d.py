"""Depthwise causal convolution over tokens, in either direction."""

import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """Depthwise convolution in which a token sees itself and the past only.

    ``out[t] = bias + sum_k weight[:, width - 1 - k] * x[t - k]`` with zeros
    before the first token. With ``reverse`` the past of a token are the
    tokens after it: the result equals flipping ``x`` and flipping back.

    Args:
        x (Tensor): (batch, length, dim).
        weight (Tensor): (dim, width); the last column weighs the token itself.
        bias (Tensor, optional): (dim,).
        reverse (bool): Walk from the last token to the first. Defaults to
            False.

    Returns:
        Tensor: (batch, length, dim), without activation.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            'x must be (batch, length, dim) and weight (dim, width), got '
            f'{tuple(x.shape)} and {tuple(weight.shape)}'
        )
    past = weight.shape[1] - 1
    pad = (0, past) if reverse else (past, 0)
    kernel = weight.flip(-1) if reverse else weight
    out = F.conv1d(
        F.pad(x.transpose(1, 2), pad),
        kernel[:, None],
        bias,
        groups=x.shape[-1],
    )
    return out.transpose(1, 2)

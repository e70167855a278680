"""Root-mean-square normalization."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Divide each token by its root mean square, then scale each channel.

    Computed in float32 or wider, whatever autocast says; the result has the
    dtype of ``x``.

    Args:
        x (Tensor): (..., dim), any floating dtype.
        weight (Tensor): (dim,), scale of each channel.
        eps (float): Added to the mean square. Defaults to 1e-5.

    Returns:
        Tensor: The shape and dtype of ``x``.

    Raises:
        ValueError: If ``weight`` is not (dim,).

    Source: arXiv:1910.07467, Eq. 4.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f'weight must be ({x.shape[-1]},) for x {tuple(x.shape)}, '
            f'got {tuple(weight.shape)}'
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        normed = torch.nn.functional.rms_norm(
            x.to(wide), weight.shape, weight.to(wide), eps
        )
    return normed.to(x.dtype)

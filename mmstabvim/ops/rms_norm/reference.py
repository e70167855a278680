"""The normalization in plain differentiable PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.ops.backend import no_autocast


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute :func:`mmstabvim.ops.rms_norm` on any device and dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device):
        normed = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return normed.to(x.dtype)


def add_residual(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Add to the residual stream, kept in float32 or wider."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden if residual is None else residual + hidden


def add_rms_norm_ref(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`mmstabvim.ops.add_rms_norm` on any device and dtype."""
    stream = add_residual(hidden, residual)
    return rms_norm_ref(stream, weight, eps).to(out_dtype), stream

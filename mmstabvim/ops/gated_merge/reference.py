"""The gated merge in plain differentiable PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_merge_ref(y: Tensor, z: Tensor, divisor: int) -> Tensor:
    """Compute ``sum_k y[k] * silu(z) / divisor``, any device and dtype."""
    wide = torch.promote_types(y.dtype, z.dtype)
    wide = torch.promote_types(wide, torch.float32)
    merged = y.to(wide).sum(0) * F.silu(z.to(wide)) / divisor
    return merged.to(y.dtype)

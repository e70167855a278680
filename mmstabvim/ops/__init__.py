"""Functions on tensors: the selective scan and its companions."""

from mmstabvim.ops.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_directions,
)
from mmstabvim.ops.gated_merge import gated_merge
from mmstabvim.ops.rms_norm import add_rms_norm, rms_norm
from mmstabvim.ops.selective_scan import (
    selective_scan,
    selective_scan_directions,
)

__all__ = [
    'add_rms_norm',
    'causal_conv1d',
    'causal_conv1d_directions',
    'gated_merge',
    'rms_norm',
    'selective_scan',
    'selective_scan_directions',
]

"""Functions on tensors: the selective scan and its companions."""

from mmstabvim.ops.causal_conv1d import causal_conv1d
from mmstabvim.ops.rms_norm import rms_norm
from mmstabvim.ops.selective_scan import selective_scan

__all__ = ['causal_conv1d', 'rms_norm', 'selective_scan']

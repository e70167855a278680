"""Layers of the Vision Mamba: plain modules, no registry, no configs."""

from mmstabvim.layers.drop_path import DropPath
from mmstabvim.layers.mamba_mixer import MambaMixer
from mmstabvim.layers.patch_embed import PatchEmbed
from mmstabvim.layers.rms_norm import RMSNorm
from mmstabvim.layers.rotary_embedding import RotaryEmbedding2d
from mmstabvim.layers.scan_order import ScanOrder
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import StateMatrix, state_matrices
from mmstabvim.layers.verification import (
    StabilityError,
    Verification,
    VerifiedMatrix,
    scan_kind,
    verify,
)
from mmstabvim.layers.vision_mamba_block import VisionMambaBlock

__all__ = [
    'DropPath',
    'MambaMixer',
    'PatchEmbed',
    'RMSNorm',
    'RotaryEmbedding2d',
    'ScanOrder',
    'SelectiveSSM',
    'StabilityError',
    'StateMatrix',
    'Verification',
    'VerifiedMatrix',
    'VisionMambaBlock',
    'scan_kind',
    'state_matrices',
    'verify',
]

"""Datasets: the embedded default data, CamVid, and a check of masks."""

from mmstabvim.datasets.digits import Digits
from mmstabvim.registry import DATASETS, TRANSFORMS, register_of_mmseg

_OF_MMSEG = {
    'CamVidDataset': ('mmstabvim.datasets.camvid', DATASETS),
    'CheckSegMap': ('mmstabvim.datasets.check_seg_map', TRANSFORMS),
    'DigitScenes': ('mmstabvim.datasets.digit_scenes', DATASETS),
}

__all__ = ['Digits', *sorted(_OF_MMSEG)]

__getattr__ = register_of_mmseg(__name__, _OF_MMSEG)

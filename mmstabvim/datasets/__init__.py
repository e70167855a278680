"""Datasets: the embedded default data, CamVid, and a check of masks."""

from mmstabvim.datasets.digits import Digits
from mmstabvim.registry import DATASETS, TRANSFORMS, defer_to_mmseg

_OF_MMSEG = {
    DATASETS: {
        'CamVidDataset': 'mmstabvim.datasets.camvid',
        'DigitScenes': 'mmstabvim.datasets.digit_scenes',
    },
    TRANSFORMS: {'CheckSegMap': 'mmstabvim.datasets.check_seg_map'},
}

__all__ = ['CamVidDataset', 'CheckSegMap', 'DigitScenes', 'Digits']

__getattr__ = defer_to_mmseg(__name__, _OF_MMSEG)

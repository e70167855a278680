"""CamVid with the 11 classes that segmentation papers use."""

from collections.abc import Sequence
from typing import ClassVar

from mmseg.datasets import BaseSegDataset

from mmstabvim.registry import DATASETS

VOID = 11
IGNORED = 255  # what MMSegmentation's losses and metrics skip


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid: street scenes of 11 classes, in MMSegmentation's layout.

    ``img_dir/{train,val}/*.jpg`` and ``ann_dir/{train,val}/*.png`` below the
    data root. Masks hold the classes 0 to 10 and 11 for void, which becomes
    255 and is ignored in training and evaluation.

    The arguments are those of MMSegmentation's ``BaseSegDataset``; images
    end in ``.jpg``, masks in ``.png``. With ``metainfo=dict(classes=...)``
    some of the classes are kept and the others ignored.

    Source: G. Brostow et al., "Segmentation and Recognition Using Structure
    from Motion Point Clouds", ECCV 2008; classes as in arXiv:1511.00561.
    """

    METAINFO: ClassVar[dict] = {
        'classes': (
            'sky',
            'building',
            'pole',
            'road',
            'pavement',
            'tree',
            'sign symbol',
            'fence',
            'car',
            'pedestrian',
            'bicyclist',
        ),
        'palette': [
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    }

    @classmethod
    def get_label_map(
        cls, new_classes: Sequence[str] | None = None
    ) -> dict[int, int]:
        """Map the labels of the masks to those of training, with void.

        Args:
            new_classes (Sequence[str], optional): Classes to keep. Defaults
                to None, all.

        Returns:
            dict[int, int]: The labels that change.
        """
        changed = super().get_label_map(new_classes) or {}
        return {**changed, VOID: IGNORED}

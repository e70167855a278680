"""Transform that refuses masks which do not fit."""

import numpy as np
from mmcv.transforms import BaseTransform

from mmstabvim.registry import TRANSFORMS


@TRANSFORMS.register_module()
class CheckSegMap(BaseTransform):
    """Refuse a mask whose size or labels are wrong, naming its file.

    Put it right after ``LoadAnnotations``, which has mapped the labels by
    then. Without it a label that is no class ends training in an index
    error somewhere in the loss, on a GPU long after the batch.

    Keys read: ``gt_seg_map``, ``ori_shape``; nothing is changed. Without a
    mask nothing is checked: the toolkits' inferencers take ``LoadAnnotations``
    out of the test pipeline and leave the rest.

    Args:
        num_classes (int): Labels 0 to ``num_classes - 1`` are allowed: 2 for
            background and foreground, also where the head has
            ``num_classes=1``.
        ignore_index (int): Allowed label of ignored pixels. Defaults to 255.

    Raises:
        ValueError: If ``num_classes`` is not positive; in the pipeline, if a
            mask is not of its image's size or holds another label.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(
                f'num_classes must be positive, got {num_classes}'
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def transform(self, results: dict) -> dict:
        """Check one mask.

        Args:
            results (dict): Results of the pipeline so far.

        Returns:
            dict: ``results``, unchanged.
        """
        mask = results.get('gt_seg_map')
        if mask is None:
            return results
        # the mask is loaded after the image was resized for a test
        wanted = tuple(results.get('ori_shape') or results['img_shape'])[:2]
        if mask.shape != wanted:
            raise ValueError(
                f'{_name(results)}: mask must have the shape of its image '
                f'{results.get("img_path", "")}, {wanted}, got {mask.shape}'
            )
        labels = np.flatnonzero(np.bincount(mask.ravel()))
        allowed = (labels < self.num_classes) | (labels == self.ignore_index)
        if not allowed.all():
            few = '; num_classes of CheckSegMap is 2 for two classes'
            raise ValueError(
                f'{_name(results)}: labels must be 0 to '
                f'{self.num_classes - 1} or {self.ignore_index} (ignored), '
                f'got {labels[~allowed].tolist()}'
                + (few if self.num_classes == 1 else '')
            )
        return results

    def __repr__(self) -> str:
        """Format class and arguments, as the host's transforms do."""
        return (
            f'{type(self).__name__}(num_classes={self.num_classes}, '
            f'ignore_index={self.ignore_index})'
        )


def _name(results: dict) -> str:
    """Return the file of the mask, for a message."""
    return str(results.get('seg_map_path', 'a mask without seg_map_path'))

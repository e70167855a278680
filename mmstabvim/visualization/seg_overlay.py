"""Overlay of classes on the images of a segmentor."""

from typing import Any

import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.visualization import SegLocalVisualizer

from mmstabvim.registry import VISUALIZERS


@VISUALIZERS.register_module()
class SegOverlayVisualizer(SegLocalVisualizer):
    """MMSegmentation's visualizer, readable for small images, too.

    Small images are enlarged, each pixel to a square. Pixels of a class named
    ``background`` are those of the image, and have no label.

    Args:
        name (str): Of the instance. Defaults to ``'visualizer'``.
        min_size (int): Pixels that the shorter side of an image has at least
            when it is drawn. Defaults to 256.
        **kwargs (Any): Of ``SegLocalVisualizer``.
    """

    def __init__(
        self, name: str = 'visualizer', min_size: int = 256, **kwargs: Any
    ) -> None:
        super().__init__(name, **kwargs)
        self.min_size = min_size

    def _draw_sem_seg(
        self,
        image: np.ndarray,
        sem_seg: PixelData,
        classes: list[str],
        palette: list,
        with_labels: bool = True,
    ) -> np.ndarray:
        """Draw classes (1, height, width) over an image."""
        factor = max(1, -(-self.min_size // min(image.shape[:2])))
        large = image.repeat(factor, 0).repeat(factor, 1)
        labels = torch.as_tensor(sem_seg.data).cpu()
        for axis in (1, 2):
            labels = labels.repeat_interleave(factor, axis)
        hidden = torch.zeros_like(labels, dtype=torch.bool)
        if 'background' in classes:
            hidden = labels == classes.index('background')
        # numbers from that of the classes on are not drawn
        shown = PixelData(data=labels.masked_fill(hidden, len(classes)))
        drawn = super()._draw_sem_seg(
            large, shown, classes, palette, with_labels
        )
        drawn = np.where(hidden[0].numpy()[..., None], large, drawn)
        self.set_image(drawn)
        return drawn

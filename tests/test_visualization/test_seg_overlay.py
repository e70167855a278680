"""Overlays of a segmentor's classes on images, small ones too."""

import numpy as np
import pytest
import torch
from mmengine.registry import VISUALIZERS, init_default_scope
from mmengine.structures import PixelData

CLASSES = ['background', 'leaf', 'stem']
PALETTE = [[0, 0, 0], [0, 255, 0], [255, 0, 0]]


def draw(size, labels, **options):
    """Draw labels (height, width) on a grey image, without words."""
    import mmstabvim  # noqa: F401 its registry

    init_default_scope('mmseg')
    cfg = dict(type='mmstabvim.SegOverlayVisualizer', name=f'{size}{options}')
    tool = VISUALIZERS.build(cfg | options)
    image = np.full((*size, 3), 200, np.uint8)
    data = PixelData(data=labels[None])
    drawn = tool._draw_sem_seg(image, data, CLASSES, PALETTE, False)
    assert tool.get_image().shape == drawn.shape  # what is saved
    return drawn


@pytest.mark.parametrize(
    ('size', 'factor'), [((8, 16), 4), ((40, 40), 1)], ids=str
)
def test_small_images_are_enlarged(size, factor):
    labels = torch.zeros(size, dtype=torch.long)
    labels[0, 1] = 1
    labels[2, 2] = 255  # ignored
    drawn = draw(size, labels, min_size=32)
    assert drawn.shape == (size[0] * factor, size[1] * factor, 3)
    pixels = drawn[::factor, ::factor]
    assert np.array_equal(drawn, pixels.repeat(factor, 0).repeat(factor, 1))
    # the background is the image itself, not darker
    assert (pixels[labels == 0] == 200).all()
    red, green, blue = pixels[0, 1].tolist()
    assert green > 200 > red == blue

"""Scenes of handwritten digits with a class for each pixel."""

import re
from typing import Any, ClassVar

import cv2
from mmengine.fileio import BaseStorageBackend, register_backend
from mmseg.datasets import BaseSegDataset

from mmstabvim.datasets.digits import SPLITS
from mmstabvim.datasets.scene_composer import compose_scene
from mmstabvim.registry import DATASETS
from mmstabvim.stability.inputs import check_choice

PREFIX = 'digit-scenes'
PATH = PREFIX + '://{split}/{size}/{seed}/{kind}/{index:05d}.png'
PATTERN = re.compile(rf'{PREFIX}://(\w+)/(\d+)/(\d+)/(img|ann)/(\d+)\.png')
NUM_SCENES = {'train': 20000, 'test': 400}


@register_backend(PREFIX, prefixes=PREFIX)
class DigitScenesBackend(BaseStorageBackend):
    """File backend that composes a scene when its path is read.

    So every transform, hook and tool that reads a file reads scenes too.
    """

    def get(self, filepath: str) -> bytes:
        """Return an image or a mask, encoded.

        Args:
            filepath (str): ``digit-scenes://SPLIT/SIZE/SEED/KIND/INDEX.png``
                with ``img`` or ``ann`` for ``KIND``.

        Returns:
            bytes: A PNG file, of three channels or one.

        Raises:
            FileNotFoundError: If there is no such scene.
        """
        match = PATTERN.fullmatch(str(filepath))
        if match is None or match[1] not in SPLITS:
            raise FileNotFoundError(
                f'wanted a path like {PATH!r}, got {str(filepath)!r}'
            )
        split, size, seed, kind, index = match.groups()
        scene = compose_scene(split, int(index), int(size), int(seed))
        pixels = scene.image if kind == 'img' else scene.labels
        # it is decoded at once: compression would only take time
        uncompressed = [cv2.IMWRITE_PNG_COMPRESSION, 0]
        return cv2.imencode('.png', pixels, uncompressed)[1].tobytes()

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        """Refuse: scenes are no text."""
        raise TypeError(f'a scene is no text file, got {str(filepath)!r}')


@DATASETS.register_module()
class DigitScenes(BaseSegDataset):
    """Digits over a textured background, labelled pixel by pixel.

    Nothing is downloaded or written: a scene is composed in memory whenever
    it is read, and is the same one each time. The digits are the images of
    :class:`.Digits` with its split, so test scenes show writers' images that
    no training scene shows. A scene is made as follows.

    1. Background: two colours, each channel drawn from 0 to 128, are mixed
       by the logistic function of twice a field that adds smooth noise on
       2 x 2, 6 x 6 and 16 x 16 cells (amplitudes 1, 0.6 and 0.35, bicubic)
       and one plane wave of 2 to 8 periods per side (amplitude 0.5) in any
       direction.
    2. Two to four digits, one after the other. Each is one of the ten with
       equal probability, then one of its images; enlarged to a side of 0.4
       to 0.7 of the scene's and turned by up to 15 degrees (bicubic); its
       grey value, 0 to 1, is the opacity of the paint.
    3. Up to ten places inside the scene are tried. The first one is taken
       where the digit covers at most so many pixels of earlier digits as
       make 10 % of the smallest one's; without one it is left out.
    4. Its colour is brighter (mean of the channels and pixels) than what it
       covers, by at least 80 where 255 leaves room for it; then each
       channel gets a tint of -50 to 50, less their mean, and is clipped to
       0 to 255.
    5. Each channel of each pixel gets a random integer from -14 to 14.

    A pixel is of the last digit whose opacity there is at least 0.5: class 1
    for the digit 0 up to class 10 for the digit 9. Class 0 is background.
    All random numbers come from one generator for each seed, split and
    index.

    Each sample has ``img_path`` and ``seg_map_path`` of the form
    ``digit-scenes://SPLIT/SIZE/SEED/img/INDEX.png``, which
    ``LoadImageFromFile`` and ``LoadAnnotations`` read.

    Args:
        split (str): ``'train'`` or ``'test'``.
        img_size (int): Height and width, pixels, at least 32. Defaults to
            64.
        num_samples (int, optional): Number of scenes. Defaults to None:
            20,000 for training, 400 for testing.
        seed (int): Seed of the scenes. Defaults to 0.
        **kwargs: Arguments of MMSegmentation's ``BaseSegDataset``:
            ``pipeline``, ``metainfo``, ``indices``, ``test_mode`` and so
            on; not the folders.

    Raises:
        TypeError: If a number is no int, or at an unknown keyword.
        ValueError: If a number or ``split`` is out of range.
    """

    METAINFO: ClassVar[dict] = {
        'classes': ('background', *'0123456789'),
        'palette': [
            [40, 40, 40],
            [31, 119, 180],
            [255, 127, 14],
            [44, 160, 44],
            [214, 39, 40],
            [148, 103, 189],
            [140, 86, 75],
            [227, 119, 194],
            [188, 189, 34],
            [23, 190, 207],
            [250, 250, 120],
        ],
    }

    def __init__(
        self,
        split: str,
        img_size: int = 64,
        num_samples: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_choice('split', split, SPLITS)
        if num_samples is None:
            num_samples = NUM_SCENES[split]
        _check_int('img_size', img_size, 32)
        _check_int('num_samples', num_samples, 1)
        _check_int('seed', seed, 0)
        _refuse_folders(kwargs)
        self.split, self.img_size = split, img_size
        self.num_samples, self.seed = num_samples, seed
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """List the scenes' paths.

        Returns:
            list[dict]: One dict per scene, as ``BaseSegDataset`` wants it.
        """
        return [self._describe(index) for index in range(self.num_samples)]

    def _describe(self, index: int) -> dict:
        """Return the entry of a scene, for a pipeline."""
        values = dict(
            split=self.split, size=self.img_size, seed=self.seed, index=index
        )
        return dict(
            img_path=PATH.format(kind='img', **values),
            seg_map_path=PATH.format(kind='ann', **values),
            label_map=self.label_map,
            reduce_zero_label=self.reduce_zero_label,
            seg_fields=[],
        )


def _check_int(name: str, value: int, least: int) -> None:
    """Refuse a value that is no int or too small."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int, got {type(value).__name__}')
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')


def _refuse_folders(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would be ignored: there are no files."""
    for name in ('ann_file', 'data_root', 'data_prefix'):
        if kwargs.get(name):
            raise TypeError(f'DigitScenes reads no files, got {name}')

"""Real handwritten digits that need no download."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import cv2
import numpy as np
from mmengine.dataset import BaseDataset

from mmstabvim.registry import DATASETS

SPLITS = ('train', 'test')
TEST_STRIDE = 5  # every fifth image of a class is a test image
MAX_VALUE = 16  # of the stored 8 x 8 images


def split_indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Return the indices of one side of the fixed stratified split.

    Images 0, 5, 10, ... of each class, in the order in which they are stored,
    are the test images and the rest are the training images. No random number
    is drawn, so the split is the same everywhere.

    Args:
        labels (np.ndarray): (num_images,), class of each image.
        split (str): ``'train'`` or ``'test'``.

    Returns:
        np.ndarray: Indices into ``labels``, ascending.

    Raises:
        ValueError: If ``split`` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[::TEST_STRIDE]] = True
    return np.flatnonzero(is_test if split == 'test' else ~is_test)


@DATASETS.register_module()
class Digits(BaseDataset):
    """The 1,797 handwritten digits that scikit-learn carries.

    The images are 8 x 8 with values from 0 to 16. They are scaled to 0 .. 255,
    enlarged by bicubic interpolation and repeated over three channels, so that
    a pipeline for RGB or BGR images takes them without a loading step. Nothing
    is downloaded. The split is fixed: 1,433 training and 364 test images, with
    the classes in proportion; writers are not kept apart.

    Each sample is a dict with ``img`` (np.ndarray: (img_size, img_size, 3),
    uint8, 0 .. 255), ``gt_label`` (int, 0 .. 9), ``img_shape`` and
    ``ori_shape`` (both (img_size, img_size)) and ``sample_idx`` (int).

    Args:
        split (str): ``'train'`` or ``'test'``.
        img_size (int): Height and width of the enlarged images, in pixels.
            Defaults to 32.
        pipeline (Sequence): Transforms, as configs or callables. Defaults to
            ``()``.
        metainfo (dict, optional): Overrides the meta information, of which
            ``classes`` is ``('0', ..., '9')``. Defaults to None.
        indices (int or Sequence[int], optional): The first images of the
            split, or the positions in it, to keep. Defaults to None, all.
        serialize_data (bool): Hold the samples as one array of
            bytes, which worker processes share. Defaults to True.
        test_mode (bool): Raise an error where the pipeline drops a sample,
            which is otherwise replaced by another one. Defaults to False.
        lazy_init (bool): Load on first use only. Defaults to False.
        max_refetch (int): Largest number of other samples to try when the
            pipeline drops one. Defaults to 1000.

    Raises:
        ValueError: If ``split`` is unknown or ``img_size`` is not positive.
        TypeError: If ``img_size`` is no int, or at an unknown keyword.

    Example:
        >>> from mmstabvim import Digits
        >>> sample = Digits('test')[0]
        >>> sample['img'].shape, sample['gt_label']
        ((32, 32, 3), 0)

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, 1998 (its test set), through
    ``sklearn.datasets.load_digits``.
    """

    METAINFO: ClassVar[dict] = {'classes': tuple('0123456789')}

    def __init__(
        self,
        split: str,
        img_size: int = 32,
        pipeline: Sequence[dict | Callable] = (),
        metainfo: dict | None = None,
        indices: int | Sequence[int] | None = None,
        serialize_data: bool = True,
        test_mode: bool = False,
        lazy_init: bool = False,
        max_refetch: int = 1000,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
        if isinstance(img_size, bool) or not isinstance(img_size, int):
            raise TypeError(
                f'img_size must be an int, got {type(img_size).__name__}'
            )
        if img_size < 1:
            raise ValueError(f'img_size must be positive, got {img_size}')
        self.split = split
        self.img_size = img_size
        super().__init__(
            metainfo=metainfo,
            indices=indices,
            serialize_data=serialize_data,
            pipeline=pipeline,
            test_mode=test_mode,
            lazy_init=lazy_init,
            max_refetch=max_refetch,
        )

    def load_data_list(self) -> list[dict]:
        """Load the images of the split, enlarged.

        Returns:
            list[dict]: One dict per image, see the class.
        """
        # here, because scikit-learn is slow to import
        from sklearn.datasets import load_digits

        digits = load_digits()
        shape = (self.img_size, self.img_size)
        return [
            {
                'img': self._enlarge(digits.images[index]),
                'gt_label': int(digits.target[index]),
                'img_shape': shape,
                'ori_shape': shape,
            }
            for index in split_indices(digits.target, self.split)
        ]

    def _enlarge(self, values: np.ndarray) -> np.ndarray:
        """Turn (8, 8) values 0 .. 16 into an (H, W, 3) uint8 image."""
        gray = np.rint(values * (255 / MAX_VALUE)).astype(np.uint8)
        shape = (self.img_size, self.img_size)
        large = cv2.resize(gray, shape, interpolation=cv2.INTER_CUBIC)
        return np.repeat(large[..., None], 3, axis=2)  # (H, W, 3)

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the class of a sample, for wrappers that balance classes.

        Args:
            idx (int): Position of the sample.

        Returns:
            list[int]: Its only class.
        """
        return [self.get_data_info(idx)['gt_label']]

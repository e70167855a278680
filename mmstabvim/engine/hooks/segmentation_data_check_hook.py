"""Check images, masks and classes before a segmentation run starts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from mmstabvim.engine.data_files import (
    bare_model,
    exists,
    folders,
    leaves,
    open_image,
    spaced,
)
from mmstabvim.engine.segmentor_check import check_segmentor
from mmstabvim.registry import HOOKS

EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
# heads that learn something else than the classes of the dataset
OTHER_TARGETS = ('STDCHead',)
DECODED = 8
"""Masks of each dataset that are decoded: a mistake in the labels is mostly
one of the whole data set, and decoding costs a hundred times the header."""


@HOOKS.register_module()
class SegmentationDataCheckHook(Hook):
    """Refuse data or parts that do not fit before the first iteration.

    Before training the training and the validation set are checked, before a
    test the test set; inside of wrappers that repeat or join datasets too:

    - there is an image, and each head's ``num_classes`` (that of auxiliary
      heads too) is the number of the dataset's classes;
    - each image has a mask, where files are on a local disk;
    - of up to ``samples`` evenly spaced images: image and mask can be read,
      and the mask has one channel and the size of its image;
    - of eight of these masks: the labels are classes or ignored once
      ``reduce_zero_label`` and ``label_map`` are applied;
    - if some are ignored in training, no head has a cross-entropy with
      ``class_weight``, which MMSegmentation cannot compute there.

    The model is checked too: what :class:`mmstabvim.VisionMamba` returns must
    suit the neck and the heads.

    Where a pipeline has no ``LoadAnnotations`` no masks are needed, and only
    the first half sentence is checked. Of the other files only the header is
    read. Two classes may have a head with ``num_classes=2, out_channels=1``
    or with ``num_classes=1``, if its losses have ``use_sigmoid``.
    Every process checks by itself, so that all of them stop.

    Args:
        samples (int): Images of each dataset that are looked into; 0 for
            none. Defaults to 100.

    Raises:
        TypeError: If ``samples`` is no int.
        ValueError: If ``samples`` is negative. When the run starts: if
            something does not fit, with the file or the argument, what was
            wanted and what was found.
    """

    # before hooks that do something
    priority = 'VERY_HIGH'

    def __init__(self, samples: int = 100) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int):
            raise TypeError(
                f'samples must be an int, got {type(samples).__name__}'
            )
        if samples < 0:
            raise ValueError(f'samples must be at least 0, got {samples}')
        self.samples = samples

    def before_train(self, runner: Runner) -> None:
        """Check what is trained and validated on."""
        check_segmentor(runner.model)
        self._check(runner, 'training', runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            self._check(runner, 'validation', runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check what is tested on."""
        check_segmentor(runner.model)
        self._check(runner, 'test', runner.test_dataloader.dataset)

    def _check(self, runner: Runner, purpose: str, dataset: Any) -> None:
        """Check a dataset or those that it wraps."""
        heads = dict(_heads(runner.model))
        for leaf in leaves(dataset):
            name = f'{purpose} data ({type(leaf).__name__})'
            if not len(leaf):
                raise ValueError(
                    f'{name}: wanted images, got none in {folders(leaf)}'
                )
            if _reads_masks(leaf.pipeline):
                trains = purpose == 'training'
                done = self._check_masks(name, leaf, heads, trains)
            else:
                done = 'its pipeline loads no masks, so none were checked'
            runner.logger.info(f'{name}: {len(leaf)} images; {done}')

    def _check_masks(
        self, name: str, dataset: Any, heads: dict[str, Any], trains: bool
    ) -> str:
        """Check classes, files and some pixels; say what was looked at."""
        num_classes = len(dataset.metainfo.get('classes') or ())
        if num_classes:
            for path, head in heads.items():
                num_classes = _check_head(name, num_classes, path, head)
        _check_files(name, dataset)
        ignored = {getattr(h, 'ignore_index', 255) for h in heads.values()}
        ignored = ignored or {getattr(dataset, 'ignore_index', 255)}
        for info in spaced(dataset, self.samples):
            _open_mask(name, dataset, info)
        decoded = min(self.samples, DECODED) if num_classes else 0
        for info in spaced(dataset, decoded):
            mask = _read_mask(name, dataset, info)
            used = _check_labels(name, info, mask, num_classes, ignored)
            if trains and not used.isdisjoint(ignored):
                _check_losses(name, info, heads)
        count = min(self.samples, len(dataset))
        return (
            f'size of {count} masks and labels of '
            f'{min(decoded, len(dataset))} fit'
        )


def _heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Heads that learn the dataset's classes, of a model in any wrapper."""
    model = bare_model(model, 'decode_head')
    for name in ('decode_head', 'auxiliary_head'):
        head = getattr(model, name, None)
        heads = {name: head}
        if isinstance(head, nn.ModuleList):
            heads = {f'{name}[{i}]': part for i, part in enumerate(head)}
        for path, part in heads.items():
            own = type(part).__name__ in OTHER_TARGETS
            if hasattr(part, 'num_classes') and not own:
                yield path, part


def _reads_masks(node: Any) -> bool:
    """Whether a pipeline loads masks from files, perhaps in a branch."""
    # here, because it is slow to import
    from mmcv.transforms import LoadAnnotations

    if isinstance(node, (list, tuple)):
        return any(_reads_masks(child) for child in node)
    if isinstance(node, LoadAnnotations):
        return node.with_seg
    children = ('transforms', 'subroutines')
    return any(_reads_masks(getattr(node, name, ())) for name in children)


def _check_head(name: str, num_classes: int, path: str, head: Any) -> int:
    """Raise ValueError where a head has another number of classes.

    Returns:
        int: Number of classes in the masks.
    """
    if _is_binary(head) and num_classes in (1, 2):
        return 2
    if head.num_classes == num_classes:
        return num_classes
    binary = (
        '; for two classes a sigmoid needs num_classes=2, out_channels=1 (or '
        'num_classes=1) and use_sigmoid=True in every loss_decode'
    )
    raise ValueError(
        f'model.{path}.num_classes must be {num_classes}, the number of '
        f'classes of the {name}, got {head.num_classes}'
        + (binary if num_classes == 2 or head.num_classes == 1 else '')
    )


def _is_binary(head: Any) -> bool:
    """Tell a head with one sigmoid for background and foreground."""
    if getattr(head, 'out_channels', 0) != 1 or head.num_classes > 2:
        return False
    return all(getattr(loss, 'use_sigmoid', True) for loss in _losses(head))


def _losses(head: Any) -> list[Any]:
    """List the losses of a head."""
    losses: Any = getattr(head, 'loss_decode', None)
    return list(losses) if isinstance(losses, nn.ModuleList) else [losses]


def _check_files(name: str, dataset: Any) -> None:
    """Raise ValueError where images or masks on a local disk are missing."""
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    for what, key in (('image', 'img_path'), ('mask', 'seg_map_path')):
        paths = [info.get(key) for info in infos]
        missing = [
            i for i, path in enumerate(paths) if not exists(dataset, path)
        ]
        if missing:
            info = infos[missing[0]]
            raise ValueError(
                f'{name}: {len(missing)} of {len(infos)} images have no '
                f'{what} file; the first is {info.get("img_path")}, whose '
                f'{what} must be {info.get(key)}; folders: '
                f'{folders(dataset)}'
            )


def _open_mask(name: str, dataset: Any, info: dict) -> Image.Image:
    """Read the header of a mask of one channel and its image's size."""
    image_path, mask_path = info['img_path'], info['seg_map_path']
    mask = open_image(name, dataset, mask_path)
    image = open_image(name, dataset, image_path)
    if mask is None:
        raise ValueError(f'{name}: mask {mask_path} is of an unknown format')
    if len(mask.getbands()) != 1:
        raise ValueError(
            f'{name}: mask {mask_path} must have one channel, a label for '
            f'each pixel, got {len(mask.getbands())} ({mask.mode})'
        )
    if image is not None and mask.size != _upright_size(image):
        raise ValueError(
            f'{name}: mask {mask_path} must be of the size of its image '
            f'{image_path}, {_upright_size(image)} pixels (width, height), '
            f'got {mask.size}'
        )
    return mask


def _read_mask(name: str, dataset: Any, info: dict) -> np.ndarray:
    """Decode a mask."""
    try:
        return np.asarray(_open_mask(name, dataset, info))
    except (OSError, SyntaxError) as error:
        path = info['seg_map_path']
        raise ValueError(
            f'{name}: mask {path} cannot be decoded ({error})'
        ) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once the camera's orientation is applied."""
    width, height = image.size
    if image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS:
        return height, width
    return width, height


def _check_labels(
    name: str,
    info: dict,
    mask: np.ndarray,
    num_classes: int,
    ignored: set[int],
) -> set[int]:
    """Return a mask's labels; ValueError for one neither class nor ignored."""
    wrong, loaded = {}, set()
    for label, count in zip(*_count_labels(mask), strict=True):
        used = _loaded_label(info, label)
        loaded.add(used)
        if not (0 <= used < num_classes or used in ignored):
            wrong[label] = count
    if wrong:
        also = ', '.join(map(str, sorted(ignored)))
        raise ValueError(
            f'{name}: mask {info["seg_map_path"]} must hold labels that '
            f'become 0 to {num_classes - 1} or {also} (ignored), got '
            f'{sorted(wrong)} in {sum(wrong.values())} pixels '
            f'(reduce_zero_label={bool(info.get("reduce_zero_label"))}, '
            f'label_map={info.get("label_map")})'
        )
    return loaded


def _check_losses(name: str, info: dict, heads: dict[str, Any]) -> None:
    """Raise ValueError where a loss cannot deal with ignored pixels."""
    for path, head in heads.items():
        for loss in _losses(head):
            if _weighs_ignored(loss, head):
                raise ValueError(
                    f'model.{path}.loss_decode.class_weight must be None '
                    'where pixels are ignored, for MMSegmentation looks up '
                    f'the weight of {head.ignore_index} too; got '
                    f'{loss.class_weight}, and ignored pixels in the {name}: '
                    f'{info["seg_map_path"]}'
                )


def _weighs_ignored(loss: Any, head: Any) -> bool:
    """Whether a loss fails at an ignored pixel, as MMSegmentation 1.2.2's."""
    softmax = type(loss).__name__ == 'CrossEntropyLoss' and not (
        loss.use_sigmoid or loss.use_mask
    )
    if not softmax or loss.class_weight is None:
        return False
    scores = torch.zeros(1, head.out_channels, 1, 1)
    labels = torch.full((1, 1, 1), head.ignore_index)
    try:
        loss(scores, labels, ignore_index=head.ignore_index)
    except IndexError:
        return True
    return False


def _count_labels(mask: np.ndarray) -> tuple[list[int], list[int]]:
    """Labels of a mask and in how many pixels they are."""
    if mask.dtype == np.uint8:  # quicker than to sort the pixels
        counts = np.bincount(mask.ravel())
        labels = np.flatnonzero(counts)
        return labels.tolist(), counts[labels].tolist()
    labels, counts = np.unique(mask.astype(np.int64), return_counts=True)
    return labels.tolist(), counts.tolist()


def _loaded_label(info: dict, label: int) -> int:
    """What ``LoadAnnotations`` makes of a label in a file."""
    if info.get('reduce_zero_label'):
        label = 255 if label in (0, 255) else label - 1
    return (info.get('label_map') or {}).get(label, label)

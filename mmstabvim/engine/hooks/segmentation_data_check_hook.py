"""Check images, masks and classes before a segmentation run starts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from mmstabvim.engine.data_files import (
    UNREADABLE,
    exists,
    folders,
    open_image,
    read_header,
    spaced,
)
from mmstabvim.engine.hooks.data_check_hook import (
    DataCheckHook,
    check_count,
    class_names,
)
from mmstabvim.engine.runner_access import model_with
from mmstabvim.engine.segmentor_check import check_segmentor
from mmstabvim.registry import HOOKS

# heads that learn something else than the classes of the dataset
OTHER_TARGETS = ('STDCHead',)
BINARY = (
    'for two classes a head has num_classes=2, out_channels=1 or '
    'num_classes=1, each with use_sigmoid=True in loss_decode, or '
    'num_classes=2 with a softmax'
)


@HOOKS.register_module()
class SegmentationDataCheckHook(DataCheckHook):
    """Refuse data or parts that do not fit before the first iteration.

    Before training the training and the validation set are checked, before a
    test the test set; inside of wrappers that repeat or join datasets too:

    - there is an image, and each head's ``num_classes`` (that of auxiliary
      heads too) is the number of the dataset's classes, and there are as many
      ``class_weight``;
    - the classes have the names and the order of the training set's, before
      a test those of the checkpoint;
    - each image has a mask, where files are on a local disk;
    - of up to ``samples`` evenly spaced images: image and mask are whole, as
      far as the header and, of PNG and JPEG, the end tell, and the mask has
      one channel and the size of its image;
    - of up to ``decoded`` evenly spaced masks: the labels are classes or
      ignored once ``reduce_zero_label`` and ``label_map`` are applied;
    - if some are ignored in training, no head has a cross-entropy with
      ``class_weight``, which MMSegmentation cannot compute there.

    The model is checked too: what :class:`mmstabvim.VisionMamba` returns must
    suit the neck and the heads. A head for background and foreground has
    ``num_classes=2, out_channels=1`` or ``num_classes=1``; both want
    ``use_sigmoid=True`` in the losses, and masks with the labels 0 and 1.

    Where a pipeline has no ``LoadAnnotations`` no masks are needed, and only
    the first half sentence is checked. :class:`mmstabvim.CheckSegMap` checks
    the labels of every mask that is loaded.
    Every process checks by itself, so that all of them stop.

    Args:
        samples (int): Images of each dataset that are looked into; 0 for
            none. Defaults to 100.
        decoded (int): Masks of each dataset that are decoded, at most
            ``samples``: wrong labels are mostly those of the whole data set,
            and decoding costs a hundred times what a header does. Defaults to
            8.

    Raises:
        TypeError: If an argument is no int.
        ValueError: If one is negative. When the run starts: if something does
            not fit, with the file or the argument, what was wanted and what
            was found.
    """

    def __init__(self, samples: int = 100, decoded: int = 8) -> None:
        super().__init__(samples)
        self.decoded = check_count('decoded', decoded)

    def check_model(self, model: nn.Module) -> None:
        """Check that the parts of the model fit."""
        check_segmentor(model)

    def check_leaf(
        self, name: str, dataset: Any, model: nn.Module, trains: bool
    ) -> str:
        """Check classes, files and some pixels of a dataset."""
        if not _reads_masks(dataset.pipeline):
            return 'its pipeline loads no masks, so none were checked'
        heads = dict(_heads(model))
        num_classes = len(class_names(dataset))
        if num_classes:
            for path, head in heads.items():
                num_classes = _check_head(name, num_classes, path, head)
        _check_files(name, dataset)
        for info in spaced(dataset, self.samples):
            _check_size(name, dataset, info)
        decoded = min(self.samples, self.decoded) if num_classes else 0
        ignored = {getattr(h, 'ignore_index', 255) for h in heads.values()}
        ignored = ignored or {getattr(dataset, 'ignore_index', 255)}
        for info in spaced(dataset, decoded):
            mask = _read_mask(name, dataset, info)
            used = _check_labels(name, info, mask, num_classes, ignored)
            if trains and not used.isdisjoint(ignored):
                _check_losses(name, info, heads)
        counts = [min(n, len(dataset)) for n in (self.samples, decoded)]
        return f'size of {counts[0]} masks and labels of {counts[1]} fit'


def _heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the heads that learn the dataset's classes, with their names."""
    model = model_with(model, 'decode_head')
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
    """Tell if a pipeline loads masks from files, perhaps in a branch."""
    # here, because it is slow to import
    from mmcv.transforms import LoadAnnotations

    if isinstance(node, (list, tuple)):
        return any(_reads_masks(child) for child in node)
    if isinstance(node, LoadAnnotations):
        return node.with_seg
    children = ('transforms', 'subroutines')
    return any(_reads_masks(getattr(node, name, ())) for name in children)


def _check_head(name: str, num_classes: int, path: str, head: Any) -> int:
    """Raise ValueError where a head does not suit the number of classes.

    Returns:
        int: Number of labels in the masks.
    """
    binary = getattr(head, 'out_channels', 0) == 1
    if binary and not all(
        getattr(loss, 'use_sigmoid', True) for loss in _losses(head)
    ):
        raise ValueError(
            f'model.{path}.loss_decode.use_sigmoid must be True for a head '
            'with out_channels=1 (the default for num_classes=1), got False; '
            f'{BINARY}'
        )
    _check_weights(path, head)
    if binary and num_classes <= 2:
        return 2
    if head.num_classes != num_classes:
        few = min(num_classes, head.num_classes) <= 2
        raise ValueError(
            f'model.{path}.num_classes must be {num_classes}, the number of '
            f'classes of the {name}, got {head.num_classes}'
            + (f'; {BINARY}' if few else '')
        )
    return num_classes


def _check_weights(path: str, head: Any) -> None:
    """Raise ValueError where a loss weighs another number of classes."""
    wanted = getattr(head, 'out_channels', head.num_classes)
    for loss in _losses(head):
        weights = getattr(loss, 'class_weight', None)
        if weights is not None and len(weights) != wanted:
            raise ValueError(
                f'model.{path}.loss_decode.class_weight must have {wanted} '
                f'numbers, one for each channel, got {weights}'
            )


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


def _check_size(name: str, dataset: Any, info: dict) -> None:
    """Raise ValueError where a mask has no single channel or another size."""
    mask = read_header(name, dataset, info, 'seg_map_path')
    image = read_header(name, dataset, info, 'img_path')
    if mask is None:  # in a format that only the pipeline knows
        return
    path = info['seg_map_path']
    if mask.bands != 1:
        raise ValueError(
            f'{name}: mask {path} must have one channel, a label for each '
            f'pixel, got {mask.bands} ({mask.mode})'
        )
    if image is not None and mask.size != image.size:
        raise ValueError(
            f'{name}: mask {path} must be of the size of its image '
            f'{info["img_path"]}, {image.size} pixels (width, height), got '
            f'{mask.size}'
        )


def _read_mask(name: str, dataset: Any, info: dict) -> np.ndarray:
    """Decode a mask; an empty one where only the pipeline knows the format."""
    path = info['seg_map_path']
    if read_header(name, dataset, info, 'seg_map_path') is None:
        return np.zeros((0, 0), np.uint8)
    try:
        with open_image(dataset, path) as mask:
            return np.asarray(mask)
    except UNREADABLE as error:
        raise ValueError(
            f'{name}: mask {path} cannot be decoded ({error})'
        ) from error


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
    """Tell if a loss fails at an ignored pixel, as in MMSegmentation 1.2.2."""
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
    """Return the labels of a mask and their numbers of pixels."""
    if mask.dtype == np.uint8:  # quicker than to sort the pixels
        counts = np.bincount(mask.ravel())
        labels = np.flatnonzero(counts)
        return labels.tolist(), counts[labels].tolist()
    labels, counts = np.unique(mask.astype(np.int64), return_counts=True)
    return labels.tolist(), counts.tolist()


def _loaded_label(info: dict, label: int) -> int:
    """Convert a label in a file as ``LoadAnnotations`` does."""
    if info.get('reduce_zero_label'):
        label = 255 if label in (0, 255) else label - 1
    return (info.get('label_map') or {}).get(label, label)

"""Check classes, labels and images before a classification run starts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.runner import Runner
from torch import nn

from mmstabvim.engine.data_files import (
    exists,
    leaves,
    read_header,
    spaced,
)
from mmstabvim.engine.hooks.data_check_hook import (
    PURPOSES,
    DataCheckHook,
    class_folders,
    class_names,
)
from mmstabvim.engine.runner_access import model_with
from mmstabvim.registry import HOOKS


@HOOKS.register_module()
class ClassificationDataCheckHook(DataCheckHook):
    """Refuse data that do not fit each other or a classifier.

    Before training the training and the validation set are checked, before a
    test the test set; inside of wrappers that repeat or join datasets too:

    - there is an image;
    - the classes have the names and the order of the training set's: a folder
      that is missing in one set would shift the labels. Before a test they
      are compared with those of the checkpoint;
    - ``num_classes`` of the head, of its loss, and of a preprocessor that
      makes one-hot labels is their number, as is that of ``class_weight``, and
      no label is beyond it;
    - of up to ``samples`` evenly spaced images the file is there and whole,
      as far as its header and, of PNG and JPEG, its end tell;
    - ``topk`` of an accuracy is not beyond the classes, either.

    Before training the test set's classes are compared too, if its data are
    there. Datasets without names of classes need a head with more classes
    than the highest label. Heads without ``num_classes`` pass, as do datasets
    that are not of MMEngine.
    Every process checks by itself, so that all of them stop.

    Args:
        samples (int): Number of images of each dataset that are opened; 0
            for none. Defaults to 100.

    Raises:
        TypeError: If ``samples`` is no int.
        ValueError: If ``samples`` is negative. When the run starts: if
            something does not fit, with the file or the argument, what was
            wanted and what was found.

    Example:
        >>> from mmstabvim import ClassificationDataCheckHook
        >>> hook = ClassificationDataCheckHook(samples=10)
    """

    def before_train(self, runner: Runner) -> None:
        """Check the data, and the metrics of the validation."""
        super().before_train(runner)
        if runner.val_loop is not None:
            _check_topk('val', runner.val_loop)

    def before_test(self, runner: Runner) -> None:
        """Check the data, and the metrics of the test."""
        super().before_test(runner)
        _check_topk('test', runner.test_loop)

    def check_leaf(
        self, name: str, dataset: Any, model: nn.Module, trains: bool
    ) -> str:
        """Check classes, labels and files of a dataset."""
        _check_order(name, dataset)
        _check_num_classes(name, dataset, model)
        count = _check_files(name, dataset, self.samples)
        named = len(class_names(dataset)) or 'unnamed'
        return f'{named} classes fit, {count} files can be read'


def _check_topk(split: str, loop: Any) -> None:
    """Raise ValueError where more classes are counted than there are."""
    count = len(class_names(next(leaves(loop.dataloader.dataset))))
    for metric in getattr(loop.evaluator, 'metrics', ()):
        counted = type(metric).__name__ == 'Accuracy'
        topk = metric.topk if counted else ()
        if count and max(topk, default=0) > count:
            raise ValueError(
                f'{split}_evaluator.topk must be at most {count}, the number '
                f'of classes of the {PURPOSES[split]} data, got {topk}'
            )


def _check_order(name: str, dataset: Any) -> None:
    """Raise ValueError where classes are in another order than folders."""
    got, wanted = class_names(dataset), class_folders(dataset)
    if got != wanted and sorted(got) == sorted(wanted):
        raise ValueError(
            f'{name}: classes must be in the order of the folders, by which '
            f'labels are given, {wanted}, got {got}'
        )


def _check_num_classes(name: str, dataset: Any, model: nn.Module) -> None:
    """Raise ValueError where labels suit neither classes nor the model."""
    labels, named = _labels(dataset), len(class_names(dataset))
    count = named or max(labels, default=-1) + 1
    for label in (min(labels, default=0), max(labels, default=0)):
        if labels and not 0 <= label < count:
            raise ValueError(
                f'{name}: labels must be 0 to {count - 1}, the positions of '
                f'its classes, got {label} of {labels[label]}'
            )
    for path, got in _numbers_of_classes(model):
        if count and (got is None or got < count or (named and got != count)):
            raise ValueError(
                f'{path} must be {count}, the number of classes of the '
                f'{name}, got {got}'
            )


def _labels(dataset: Any) -> dict[int, str]:
    """Find the labels of a dataset, each with an image that has it.

    There may be several for an image. Folders give the right ones.
    """
    found: dict[int, str] = {}
    for i in range(0 if class_folders(dataset) else len(dataset)):
        info = dataset.get_data_info(i)
        label = info.get('gt_label')
        # neither those of several tasks nor numbers to be predicted
        if np.asarray(label).dtype.kind not in 'iu':
            continue
        image = info.get('img_path', f'image {i}')
        for one in np.ravel(label).tolist():
            found.setdefault(one, image)
    return found


def _numbers_of_classes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Find each ``num_classes`` of a classifier, with its argument."""
    model = model_with(model, 'head')
    head = getattr(model, 'head', None)
    loss = getattr(head, 'loss_module', None)
    for path, part in (('model.head', head), ('model.head.loss', loss)):
        number = getattr(part, 'num_classes', None)
        if isinstance(number, int):
            yield f'{path}.num_classes', number
    weights = getattr(loss, 'class_weight', None)
    if weights is not None:
        yield 'the length of model.head.loss.class_weight', len(weights)
    preprocessor = getattr(model, 'data_preprocessor', None)
    if getattr(preprocessor, 'to_onehot', False):
        yield (
            'data_preprocessor.num_classes',
            getattr(preprocessor, 'num_classes', None),
        )


def _check_files(name: str, dataset: Any, samples: int) -> int:
    """Raise ValueError where a file of the sample is missing or damaged.

    Returns:
        int: Number of files looked into.
    """
    count = 0
    for info in spaced(dataset, samples):
        path = info.get('img_path')
        if path is None:  # an array
            continue
        if not exists(dataset, path):
            raise ValueError(f'{name}: there is no image file {path}')
        read_header(name, dataset, info, 'img_path')
        count += 1
    return count

"""Check classes, labels and images before a classification run starts."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from mmstabvim.engine.data_files import (
    bare_model,
    exists,
    folders,
    leaves,
    open_image,
    spaced,
)
from mmstabvim.registry import HOOKS


@HOOKS.register_module()
class ClassificationDataCheckHook(Hook):
    """Refuse data that do not fit each other or the model.

    Before training the training and the validation set are checked, before a
    test the test set; inside of wrappers that repeat or join datasets too:

    - there is an image;
    - the classes have the names and the order of the training set's: a folder
      that is missing in one of them would shift the labels;
    - ``num_classes`` of the head, and of a preprocessor that makes one-hot
      labels, is their number, and no label is beyond it;
    - of up to ``samples`` evenly spaced images the file can be read, as far as
      its header and, of a PNG, its end tell.

    Before training the classes of a test set of folders are compared too.
    Datasets without names of classes, and heads without ``num_classes``, pass
    these checks.

    Args:
        samples (int): Images of each dataset that are looked into; 0 for
            none. Defaults to 100.

    Raises:
        TypeError: If ``samples`` is no int.
        ValueError: If ``samples`` is negative. When the run starts: if
            something does not fit, with the file or the argument, what was
            wanted and what was found.

    Example:
        >>> from mmstabvim import ClassificationDataCheckHook
        >>> hook = ClassificationDataCheckHook(samples=10)
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
        """Check what is trained and validated on, and the test's classes."""
        train = runner.train_dataloader.dataset
        self._check(runner, 'train_dataloader', train)
        if runner.val_loop is not None:
            val = runner.val_dataloader.dataset
            _check_classes('val_dataloader', val, train)
            self._check(runner, 'val_dataloader', val)
        test = _folders_of_test(runner)
        if test is not None:
            _check_classes('test_dataloader', test, train)

    def before_test(self, runner: Runner) -> None:
        """Check what is tested on."""
        self._check(runner, 'test_dataloader', runner.test_dataloader.dataset)

    def _check(self, runner: Runner, name: str, dataset: Any) -> None:
        """Check a dataset or those that it wraps."""
        for leaf in leaves(dataset):
            if not hasattr(leaf, 'get_data_info'):
                continue  # not one of MMEngine
            kind = f'{name}.dataset ({type(leaf).__name__})'
            if not len(leaf):
                raise ValueError(
                    f'{kind}: wanted images, got none in {folders(leaf)}'
                )
            _check_labels(kind, leaf, runner.model)
            count = _check_files(kind, leaf, self.samples)
            runner.logger.info(
                f'{kind}: {len(leaf)} images, {_count(leaf)} classes; '
                f'{count} files looked into'
            )


def _folders_of_test(runner: Runner) -> Any:
    """Build the test's dataset where it is of folders; None for others.

    The runner itself builds it at the test only, and another one may read
    files for minutes.
    """
    cfg = runner.cfg.get('test_dataloader') or {}
    dataset = cfg.get('dataset') or {}
    same = dataset == (runner.cfg.get('val_dataloader') or {}).get('dataset')
    kind = str(dataset.get('type')).rpartition('.')[2]
    if same or kind != 'CustomDataset':
        return None
    return DATASETS.build({**dataset, 'pipeline': ()})


def _classes(dataset: Any) -> list[str]:
    """List the names of a dataset's classes; empty where it has none."""
    metainfo = getattr(dataset, 'metainfo', None) or {}
    return [str(name) for name in metainfo.get('classes') or ()]


def _count(dataset: Any) -> int | str:
    """Count the classes, for the log."""
    return len(_classes(dataset)) or 'unnamed'


def _check_classes(name: str, dataset: Any, train: Any) -> None:
    """Raise ValueError where classes differ from those of the training."""
    wanted = _classes(next(leaves(train)))
    for leaf in leaves(dataset):
        got = _classes(leaf)
        if not got or not wanted or got == wanted:
            continue
        missing = [c for c in wanted if c not in got]
        added = [c for c in got if c not in wanted]
        differs = (
            'another order'
            if not missing + added
            else ', '.join(
                f'{what} {", ".join(map(repr, names[:6]))}'
                for what, names in (('without', missing), ('and also', added))
                if names
            )
        )
        raise ValueError(
            f'{name}.dataset.classes must be those of train_dataloader, '
            f'{len(wanted)} classes, got {len(got)}: {differs} (in '
            f'{folders(leaf)}). A label is the position of its class, so '
            'labels would be shifted: give each folder of images the same '
            'class folders (one may be empty), or each dataset the same '
            'classes'
        )


def _check_labels(kind: str, dataset: Any, model: Any) -> None:
    """Raise ValueError where the head does not suit the labels."""
    labels = _labels(dataset)
    named = len(_classes(dataset))
    count = named or max(labels, default=-1) + 1
    if labels and not 0 <= min(labels) <= max(labels) < count:
        raise ValueError(
            f'{kind}: labels must be 0 to {count - 1}, the positions of '
            f'{count} classes, got {min(labels)} to {max(labels)}'
        )
    for path, got in _numbers_of_classes(model):
        if count and (got < count or (named and got != count)):
            raise ValueError(
                f'model.{path} must be {count}, the number of classes of '
                f'{kind}, got {got}'
            )


def _labels(dataset: Any) -> list[int]:
    """List the labels of a dataset; empty where an image has none or many."""
    if not hasattr(dataset, 'get_gt_labels'):
        return []
    try:
        return [int(label) for label in dataset.get_gt_labels()]
    except (KeyError, TypeError, ValueError):
        return []


def _numbers_of_classes(model: Any) -> list[tuple[str, int]]:
    """Find each ``num_classes`` of a classifier, with its path."""
    found = []
    classifier = bare_model(model, 'head')
    for name in ('head', 'data_preprocessor'):
        part = getattr(classifier, name, None)
        number = getattr(part, 'num_classes', None)
        if name == 'data_preprocessor' and not getattr(
            part, 'to_onehot', False
        ):
            continue
        if isinstance(number, int):
            found.append((f'{name}.num_classes', number))
    return found


def _check_files(kind: str, dataset: Any, samples: int) -> int:
    """Raise where an image of the sample is missing or cannot be read.

    Returns:
        int: Number of files looked into.
    """
    count = 0
    for info in spaced(dataset, samples):
        path = info.get('img_path')
        if path is None:
            continue
        if not exists(dataset, path):
            raise ValueError(f'{kind}: there is no image file {path}')
        open_image(kind, dataset, path)
        count += 1
    return count

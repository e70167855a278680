"""Base class of the hooks that check data before a run starts."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn

from mmstabvim.engine.data_files import folders, leaves

PURPOSES = {'train': 'training', 'val': 'validation', 'test': 'test'}


class DataCheckHook(Hook):
    """Refuse data that do not fit each other or the model.

    Before training the training and the validation set are checked, before a
    test the test set; inside of wrappers that repeat or join datasets too.
    The classes of all three must have the same names in the same order.
    Every process checks by itself, so that all of them stop.

    Args:
        samples (int): Number of images of each dataset that are opened; 0
            for none. Defaults to 100.

    Raises:
        TypeError: If ``samples`` is no int.
        ValueError: If ``samples`` is negative.
    """

    # before hooks that do something
    priority = 'VERY_HIGH'

    def __init__(self, samples: int = 100) -> None:
        self.samples = check_count('samples', samples)
        self._trained_on: list[str] = []  # names of classes

    def check_leaf(
        self, name: str, dataset: Any, model: nn.Module, trains: bool
    ) -> str:
        """Raise ValueError where a dataset does not fit the model.

        Args:
            name (str): Split, argument and type of the dataset.
            dataset (Any): One of MMEngine, in no wrapper, and not empty.
            model (nn.Module): Model of the run, in wrappers or not.
            trains (bool): True for the training set.

        Returns:
            str: Short account of the check, for the log.
        """
        raise NotImplementedError

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError where parts of the model do not fit."""

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the classes that the weights were trained on."""
        meta = checkpoint.get('meta') or {}
        self._trained_on = _names(meta.get('dataset_meta') or {})

    def before_train(self, runner: Runner) -> None:
        """Check the training and validation data, and the test's classes."""
        self.check_model(runner.model)
        datasets = {'train': runner.train_dataloader.dataset}
        if runner.val_loop is not None:
            datasets['val'] = runner.val_dataloader.dataset
        first = next(leaves(datasets['train']))
        compared = {**datasets, 'test': _unbuilt_test_set(runner)}
        for split, dataset in compared.items():
            if split != 'train' and dataset is not None:
                check_classes(split, dataset, first)
        for split, dataset in datasets.items():
            self._check(runner, split, dataset)
        self._trained_on = class_names(first)

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        self.check_model(runner.model)
        dataset = runner.test_dataloader.dataset
        for leaf in leaves(dataset):
            got, wanted = class_names(leaf), self._trained_on
            # names of another kind, such as those of ImageNet's folders,
            # share none
            if got != wanted and not set(got).isdisjoint(wanted):
                raise _other_classes('test', leaf, got, wanted, 'the weights')
        self._check(runner, 'test', dataset)

    def _check(self, runner: Runner, split: str, dataset: Any) -> None:
        """Check a dataset or those that it wraps."""
        for leaf in leaves(dataset):
            name = name_of(split, leaf)
            if not hasattr(leaf, 'get_data_info'):
                runner.logger.info(f'{name}: not of MMEngine, not checked')
                continue
            if not len(leaf):
                raise ValueError(
                    f'{name}: wanted images, got none in {folders(leaf)}'
                )
            done = self.check_leaf(name, leaf, runner.model, split == 'train')
            runner.logger.info(f'{name}: {len(leaf)} images; {done}')


def check_count(name: str, value: Any) -> int:
    """Return an argument that must be an int of at least 0.

    Args:
        name (str): Argument, for the message.
        value (Any): Its value.

    Returns:
        int: The value.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is negative.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int, got {type(value).__name__}')
    if value < 0:
        raise ValueError(f'{name} must be at least 0, got {value}')
    return value


def name_of(split: str, dataset: Any) -> str:
    """Name a dataset by its split, its argument and its type."""
    return (
        f'{PURPOSES[split]} data ({split}_dataloader.dataset, '
        f'{type(dataset).__name__})'
    )


def class_names(dataset: Any) -> list[str]:
    """List the names of a dataset's classes; empty where it has none."""
    return _names(getattr(dataset, 'metainfo', None) or {})


def class_folders(dataset: Any) -> list[str]:
    """List the folders that are classes, in the order of the labels."""
    numbers = getattr(dataset, 'folder_to_idx', None) or {}
    return sorted(numbers, key=numbers.__getitem__)


def _names(metainfo: dict) -> list[str]:
    """List the names of classes in meta information."""
    return [str(name) for name in metainfo.get('classes') or ()]


def check_classes(split: str, dataset: Any, train: Any) -> None:
    """Refuse classes that are not those of the training set.

    Args:
        split (str): ``'val'`` or ``'test'``.
        dataset (Any): Dataset of the split, wrapped or not.
        train (Any): Training set, in no wrapper.

    Raises:
        ValueError: If names, order or folders of the classes differ.
    """
    for leaf in leaves(dataset):
        for read in (class_folders, class_names):
            got, wanted = read(leaf), read(train)
            if got and wanted and got != wanted:
                source = f'train_dataloader.dataset ({folders(train)})'
                raise _other_classes(split, leaf, got, wanted, source)


def _other_classes(
    split: str, dataset: Any, got: list[str], wanted: list[str], source: str
) -> ValueError:
    """Make the error about classes that differ."""
    return ValueError(
        f'{split}_dataloader.dataset.classes must be those of {source}, '
        f'{_short(wanted)}, got {_short(got)} ({folders(dataset)}): '
        f'{_difference(got, wanted)}. A label is the position of its class, '
        'so labels would be shifted. Give each data set the same folders of '
        'classes (one may be empty), or lists of images (ann_file) and '
        f'classes=[{_short(wanted)}]'
    )


def _difference(got: list[str], wanted: list[str]) -> str:
    """Describe the difference of two lists of classes."""
    missing = [name for name in wanted if name not in got]
    added = [name for name in got if name not in wanted]
    parts = (('without', missing), ('and also', added))
    told = [f'{what} {_short(names)}' for what, names in parts if names]
    return ' '.join(told) or 'in another order'


def _short(names: list[str], limit: int = 8) -> str:
    """Write a list of names, cut where it is long."""
    dots = ', ...' if len(names) > limit else ''
    return ', '.join(map(repr, names[:limit])) + dots


def _unbuilt_test_set(runner: Runner) -> Any:
    """Build the test set as far as its classes; None where it cannot be.

    A runner builds the test's data at the test only, and they may come later
    than the training.
    """
    cfg = (runner.cfg.get('test_dataloader') or {}).get('dataset')
    val = (runner.cfg.get('val_dataloader') or {}).get('dataset')
    if not isinstance(cfg, dict) or cfg == val:
        return None
    try:
        dataset = DATASETS.build({**cfg, 'pipeline': (), 'lazy_init': True})
        if not class_names(dataset):
            dataset.full_init()
    # of any dataset whose files are not there, or that takes no lazy_init
    except Exception as error:
        runner.logger.info(f'classes of the test data not checked: {error}')
        return None
    return dataset

"""What the check of classification data refuses, and what it lets pass."""

import logging

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.registry import DATASETS, init_default_scope
from small_runs import digits_config, train
from torch import nn

from mmstabvim import ClassificationDataCheckHook

CLASSES = ('ant', 'bee', 'cat')
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(32, 32)),
    dict(type='PackInputs'),
]


def write(folder, names=CLASSES, count=4, suffix='.png'):
    """Folders of images, 8 x 6 pixels each."""
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / name / f'{i}{suffix}'), image)


@pytest.fixture
def root(tmp_path):
    for split in ('train', 'val', 'test'):
        write(tmp_path / split)
    return tmp_path


def config(root, head=3, **changes):
    """The digits config on folders of images, one epoch."""
    cfg = digits_config(root)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.batch_size = 4
        loader.dataset = Config(
            dict(
                d=dict(
                    type='CustomDataset',
                    data_root=str(root),
                    data_prefix=split,
                    pipeline=PIPELINE,
                )
            )
        ).d
    cfg.model.backbone.in_channels = 3
    cfg.model.head.num_classes = head
    cfg.data_preprocessor = dict(num_classes=head)
    cfg.train_cfg.max_epochs = 1
    cfg.merge_from_dict(changes)
    return cfg


def test_good_folders_train(root):
    runner = train(config(root))
    assert runner.iter == 3


@pytest.mark.parametrize('head', [2, 4])
def test_number_of_classes(root, head):
    message = rf'model\.head\.num_classes must be 3, .*CustomDataset.* {head}'
    with pytest.raises(ValueError, match=message):
        train(config(root, head))


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize('missing', ['bee', 'cat'])
def test_a_class_that_a_split_does_not_have(root, split, missing):
    """Even the last one, which shifts nothing: its name is told."""
    folder = root / split / missing
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    message = rf"{split}_dataloader\.dataset\.classes .* without '{missing}'"
    with pytest.raises(ValueError, match=message):
        train(config(root))


def test_an_additional_class_and_another_order(root):
    write(root / 'val', ['dog'])
    with pytest.raises(ValueError, match="and also 'dog'"):
        train(config(root))
    order = {'val_dataloader.dataset.classes': ['cat', 'bee', 'ant']}
    (root / 'val/dog').rename(root / 'dog')
    with pytest.raises(ValueError, match='another order'):
        train(config(root, **order))


def test_an_empty_folder_cures_it(root):
    """As the message advises."""
    for path in (root / 'val/bee').iterdir():
        path.unlink()
    (root / 'val/bee').rmdir()
    with pytest.raises(ValueError, match=r'\(one may be empty\)'):
        train(config(root))
    (root / 'val/bee').mkdir()
    assert train(config(root)).iter == 3


def test_one_hot_labels(root):
    """A mixup needs the number of classes in the preprocessor too."""
    cfg = config(root)
    cfg.data_preprocessor.update(num_classes=5, to_onehot=True)
    with pytest.raises(ValueError, match=r'data_preprocessor\.num_classes'):
        train(cfg)


def test_truncated_and_broken_files(root):
    path = root / 'val/cat/3.png'
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], 'is truncated'),
        (b'no image', 'cannot be read as image'),
        (b'', 'cannot be read as image'),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf'cat/3\.png {message}'):
            train(config(root))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_file_broken_behind_the_sample_is_named(root, workers):
    """By whoever reads it, in a worker process too."""
    path = root / 'train/bee/2.png'
    path.write_bytes(path.read_bytes()[:60] + b'\0' * 40 + b'IEND')
    cfg = config(root)
    cfg.train_dataloader.num_workers = workers
    cfg.default_hooks.data_check.samples = 0
    with pytest.raises(Exception, match=r'bee/2\.png'):
        train(cfg)


def test_a_missing_listed_file(root):
    (root / 'list.txt').write_text('ant/0.png 0\nbee/zzz.png 1\ncat/0.png 2\n')
    cfg = config(root)
    cfg.train_dataloader.dataset.update(
        ann_file='list.txt', data_prefix='train', classes=list(CLASSES)
    )
    with pytest.raises(ValueError, match=r'no image file .*zzz\.png'):
        train(cfg)


def test_a_label_beyond_the_classes(root):
    (root / 'list.txt').write_text('ant/0.png 0\nbee/0.png 7\n')
    cfg = config(root)
    cfg.train_dataloader.dataset.update(
        ann_file='list.txt', data_prefix='train', classes=list(CLASSES)
    )
    with pytest.raises(ValueError, match=r'labels must be 0 to 2.*got 0 to 7'):
        train(cfg)


class Model(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Module()
        if num_classes:
            self.head.num_classes = num_classes


class Runner:
    """As far as the hook looks at it."""

    val_loop = None
    cfg = Config()
    logger = logging.getLogger('check')

    def __init__(self, dataset, model):
        self.train_dataloader = self.test_dataloader = self
        self.dataset, self.model = dataset, model


@pytest.fixture
def dataset(root):
    import mmpretrain  # noqa: F401

    init_default_scope('mmpretrain')
    return DATASETS.build(config(root).train_dataloader.dataset)


@pytest.mark.parametrize('wrap', ['repeat', 'concat'])
def test_wrapped_datasets(dataset, wrap):
    if wrap == 'repeat':
        wrapped = RepeatDataset(dataset, 2)
    else:
        wrapped = ConcatDataset([dataset, dataset])
    hook = ClassificationDataCheckHook()
    hook.before_train(Runner(wrapped, Model(3)))
    with pytest.raises(ValueError, match=r'head\.num_classes must be 3'):
        hook.before_train(Runner(wrapped, Model(2)))


def test_models_in_wrappers_and_without_a_number(dataset):
    hook = ClassificationDataCheckHook()
    hook.before_test(Runner(dataset, Model(None)))
    wrapped = nn.Module()
    wrapped.module = Model(2)
    with pytest.raises(ValueError, match=r'head\.num_classes must be 3'):
        hook.before_test(Runner(dataset, wrapped))


def test_an_empty_dataset(dataset):
    with pytest.raises(ValueError, match='wanted images, got none'):
        ClassificationDataCheckHook().before_test(
            Runner(dataset.get_subset([]), Model(3))
        )


@pytest.mark.parametrize(
    ('samples', 'error'), [(-1, ValueError), (2.0, TypeError)]
)
def test_bad_argument(samples, error):
    with pytest.raises(error, match='samples must be'):
        ClassificationDataCheckHook(samples)

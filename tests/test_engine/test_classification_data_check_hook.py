"""Check of classification data: refusals, and data that pass."""

import json
import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import (
    ClassBalancedDataset,
    ConcatDataset,
    RepeatDataset,
)
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner as MMRunner
from small_runs import digits_config, train
from torch import nn
from torch.utils.data import Subset

from mmstabvim import ClassificationDataCheckHook, Digits

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
    """The cure that the message advises works."""
    for path in (root / 'val/bee').iterdir():
        path.unlink()
    (root / 'val/bee').rmdir()
    with pytest.raises(ValueError, match=r'\(one may be empty\)'):
        train(config(root))
    (root / 'val/bee').mkdir()
    assert train(config(root)).iter == 3


@pytest.mark.parametrize('number', [5, None])
def test_one_hot_labels(root, number):
    """A mixup needs the number of classes in the preprocessor too."""
    cfg = config(root)
    cfg.data_preprocessor.update(num_classes=number, to_onehot=True)
    message = rf'data_preprocessor\.num_classes must be 3.*got {number}'
    with pytest.raises(ValueError, match=message):
        train(cfg)


def test_number_of_classes_of_the_loss(root):
    for argument, loss in dict(
        num_classes=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        class_weight=dict(type='CrossEntropyLoss'),
    ).items():
        cfg = config(root)
        wrong = 4 if argument == 'num_classes' else [1.0] * 4
        cfg.model.head['loss'] = {**loss, argument: wrong}
        message = rf'model\.head\.loss\.{argument} must be 3.*got 4'
        with pytest.raises(ValueError, match=message):
            train(cfg)


def test_more_classes_counted_than_there_are(root):
    topk = {'val_evaluator.topk': (1, 5)}
    message = r'val_evaluator\.topk must be at most 3.*got \(1, 5\)'
    with pytest.raises(ValueError, match=message):
        train(config(root, **topk))


def test_folders_differ_below_the_same_names(root):
    """Names given by hand do not tell what is in the folders."""
    (root / 'val/bee').rename(root / 'val/dog')
    names = {
        f'{split}_dataloader.dataset.classes': list(CLASSES)
        for split in ('train', 'val', 'test')
    }
    with pytest.raises(ValueError, match="without 'bee' and also 'dog'"):
        train(config(root, **names))


def test_names_that_are_not_those_of_the_folders(root):
    """Other names pass, as those of ImageNet; another order does not."""
    for names, error in ((('x', 'y', 'z'), None), (CLASSES[::-1], 'order')):
        cfg = config(root)
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.classes = names
        if error is None:
            assert train(cfg).iter == 3
            continue
        message = r'training data \(train_dataloader.*order of the folders'
        with pytest.raises(ValueError, match=message):
            train(cfg)


def test_test_data_that_are_not_there_yet(root):
    for path in (root / 'test').glob('*/*'):
        path.unlink()
    assert train(config(root)).iter == 3


@pytest.mark.parametrize('changed', [None, 'bee', 'all'])
def test_classes_of_the_weights(root, changed):
    """Weights are tested on their classes, or on all other names."""
    cfg = config(root)
    train(cfg)
    for name in () if changed is None else CLASSES:
        if changed in (name, 'all'):
            # as many, in the same order
            (root / f'test/{name}').rename(root / f'test/{name}x')
    cfg.load_from = f'{cfg.work_dir}/epoch_1.pth'
    cfg.experiment_name = f'test_{changed}'
    runner = MMRunner.from_cfg(cfg)
    if changed == 'bee':
        with pytest.raises(ValueError, match=r"those of the weights.*'beex'"):
            runner.test()
    else:
        assert runner.test()


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
    with pytest.raises(
        ValueError, match=r'labels must be 0 to 2.*got 7 of .*bee/0\.png'
    ):
        train(cfg)


def test_whole_jpegs_with_something_behind(root):
    """Cameras write such files; without their end they are refused."""
    write(root / 'train', suffix='.jpg')
    path = root / 'train/bee/1.jpg'
    whole = path.read_bytes()
    path.write_bytes(whole + b'\0' * 9999)
    assert train(config(root)).iter == 6
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r'bee/1\.jpg is truncated'):
        train(config(root))


@pytest.mark.usefixtures('_scope')
def test_formats_that_only_the_pipeline_knows(root):
    """OpenCV reads three channels of floats, Pillow does not."""
    path = root / 'train/ant/0.tif'
    cv2.imwrite(str(path), np.ones((6, 8, 3), np.float32))
    (root / 'list.txt').write_text('ant/0.tif 0\n')
    cfg = config(root).train_dataloader.dataset
    cfg.update(ann_file='list.txt', classes=CLASSES)
    hook = ClassificationDataCheckHook()
    cfg.pipeline[0].color_type = 'unchanged'
    hook.before_train(Runner(DATASETS.build(cfg), Model(3)))
    cfg.pipeline[0].color_type = 'color'
    with pytest.raises(ValueError, match=r'0\.tif cannot be read as image'):
        hook.before_train(Runner(DATASETS.build(cfg), Model(3)))


class Model(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Module()
        if num_classes:
            self.head.num_classes = num_classes


class Runner:
    """Stand-in with the parts that the hook reads."""

    val_loop = None
    cfg = Config()
    logger = logging.getLogger('check')
    evaluator = SimpleNamespace(metrics=[])

    def __init__(self, dataset, model):
        self.train_dataloader = self.test_dataloader = self
        self.test_loop = self.dataloader = self
        self.dataset, self.model = dataset, model


@pytest.fixture
def _scope():
    import mmpretrain  # noqa: F401

    init_default_scope('mmpretrain')


@pytest.fixture
def dataset(root, _scope):
    return DATASETS.build(config(root).train_dataloader.dataset)


def wrapped(dataset, wrap):
    from mmpretrain.datasets import KFoldDataset

    if wrap == 'k-fold':
        # it takes the classes of its configuration only
        dataset = KFoldDataset(
            dict(
                type='CustomDataset',
                data_root=dataset.data_root,
                data_prefix='train',
            ),
            num_splits=3,
        )
        return dataset
    return {
        'repeat': lambda: RepeatDataset(dataset, 2),
        'concat': lambda: ConcatDataset([dataset, dataset]),
        'balanced': lambda: ClassBalancedDataset(dataset, 0.1),
        'subset': lambda: Subset(dataset, [0, 1]),
    }[wrap]()


@pytest.mark.parametrize(
    'wrap', ['repeat', 'concat', 'balanced', 'k-fold', 'subset']
)
def test_wrapped_datasets(dataset, wrap):
    data = wrapped(dataset, wrap)
    hook = ClassificationDataCheckHook()
    hook.before_train(Runner(data, Model(3)))
    with pytest.raises(ValueError, match=r'head\.num_classes must be 3'):
        hook.before_train(Runner(data, Model(2)))


def listed(root, labels, kind='CustomDataset', **kwargs):
    """A dataset by a list of images, without names of classes."""
    if kind == 'CustomDataset':
        path = root / 'list.txt'
        lines = [f'ant/{i}.png {label}' for i, label in enumerate(labels)]
        path.write_text('\n'.join(lines))
    else:
        path = root / 'list.json'
        entries = [
            dict(img_path=f'ant/{i}.png', gt_label=label)
            for i, label in enumerate(labels)
        ]
        path.write_text(json.dumps(dict(metainfo={}, data_list=entries)))
    cfg = dict(
        type=kind, data_root=str(root), ann_file=path.name, data_prefix='train'
    )
    return DATASETS.build(dict(cfg, **kwargs))


@pytest.mark.usefixtures('_scope')
def test_without_names_of_classes(root):
    """A head must have a class for the highest label at least."""
    hook = ClassificationDataCheckHook()
    data = listed(root, [0, 4, 1])
    for head in (5, 9):
        hook.before_train(Runner(data, Model(head)))
    with pytest.raises(ValueError, match=r'num_classes must be 5.*got 4'):
        hook.before_train(Runner(data, Model(4)))
    bad = listed(root, [0, -1])
    with pytest.raises(ValueError, match=r'got -1 of .*ant/1\.png'):
        hook.before_train(Runner(bad, Model(4)))


@pytest.mark.usefixtures('_scope')
def test_several_labels_of_an_image(root):
    hook = ClassificationDataCheckHook()
    kind = 'MultiLabelDataset'
    for labels in ([[0, 1], [2]], [[0, 2], []]):
        good = listed(root, labels, kind, classes=CLASSES)
        hook.before_train(Runner(good, Model(3)))
    bad = listed(root, [[0, 1], [2, 3]], kind, classes=CLASSES)
    with pytest.raises(ValueError, match=r'0 to 2.*got 3 of .*ant/1\.png'):
        hook.before_train(Runner(bad, Model(3)))


def test_arrays_and_other_datasets(caplog):
    """Digits has no files; a stream of pairs is no dataset of MMEngine."""
    hook = ClassificationDataCheckHook()
    with caplog.at_level(logging.INFO):
        hook.before_train(Runner(Digits('test', indices=9), Model(10)))
        hook.before_train(Runner(iter([(0, 1)]), Model(10)))
    assert '10 classes fit, 0 files can be read' in caplog.text
    assert 'not of MMEngine' in caplog.text
    with pytest.raises(ValueError, match=r'must be 10.*Digits.*got 9'):
        hook.before_train(Runner(Digits('test', indices=9), Model(9)))


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

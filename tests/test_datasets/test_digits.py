"""The embedded digits: split, images, keywords, use in a pipeline."""

import hashlib
import random

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from sklearn.datasets import load_digits

from mmstabvim import Digits
from mmstabvim.datasets.digits import split_indices

TEST_SHA256 = (
    'c0e2fd0581477082624ff3892f94e2a4eccd0a18f8c6ce6f2d886a9df276b056'
)


@pytest.fixture(scope='module')
def labels():
    return load_digits().target


def test_split_is_pinned(labels):
    """The test indices are these and no others, on every machine."""
    indices = split_indices(labels, 'test').astype('<i8')
    assert hashlib.sha256(indices.tobytes()).hexdigest() == TEST_SHA256


def test_split_is_a_partition(labels):
    """Each image is in exactly one split."""
    train = split_indices(labels, 'train')
    test = split_indices(labels, 'test')
    everything = np.sort(np.concatenate([train, test]))
    np.testing.assert_array_equal(everything, np.arange(len(labels)))


def test_classes_keep_their_proportion(labels):
    """Every fifth image of each class is a test image, rounded up."""
    targets = [sample['gt_label'] for sample in Digits('test')]
    wanted = np.ceil(np.bincount(labels) / 5)
    np.testing.assert_array_equal(np.bincount(targets), wanted)


def test_ignores_and_leaves_global_rng():
    """Seeds change nothing, and no random number is drawn."""
    samples = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.random(), np.random.rand(), torch.rand(1).item()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        samples.append(Digits('test')[7])
        after = random.random(), np.random.rand(), torch.rand(1).item()
        assert before == after
    np.testing.assert_array_equal(samples[0]['img'], samples[1]['img'])


def test_sample():
    """Keys, types and ranges that the host's pipelines rely on."""
    sample = Digits('test')[3]
    assert sample['img'].shape == (32, 32, 3)
    assert sample['img'].dtype == np.uint8
    assert type(sample['gt_label']) is int
    assert sample['img_shape'] == sample['ori_shape'] == (32, 32)
    assert sample['sample_idx'] == 3


def test_images_are_the_stored_ones(labels):
    """At 8 x 8 nothing is interpolated: value 16 is 255, 0 is 0."""
    stored = load_digits().images[split_indices(labels, 'train')]
    images = np.stack([s['img'] for s in Digits('train', img_size=8)])
    np.testing.assert_array_equal(
        images,
        np.rint(stored * 255 / 16).astype(np.uint8)[..., None].repeat(3, -1),
    )


def test_enlarged_image_looks_like_the_small_one():
    """Averaged back over 4 x 4 blocks, the image is near the small one."""
    small = np.stack([s['img'] for s in Digits('test', img_size=8)])
    large = np.stack([s['img'] for s in Digits('test')]).astype(float)
    back = large.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4))
    # 11 of 255 here, 43 once the image is shifted by one small pixel
    assert np.abs(back - small).mean() < 20
    # bicubic, not nearest: more grey levels than 17
    assert len(np.unique(large)) > 200


def test_img_size():
    """Height and width follow ``img_size``."""
    sample = Digits('test', img_size=28)[0]
    assert sample['img'].shape == (28, 28, 3)
    assert sample['ori_shape'] == (28, 28)


def test_classes():
    """The meta information names the ten classes, and can be overridden."""
    assert Digits('test').metainfo['classes'] == tuple('0123456789')
    names = ('zero', 'one')
    other = Digits('test', metainfo={'classes': names}, lazy_init=True)
    assert other.metainfo['classes'] == names


def test_indices():
    """A number keeps the first images, a sequence keeps those positions."""
    full = Digits('train')
    assert len(Digits('train', indices=10)) == 10
    subset = Digits('train', indices=[5, 2])
    assert len(subset) == 2
    for position, index in enumerate([5, 2]):
        np.testing.assert_array_equal(
            subset[position]['img'], full[index]['img']
        )


def test_get_cat_ids():
    """Wrappers that balance classes see the label."""
    dataset = Digits('test')
    assert dataset.get_cat_ids(4) == [dataset[4]['gt_label']]


@pytest.mark.parametrize('serialize_data', [True, False])
def test_pipeline_cannot_change_the_data(serialize_data):
    """A transform that writes into the image spoils no later epoch."""

    def blacken(results):
        results['img'][:] = 0
        return results

    dataset = Digits('test', pipeline=[blacken], serialize_data=serialize_data)
    assert bool(dataset.data_list) is not serialize_data
    assert dataset[0]['img'].max() == 0
    assert dataset.get_data_info(0)['img'].max() > 200


def test_unknown_split():
    """The message lists the choices and what came."""
    with pytest.raises(ValueError, match=r"train.*test.*'val'"):
        Digits('val')
    with pytest.raises(ValueError, match=r"train.*test.*'val'"):
        split_indices(np.zeros(3, int), 'val')


def test_unknown_keyword():
    """No keyword is swallowed, those of file datasets included."""
    with pytest.raises(TypeError, match='spilt'):
        Digits('test', spilt='train')
    with pytest.raises(TypeError, match='data_root'):
        Digits('test', data_root='data')
    with pytest.raises(TypeError, match='split'):
        Digits()


@pytest.mark.parametrize(
    ('img_size', 'error'),
    [(0, ValueError), (-4, ValueError), (32.0, TypeError), (True, TypeError)],
)
def test_bad_img_size(img_size, error):
    """``img_size`` is a positive int."""
    with pytest.raises(error, match='img_size'):
        Digits('test', img_size=img_size)


def test_host_pipeline():
    """Built by its name from the root registry, packed by MMPretrain."""
    from mmpretrain.datasets import PackInputs

    dataset = DATASETS.build(
        {
            'type': 'mmstabvim.Digits',
            'split': 'test',
            'pipeline': [PackInputs()],
        }
    )
    packed = dataset[11]
    assert packed['inputs'].shape == (3, 32, 32)
    assert packed['inputs'].dtype == torch.uint8
    sample = packed['data_samples']
    assert sample.gt_label.item() == dataset.get_cat_ids(11)[0]
    assert sample.ori_shape == sample.img_shape == (32, 32)
    assert sample.sample_idx == 11


def test_host_visualizer():
    """MMPretrain's visualizer draws a sample with its class name."""
    from mmpretrain.structures import DataSample
    from mmpretrain.visualization import UniversalVisualizer

    dataset = Digits('test')
    visualizer = UniversalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    sample = DataSample().set_gt_label(dataset[0]['gt_label'])
    drawn = visualizer.visualize_cls(dataset[0]['img'], sample)
    assert drawn.dtype == np.uint8

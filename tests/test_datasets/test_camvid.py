"""CamVid: its layout, void, masks that do not fit."""

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmstabvim import CamVidDataset

BASE = 'configs/_base_/datasets/camvid_360x480.py'
PER_SPLIT = 3


@pytest.fixture(autouse=True)
def _scope():
    import mmseg  # noqa: F401

    init_default_scope('mmseg')


@pytest.fixture
def config(request):
    return Config.fromfile(request.config.rootpath / BASE)


@pytest.fixture
def root(tmp_path):
    """Scenes in the layout, the size and with the labels of the real data."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('img_dir', 'ann_dir'):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(PER_SPLIT):
            name = f'{split}/{i:04}'
            pixels = random.integers(0, 255, (360, 480, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f'img_dir/{name}.jpg')
            # blocks of 40 pixels, every label in each mask
            labels = random.permutation(np.arange(108) % 12).reshape(9, 12)
            mask = labels.astype(np.uint8).repeat(40, 0).repeat(40, 1)
            Image.fromarray(mask).save(tmp_path / f'ann_dir/{name}.png')
    return tmp_path


def build(config, split, root):
    dataset = config[f'{split}_dataloader'].dataset
    dataset.data_root = str(root)
    return DATASETS.build(dataset)


def test_metainfo():
    """As many colours as classes; void, the label after them, is none."""
    from mmstabvim.datasets.camvid import VOID

    meta = CamVidDataset.METAINFO
    assert len(meta['classes']) == len(set(meta['classes'])) == VOID
    assert len({tuple(colour) for colour in meta['palette']}) == VOID
    assert meta['classes'][0] == 'sky'
    assert meta['classes'][-1] == 'bicyclist'


def test_images(config, root):
    """Every file has its mask; void becomes 255 and nothing else does."""
    dataset = build(config, 'val', root)
    assert len(dataset) == PER_SPLIT
    for index in range(PER_SPLIT):
        packed = dataset[index]
        sample = packed['data_samples']
        assert packed['inputs'].shape == (3, 360, 480)
        raw = np.array(Image.open(sample.seg_map_path))
        assert (raw == 11).any()
        expected = np.where(raw == 11, 255, raw)
        loaded = sample.gt_sem_seg.data[0].numpy()
        np.testing.assert_array_equal(loaded, expected)


def test_images_of_training(config, root):
    """Crops have labels of the eleven classes or 255."""
    dataset = build(config, 'train', root)
    assert len(dataset) == PER_SPLIT
    np.random.seed(0)
    for index in range(PER_SPLIT):
        packed = dataset[index]
        labels = packed['data_samples'].gt_sem_seg.data
        assert set(labels.unique().tolist()) <= {*range(11), 255}
        height, width = packed['inputs'].shape[1:]
        assert labels.shape == (1, height, width)
        assert height <= 360
        assert width <= 480


def test_flips_and_sizes_of_augmented_tests(config, root):
    """Test-time augmentation: four sizes, each with its mirror image."""
    loader = config.val_dataloader
    loader.dataset.pipeline = config.tta_pipeline
    packed = build(config, 'val', root)[0]
    sizes = [tuple(x.shape[1:]) for x in packed['inputs']]
    assert sizes[::2] == [(270, 360), (360, 480), (450, 600), (540, 720)]
    assert sizes[::2] == sizes[1::2]
    flips = [sample.flip for sample in packed['data_samples']]
    assert flips == [False, True] * 4


def make_pair(root, labels, size=(8, 6)):
    """One image of 8 x 6 pixels and a mask."""
    for kind in ('img_dir', 'ann_dir'):
        (root / kind / 'val').mkdir(parents=True)
    Image.new('RGB', (8, 6)).save(root / 'img_dir/val/street.jpg')
    mask = np.resize(np.array(labels, np.uint8), size[::-1])
    Image.fromarray(mask).save(root / 'ann_dir/val/street.png')


def test_unknown_label_names_the_file(config, tmp_path):
    make_pair(tmp_path, [0, 3, 12, 11])
    dataset = build(config, 'val', tmp_path)
    with pytest.raises(ValueError, match=r'street\.png.*0 to 10.*got \[12\]'):
        dataset[0]


def test_other_size_names_the_file(config, tmp_path):
    make_pair(tmp_path, [0], size=(6, 8))
    dataset = build(config, 'val', tmp_path)
    message = r'street\.png.*street\.jpg, \(6, 8\), got \(8, 6\)'
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_subset_of_classes(tmp_path, config):
    """Kept classes are numbered anew; the others and void are ignored."""
    make_pair(tmp_path, range(12))
    config.val_dataloader.dataset.metainfo = dict(classes=('car', 'sky'))
    config.val_dataloader.dataset.pipeline = config.test_pipeline[:2]
    dataset = build(config, 'val', tmp_path)
    labels = dataset[0]['gt_seg_map'].ravel()[:12]
    assert labels.tolist() == [1] + 7 * [255] + [0] + 3 * [255]
    assert [dataset.metainfo['palette'][i] for i in range(2)] == [
        [64, 0, 128],
        [128, 128, 128],
    ]


def test_unknown_class_is_refused(tmp_path):
    make_pair(tmp_path, [0])
    with pytest.raises(ValueError, match='not a subset of classes'):
        CamVidDataset(
            data_root=str(tmp_path),
            data_prefix=dict(img_path='img_dir/val', seg_map_path=''),
            metainfo=dict(classes=('train',)),
        )

"""Check of segmentation data: refusals, and data that pass."""

import logging
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.registry import HOOKS, init_default_scope
from PIL import Image
from torch import nn

from mmstabvim import DigitScenes, SegmentationDataCheckHook
from mmstabvim.engine.data_files import spaced

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
CLASSES = ('road', 'tree', 'car')


@pytest.fixture(autouse=True)
def _scope():
    import mmseg  # noqa: F401

    init_default_scope('mmseg')


class Head(nn.Module):
    """Stand-in for a head, with the parts that the hook reads."""

    def __init__(self, num_classes=3, ignore_index=255):
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index


class STDCHead(Head):
    """Stand-in for MMSegmentation's head, which learns edges."""


class Model(nn.Module):
    def __init__(self, decode_head=None, auxiliary_head=None):
        super().__init__()
        self.decode_head = decode_head or Head()
        if auxiliary_head is not None:
            self.auxiliary_head = auxiliary_head


class Wrapper(nn.Module):
    """For distributed training or test-time augmentation."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def write(folder, name, labels, size=(6, 4), mode='L', image_size=None):
    """An image and a mask, by default of 6 x 4 pixels (width, height)."""
    for kind in ('img', 'ann'):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.new('RGB', image_size or size).save(folder / f'img/{name}.jpg')
    pixels = np.resize(np.array(labels), (size[1], size[0]))
    dtype = {'L': np.uint8, 'I;16': np.uint16}[mode]
    Image.fromarray(pixels.astype(dtype)).save(folder / f'ann/{name}.png')


def dataset(folder, pipeline=None, **kwargs):
    from mmseg.datasets import BaseSegDataset

    return BaseSegDataset(
        data_root=str(folder),
        data_prefix=kwargs.pop(
            'data_prefix', dict(img_path='img', seg_map_path='ann')
        ),
        metainfo=kwargs.pop('metainfo', dict(classes=CLASSES)),
        pipeline=PIPELINE if pipeline is None else pipeline,
        **kwargs,
    )


def runner(train, model=None, val=None, test=None, cfg=None):
    """Stand-in for a runner, with the parts that the hook reads."""
    loader = SimpleNamespace(dataset=val)
    return SimpleNamespace(
        cfg=cfg or {},
        model=model or Model(),
        logger=logging.getLogger('test_segmentation_data_check_hook'),
        train_dataloader=SimpleNamespace(dataset=train),
        val_dataloader=loader,
        val_loop=None if val is None else SimpleNamespace(dataloader=loader),
        test_dataloader=SimpleNamespace(dataset=test),
    )


def check(train, samples=100, **kwargs):
    SegmentationDataCheckHook(samples).before_train(runner(train, **kwargs))


@pytest.fixture
def good(tmp_path):
    for name in 'abcde':
        write(tmp_path, name, [0, 1, 2, 255])
    return tmp_path


def test_good_data_pass_and_are_told(good, caplog):
    with caplog.at_level(logging.INFO):
        check(dataset(good), samples=3, val=dataset(good))
    assert [record.getMessage() for record in caplog.records] == [
        f'{purpose} data ({split}_dataloader.dataset, BaseSegDataset): '
        '5 images; size of 3 masks and labels of 3 fit'
        for purpose, split in (('training', 'train'), ('validation', 'val'))
    ]


def test_number_of_classes(good):
    for name in ('decode_head', 'auxiliary_head'):
        message = rf'model\.{name}\.num_classes must be 3.*training.*got 19'
        with pytest.raises(ValueError, match=message):
            check(dataset(good), model=Model(**{name: Head(19)}))
    several = nn.ModuleList([Head(), Head(4)])
    with pytest.raises(
        ValueError, match=r'auxiliary_head\[1\]\.num_cl.*got 4'
    ):
        check(dataset(good), model=Model(auxiliary_head=several))


@pytest.mark.parametrize('depth', [1, 2])
def test_heads_inside_of_wrappers(good, depth):
    model = Model(Head(19))
    for _ in range(depth):
        model = Wrapper(model)
    with pytest.raises(ValueError, match=r'decode_head\.num_classes'):
        check(dataset(good), model=model)


def test_head_that_learns_something_else(good):
    check(dataset(good), model=Model(auxiliary_head=STDCHead(1)))


@pytest.mark.parametrize('purpose', ['training', 'validation', 'test'])
def test_label_out_of_range(good, purpose):
    write(good, 'c', [0, 3, 1, 9])
    bad = dataset(good)
    message = (
        rf'{purpose} data.*c\.png must hold labels that become 0 to 2 or 255 '
        r'\(ignored\), got \[3, 9\] in 12 pixels'
    )

    def act():
        if purpose == 'test':
            hook = SegmentationDataCheckHook()
            hook.before_test(runner(None, test=bad))
        elif purpose == 'training':
            check(bad)
        else:
            write(good / 'fine', 'a', [0])
            check(dataset(good / 'fine'), val=bad)

    with pytest.raises(ValueError, match=message):
        act()


def test_samples_are_spread_over_all(good):
    """With two samples of five those at 0 and 2 are looked into."""
    write(good, 'd', [9])
    check(dataset(good), samples=2)
    write(good, 'c', [9])
    with pytest.raises(ValueError, match=r'c\.png'):
        check(dataset(good), samples=2)
    check(dataset(good), samples=0)


def test_reduce_zero_label(good):
    """Zero is ignored, 1 to 3 are the classes, 255 stays ignored."""
    write(good, 'c', [0, 1, 2, 3, 255])
    check(dataset(good, reduce_zero_label=True))
    write(good, 'c', [4])
    with pytest.raises(ValueError, match=r'got \[4\].*reduce_zero_label=True'):
        check(dataset(good, reduce_zero_label=True))


def test_reading_agrees_with_the_pipeline(good):
    """Every label passes that LoadAnnotations turns into a class or 255."""
    from mmseg.datasets import ADE20KDataset

    from mmstabvim.engine.hooks import segmentation_data_check_hook as module

    write(good, 'a', range(256), size=(16, 16))
    classes = ADE20KDataset.METAINFO['classes']
    for metainfo in (None, dict(classes=classes[3:7])):
        for reduce in (False, True):
            data = ADE20KDataset(
                data_root=str(good),
                data_prefix=dict(img_path='img', seg_map_path='ann'),
                reduce_zero_label=reduce,
                metainfo=metainfo,
                pipeline=PIPELINE[:2],
            )
            info = data.get_data_info(0)
            mine = [module._loaded_label(info, i) for i in range(256)]
            assert data[0]['gt_seg_map'].ravel().tolist() == mine


def test_label_map(good):
    """A label that is mapped to a class or away is no error."""
    from mmstabvim import CamVidDataset

    kwargs = dict(
        data_root=str(good),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=PIPELINE,
    )
    write(good, 'c', range(12))
    check(CamVidDataset(**kwargs), model=Model(Head(11)))
    some = CamVidDataset(metainfo=dict(classes=('car', 'sky')), **kwargs)
    check(some, model=Model(Head(2)))
    write(good, 'c', range(13))
    with pytest.raises(ValueError, match=r'c\.png.*got \[12\]'):
        check(CamVidDataset(**kwargs), model=Model(Head(11)))


def test_head_ignores_another_label(good):
    with pytest.raises(ValueError, match=r'0 to 2 or 9 .*got \[255\]'):
        check(dataset(good), model=Model(Head(ignore_index=9)))


def with_losses(head, *losses):
    """The head with one loss, or a list of several."""
    from mmseg.models.losses import CrossEntropyLoss

    built = [CrossEntropyLoss(**loss) for loss in losses]
    head.out_channels = head.num_classes
    head.loss_decode = built[0] if len(built) == 1 else nn.ModuleList(built)
    return head


WEIGHTED = dict(class_weight=[0.5, 1.0, 1.0])


@pytest.mark.parametrize('losses', [[WEIGHTED], [{}, WEIGHTED]], ids=len)
def test_ignored_pixels_and_weighted_classes(good, losses):
    model = Model(auxiliary_head=with_losses(Head(), *losses))
    message = (
        r'model\.auxiliary_head\.loss_decode\.class_weight must be None.*'
        r'weight of 255 too; got \[0\.5.*training data.*a\.png'
    )
    with pytest.raises(ValueError, match=message):
        check(dataset(good), model=model)


@pytest.mark.parametrize('use_sigmoid', [False, True])
def test_number_of_weights(good, use_sigmoid):
    loss = dict(class_weight=[0.5, 1.0], use_sigmoid=use_sigmoid)
    message = (
        r'model\.decode_head\.loss_decode\.class_weight must have 3 numbers.*'
        r'got \[0\.5, 1\.0\]'
    )
    with pytest.raises(ValueError, match=message):
        check(dataset(good), model=Model(with_losses(Head(), loss)))


def test_weighted_classes_that_pass(good, tmp_path):
    weighted = Model(with_losses(Head(), WEIGHTED))
    write(tmp_path / 'all', 'a', [0, 1, 2])
    # where nothing is ignored in training
    check(dataset(tmp_path / 'all'), model=weighted, val=dataset(good))
    # and the losses that do not look up an ignored pixel's weight
    for loss in (
        dict(WEIGHTED, use_sigmoid=True),
        dict(WEIGHTED, reduction='sum'),
        {},
    ):
        check(dataset(good), model=Model(with_losses(Head(), loss)))


def test_sixteen_bits(good):
    write(good, 'c', [0, 1, 256 + 2], mode='I;16')
    with pytest.raises(ValueError, match=r'c\.png.*got \[258\] in 8 pixels'):
        check(dataset(good))


def test_sizes_differ(good):
    write(good, 'c', [0], size=(6, 4), image_size=(4, 6))
    message = r'c\.png must.*c\.jpg, \(4, 6\) pixels.*got \(6, 4\)'
    with pytest.raises(ValueError, match=message):
        check(dataset(good))


def test_camera_was_turned(good):
    """An image that is loaded upright has the size of an upright mask."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write(good, 'c', [0])
    Image.new('RGB', (4, 6)).save(good / 'img/c.jpg', exif=exif)
    data = dataset(good)
    check(data)
    assert data[2]['inputs'].shape[1:] == (4, 6)


def test_colour_mask(good):
    Image.new('RGB', (6, 4)).save(good / 'ann/c.png')
    with pytest.raises(ValueError, match=r'c\.png must have one .*got 3'):
        check(dataset(good))


@pytest.mark.parametrize('kind', ['img/c.jpg', 'ann/c.png'])
def test_broken_file(good, kind):
    (good / kind).write_bytes(b'no image')
    with pytest.raises(ValueError, match=rf'{kind} cannot be read as image'):
        check(dataset(good))


@pytest.mark.parametrize('kind', ['img', 'ann'])
def test_truncated_file(good, kind):
    """The header is whole: only the end is missing."""
    Image.new('L', (6, 4)).save(good / f'{kind}/c.png')
    whole = (good / f'{kind}/c.png').read_bytes()
    (good / f'{kind}/c.png').write_bytes(whole[:-12])
    suffixes = dict(img_suffix='.png') if kind == 'img' else {}
    if kind == 'img':
        for path in (good / 'img').glob('*.jpg'):
            Image.open(path).save(path.with_suffix('.png'))
        (good / 'img/c.png').write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=rf'{kind}/c\.png is truncated'):
        check(dataset(good, **suffixes))


def test_labels_are_decoded_of_few_masks_only(good):
    """Only header and end of the others are read."""
    for i in range(20):
        write(good, f'x{i:02}', [0])
        path = good / f'ann/x{i:02}.png'
        whole = path.read_bytes()
        at = whole.index(b'IDAT') + 4
        damaged = whole[:at] + b'\0' * 8 + whole[at + 8 :]
        if i % 3:
            path.write_bytes(damaged)
    seen = [info['seg_map_path'] for info in spaced(dataset(good), 8)]
    for path in seen:
        Image.new('L', (6, 4)).save(path)
    check(dataset(good))
    Path(seen[3]).write_bytes(damaged)
    with pytest.raises(ValueError, match=r'png cannot be decoded'):
        check(dataset(good))
    hook = SegmentationDataCheckHook(decoded=0)
    hook.before_train(runner(dataset(good)))


def test_images_are_not_decoded(good):
    """Pillow would, in search of the Exif of a PNG."""
    Image.new('RGB', (6, 4)).save(good / 'img/c.png')
    write(good, 'c', [0])
    whole = (good / 'img/c.png').read_bytes()
    at = whole.index(b'IDAT') + 4
    damaged = whole[:at] + b'\0' * 8 + whole[at + 8 :]
    (good / 'img/c.png').write_bytes(damaged)
    data = dataset(good, img_suffix='.png')
    assert len(data) == 1
    check(data)


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_masks_that_only_the_pipeline_knows(good, backend):
    """OpenCV reads a TIFF of float64, Pillow does not."""
    for path in (good / 'ann').iterdir():
        cv2.imwrite(str(path.with_suffix('.tif')), np.ones((4, 6)))
    load = dict(type='LoadAnnotations', imdecode_backend=backend)
    data = dataset(
        good, [PIPELINE[0], load, PIPELINE[2]], seg_map_suffix='.tif'
    )
    if backend == 'cv2':
        check(data)
        return
    with pytest.raises(ValueError, match=r'ann/a\.tif cannot be read'):
        check(data)


def test_classes_of_the_splits_differ(good):
    other = dict(classes=('road', 'car', 'tree'))
    message = (
        r'val_dataloader\.dataset\.classes must be those of train_dataloader'
        r".*'road', 'tree', 'car', got 'road', 'car', 'tree'.*another order"
    )
    with pytest.raises(ValueError, match=message):
        check(dataset(good), val=dataset(good, metainfo=other))
    cfg = dict(
        type='BaseSegDataset',
        data_root=str(good),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        metainfo=other,
        pipeline=PIPELINE,
    )
    for metainfo in (other, dict(classes=CLASSES)):
        cfg['metainfo'] = metainfo
        loaders = dict(test_dataloader=dict(dataset=cfg))
        if metainfo is not other:
            check(dataset(good), cfg=loaders)
            continue
        with pytest.raises(ValueError, match=r'test_dataloader\.dataset\.cl'):
            check(dataset(good), cfg=loaders)


class BinaryHead(Head):
    def __init__(self, num_classes, out_channels, use_sigmoid):
        super().__init__(num_classes)
        self.out_channels = out_channels
        self.loss_decode = nn.Identity()
        self.loss_decode.use_sigmoid = use_sigmoid


def binary(root, head):
    metainfo = dict(classes=('road', 'tree'))
    check(dataset(root, metainfo=metainfo), model=Model(head))


def test_both_forms_of_binary_segmentation(good):
    for name in 'abcde':
        write(good, name, [0, 1, 255])
    binary(good, BinaryHead(2, 1, True))
    binary(good, BinaryHead(1, 1, True))
    binary(good, BinaryHead(2, 2, False))
    for head, argument in (
        (BinaryHead(1, 1, False), 'loss_decode.use_sigmoid must be True'),
        (BinaryHead(2, 1, False), 'loss_decode.use_sigmoid must be True'),
        (BinaryHead(3, 3, False), 'num_classes must be 2'),
    ):
        message = rf'model\.decode_head\.{argument}.*num_classes=2, out_ch'
        with pytest.raises(ValueError, match=message):
            binary(good, head)
    write(good, 'c', [0, 2])
    with pytest.raises(ValueError, match=r'become 0 to 1 or 255.*\[2\]'):
        binary(good, BinaryHead(1, 1, True))


def test_images_without_masks(good):
    """All images are looked at, whatever the number of samples."""
    for name in 'bd':
        (good / f'ann/{name}.png').unlink()
    message = r'2 of 5 images have no mask file; the first is .*b\.jpg'
    with pytest.raises(ValueError, match=message):
        check(dataset(good), samples=1)


@pytest.mark.parametrize('prefix', ['masks', '', None], ids=str)
def test_no_folder_of_masks(good, prefix):
    prefixes = dict(img_path='img', seg_map_path=prefix)
    if prefix is None:
        del prefixes['seg_map_path']
    with pytest.raises(ValueError, match='5 of 5 images have no mask file'):
        check(dataset(good, data_prefix=prefixes))


def test_listed_image_is_missing(good):
    (good / 'list.txt').write_text('a\nzzz\n')
    data = dataset(good, ann_file='list.txt')
    message = r'1 of 2 images have no image file.*zzz\.jpg'
    with pytest.raises(ValueError, match=message):
        check(data)


def test_empty_folder(tmp_path):
    """The sampler of an iteration-based loop would wait forever."""
    (tmp_path / 'img').mkdir()
    empty = dataset(tmp_path, serialize_data=False)
    message = r'training data.*wanted images, got none in img_path=.*img'
    with pytest.raises(ValueError, match=message):
        check(empty)


@pytest.mark.parametrize('wrap', ['repeat', 'concat'])
def test_wrapped_datasets(good, wrap):
    write(good / 'fine', 'a', [0])
    write(good, 'e', [7])
    data = dataset(good)
    if wrap == 'concat':
        data = ConcatDataset([dataset(good / 'fine'), data])
    else:
        data = RepeatDataset(data, 3)
    with pytest.raises(ValueError, match=r'e\.png.*got \[7\]'):
        check(data)


def test_pipeline_without_masks(good, caplog):
    """Nothing is wanted of a test set that has no masks."""
    bare = dataset(
        good,
        pipeline=[PIPELINE[0], PIPELINE[2]],
        data_prefix=dict(img_path='img'),
    )
    with caplog.at_level(logging.INFO):
        SegmentationDataCheckHook().before_test(runner(None, test=bare))
    assert 'loads no masks' in caplog.text


def test_masks_loaded_in_a_branch(good):
    """Test-time augmentation loads the mask for each version."""
    branches = [
        [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')],
    ]
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='TestTimeAug', transforms=branches),
    ]
    write(good, 'c', [8])
    bad = dataset(good, pipeline=pipeline)
    with pytest.raises(ValueError, match=r'c\.png.*got \[8\]'):
        SegmentationDataCheckHook().before_test(runner(None, test=bad))


def test_scenes_that_are_no_files(caplog):
    data = DigitScenes('test', num_samples=5, pipeline=PIPELINE)
    with caplog.at_level(logging.INFO):
        check(data, model=Model(Head(11)))
    assert 'size of 5 masks and labels of 5 fit' in caplog.text
    with pytest.raises(ValueError, match='must be 11'):
        check(data)


@pytest.mark.parametrize(
    ('value', 'error'), [(-1, ValueError), (1.0, TypeError)]
)
@pytest.mark.parametrize('name', ['samples', 'decoded'])
def test_bad_argument(name, value, error):
    with pytest.raises(error, match=f'{name} must be'):
        SegmentationDataCheckHook(**{name: value})


def test_built_by_name():
    hook = HOOKS.build(dict(type='mmstabvim.SegmentationDataCheckHook'))
    assert hook.samples == 100
    assert hook.priority == 'VERY_HIGH'

"""Files that a loading transform cannot read are named, in workers too."""

import cv2
import numpy as np
import pytest
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from torch.utils.data import DataLoader


def write(root):
    """Images and masks of 40 x 30 pixels, in folders that are classes too."""
    random = np.random.default_rng(0)
    for kind in ('img', 'ann'):
        (root / kind).mkdir()
        for i in range(4):
            pixels = random.integers(0, 9, (30, 40), dtype=np.uint8)
            cv2.imwrite(str(root / f'{kind}/{i}.png'), pixels)


def classification(root, **load):
    import mmpretrain  # noqa: F401

    init_default_scope('mmpretrain')
    return dict(
        type='CustomDataset',
        data_root=str(root),
        pipeline=[
            dict(type='LoadImageFromFile', **load),
            dict(type='PackInputs'),
        ],
    )


def segmentation(root, **load):
    import mmseg  # noqa: F401

    init_default_scope('mmseg')
    return dict(
        type='BaseSegDataset',
        data_root=str(root),
        img_suffix='.png',
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        metainfo=dict(classes=[str(i) for i in range(9)]),
        pipeline=[
            dict(type='LoadImageFromFile', **load),
            dict(type='LoadAnnotations', **load),
            dict(type='PackSegInputs'),
        ],
    )


@pytest.mark.parametrize('content', ['truncated', 'empty', 'text'])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize(
    ('make', 'kind'),
    [(classification, 'img'), (segmentation, 'img'), (segmentation, 'ann')],
    ids=['classification', 'segmentation', 'masks'],
)
def test_the_file_is_named(tmp_path, make, kind, workers, backend, content):
    write(tmp_path)
    path = tmp_path / kind / '2.png'
    whole = path.read_bytes()
    path.write_bytes(
        dict(truncated=whole[: len(whole) // 2], empty=b'', text=b'no image')[
            content
        ]
    )
    dataset = DATASETS.build(make(tmp_path, imdecode_backend=backend))
    batches = DataLoader(
        dataset, num_workers=workers, collate_fn=pseudo_collate
    )
    with pytest.raises(Exception, match=rf'{kind}/2\.png'):
        list(batches)


def test_a_missing_file_keeps_its_error(tmp_path):
    write(tmp_path)
    dataset = DATASETS.build(classification(tmp_path))
    (tmp_path / 'img/2.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'img/2\.png'):
        list(dataset)

"""Two classes with one sigmoid, in both of MMSegmentation's forms."""

import cv2
import numpy as np
import pytest
from small_runs import scenes_config, train, unformatted_configs

SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True)
FORMS = {
    'two classes, one channel': dict(num_classes=2, out_channels=1),
    'one class': dict(num_classes=1),
}


@pytest.fixture(autouse=True)
def _quick():
    with unformatted_configs():
        yield


def write(root, labels):
    """Four images and masks of the given labels for each split."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('img', 'ann'):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            image = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            mask = random.choice(labels, (32, 32)).astype(np.uint8)
            cv2.imwrite(str(root / f'img/{split}/{i}.png'), image)
            cv2.imwrite(str(root / f'ann/{split}/{i}.png'), mask)


def config(root, head, **data):
    """Two iterations and a validation on the files."""
    cfg = scenes_config(root)
    for split, folder in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        cfg[f'{split}_dataloader'].dataset = dict(
            type='BaseSegDataset',
            data_root=str(root),
            img_suffix='.png',
            data_prefix=dict(
                img_path=f'img/{folder}', seg_map_path=f'ann/{folder}'
            ),
            metainfo=dict(
                classes=('background', 'thing'), palette=[[0] * 3, [9] * 3]
            ),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations'),
                dict(type='PackSegInputs'),
            ],
            **data,
        )
    for name in ('decode_head', 'auxiliary_head'):
        for key, value in head.items():  # update() would merge the losses
            cfg.model[name][key] = value
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    return cfg


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ('labels', 'reduce'),
    [((0, 1), False), ((0, 1, 255), False), ((0, 1, 2), True)],
    ids=['all', 'ignored', 'zero-is-ignored'],
)
def test_trains_and_validates(tmp_path, form, labels, reduce):
    write(tmp_path, labels)
    head = dict(form, loss_decode=SIGMOID)
    cfg = config(tmp_path, head, reduce_zero_label=reduce)
    runner = train(cfg)
    assert runner.iter == 2
    score = runner.message_hub.get_scalar('val/mIoU').current()
    assert 0 < score <= 100


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_a_label_beyond_and_no_sigmoid(tmp_path, form):
    write(tmp_path, (0, 1, 2))
    with pytest.raises(ValueError, match=r'become 0 to 1 or 255.*got \[2\]'):
        train(config(tmp_path, dict(form, loss_decode=SIGMOID)))
    softmax = dict(type='CrossEntropyLoss')
    message = r'model\.decode_head\.loss_decode\.use_sigmoid must be True'
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, dict(form, loss_decode=softmax)))

"""Short real training runs for the tests: the digits config, cut down."""

import copy
import json
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / 'configs/vim/vim-nano-p4_1xb64-20e_digits.py'
ARCH = dict(embed_dims=16, num_layers=2, d_state=4)


def digits_config(tmp_path):
    """The digits config, cut to 48 images, 2 layers and 4 epochs."""
    cfg = Config.fromfile(DIGITS)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.backbone.arch = dict(ARCH)
    cfg.model.backbone.drop_path_rate = 0.2
    cfg.model.head.in_channels = 16
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.indices = 48
        loader.update(batch_size=16, num_workers=0, persistent_workers=False)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
    cfg.param_scheduler = [
        dict(
            type='CosineAnnealingLR',
            T_max=4,
            by_epoch=True,
            convert_to_iter_based=True,
        )
    ]
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=-1
    )
    cfg.vis_backends = [dict(type='LocalVisBackend')]
    cfg.visualizer.vis_backends = cfg.vis_backends
    cfg.randomness = dict(seed=3)
    cfg.log_level = 'ERROR'
    return cfg


def without_randomness(cfg):
    """The same images in the same order, no augmentation, no drop path."""
    cfg.model.backbone.drop_path_rate = 0.0
    test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = test_pipeline
    cfg.train_dataloader.sampler.shuffle = False


def train(cfg):
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


def scalars(cfg, key='loss'):
    """Logged values by iteration, of every run in the work dir."""
    values = {}
    for path in sorted(Path(cfg.work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if key in row:
                values[row['step']] = row[key]
    return values

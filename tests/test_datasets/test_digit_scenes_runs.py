"""Real runs of MMSegmentation on a few scenes: every part of a run."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmstabvim.engine import launch

ROOT = Path(__file__).parents[2]
DEMO = 'vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64'
CONFIG = ROOT / f'configs/upernet/{DEMO}.py'


@pytest.fixture
def config(tmp_path):
    """The demo, cut down to four steps on eight scenes of 32 x 32."""
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.backbone.arch = dict(embed_dims=16, num_layers=2, d_state=4)
    cfg.model.backbone.update(img_size=32, out_indices=[1])
    cfg.model.neck.in_channels = 16
    cfg.model.decode_head.update(in_channels=[16] * 3, channels=8)
    cfg.model.auxiliary_head.update(in_channels=16, channels=8)
    cfg.model.data_preprocessor.size = (32, 32)
    for name in ('train', 'val', 'test'):
        loader = cfg[f'{name}_dataloader']
        loader.batch_size = 4
        loader.dataset.update(img_size=32, num_samples=8)
    cfg.train_cfg.update(max_iters=4, val_interval=2)
    cfg.param_scheduler = []
    hooks = cfg.default_hooks
    hooks.logger.interval = 1
    hooks.checkpoint.update(interval=2, max_keep_ckpts=-1)
    hooks.stability.interval = 2
    hooks.divergence.update(checkpoint_interval=2, activation_interval=2)
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.randomness = dict(seed=3)
    launch.set_loader_defaults(cfg, no_pin_memory=True)
    return cfg


def train(cfg):
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


def weights(runner):
    return {k: v.clone() for k, v in runner.model.state_dict().items()}


def test_train_resume_and_test(config):
    """Logs, monitor, summary; a resumed run repeats an uninterrupted one."""
    whole = train(config)
    work = Path(config.work_dir)
    rows = [
        json.loads(line)
        for line in next(work.glob('*/vis_data/scalars.json')).open()
    ]
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert [row['step'] for row in rows if 'mIoU' in row] == [2, 4]
    assert not (work / 'last_good.pth').exists()
    records = next(work.glob('*/stability.jsonl')).read_text().splitlines()
    assert [json.loads(record)['step'] for record in records] == [1, 3]
    summary = launch.training_summary(whole)
    assert 'Test set: aAcc' in summary
    assert f'Last checkpoint: {work / "iter_4.pth"}' in summary

    resumed = copy.deepcopy(config)
    resumed.update(load_from=str(work / 'iter_2.pth'), resume=True)
    resumed.work_dir = str(work / 'resumed')
    again = train(resumed)
    assert again.iter == 4
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name

    tested = copy.deepcopy(config)
    tested.update(load_from=str(work / 'iter_4.pth'))
    metrics = Runner.from_cfg(tested).test()
    assert metrics['mIoU'] == pytest.approx(rows[-1]['mIoU'])

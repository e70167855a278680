"""Training end to end: real runners on few images."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from small_runs import (
    ROOT,
    digits_config,
    scalars,
    train,
    without_randomness,
)

from mmstabvim.models.vim_checkpoint import to_official


@pytest.fixture
def config(tmp_path):
    return digits_config(tmp_path)


def path_with_this_python():
    """PATH on which ``python`` is the interpreter that runs the tests."""
    return os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ['PATH']]
    )


def assert_same_weights(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def shake_generators():
    """What a new process would have: other random numbers."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


@pytest.mark.parametrize('ema', [False, True])
def test_resume_repeats_the_uninterrupted_run(config, tmp_path, ema):
    """Losses and weights, bit by bit, with augmentation and drop path."""
    if ema:
        config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    whole = train(config)

    resumed = copy.deepcopy(config)
    resumed.work_dir = str(tmp_path / 'resumed')
    resumed.resume = True
    resumed.load_from = f'{config.work_dir}/epoch_2.pth'
    shake_generators()
    again = train(resumed)
    assert again.epoch == 4
    losses = scalars(config)
    assert len(losses) == 12
    assert scalars(resumed) == {i: losses[i] for i in range(7, 13)}
    assert_same_weights(whole, again)


def test_resume_by_iterations(config, tmp_path):
    """The same for an iteration-based loop that skips seen batches."""
    config.train_cfg = dict(by_epoch=False, max_iters=6, val_interval=2)
    config.train_dataloader.sampler = dict(type='InfiniteSampler')
    config.param_scheduler = []
    config.log_processor = dict(by_epoch=False)
    config.default_hooks.checkpoint.update(interval=1, by_epoch=False)
    whole = train(config)
    resumed = copy.deepcopy(config)
    resumed.work_dir = str(tmp_path / 'resumed')
    resumed.resume = True
    resumed.load_from = f'{config.work_dir}/iter_3.pth'
    shake_generators()
    again = train(resumed)
    losses = scalars(config)
    assert scalars(resumed) == {i: losses[i] for i in (4, 5, 6)}
    assert_same_weights(whole, again)


def test_validation_does_not_change_training(config, tmp_path):
    """The same weights whether or not epochs end with validation."""
    config.train_cfg.max_epochs = 2
    with_val = train(config)
    without = copy.deepcopy(config)
    without.work_dir = str(tmp_path / 'without')
    without.train_cfg.val_interval = 100
    assert_same_weights(with_val, train(without))


def test_killed_run_resumes_from_its_last_checkpoint(config):
    """A process killed by a signal loses nothing but its last epoch."""
    config.train_cfg.max_epochs = 400
    path = Path(config.work_dir).parent / 'long.py'
    config.dump(path)
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(path)]
    command += ['--work-dir', config.work_dir]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
    )
    last = Path(config.work_dir) / 'last_checkpoint'
    try:
        for _ in range(1200):
            if last.exists() and last.read_text().endswith('epoch_3.pth'):
                break
            if process.poll() is not None:
                pytest.fail(process.stderr.read().decode()[-2000:])
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
        process.wait()
    reached = int(Path(last.read_text()).stem.removeprefix('epoch_'))
    assert reached >= 3
    done = subprocess.run(
        [
            *command,
            '--resume',
            '--cfg-options',
            f'train_cfg.max_epochs={reached + 1}',
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs = sorted(Path(config.work_dir).glob('*/vis_data/scalars.json'))
    steps = [json.loads(line)['step'] for line in logs[-1].open()]
    assert steps[0] == 3 * reached + 1  # three batches in an epoch
    assert Path(config.work_dir, f'epoch_{reached + 1}.pth').exists()


def test_gradient_accumulation_is_a_larger_batch(config, tmp_path):
    """Four batches of 4 take the steps of one batch of 16."""
    config.model.backbone.drop_path_rate = 0.0
    without_randomness(config)
    config.train_cfg.max_epochs = 1
    config.param_scheduler = []
    config.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, weight_decay=0.0)
    large = train(config)
    small = copy.deepcopy(config)
    small.work_dir = str(tmp_path / 'small')
    small.train_dataloader.batch_size = 4
    small.optim_wrapper.accumulative_counts = 4
    weights = large.model.state_dict()
    for name, value in train(small).model.state_dict().items():
        torch.testing.assert_close(
            value, weights[name], rtol=1e-4, atol=1e-5, msg=name
        )


def test_bfloat16_autocast_on_a_cpu(config, tmp_path):
    """Finite, near float32, and really in bfloat16."""
    config.train_cfg.max_epochs = 1
    plain = copy.deepcopy(config)
    plain.work_dir = str(tmp_path / 'plain')
    train(plain)
    config.optim_wrapper.type = 'AmpOptimWrapper'
    config.optim_wrapper.dtype = 'bfloat16'
    runner = train(config)
    assert all(p.isfinite().all() for p in runner.model.parameters())
    low, exact = scalars(config), scalars(plain)
    assert low != exact
    for step, value in exact.items():
        assert low[step] == pytest.approx(value, rel=0.02)


def test_ema_follows_the_weights(config):
    """The averaged weights are evaluated and saved beside the raw ones."""
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    config.train_cfg.max_epochs = 2
    runner = train(config)
    saved = torch.load(f'{config.work_dir}/epoch_2.pth', weights_only=False)
    name = 'backbone.norm.weight'
    # mmengine stores the average as the model, so that it is what one loads
    average = saved['state_dict'][name]
    raw = saved['ema_state_dict'][f'module.{name}']
    assert torch.equal(raw, runner.model.state_dict()[name])
    assert not torch.equal(average, raw)
    assert (average - 1).abs().max() < (raw - 1).abs().max()


def test_load_from_converted_checkpoint_of_another_size(config, tmp_path):
    """Official weights, converted by the tool, for a larger image."""
    runner = Runner.from_cfg(copy.deepcopy(config))
    official, _ = to_official(runner.model.state_dict())
    source, converted = tmp_path / 'vim.pth', tmp_path / 'converted.pth'
    torch.save({'model': official}, source)
    tool = ROOT / 'tools/model_converters/vim_to_mmpretrain.py'
    subprocess.run(
        [sys.executable, str(tool), str(source), str(converted)],
        check=True,
        cwd=ROOT,
    )
    config.load_from = str(converted)
    config.model.backbone.img_size = 48
    config.train_cfg.max_epochs = 1
    config.optim_wrapper.optimizer.lr = 0.0
    tuned = train(config)
    weights = runner.model.state_dict()
    for name, value in tuned.model.state_dict().items():
        if name == 'backbone.pos_embed':
            assert value.shape[1] == 12 * 12 + 1
            assert torch.equal(value[:, 72], weights[name][:, 32])
        else:
            assert torch.equal(value, weights[name]), name


RANK_LOSSES = """
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RankLosses(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        with open(f'{runner.work_dir}/rank{get_rank()}.txt', 'a') as file:
            file.write(f"{outputs['loss'].item()!r}\\n")
"""


def rank_losses(cfg, rank):
    text = Path(cfg.work_dir, f'rank{rank}.txt').read_text()
    return np.array([float(line) for line in text.split()])


def test_two_processes_equal_one_with_the_doubled_batch(
    config, tmp_path, monkeypatch
):
    """``dist_train.sh`` with gloo: the mean over ranks is the loss."""
    (tmp_path / 'rank_losses.py').write_text(RANK_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    config.custom_imports.imports += ['rank_losses']
    config.custom_hooks = [dict(type='mmengine.RankLosses')]
    without_randomness(config)
    config.train_cfg.max_epochs = 2
    one = copy.deepcopy(config)
    one.work_dir = str(tmp_path / 'one')
    train(Config.fromfile(dump(one, tmp_path / 'one.py')))

    config.train_dataloader.batch_size = 8
    search = [str(tmp_path), os.environ.get('PYTHONPATH', '')]
    done = subprocess.run(
        [
            'bash',
            str(ROOT / 'tools/dist_train.sh'),
            str(dump(config, tmp_path / 'two.py')),
            '2',
            '--work-dir',
            config.work_dir,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(
            os.environ,
            PATH=path_with_this_python(),
            PYTHONPATH=os.pathsep.join(search),
            PORT='29641',
        ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    single = rank_losses(one, 0)
    halves = np.stack([rank_losses(config, 0), rank_losses(config, 1)])
    assert len(single) == 6
    assert not np.allclose(halves[0], halves[1])
    np.testing.assert_allclose(halves.mean(0), single, rtol=1e-5)


def dump(cfg, path):
    cfg.dump(path)
    return path

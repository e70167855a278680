"""Models and runs that diverge, for the tests of divergences."""

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmstabvim.engine.hooks import DivergenceHook

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / 'configs/vim/vim-nano-p4_1xb64-20e_digits.py'
COUNTER = itertools.count()
QUIET = dict(checkpoint_interval=2, activation_interval=0, spike_factor=None)


class Tiny(BaseModel):
    """Code between modules, a module that changes its input, dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 8))
        self.unused = nn.Linear(1, 1)
        self.last = nn.Linear(8, 1)

    def forward(self, inputs, target, mode='loss'):
        hidden = self.relu(self.norm(self.first(inputs)))
        hidden = hidden + self.block(hidden).clamp(-5, 5)
        return dict(loss=(self.last(hidden) - target).square().mean())


def batches(count=8):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * count, 4, generator=generator)
    target = inputs.sum(1, keepdim=True)
    return [
        dict(inputs=x, target=y) for x, y in zip(inputs, target, strict=True)
    ]


def make_runner(folder, *hooks, epochs=None, iters=10, model=None, **options):
    """A runner for the tiny model, by iterations unless epochs are given."""
    torch.manual_seed(0)
    train_cfg = dict(by_epoch=False, max_iters=iters)
    if epochs:
        train_cfg = dict(by_epoch=True, max_epochs=epochs)
    config = dict(
        model=model or Tiny(),
        work_dir=str(folder),
        # mmengine sleeps for two seconds before it starts a loader anew
        train_dataloader=DataLoader(
            batches(8 if epochs else 20), batch_size=4, shuffle=False
        ),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.01)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=10**6),
            random_state=dict(type='mmstabvim.RandomStateHook'),
        ),
        custom_hooks=list(hooks),
        log_level='ERROR',
        # runs within one second would share their history
        experiment_name=f'divergence{next(COUNTER)}',
        randomness=dict(seed=1),
    )
    return Runner(**{**config, **options})


def hook(**options):
    return DivergenceHook(**{**QUIET, **options})


def write_nan(runner, iterations, value=math.nan):
    """A forward hook that spoils one number in some iterations, from 0."""

    def write(_module, _args, output):
        if runner.iter in iterations and torch.is_grad_enabled():
            output = output.clone()
            output.view(-1)[1] = value
        return output

    return write


def diverge(runner):
    """Train to the error; return the report."""
    with pytest.raises(RuntimeError, match='training diverged') as caught:
        runner.train()
    path = Path(re.search(r'see (\S+\.md)', str(caught.value))[1])
    assert str(path.parent) == runner.log_dir
    return path.read_text()


def first_in(report):
    return re.search(r'First non-finite tensor: \*\*(.*?)\*\*', report)[1]


def reports(runner):
    return sorted(Path(runner.log_dir).glob('divergence*'))


def weights(runner):
    return copy.deepcopy(runner.model.state_dict())


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class Spy(Hook):
    """Calls a function at the end of each iteration, after all others."""

    priority = 'LOWEST'

    def __init__(self, function):
        self.function = function

    def after_train_iter(self, runner, *args, **kwargs):
        self.function(runner)


def infinite_gradient(runner, iterations):
    """A gradient hook that multiplies by infinity in some iterations."""
    return lambda g: g * math.inf if runner.iter in iterations else g


def check_weights(optimizer, *_):
    for group in optimizer.param_groups:
        for p in group['params']:
            if not p.isfinite().all():
                raise ValueError('not finite')


class SpoilOnce(Hook):
    """Put NaN into a layer's output in one iteration."""

    def __init__(self, iterations):
        self.iterations = iterations

    def before_train(self, runner):
        runner.model.norm.register_forward_hook(
            write_nan(runner, self.iterations)
        )
        # as the stabilizers do: weights that are not finite are an error
        runner.optim_wrapper.optimizer.register_step_post_hook(check_weights)


def digits_config(tmp_path):
    """The digits config, cut to 32 images and 2 small layers."""
    cfg = Config.fromfile(DIGITS)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.backbone.arch = dict(embed_dims=8, num_layers=2, d_state=2)
    cfg.model.backbone.drop_path_rate = 0.2
    cfg.model.backbone.patch_size = 8
    cfg.model.head.in_channels = 8
    cfg.model.train_cfg = dict(augments=dict(type='Mixup', alpha=0.8))
    cfg.train_dataloader.dataset.indices = 32
    cfg.train_dataloader.update(batch_size=8, persistent_workers=False)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2)
    cfg.param_scheduler = []
    cfg.vis_backends = [dict(type='LocalVisBackend')]
    cfg.visualizer.vis_backends = cfg.vis_backends
    cfg.randomness = dict(seed=3)
    cfg.log_level = 'ERROR'
    cfg.custom_hooks = [
        dict(type='mmstabvim.DivergenceHook', checkpoint_interval=2)
    ]
    cfg.experiment_name = f'digits{next(COUNTER)}'
    return cfg

"""Divergences planted in real runs: found, named, reported, undone."""

import copy
import itertools
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, PixelData
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from mmstabvim.checkpoint import load_checkpoint_tensors, load_everything
from mmstabvim.engine.divergence import (
    largest_entry,
    trace_loss,
    trace_step,
)
from mmstabvim.engine.divergence.alarm import Alarm, LossHistory
from mmstabvim.engine.divergence.record import (
    pack_batch,
    replay,
    unpack_batch,
)
from mmstabvim.engine.hooks import DivergenceHook
from mmstabvim.engine.random_state import (
    drawing_from,
    get_random_state,
    set_random_state,
)
from mmstabvim.registry import HOOKS

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
        experiment_name=f'run{next(COUNTER)}',
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


# ------------------------------------------------------------ trace it


@pytest.fixture
def digits(tmp_path):
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


@pytest.mark.parametrize(
    'place', ['backbone.layers.1.norm', 'backbone.layers.0', 'head.fc']
)
def test_names_the_layer_that_writes_nan(digits, place):
    """In a leaf, in the code of a block, in the head; nothing is stepped."""
    digits.custom_hooks = []
    runner = Runner.from_cfg(digits)
    runner.register_hook(DivergenceHook(checkpoint_interval=2))

    def write(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        spoilt = write_nan(runner, {5})(module, args, first)
        if isinstance(output, tuple):
            return (spoilt, *output[1:])
        return spoilt

    seen = {}
    runner.model.get_submodule(place).register_forward_hook(write)
    runner.register_hook(Spy(lambda r: seen.update(weights(r))))
    report = diverge(runner)
    assert first_in(report).startswith('output')
    assert f'of `{place}` (' in first_in(report)
    assert 'Iteration 6, epoch 2' in report
    assert 'after 4 iterations' in report
    assert_same(weights(runner), seen)  # of the iteration before
    # what comes before in the table is finite
    table = report.split('## Ranges before it')[1].split('##')[0]
    shares = [line.split('|')[-2].strip() for line in table.splitlines()[4:-1]]
    assert float(shares[-1]) > 0
    assert set(shares[:-1]) == {'0'}
    assert '| 5 | ' in report.split('## Loss before it')[1]
    assert 'SpectralNormalizationHook' in report.split('## What to try')[1]
    logged = Path(runner.log_dir, 'vis_data/scalars.json').read_text()
    assert '"stab/divergence": 1.0' in logged


@pytest.mark.parametrize(
    'name',
    [
        'backbone.layers.1.mixer.directions.0.state_matrix.A_log',
        # functional code reads the weights of a module that is never called
        'backbone.layers.0.mixer.directions.1.conv1d.weight',
        'backbone.pos_embed',
    ],
)
def test_names_the_weight_and_runs_the_step_again(digits, name):
    """The snippet in the report gives the same loss and the same place."""
    runner = Runner.from_cfg(digits)

    def spoil(runner):
        if runner.iter == 4:
            with torch.no_grad():
                runner.model.get_parameter(name).view(-1)[0] = math.nan

    runner.register_hook(Spy(spoil))
    report = diverge(runner)
    owner, _, key = name.rpartition('.')
    assert first_in(report).startswith(f'parameter {key} of `{owner}`')
    assert 'Iteration 6' in report
    snippet = re.search(r'```python\n(.*?)```', report, re.DOTALL)[1]
    scope = {}
    exec(snippet, scope)
    assert scope['trace'].parameters == [name]
    assert scope['trace'].first_nonfinite.describe() == first_in(report)


def test_record_repeats_the_step(digits, monkeypatch):
    """Mixup, drop path and batch: the loss of the step, bit by bit."""
    losses = []
    runner = Runner.from_cfg(digits)
    original = OptimWrapper.update_params

    def note(self, loss, *args, **kwargs):
        losses.append(loss.item())
        original(self, loss, *args, **kwargs)

    monkeypatch.setattr(OptimWrapper, 'update_params', note)

    def alarm_in_the_sixth(_history, values, _spikes):
        wanted = values.iteration == 6
        return Alarm('spike', 'of this test', 6, True) if wanted else None

    monkeypatch.setattr(LossHistory, '_spike', alarm_in_the_sixth)
    report = diverge(runner)
    (path,) = Path(runner.log_dir).glob('divergence_iter_6.pth')
    torch.load(path, weights_only=True)
    assert load_checkpoint_tensors(path)['cause'] == 'spike'
    trace = replay(path, Path(runner.log_dir, 'divergence_config.py'))
    assert trace.losses['loss'] == losses[5]
    assert f'loss {losses[5]:.6g}' in report
    assert trace.first_nonfinite is None
    with pytest.raises(ValueError, match=r"without \['batch'"):
        replay(Path(runner.work_dir, 'last_good.pth'), nn.Linear(1, 1))


def infinite_gradient(runner, iterations):
    """A gradient hook that multiplies by infinity in some iterations."""
    return lambda g: g * math.inf if runner.iter in iterations else g


def test_trace_of_a_plain_module():
    """No data preprocessor, no dict of losses: PyTorch alone."""
    root = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    nn.init.constant_(root[0].weight, -1.0)
    nn.init.zeros_(root[0].bias)
    # the derivative of a square root at 0, of what ReLU has cut off
    trace = trace_loss(root, lambda: root(torch.ones(1, 2)).sqrt().sum())
    first = trace.first_nonfinite
    assert (first.module, first.role) == ('1', 'gradient of output')
    assert "reads this module's output" in trace.reason
    assert trace.error == ''
    assert trace.losses == {}
    assert root[0].weight.grad is None


@pytest.mark.parametrize('clip', [None, 'norm', 'value'])
def test_names_the_gradient(tmp_path, clip):
    """Before it is clipped, and before the step."""
    wrapper = dict(optimizer=dict(type='Adam', lr=0.01))
    if clip == 'norm':
        wrapper['clip_grad'] = dict(max_norm=1.0, error_if_nonfinite=True)
    elif clip == 'value':
        wrapper['clip_grad'] = dict(type='value', clip_value=1.0)
    runner = make_runner(tmp_path, hook(), optim_wrapper=wrapper)
    gradient = infinite_gradient(runner, {3})
    runner.model.block[1].weight.register_hook(gradient)
    seen = {}
    runner.register_hook(Spy(lambda r: seen.update(weights(r))))
    report = diverge(runner)
    assert first_in(report) == (
        'gradient of parameter weight of `block.1` (Linear)'
    )
    assert 'A gradient is not finite: ' in report
    state = weights(runner)
    for name, _ in runner.model.named_parameters():
        assert torch.equal(state[name], seen[name]), name


class Backward(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize('inside', [False, True])
def test_tells_a_module_from_the_code_around_it(inside):
    """By the gradients on both sides of each module."""
    model = Tiny()
    if inside:
        model.block[0].forward = Backward.apply
        role, place = 'gradient of input', 'block.0'
    else:
        model.forward = lambda inputs, target, mode: dict(
            loss=model.last(Backward.apply(model.first(inputs)))
            .sub(target)
            .square()
            .mean()
        )
        role, place = 'gradient of output', 'first'
    batch = torch.utils.data.default_collate(batches()[:4])
    trace = trace_step(model, batch)
    assert (trace.first_nonfinite.role, trace.first_nonfinite.module) == (
        role,
        place,
    )
    assert 'first.weight' in trace.gradients
    assert 'last.weight' not in trace.gradients


def test_code_between_modules_and_masks():
    """A parent's code is named; infinity that a module copes with is not."""

    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.without_effect = nn.Parameter(torch.tensor(math.nan))

        def forward(self, x, mask):
            return torch.softmax(x + mask, -1)

    model = Tiny()
    model.mask = Mask()
    mask = torch.tensor([0.0] * 7 + [-math.inf])

    def forward(inputs, target, mode):
        hidden = model.mask(model.first(inputs), mask=mask) - 0.5
        return dict(loss=model.last(model.norm(hidden.sqrt())).mean())

    model.forward = forward
    batch = torch.utils.data.default_collate(batches()[:4])
    trace = trace_step(model, batch)
    assert trace.first_nonfinite.describe() == 'input of `norm` (BatchNorm1d)'
    assert 'the whole model, after `mask`' in trace.reason
    batch['inputs'][0, 0] = math.nan
    trace = trace_step(model, batch)
    assert trace.first_nonfinite.module == 'data_preprocessor'
    assert trace.reason == 'The batch itself is not finite.'


def test_tracing_changes_nothing():
    """Buffers, gradients, weights and hooks are what they were."""
    model = Tiny()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    batch = torch.utils.data.default_collate(batches()[:4])
    trace = trace_step(model, batch)
    assert trace.error == ''
    assert trace.first_nonfinite is None
    assert_same(before, model.state_dict())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for p in model.parameters():
        assert torch.equal(p.grad, torch.ones_like(p))
        assert not p._backward_hooks
    model.last.forward = lambda x: 1 / 0
    assert trace_step(model, batch).error.startswith('ZeroDivisionError')


def test_checkpointed_forward_counts_once():
    """Activation checkpointing runs a block again in the backward pass."""
    model = Tiny()
    model.block[0].forward = Backward.apply
    block = model.block.forward
    model.block.forward = partial(checkpoint, block, use_reentrant=False)
    batch = torch.utils.data.default_collate(batches()[:4])
    trace = trace_step(model, batch)
    assert trace.error == ''
    modules = [(r.module, r.role) for r in trace.outputs]
    assert ('block.1', 'output') in modules
    assert len(set(modules)) == len(modules)
    assert (
        trace.first_nonfinite.describe()
        == 'gradient of input of `block.0` (Dropout)'
    )


def test_largest_entry():
    values = [torch.tensor([1.0, -3]), torch.tensor([2j]), torch.ones(0)]
    assert largest_entry(values).item() == 3
    assert largest_entry([torch.ones(0)]) is None
    for bad in (math.nan, math.inf, -math.inf):
        worse = [*values, torch.tensor([bad, 1.0], dtype=torch.float16)]
        assert not math.isfinite(largest_entry(worse).item())
    assert (
        largest_entry([torch.tensor([1e300], dtype=torch.float64)]).item()
        == 1e300
    )


@pytest.mark.parametrize('interval', [0, 1, 2])
def test_activation_that_does_not_reach_the_loss(tmp_path, interval):
    """Found in the iterations in which activations are looked at."""
    ours = hook(
        activation_interval=interval, interval=100, checkpoint_interval=100
    )
    runner = make_runner(tmp_path, ours, iters=7)
    place = runner.model.block[1]
    place.register_forward_hook(write_nan(runner, {3, 4}, math.inf))
    if not interval:
        runner.train()
        assert not reports(runner)
        return
    report = diverge(runner)
    assert 'An activation is not finite: inf.' in report
    assert first_in(report) == 'output of `block.1` (Linear)'
    assert f'Iteration {4 if interval == 1 else 5},' in report
    assert 'iterations late' not in report


def test_unrepeatable_activation_is_named_from_the_step(tmp_path):
    runner = make_runner(tmp_path, hook(activation_interval=1))
    spoil, calls = write_nan(runner, {3}, math.inf), itertools.count()

    def once(*args):
        at_fault = runner.iter == 3 and next(calls) == 0
        return spoil(*args) if at_fault else None

    runner.model.block[1].register_forward_hook(once)
    report = diverge(runner)
    assert first_in(report) == 'output of `block.1` (Linear)'
    assert 'the cause lies outside of the model' in report


def test_unrepeatable_gradient_is_named_from_the_step(tmp_path):
    runner = make_runner(tmp_path, hook())
    calls = itertools.count()
    runner.model.norm.weight.register_hook(
        lambda g: g * math.inf if next(calls) == 3 else g
    )
    report = diverge(runner)
    place = 'gradient of parameter weight of `norm` (BatchNorm1d)'
    assert first_in(report) == place
    assert 'the cause lies outside of the model' in report


def test_accumulated_gradient_of_an_earlier_batch(tmp_path):
    wrapper = dict(optimizer=dict(type='Adam', lr=0.01), accumulative_counts=3)
    runner = make_runner(tmp_path, hook(), optim_wrapper=wrapper)
    # iterations 3, 4, 5 make the second step; a replay sees runner.iter 5
    batch_of_3 = {}
    runner.register_hook(
        Spy(
            lambda r: (
                batch_of_3.update(x=r.model.seen) if r.iter == 3 else None
            )
        )
    )
    runner.model.first.register_forward_pre_hook(
        lambda m, args: setattr(runner.model, 'seen', args[0].clone())
    )

    def spoil(gradient):
        model = runner.model
        planned = batch_of_3.get('x')
        same = planned is not None and torch.equal(model.seen, planned)
        return gradient * math.inf if runner.iter == 3 or same else gradient

    runner.model.last.weight.register_hook(spoil)
    report = diverge(runner)
    assert 'Iteration 6,' in report
    assert first_in(report).startswith('gradient of parameter weight of `last')
    record = load_checkpoint_tensors(
        Path(runner.log_dir, 'divergence_iter_6.pth')
    )
    assert record['iter'] == 4
    assert torch.equal(record['batch']['inputs'], batch_of_3['x'])


def test_late_look_is_dated_rightly(tmp_path):
    runner = make_runner(tmp_path, hook(interval=4, checkpoint_interval=4))
    runner.model.last.register_forward_hook(write_nan(runner, {5, 6, 7, 8}))
    report = diverge(runner)
    assert 'Iteration 6,' in report
    assert 'Found 2 iterations late (interval=4)' in report
    assert 'after 4 iterations' in report


# ------------------------------------------------------- float16 and jumps


def scaled_wrapper(monkeypatch, model, **options):
    """The wrapper for automatic mixed precision with a scaler on the CPU."""
    monkeypatch.setattr(
        amp_optimizer_wrapper, 'is_cuda_available', lambda: True
    )
    monkeypatch.setattr(
        amp_optimizer_wrapper,
        'GradScaler',
        partial(torch.amp.GradScaler, 'cpu'),
    )
    return amp_optimizer_wrapper.AmpOptimWrapper(
        dtype='bfloat16',
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01, **options),
    )


@pytest.mark.parametrize('fused', [False, True])
def test_skipped_steps(tmp_path, monkeypatch, fused):
    """Two in a row are normal, three are not; a step between counts anew."""
    for bad, found in (({2, 3, 5, 6}, False), ({2, 4, 5, 6}, True)):
        model = Tiny()
        runner = make_runner(
            tmp_path / str(found),
            hook(max_skipped=3),
            model=model,
            optim_wrapper=scaled_wrapper(monkeypatch, model, fused=fused),
        )
        model.first.weight.register_hook(infinite_gradient(runner, bad))
        if not found:
            runner.train()
            assert not reports(runner)
            continue
        report = diverge(runner)
        assert 'too many steps in a row: 3 steps in a row' in report
        assert 'Iteration 7,' in report
        place = 'gradient of parameter weight of `first` (Linear)'
        assert first_in(report) == place
        assert "dtype='bfloat16'" in report
        assert '| bfloat16 | bfloat16 |' in report
        record = load_checkpoint_tensors(
            Path(runner.log_dir, 'divergence_iter_7.pth')
        )
        assert record['autocast'] == 'bfloat16'
        assert record['scale'] == 2.0 ** (16 - 3)


def spoilt_loss(runner, factors):
    """Multiply the loss in some iterations."""
    return lambda module, args, kwargs, output: dict(
        loss=output['loss'] * factors.get(runner.iter, 1.0)
    )


def test_scaled_loss_that_is_nan(tmp_path, monkeypatch):
    """The scaler would skip the step for ever; the loss is looked at."""
    model = Tiny()
    wrapper = scaled_wrapper(monkeypatch, model)
    runner = make_runner(tmp_path, hook(), model=model, optim_wrapper=wrapper)
    model.norm.register_forward_hook(write_nan(runner, {4}))
    assert first_in(diverge(runner)) == 'output of `norm` (BatchNorm1d)'


@pytest.mark.parametrize(
    ('options', 'found'),
    [
        ({}, True),
        (dict(spike_warmup=7), False),
        (dict(spike_floor=1e9), False),
        (dict(spike_factor=1e3), False),
        (dict(spike_factor=None), False),
    ],
)
def test_jump_of_the_loss(tmp_path, options, found):
    defaults = dict(spike_factor=10.0, spike_warmup=6)
    runner = make_runner(tmp_path, hook(**{**defaults, **options}))
    runner.model.register_forward_hook(
        spoilt_loss(runner, {6: 100.0}), with_kwargs=True
    )
    if not found:
        runner.train()
        assert not reports(runner)
        return
    report = diverge(runner)
    assert 'The loss has jumped: ' in report
    assert 'Iteration 7,' in report
    assert 'every number of the forward and the backward' in report


# --------------------------------------------------------------- actions


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


def check_weights(optimizer, *_):
    for group in optimizer.param_groups:
        for p in group['params']:
            if not p.isfinite().all():
                raise ValueError('not finite')


SCHEDULES = {
    'cosine': dict(type='CosineAnnealingLR', T_max=6, eta_min=1e-3),
    'steps': dict(type='MultiStepLR', milestones=[3, 8], gamma=0.1),
    'poly': dict(type='PolyLR', power=0.9, eta_min=1e-4, end=12),
    'cycle': dict(type='OneCycleLR', eta_max=0.02, total_steps=12),
    'restart': dict(
        type='CosineRestartLR',
        periods=[5, 7],
        restart_weights=[1, 0.5],
        eta_min=1e-4,
    ),
}


@pytest.mark.parametrize('schedule', sorted(SCHEDULES))
def test_learning_rate_stays_reduced(tmp_path, schedule):
    """Half of what it would have been, to the end of the schedule."""
    rates = {}
    for name, bad in (('plain', set()), ('back', {5})):
        seen = rates[name] = []
        runner = make_runner(
            tmp_path / name,
            hook(action='rollback'),
            SpoilOnce(bad),
            Spy(
                lambda r, seen=seen: seen.append(
                    r.optim_wrapper.get_lr()['lr']
                )
            ),
            iters=12,
            param_scheduler=[dict(SCHEDULES[schedule], by_epoch=False)],
        )
        runner.train()
    assert rates['back'][:5] == rates['plain'][:5]
    np.testing.assert_allclose(
        rates['back'][5:], np.array(rates['plain'][5:]) / 2, rtol=1e-12
    )


@pytest.mark.parametrize('by_epoch', [False, True])
def test_rollback(tmp_path, by_epoch):
    """Weights, optimizer, average and history of the checkpoint; goes on."""
    checks = {}

    def look(runner):
        if runner.iter != 5:
            return
        saved = load_everything(tmp_path / 'last_good.pth')
        assert saved['meta']['iter'] == 4
        # EMAHook stores the average in the place of the model
        ema = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
        assert_same(ema.ema_model.module.state_dict(), saved['state_dict'])
        raw = saved['ema_state_dict']
        model = {f'module.{k}': v for k, v in weights(runner).items()}
        assert_same(model, {k: raw[k] for k in model})
        assert ema.ema_model.steps == raw['steps'] == 4
        state = runner.optim_wrapper.optimizer.state_dict()['state']
        for index, values in saved['optimizer']['state'].items():
            assert_same(values, state[index])
        history = runner.message_hub.get_scalar('train/loss').data[0]
        assert len(history) == 4
        assert np.isfinite(history).all()
        hub = runner.message_hub
        assert hub.get_scalar('train/stab/rollback').current() == 1
        checks['done'] = True

    runner = make_runner(
        tmp_path,
        dict(type='EMAHook', momentum=0.1),
        hook(action='rollback', checkpoint_interval=4),
        SpoilOnce({5}),
        Spy(look),
        **(dict(epochs=2) if by_epoch else dict(iters=16)),
    )
    runner.train()
    assert checks
    assert (runner.iter, runner.epoch) == (16, 2 if by_epoch else 0)
    assert all(v.isfinite().all() for v in weights(runner).values())
    assert runner.optim_wrapper.get_lr()['lr'] == [0.005]
    names = [path.name for path in reports(runner)]
    assert names == ['divergence_iter_6.pth', 'divergence_report.md']
    report = reports(runner)[1].read_text()
    assert (
        'goes on with 0.5 times the learning rate (rollback 1 of 3)' in report
    )
    assert 'model: build it here' in report


def test_rollbacks_come_to_an_end(tmp_path):
    """One checkpoint, a quarter of the rate, then an error."""
    rates = []
    runner = make_runner(
        tmp_path,
        hook(action='rollback', max_rollbacks=2, checkpoint_interval=4),
        SpoilOnce({4, 5, 6, 7, 8}),
        Spy(lambda r: rates.append(r.optim_wrapper.get_lr()['lr'][0])),
    )
    report = diverge(runner)
    assert 'stopped after 2 rollbacks' in report
    assert 'after 4 iterations' in report
    assert rates == [0.01] * 4 + [0.005, 0.0025]
    assert len(list(Path(runner.log_dir).glob('*.md'))) == 3


def test_rollback_takes_the_newest_whole_checkpoint(tmp_path):
    """CheckpointHook's, if it is newer and neither damaged nor spoilt."""
    for damage, expected in (('', 4), ('torn', 2), ('spoilt', 2)):
        folder = tmp_path / f'case{damage}'

        def harm(runner, folder=folder, damage=damage):
            path = folder / 'iter_4.pth'
            if runner.iter != 3 or not damage:
                return
            if damage == 'torn':
                path.write_bytes(path.read_bytes()[:1000])
            else:
                saved = load_everything(path)
                saved['state_dict']['last.bias'][0] = math.nan
                torch.save(saved, path)

        runner = make_runner(
            folder,
            hook(action='rollback', checkpoint_interval=100),
            SpoilOnce({5}),
            Spy(harm),
        )
        for other in runner.hooks:
            if type(other).__name__ == 'CheckpointHook':
                other.interval, other.by_epoch = 4, False
                other.filename_tmpl = 'iter_{}.pth'
            if isinstance(other, DivergenceHook) and expected == 2:
                other.checkpoint_interval = 2
            if isinstance(other, DivergenceHook):
                ours = other
        if damage:
            # the rolling one stays where it is from here
            runner.register_hook(
                Spy(
                    lambda r, ours=ours: (
                        setattr(ours, 'checkpoint_interval', 100)
                        if r.iter == 2
                        else None
                    )
                )
            )
        runner.train()
        report = next(Path(runner.log_dir).glob('*.md')).read_text()
        assert f'after {expected} iterations' in report, damage
        assert ('iter_4.pth' in report) == (expected == 4)


def test_rollback_beside_the_stabilizers(digits):
    """They refuse weights that are not finite, and see none."""
    digits.model.backbone.state_matrix = dict(type='full')
    digits.custom_hooks = [
        dict(type='EMAHook', momentum=0.1),
        dict(type='mmstabvim.SpectralNormalizationHook', rho_max=4.0),
        dict(type='mmstabvim.EigenvalueClampingHook'),
        dict(type='mmstabvim.StabilityLossHook'),
    ]
    digits.default_hooks.divergence.update(
        action='rollback', checkpoint_interval=2
    )
    runner = Runner.from_cfg(digits)
    runner.model.backbone.layers[0].mixer.in_proj.register_forward_hook(
        write_nan(runner, {5})
    )
    runner.train()
    assert runner.iter == 8
    assert all(v.isfinite().all() for v in weights(runner).values())
    (report,) = Path(runner.log_dir).glob('*.md')
    report = report.read_text()
    assert 'output of `backbone.layers.0.mixer.in_proj` (Linear)' in report
    assert '- hook: `SpectralNormalizationHook` rho_max=4.0\n' in report
    assert 'Add `dict(' not in report


def test_checkpoints_are_whole(tmp_path):
    """Between the schedule and CheckpointHook: neither is a step behind."""
    steps = []

    def look(runner):
        good = load_everything(tmp_path / 'last_good.pth')
        (ours,) = good['param_schedulers']
        (live,) = runner.param_schedulers
        steps.append(live.last_step - ours['last_step'])
        if runner.iter == 5:
            saved = load_everything(tmp_path / 'iter_6.pth')
            assert_same(saved['state_dict'], good['state_dict'])
            rate = saved['optimizer']['param_groups'][0]['lr']
            assert rate == runner.optim_wrapper.get_lr()['lr'][0]

    runner = make_runner(
        tmp_path,
        hook(action='rollback', checkpoint_interval=1),
        SpoilOnce({5}),
        Spy(look),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)
        ),
        param_scheduler=[dict(SCHEDULES['cosine'], by_epoch=False)],
    )
    runner.train()
    assert steps == [0] * 5 + [1] + [0] * 4


def test_continue_reports_once(tmp_path):
    """Nothing else changes: the weights are those without the hook."""
    runs = []
    for name, hooks in (('with', [hook(action='continue')]), ('without', [])):
        runner = make_runner(tmp_path / name, *hooks)
        runner.model.norm.register_forward_hook(write_nan(runner, {4, 5}))
        runner.train()
        runs.append(runner)
    after, plain = (weights(r) for r in runs)
    for key, value in plain.items():
        torch.testing.assert_close(
            after[key], value, rtol=0, atol=0, equal_nan=True
        )
    assert not after['first.weight'].isfinite().all()
    assert [p.name for p in reports(runs[0])] == [
        'divergence_iter_5.pth',
        'divergence_report.md',
    ]
    # the last good checkpoint was not overwritten
    good = load_everything(tmp_path / 'with/last_good.pth')
    assert good['meta']['iter'] == 4
    assert all(v.isfinite().all() for v in good['state_dict'].values())


def test_good_run_is_left_alone(tmp_path):
    """Bit by bit, with every check in every iteration; no file remains."""
    ours = DivergenceHook(activation_interval=1, checkpoint_interval=1)
    runs = []
    for name, hooks in (('with', [ours]), ('without', [])):
        runs.append(make_runner(tmp_path / name, *hooks, epochs=2))
        runs[-1].train()
    assert_same(*map(weights, runs))
    assert not reports(runs[0])
    files = [
        sorted(p.name for p in Path(r.work_dir).glob('*.pth')) for r in runs
    ]
    assert files[0] == files[1]
    assert 'step' not in vars(runs[1].optim_wrapper)
    assert 'update_params' not in vars(runs[0].optim_wrapper)
    assert 'step' not in vars(runs[0].optim_wrapper)


def test_good_digits_run_is_left_alone(digits, tmp_path):
    """With the random numbers of Mixup and drop path."""
    plain = copy.deepcopy(digits)
    plain.update(custom_hooks=[], work_dir=str(tmp_path / 'plain'))
    plain.experiment_name += 'plain'
    digits.custom_hooks[0].activation_interval = 2
    runs = []
    for cfg in (digits, plain):
        runs.append(Runner.from_cfg(cfg))
        runs[-1].train()
    assert_same(*map(weights, runs))
    assert not reports(runs[0])


def test_weights_that_overflow_are_not_kept(tmp_path):
    """An optimizer state that is not finite is no good checkpoint."""

    def spoil(runner):
        if runner.iter == 4:
            optimizer = runner.optim_wrapper.optimizer
            state = optimizer.state[runner.model.last.bias]
            state['exp_avg_sq'].fill_(math.inf)

    runner = make_runner(tmp_path, hook(action='continue'), Spy(spoil))
    kept = []
    runner.register_hook(
        Spy(
            lambda r: kept.append(
                load_everything(tmp_path / 'last_good.pth')['meta']['iter']
            )
        )
    )
    runner.train()
    assert kept == [0, 2, 2, 4, 4, 4, 4, 4, 4, 4]


def test_resumed_run_remembers(tmp_path):
    """Losses, the number of rollbacks and the lower rate."""
    options = dict(
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=8, by_epoch=False)
        ),
        param_scheduler=[dict(SCHEDULES['cosine'], by_epoch=False, T_max=12)],
        iters=12,
    )
    results = []
    for name, resume in (('whole', None), ('again', 'whole/iter_8.pth')):
        ours = hook(action='rollback', max_rollbacks=1)
        runner = make_runner(
            tmp_path / name,
            ours,
            SpoilOnce(set() if resume else {5}),
            load_from=resume and str(tmp_path / resume),
            resume=bool(resume),
            **options,
        )
        runner.train()
        results.append(
            (runner.optim_wrapper.get_lr(), ours.history.num_rollbacks)
        )
    assert results[0] == results[1]
    assert ours.history.num_rollbacks == 1
    # one iteration rolled back, one lost
    assert [i for i, _ in ours.history.losses] == [
        1,
        2,
        3,
        4,
        7,
        8,
        9,
        10,
        11,
        12,
    ]
    runner = make_runner(
        tmp_path / 'third',
        hook(action='rollback', max_rollbacks=1),
        SpoilOnce({9}),
        load_from=str(tmp_path / 'whole/iter_8.pth'),
        resume=True,
        **options,
    )
    assert 'stopped after 1 rollbacks' in diverge(runner)


SCRIPT = """
import math
import sys
from pathlib import Path

import torch.distributed as dist
from mmengine.config import Config
from test_divergence_hook import (
    DivergenceHook, Spy, batches, infinite_gradient, make_runner, write_nan,
)
from torch.utils.data import DataLoader

from mmstabvim.compat import prepare_cpu_distributed


def run(action):
    cfg = Config(dict(launcher='pytorch'))
    prepare_cpu_distributed(cfg)
    rank = dist.get_rank()
    cfg.model_wrapper_cfg.broadcast_buffers = True
    cfg.model_wrapper_cfg.find_unused_parameters = True
    folder = Path(sys.argv[1], action)
    runner = make_runner(
        folder,
        DivergenceHook(
            action=action, checkpoint_interval=2, activation_interval=1
        ),
        train_dataloader=DataLoader(batches(16)[rank::2], batch_size=4),
        iters=8,
        launcher='pytorch',
        experiment_name=action,
        cfg=cfg,
    )
    block = runner.model.module.block[1]
    if rank == 1 and action == 'rollback':
        # both ranks have it after the gradients are averaged
        block.bias.register_hook(infinite_gradient(runner, {5}))
    elif rank == 1:
        # clamped away: only activations show it, on this rank alone
        block.register_forward_hook(write_nan(runner, {5}, math.inf))
    lines = []
    weight = runner.model.module.first.weight
    runner.register_hook(Spy(lambda r: lines.append(
        f'{r.iter} {r.optim_wrapper.get_lr()["lr"][0]} '
        + weight.detach().sum().item().hex()
    )))
    try:
        runner.train()
    except RuntimeError as error:
        lines.append(f'stopped: {error}')
    (folder / f'rank{rank}.txt').write_text('\\n'.join(lines))


run('rollback')
run('stop')
"""


def test_two_processes_decide_alike(tmp_path):
    """A divergence on one rank takes back, or stops, both."""
    script = tmp_path / 'run.py'
    script.write_text(SCRIPT)
    command = [sys.executable, '-m', 'torch.distributed.run']
    command += ['--nproc_per_node=2', '--master_port=29651', str(script)]
    path = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
    )
    done = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'),
        timeout=240,  # ranks that disagree wait for each other
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for action in ('rollback', 'stop'):
        ranks = [
            (tmp_path / action / f'rank{r}.txt').read_text() for r in (0, 1)
        ]
        assert ranks[0] == ranks[1]
        lines = ranks[0].splitlines()
        (path,) = (tmp_path / action).glob('*/divergence_report.md')
        report = path.read_text()
        assert 'Iteration 6,' in report
        assert 'Rank 1 of 2 processes' in report
        assert path.with_name('divergence_iter_6.pth').exists()
        if action == 'stop':
            assert first_in(report) == 'output of `block.1` (Linear)'
            assert len(lines) == 6
            assert 'stopped: training diverged at iteration 6' in lines[-1]
            continue
        assert first_in(report) == (
            'gradient of parameter bias of `block.1` (Linear)'
        )
        rates = [float(line.split()[1]) for line in lines]
        assert rates == [0.01] * 5 + [0.005] * 3
        # back to what iteration 4 has left
        assert lines[5].split()[2] == lines[3].split()[2]


# ----------------------------------------------------------- odds and ends


def test_random_numbers_go_on_after_a_replay():
    state = get_random_state()
    first = torch.rand(3), np.random.rand(3)
    middle = get_random_state()
    second = torch.rand(3), np.random.rand(3)
    set_random_state(middle)
    with drawing_from(state):
        assert torch.equal(torch.rand(3), first[0])
        assert np.array_equal(np.random.rand(3), first[1])
        torch.rand(1), np.random.rand(1)
    assert torch.equal(torch.rand(3), second[0])
    assert np.array_equal(np.random.rand(3), second[1])


def test_batch_goes_there_and_back(tmp_path):
    """mmengine's elements, nested, with arrays and private fields."""

    class Odd:
        pass

    element = BaseDataElement(metainfo=dict(size=(3, 4), path='a.png'))
    element.seg = PixelData(data=torch.arange(6).reshape(1, 2, 3))
    element._private = np.float64(0.5)
    batch = dict(
        inputs=[torch.ones(2, dtype=torch.uint8)],
        samples=(element, np.arange(3, dtype=np.int16)),
        names=np.array(['a', 'b']),
    )
    torch.save(pack_batch(batch), tmp_path / 'batch.pth')
    again = unpack_batch(load_checkpoint_tensors(tmp_path / 'batch.pth'))
    sample, array = again['samples']
    assert type(sample.seg) is PixelData
    assert torch.equal(sample.seg.data, element.seg.data)
    assert sample.seg.shape == (2, 3)
    assert sample.metainfo == element.metainfo
    assert sorted(sample.keys()) == sorted(element.keys())
    assert array.dtype == np.int16
    assert array.tolist() == [0, 1, 2]
    assert again['names'] == ['a', 'b']
    assert again['inputs'][0].dtype == torch.uint8
    assert 'Odd' in str(pack_batch([Odd()]))
    packed = pack_batch(element)
    packed['__data_element__'] = 'os.system'
    with pytest.raises(ValueError, match=r"'os\.system', a class that is not"):
        unpack_batch(packed)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(action='halt'), r"one of \('stop', .*got 'halt'"),
        (dict(interval=0), 'interval must be at least 1, got 0'),
        (dict(interval=1.5), r'interval must be an int, got 1\.5'),
        (dict(checkpoint_interval=-1), 'checkpoint_interval must be at least'),
        (dict(max_skipped=True), 'max_skipped must be an int, got True'),
        (dict(spike_factor=1.0), r'spike_factor must be above 1'),
        (dict(lr_factor=0.0), r'lr_factor must be in \(0, 1\]'),
        (dict(lr_factor=math.nan), r'lr_factor must be in'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build(dict(type='mmstabvim.DivergenceHook', **options))


def test_rollback_without_a_checkpoint_stops(tmp_path):
    runner = make_runner(
        tmp_path,
        hook(action='rollback', checkpoint_interval=0),
        SpoilOnce({3}),
    )
    assert 'there is no checkpoint to go back to' in diverge(runner)
    assert not (tmp_path / 'last_good.pth').exists()


def test_logged_names_are_no_losses(tmp_path):
    """mmengine sums what is called a loss."""
    runner = make_runner(tmp_path, hook(action='continue'), SpoilOnce(set()))
    runner.model.last.register_forward_hook(write_nan(runner, {3}))
    runner._hooks = [h for h in runner.hooks if not isinstance(h, SpoilOnce)]
    runner.train()
    hub = MessageHub.get_current_instance()
    names = [n for n in hub.log_scalars if 'stab/' in n]
    assert names == ['train/stab/divergence']

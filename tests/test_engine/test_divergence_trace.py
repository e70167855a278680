"""Tracing: the first tensor that is not finite is found and named."""

import copy
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from divergence_runs import (
    Spy,
    Tiny,
    assert_same,
    batches,
    diverge,
    first_in,
    hook,
    infinite_gradient,
    make_runner,
    weights,
    write_nan,
)
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmstabvim.engine.divergence import (
    largest_entry,
    trace_loss,
    trace_step,
)
from mmstabvim.engine.hooks import DivergenceHook


@pytest.mark.parametrize(
    'place', ['backbone.layers.1.norm', 'backbone.layers.0', 'head.fc']
)
def test_names_the_layer_that_writes_nan(small_digits, place):
    """In a leaf, in the code of a block, in the head; nothing is stepped."""
    small_digits.custom_hooks = []
    runner = Runner.from_cfg(small_digits)
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
    advice = report.split('## What to try')[1]
    assert 'default_hooks.sn.type=mmstabvim.SpectralNorm' in advice
    logged = Path(runner.log_dir, 'vis_data/scalars.json').read_text()
    assert '"stab/divergence": 1.0' in logged


@pytest.mark.parametrize(
    'name',
    [
        'backbone.layers.1.mixer.ssm.state_matrix.A_log',
        # functional code reads the weights of a module that is never called
        'backbone.layers.0.mixer.conv1d.weight',
        'backbone.pos_embed',
    ],
)
def test_names_the_weight_and_runs_the_step_again(small_digits, name):
    """The snippet in the report gives the same loss and the same place."""
    runner = Runner.from_cfg(small_digits)

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

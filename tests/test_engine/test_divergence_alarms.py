"""Alarms: activations, gradients, skipped float16 steps, jumps."""

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from divergence_runs import (
    Spy,
    Tiny,
    diverge,
    first_in,
    hook,
    infinite_gradient,
    make_runner,
    reports,
    write_nan,
)
from mmengine.optim.optimizer import amp_optimizer_wrapper

from mmstabvim.checkpoint import load_checkpoint_tensors


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

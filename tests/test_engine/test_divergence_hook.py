"""Arguments of DivergenceHook, and good runs that it leaves alone."""

import copy
import math
from pathlib import Path

import pytest
import torch
from divergence_runs import (
    SpoilOnce,
    assert_same,
    diverge,
    hook,
    make_runner,
    reports,
    weights,
    write_nan,
)
from mmengine.logging import MessageHub
from mmengine.runner import Runner

from mmstabvim.checkpoint import load_everything
from mmstabvim.engine.hooks import DivergenceHook
from mmstabvim.registry import HOOKS


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


def test_good_digits_run_is_left_alone(small_digits, tmp_path):
    """With the random numbers of Mixup and drop path."""
    plain = copy.deepcopy(small_digits)
    plain.update(custom_hooks=[], work_dir=str(tmp_path / 'plain'))
    plain.experiment_name += 'plain'
    small_digits.custom_hooks[0].activation_interval = 2
    runs = []
    for cfg in (small_digits, plain):
        runs.append(Runner.from_cfg(cfg))
        runs[-1].train()
    assert_same(*map(weights, runs))
    assert not reports(runs[0])


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

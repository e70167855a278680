"""Rollback: the way back to the last good checkpoint."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from divergence_runs import (
    SpoilOnce,
    Spy,
    assert_same,
    diverge,
    hook,
    make_runner,
    reports,
    weights,
    write_nan,
)
from mmengine.runner import Runner

from mmstabvim.checkpoint import load_everything
from mmstabvim.engine.hooks import DivergenceHook

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


def test_rollback_beside_the_stabilizers(small_digits):
    """They refuse weights that are not finite, and see none."""
    small_digits.model.backbone.state_matrix = dict(type='full')
    small_digits.custom_hooks = [
        dict(type='EMAHook', momentum=0.1),
        dict(type='mmstabvim.SpectralNormalizationHook', rho_max=4.0),
        dict(type='mmstabvim.EigenvalueClampingHook'),
        dict(type='mmstabvim.StabilityLossHook'),
    ]
    small_digits.default_hooks.divergence.update(
        action='rollback', checkpoint_interval=2
    )
    runner = Runner.from_cfg(small_digits)
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
    assert 'default_hooks.' not in report.split('## What to try')[1]


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

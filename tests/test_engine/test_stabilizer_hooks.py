"""Stabilizers in real training runs: when they act, and on what."""

import copy
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from small_runs import (
    digits_config,
    scalars,
    scenes_config,
    train,
    train_in_two_processes,
    without_randomness,
)
from torch import nn

from mmstabvim import (
    EigenvalueClampingHook,
    SpectralNormalizationHook,
    StabilityLoss,
    StabilityLossHook,
    verify,
)
from mmstabvim.engine import learning_rate_budget
from mmstabvim.engine.hooks import stabilizer_hook
from mmstabvim.engine.hooks.after_step_hook import averages_of
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import (
    EigenvalueClamping,
    SpectralNormalization,
    state_matrices,
)

SN = dict(type='mmstabvim.SpectralNormalizationHook')
EC = dict(type='mmstabvim.EigenvalueClampingHook')
SP = dict(type='mmstabvim.StabilityLossHook')
MATRICES = {
    'neg_exp': dict(type='neg_exp'),
    'signed': dict(type='signed'),
    'complex': dict(type='complex', real_part='free'),
    'full': dict(type='full', groups=2),
}


@pytest.fixture
def config(tmp_path):
    """One epoch of three steps, with a rate that leaves the stable set."""
    cfg = digits_config(tmp_path)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.param_scheduler = []
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=0.05, weight_decay=0.0)
    cfg.model.backbone.state_matrix = dict(type='signed')
    return cfg


@pytest.fixture
def warnings(monkeypatch):
    """Warnings of the hooks."""
    lines = []

    def note(message, logger=None, level=logging.INFO):
        if level >= logging.WARNING:
            lines.append(message)

    for module in ('stabilizer_hook', 'stability_loss_hook'):
        monkeypatch.setattr(
            sys.modules[f'mmstabvim.engine.hooks.{module}'], 'print_log', note
        )
    return lines


def weights(cfg):
    return train(cfg).model.state_dict()


def abscissa(model):
    values = [m.eigenvalues() for m in state_matrices(model).values()]
    return max(v.real.max().item() for v in values)


def radius(model):
    values = [m.eigenvalues() for m in state_matrices(model).values()]
    return max(v.abs().max().item() for v in values)


# ------------------------------------------------------------- what they do


@pytest.mark.parametrize('mode', ['project', 'reparam'])
@pytest.mark.parametrize('matrix', MATRICES)
def test_both_modes_keep_the_constraints(config, matrix, mode):
    """Where training without them breaks both."""
    config.model.backbone.state_matrix = dict(MATRICES[matrix])
    free = train(config).model
    config.work_dir += '-stabilized'
    config.custom_hooks = [
        dict(SN, rho_max=2.0, mode=mode),
        dict(EC, eps=0.5, mode=mode),
    ]
    bound = train(config).model
    assert radius(free) > 2.1
    # clamping after normalization may leave the disc by eps
    assert radius(bound) <= math.hypot(2.0, 0.5) * (1 + 1e-4)
    assert abscissa(bound) <= -0.5 + 1e-4
    if matrix != 'neg_exp':
        # its smallest mode starts at -1
        config.custom_hooks.pop()
        config.work_dir += '-half'
        assert abscissa(train(config).model) > -0.5 + 1e-4


def test_normalization_acts_before_clamping(config):
    """Whatever the order in the config: after it Re <= -eps holds."""
    hooks = [dict(SN, rho_max=0.2), dict(EC, eps=0.1)]
    config.custom_hooks = hooks
    first = weights(config)
    config.custom_hooks = hooks[::-1]
    second = weights(config)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        max(
            m.eigenvalues().max()
            for m in state_matrices(train(config).model).values()
        )
        <= -0.1
    )


def test_reparametrization_holds_in_a_test_run(config):
    """Raw parameters are saved; who tests them gets the rule as well."""
    config.custom_hooks = [dict(EC, eps=0.95, mode='reparam')]
    runner = train(config)
    raw = [p for m in state_matrices(runner.model).values() for p in m.free]
    assert max(p.max() for p in raw) > -0.95
    config.load_from = f'{config.work_dir}/epoch_1.pth'
    tester = Runner.from_cfg(copy.deepcopy(config))
    tester.test()
    assert abscissa(tester.model) <= -0.95 + 1e-6


def test_existing_hooks_keep_working(config):
    config.custom_hooks = [dict(type='EMAHook'), SN, EC, SP]
    runner = train(config)
    names = [type(hook).__name__ for hook in runner.hooks]
    assert 'EMAHook' in names
    assert len(scalars(config, 'loss_stab')) == 3


def test_keys_of_default_hooks_are_the_same_stabilizers(config):
    """As entries of ``custom_hooks``, bit by bit, in any order."""
    hooks = [dict(SN, rho_max=0.2), dict(EC, eps=0.1), SP]
    config.custom_hooks = hooks
    listed = weights(config)
    config.custom_hooks = []
    config.default_hooks.update(sp=SP, ec=hooks[1], sn=hooks[0])
    keyed = weights(config)
    assert all(torch.equal(listed[name], keyed[name]) for name in listed)
    config.default_hooks.sn = None
    less = weights(config)
    assert not all(torch.equal(listed[name], less[name]) for name in listed)


# ------------------------------------------------------------ when they act


@pytest.fixture
def projections(monkeypatch):
    """One entry for every time that the model is projected."""
    calls = []
    original = stabilizer_hook.project

    def counted(*args):
        calls.append(args)
        original(*args)

    monkeypatch.setattr(stabilizer_hook, 'project', counted)
    return calls


def without_saving(config):
    """Averages are looked for when a checkpoint is saved: not counted."""
    config.default_hooks.checkpoint.interval = 100
    config.default_hooks.checkpoint.save_last = False


def test_once_and_then_after_each_step(config, projections):
    config.custom_hooks = [SN, EC]
    without_saving(config)
    train(config)
    assert len(projections) == 1 + 3


def test_accumulating_iterations_project_nothing(config, projections):
    """Ten iterations of which three make a step, and the last one."""
    config.custom_hooks = [SN]
    config.train_dataloader.dataset.indices = 40
    config.train_dataloader.batch_size = 4
    config.optim_wrapper.accumulative_counts = 3
    without_saving(config)
    train(config)
    assert len(projections) == 1 + 4


def test_a_step_skipped_by_fp16_projects_nothing(config):
    """The scaler calls no optimizer step where a gradient overflows."""
    config.custom_hooks = [EC]
    config.train_cfg.max_epochs = 0
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.train()
    hook = next(
        h for h in runner.hooks if isinstance(h, EigenvalueClampingHook)
    )
    hook.before_train(runner)
    optimizer = runner.optim_wrapper.optimizer
    matrices = state_matrices(runner.model)
    matrix = next(iter(matrices.values()))
    scaler = torch.amp.GradScaler('cpu', init_scale=1.0)
    for gradient, projected in ((math.inf, False), (0.0, True)):
        matrix.A.data.fill_(1.0)
        for parameter in runner.model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.ones(()))  # as a backward pass would have
        scaler.step(optimizer)
        scaler.update()
        assert (matrix.A.max() <= 0) == projected


def test_each_of_two_optimizers_projects(config):
    config.train_cfg.max_epochs = 0
    config.custom_hooks = [EC]
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.train()
    matrices = list(state_matrices(runner.model).values())
    first, others = matrices[0].A, [m.A for m in matrices[1:]]
    wrappers = {
        name: OptimWrapper(torch.optim.AdamW(parameters, lr=0.1))
        for name, parameters in (('first', [first]), ('others', others))
    }
    runner.optim_wrapper = OptimWrapperDict(**wrappers)
    hook = next(
        h for h in runner.hooks if isinstance(h, EigenvalueClampingHook)
    )
    hook.before_train(runner)
    for wrapper in wrappers.values():
        first.data.fill_(1.0)
        others[0].data.fill_(1.0)
        wrapper.step()
        assert first.max() <= -0.01
        assert others[0].max() <= -0.01


def test_a_second_run_projects_once_per_step(config, projections):
    """The first run's hook on the optimizer is gone."""
    config.custom_hooks = [SN]
    without_saving(config)
    runner = train(config)
    projections.clear()
    runner.optim_wrapper.step()
    assert not projections


# ------------------------------------------------- checkpoints and averages


def test_checkpoint_holds_projected_weights(config):
    config.custom_hooks = [dict(EC, eps=0.5)]
    runner = train(config)
    saved = torch.load(f'{config.work_dir}/epoch_1.pth', weights_only=False)
    own = runner.model.state_dict()
    names = [name for name in own if name.endswith('state_matrix.A')]
    assert names
    for name in names:
        assert saved['state_dict'][name].max() <= -0.5
        assert torch.equal(saved['state_dict'][name], own[name])


def test_average_of_stable_matrices_is_projected(config):
    """[[-1, 10], [0, -1]] and its transpose average to an eigenvalue 4."""
    config.model.backbone.state_matrix = dict(type='full', rank=0)
    config.custom_hooks = [dict(type='EMAHook'), EC]
    runner = train(config)
    ema = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    average = next(iter(state_matrices(ema.ema_model.module).values()))
    unstable = torch.tensor([[-1.0, 5.0], [5.0, -1.0]])
    average.blocks.data.copy_(unstable)
    assert average.spectral_abscissa().max() == pytest.approx(4)
    evaluated = []
    find = runner.model.forward

    def forward(*args, **kwargs):
        evaluated.append(abscissa(runner.model))
        return find(*args, **kwargs)

    runner.model.forward = forward
    runner.val_loop.run()
    assert max(evaluated) <= -0.01 + 1e-5
    average.blocks.data.copy_(unstable)
    runner.save_checkpoint(config.work_dir, 'last.pth')
    saved = torch.load(f'{config.work_dir}/last.pth', weights_only=False)
    for name, value in saved['state_dict'].items():
        if name.endswith('.blocks'):
            found = torch.linalg.eigvals(value).real.max()
            assert found <= -0.01 + 1e-5


class Probe(Hook):
    """The state matrices at the end of each iteration."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.seen = []

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        matrices = state_matrices(runner.model).values()
        self.seen.append([m.A.detach().clone() for m in matrices])


def test_averages_are_of_projected_weights(config):
    config.custom_hooks = [
        dict(type='EMAHook', momentum=0.25),
        dict(EC, eps=0.98),
    ]
    config.val_cfg = config.val_evaluator = config.val_dataloader = None
    config.experiment_name = 'averages'
    runner, probe = Runner.from_cfg(copy.deepcopy(config)), Probe()
    runner.register_hook(probe)
    runner.train()
    ema = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    found = [m.A for m in state_matrices(ema.ema_model.module).values()]
    assert len(probe.seen) == 3
    # something was projected, to the bound
    assert all(max(A.max() for A in seen) == -0.98 for seen in probe.seen[1:])
    wanted = probe.seen[0]
    for seen in probe.seen[1:]:
        wanted = [
            0.75 * a + 0.25 * b for a, b in zip(wanted, seen, strict=True)
        ]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize('mode', ['project', 'reparam'])
@pytest.mark.parametrize('matrix', ['signed', 'full'])
def test_resume_repeats_the_uninterrupted_run(config, tmp_path, matrix, mode):
    """With the radii of the start kept in the checkpoint."""
    config.model.backbone.state_matrix = dict(MATRICES[matrix])
    config.custom_hooks = [
        dict(SN, rho_max='init', mode=mode),
        dict(EC, mode=mode),
        SP,
        dict(type='EMAHook', momentum=0.1),
    ]
    config.train_cfg.max_epochs = 3
    whole = train(config)
    config.resume, config.load_from = True, f'{config.work_dir}/epoch_1.pth'
    config.work_dir = str(tmp_path / 'resumed')
    resumed = train(config)
    start = [
        next(h for h in r.hooks if isinstance(h, SpectralNormalizationHook))
        for r in (whole, resumed)
    ]
    for name, radii in start[0]._start.items():
        assert torch.equal(start[1]._start[name], radii)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (next(averages_of(r)).state_dict() for r in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_where_both_rules_bind(config, tmp_path):
    """Projecting again what obeys both changes nothing."""
    config.model.backbone.state_matrix = dict(MATRICES['full'])
    config.custom_hooks = [dict(SN, rho_max=2.0), dict(EC, eps=1.5)]
    config.train_cfg.max_epochs = 2
    whole = train(config)
    config.resume, config.load_from = True, f'{config.work_dir}/epoch_1.pth'
    config.work_dir = str(tmp_path / 'resumed')
    a, b = whole.model.state_dict(), train(config).model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    # other rules than those of the checkpoint act at once
    config.custom_hooks[1].eps = 1.8
    config.train_cfg.max_epochs = 1
    assert abscissa(train(config).model) <= -1.8 + 1e-4


@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.parametrize('matrix', MATRICES)
def test_a_reparametrized_model_survives_its_checkpoint(
    config, tmp_path, matrix, ema
):
    """Loaded without hooks it is the model that was trained."""
    config.model.backbone.state_matrix = dict(MATRICES[matrix])
    config.custom_hooks = [
        dict(SN, rho_max=1.0, mode='reparam'),
        dict(EC, eps=0.5, mode='reparam'),
    ]
    if ema:
        config.custom_hooks.append(dict(type='EMAHook', momentum=0.3))
    runner = train(config)
    model = runner.model.eval()
    image = torch.rand(2, 3, 8, 8)
    if ema:
        average = next(averages_of(runner)).module
        values = [p.detach().clone() for p in average.parameters()]
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data.copy_(value)
    with torch.no_grad():
        wanted = model.backbone(image)[0]
    path = f'{config.work_dir}/epoch_1.pth'
    config.custom_hooks = []
    plain = Runner.from_cfg(config)
    plain.load_checkpoint(path)
    found = plain.model.eval().backbone
    assert not any(
        m.reparametrizations for m in state_matrices(found).values()
    )
    with torch.no_grad():
        assert torch.equal(found(image)[0], wanted)
    # clamping of complex eigenvalues takes their modulus to hypot(1, 0.5)
    assert radius(found) <= math.hypot(1, 0.5) + 1e-5
    assert abscissa(found) <= -0.5 + 1e-6


@pytest.mark.parametrize('toolkit', ['mmpretrain', 'mmseg'])
def test_the_toolkits_load_a_reparametrized_model(tmp_path, toolkit):
    """By their own functions for inference, which know no hooks."""
    from mmpretrain import get_model
    from mmseg.apis import init_model

    classifies = toolkit == 'mmpretrain'
    cfg = (digits_config if classifies else scenes_config)(tmp_path)
    cfg.model.backbone.state_matrix = dict(type='full', groups=2)
    cfg.custom_hooks = [
        dict(SN, rho_max=1.0, mode='reparam'),
        dict(EC, eps=0.5, mode='reparam'),
    ]
    runner = train(cfg)
    path = (Path(cfg.work_dir) / 'last_checkpoint').read_text()
    if classifies:
        file = tmp_path / 'config.py'
        cfg.dump(file)
        model = get_model(str(file), pretrained=path)
    else:
        model = init_model(cfg, path, device='cpu')
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        found = model.eval().backbone(image)
        wanted = runner.model.eval().backbone(image)
    assert all(map(torch.equal, found, wanted))
    assert radius(model) <= 1.01
    assert abscissa(model) <= -0.5


def test_two_rules_of_one_kind_act_together(config):
    """In the forward pass as in place."""
    for mode in ('project', 'reparam'):
        config.custom_hooks = [
            dict(EC, eps=0.5, mode=mode),
            dict(EC, eps=0.1, lambda_max=2.0, mode=mode),
        ]
        model = train(config).model
        values = torch.cat(
            [m.eigenvalues() for m in state_matrices(model).values()]
        )
        assert values.max() <= -0.5 + 1e-6
        assert values.min() >= -2.0 - 1e-5
        config.work_dir += '-reparam'


def test_frozen_matrices_are_left_alone(config, warnings):
    class Freeze(Hook):
        priority = 'VERY_HIGH'

        def before_train(self, runner):
            matrices = list(state_matrices(runner.model).values())
            matrices[0].A.requires_grad_(False)
            matrices[0].A.fill_(3.0)

    stabilizer_hook._say_frozen.cache_clear()
    config.custom_hooks = [dict(EC, eps=0.5), dict(type='EMAHook')]
    runner = Runner.from_cfg(config)
    runner.register_hook(Freeze())
    runner.train()
    frozen, *others = state_matrices(runner.model).values()
    assert (frozen.A == 3.0).all()
    assert all(m.A.max() <= -0.5 for m in others)
    average = next(averages_of(runner)).module
    assert (next(iter(state_matrices(average).values())).A == 3.0).all()
    said = [line for line in warnings if 'frozen' in line]
    assert len(said) == 1
    assert 'backbone.layers.0.mixer.ssm.state_matrix' in said[0]


@pytest.mark.parametrize('mode', ['project', 'reparam'])
def test_ill_conditioned_matrices_are_kept_stable(config, mode):
    """From random full matrices, at a high rate, with averages."""
    config.model.backbone.state_matrix = dict(
        type='full', groups=2, block_size=4
    )
    config.optim_wrapper.optimizer.lr = 0.3
    config.train_cfg.max_epochs = 3
    seen = []

    class Watch(Hook):
        priority = 'VERY_LOW'

        def before_run(self, runner):
            for matrix in state_matrices(runner.model).values():
                for parameter in matrix.parameters():
                    parameter.data.normal_(std=2.0)

        def after_train_iter(self, runner, *args, **kwargs):
            rows = verify(runner.model, 17, 0.01, 1e3)
            seen.append(max(row.condition for row in rows))

    config.custom_hooks = [
        dict(EC, mode=mode),
        dict(type='EMAHook', momentum=0.3),
    ]
    runner = Runner.from_cfg(config)
    runner.register_hook(Watch())
    runner.train()
    assert len(seen) == 9
    runner.model.load_state_dict(
        torch.load(f'{config.work_dir}/epoch_3.pth', weights_only=False)[
            'state_dict'
        ]
    )
    verify(runner.model, 17, 0.01, 1e3)


def test_what_the_start_costs_is_said(config, warnings):
    config.model.backbone.arch.d_state = 16
    config.model.backbone.state_matrix = dict(type='full', init='hippo')
    config.custom_hooks = [dict(EC)]
    config.train_cfg.max_epochs = 1
    verify(train(config).model, 17, 0.01, 1e3)
    assert any('blended with a normal matrix, by s up' in w for w in warnings)


@pytest.mark.parametrize(
    ('lr', 'verdict'),
    [(1e-3, 'cannot act'), (0.2, 'is unlikely to act'), (0.5, 'can act')],
)
def test_whether_training_can_reach_the_bound(
    config, monkeypatch, lr, verdict
):
    """Three steps from -1, and the border is at -0.01."""
    lines = []
    monkeypatch.setattr(
        learning_rate_budget, 'print_log', lambda line, **_: lines.append(line)
    )
    config.custom_hooks = [dict(EC)]
    config.optim_wrapper.optimizer.lr = lr
    train(config)
    (line,) = lines
    assert f'EigenvalueClampingHook {verdict}' in line
    assert 'is 0.99 from its border' in line
    assert f'the learning rates add up to {3 * lr:.3g},' in line


def test_fine_tuning_takes_the_radii_it_starts_with(config, tmp_path):
    config.custom_hooks = [dict(SN, rho_max='init')]
    train(config)
    weights_file = tmp_path / 'weights.pth'
    saved = torch.load(f'{config.work_dir}/epoch_1.pth', weights_only=False)
    state = saved['state_dict']
    for name in state:
        if name.endswith('state_matrix.A'):
            state[name] *= 0.5
    torch.save({**saved, 'state_dict': state}, weights_file)
    config.load_from = str(weights_file)
    config.optim_wrapper.optimizer.lr = 0.0
    tuned = train(config)
    hook = next(
        h for h in tuned.hooks if isinstance(h, SpectralNormalizationHook)
    )
    for name, matrix in state_matrices(tuned.model).items():
        assert torch.equal(hook._start[name], matrix.A.abs().amax(-1))


# ---------------------------------------------------------- two processes


def test_two_processes_stay_equal(config, tmp_path):
    """Bit by bit, with all three stabilizers."""
    config.model.backbone.state_matrix = dict(MATRICES['full'])
    config.custom_hooks = [dict(SN, rho_max=3.0), EC, dict(SP, eps=-2.5)]
    config.train_dataloader.batch_size = 8
    a, b = train_in_two_processes(config, tmp_path, port=29643)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert min(scalars(config, 'loss_stab').values()) > 0


# -------------------------------------------------- what changes nothing


IDLE = {
    'discrete SN': [dict(SN, domain='discrete')],
    'EC': [EC],
    'EC without distance': [dict(EC, eps=0.0)],
    'SP': [SP],
    'SP after EC': [dict(EC, eps=0.0), SP],
    'all': [dict(SN, domain='discrete'), EC, SP],
}


@pytest.mark.parametrize('matrix', ['neg_exp', 'complex'])
@pytest.mark.parametrize('idle', IDLE)
def test_idle_stabilizers_warn_once_and_change_nothing(
    config, idle, matrix, warnings
):
    """Negative exponentials are stable anyway: bit for bit the baseline."""
    config.model.backbone.state_matrix = dict(type=matrix)
    config.val_cfg = config.val_evaluator = config.val_dataloader = None
    config.optim_wrapper.optimizer.lr = 0.02  # leaves the slowest fast enough
    baseline = weights(config)
    config.custom_hooks = IDLE[idle]
    changed = weights(config)
    assert all(torch.equal(baseline[name], changed[name]) for name in baseline)
    assert len(warnings) == len(IDLE[idle]), warnings
    assert all(
        'nothing to change' in w or 'zero throughout' in w for w in warnings
    )


STABLE_ONLY = ('neg_exp', 'complex')
FREE = ('signed', 'complex free', 'full')


def state_of(kind, where):
    """A matrix at its start, with fast, slow or growing modes."""
    options = dict(type=kind.split()[0])
    if kind == 'complex free':
        options['real_part'] = 'free'
    ssm = SelectiveSSM(4, 4, state_matrix=options)
    parameters = dict(ssm.state_matrix.named_parameters())
    name = next(iter(parameters))
    shift = {'start': 0.0, 'fast': 0.0, 'slow': 0.995, 'growing': 1.7}[where]
    with torch.no_grad():
        if where == 'fast':  # and within the disc of radius 1
            for parameter in parameters.values():
                parameter.mul_(0.05)
            if kind in STABLE_ONLY:
                parameters[name].fill_(math.log(0.4))
        elif kind in STABLE_ONLY and where == 'slow':
            parameters[name][..., 0] = math.log(0.005)
        elif kind == 'full':
            parameters[name] += shift * torch.eye(2)
        elif kind in FREE:
            parameters[name] += shift * (0.5 if 'complex' in kind else 1.0)
    return ssm


def changed_by(ssm, **rule):
    """Whether a projection changes a bit of the parameters."""
    before = [p.detach().clone() for p in ssm.state_matrix.parameters()]
    if 'eps' in rule:
        ssm.state_matrix.apply_(EigenvalueClamping(**rule))
    else:
        ssm.state_matrix.apply_(SpectralNormalization(**rule))
    return not all(map(torch.equal, before, ssm.state_matrix.parameters()))


def penalized(ssm):
    """Whether the penalty is positive; without it there is no gradient."""
    loss = StabilityLoss(loss_weight=1.0)(ssm)
    loss.backward()
    grads = [p.grad for p in ssm.state_matrix.parameters()]
    moved = any(g is not None and bool(g.any()) for g in grads)
    assert moved == bool(loss > 0)
    return moved


@pytest.mark.parametrize('kind', [*STABLE_ONLY, *FREE])
@pytest.mark.parametrize('where', ['start', 'fast', 'slow', 'growing'])
def test_which_stabilizer_does_anything(kind, where):
    """Every cell of the table in docs/stabilizers.md."""
    if kind in STABLE_ONLY and where == 'growing':
        pytest.skip('cannot grow')
    # S4D-Real: -1 ... -4; the others' modes have the modulus 0.4 or less
    assert changed_by(state_of(kind, where)) == (where != 'fast')
    growing = where == 'growing'
    discrete = dict(domain='discrete', rho_max=1.0)
    assert changed_by(state_of(kind, where), **discrete) == growing
    slow = where in ('slow', 'growing')
    assert changed_by(state_of(kind, where), eps=0.01) == slow
    assert penalized(state_of(kind, where)) == growing


def test_clamping_that_may_act_says_nothing(config, warnings):
    """Where a mode is too slow, or a bound on the fast ones is asked for."""
    for hook in (dict(EC, eps=1.5), dict(EC, lambda_max=100.0)):
        config.model.backbone.state_matrix = dict(type='neg_exp')
        config.train_cfg.max_epochs = 1
        config.custom_hooks = [hook]
        train(config)
    assert warnings == []


def test_penalty_beside_a_clamp_in_the_forward_pass():
    """It sees the raw parameters, so it has a gradient."""
    ssm = ssm_with([[0.5, -1.0, 0.02], [0.005, 0.01, -3.0]])
    hook = EigenvalueClampingHook(mode='reparam')
    ssm.state_matrix.reparametrizations = [hook.rule]
    assert ssm.state_matrix.eigenvalues().max() <= -0.01
    loss = StabilityLoss(loss_weight=1.0)(ssm)
    loss.backward()
    assert loss.item() == pytest.approx(0.50, abs=1e-6)
    wanted = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    assert torch.equal(ssm.state_matrix.A.grad, wanted)


def test_penalty_after_projection_is_idle(config, warnings):
    """EC + SP is EC, which the run says; in the other mode both act."""
    clamping, penalty = dict(EC, eps=0.95), dict(SP, eps=-0.93)
    config.custom_hooks = [clamping]
    clamped = weights(config)
    config.custom_hooks = [clamping, penalty]
    both = weights(config)
    assert all(torch.equal(clamped[name], both[name]) for name in both)
    assert len(warnings) == 1
    assert "mode='reparam'" in warnings[0]
    config.custom_hooks = [dict(clamping, mode='reparam'), penalty]
    config.work_dir += '-reparam'
    train(config)
    assert max(scalars(config, 'loss_stab').values()) > 0
    assert len(warnings) == 1


@pytest.mark.parametrize('matrix', MATRICES)
@pytest.mark.parametrize('combination', range(8))
def test_every_combination_runs(config, matrix, combination):
    hooks = [dict(SN), dict(EC), dict(SP)]
    config.custom_hooks = [
        hook for bit, hook in enumerate(hooks) if combination >> bit & 1
    ]
    config.model.backbone.state_matrix = dict(MATRICES[matrix])
    config.optim_wrapper.optimizer.lr = 1e-3
    config.train_dataloader.dataset.indices = 32
    config.val_cfg = config.val_evaluator = config.val_dataloader = None
    runner = train(config)
    assert all(p.isfinite().all() for p in runner.model.parameters())


# ------------------------------------------------------------------ losses


def test_loss_is_logged_and_counted(config):
    config.custom_hooks = [dict(SP, eps=-0.97, loss_weight=0.25)]
    without_randomness(config)
    train(config)
    total, own = scalars(config), scalars(config, 'loss_stab')
    config.custom_hooks = []
    config.work_dir += '-plain'
    train(config)
    plain = scalars(config)
    assert own[1] == pytest.approx(0.0)  # S4D-Real starts at -1
    assert total[1] == pytest.approx(plain[1])
    assert own[3] > 0
    assert total[3] != pytest.approx(plain[3], rel=1e-6)


def test_loss_pushes_eigenvalues_back(config):
    config.model.backbone.state_matrix = dict(type='signed')
    free = train(config).model
    config.custom_hooks = [
        dict(SP, eps=-1.0, reduction='sum', loss_weight=10.0)
    ]
    config.work_dir += '-penalized'
    assert abscissa(train(config).model) < abscissa(free)


class Toy(BaseModel):
    """A model with one state matrix and any losses."""

    def __init__(self, losses=None):
        super().__init__()
        self.ssm = SelectiveSSM(4, 2, state_matrix=dict(type='signed'))
        self.losses = losses or {}

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss':
            return {'loss': self.ssm(inputs).sum(), **self.losses}
        return self.ssm(inputs)


def hooked(model, **loss):
    hook = StabilityLossHook(**loss)
    hook.before_train(type('R', (), dict(model=model, hooks=[hook])))
    return hook


def test_loss_hook_leaves_other_modes_alone():
    model = Toy()
    hook = hooked(model, reduction='mean', eps=-2.0, loss_weight=3.0)
    x = torch.randn(1, 3, 4)
    assert isinstance(model(x), torch.Tensor)
    for losses in (
        model(x, mode='loss'),
        model(x, None, 'loss'),
        model(inputs=x, mode='loss'),
    ):
        # of the modes -1 and -2 one exceeds -2, by 1
        assert losses['loss_stab'].item() == pytest.approx(1.5)
    losses['loss_stab'].backward()
    assert model.ssm.state_matrix.A.grad[0].tolist() == pytest.approx(
        [3 / 8, 0]
    )
    hook.after_train(None)
    assert 'loss_stab' not in model(x, mode='loss')


def test_two_losses_of_one_name_are_refused():
    model = Toy({'loss_stab': torch.zeros(())})
    hooked(model, eps=-2.0)
    with pytest.raises(RuntimeError, match='of its own'):
        model(torch.randn(1, 3, 4), mode='loss')


def ssm_with(values):
    ssm = SelectiveSSM(2, 3, state_matrix=dict(type='signed'))
    ssm.state_matrix.A.data.copy_(torch.tensor(values))
    return ssm


def test_loss_of_the_example():
    """Literal sum, and gradient one at the two active entries."""
    ssm = ssm_with([[0.5, -1.0, 0.02], [0.005, 0.01, -3.0]])
    loss = StabilityLoss(loss_weight=1.0)(ssm)
    assert loss.item() == pytest.approx(0.50, abs=1e-6)
    loss.backward()
    wanted = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    assert torch.equal(ssm.state_matrix.A.grad, wanted)


def test_loss_of_negative_exponentials():
    """Zero with zero gradient, but for a negative threshold."""
    ssm = SelectiveSSM(1, 3)
    A_log = ssm.state_matrix.A_log
    A_log.data.copy_(torch.tensor([[0.0, 1.0, -5.0]]))
    loss = StabilityLoss()(ssm)
    loss.backward()
    assert loss == 0
    assert not A_log.grad.any()
    loss = StabilityLoss(eps=-0.01, loss_weight=1.0)(ssm)
    assert loss.item() == pytest.approx(0.0032620530, abs=1e-8)
    loss.backward()
    wanted = torch.tensor([[0.0, 0.0, -math.exp(-5)]])
    assert torch.allclose(A_log.grad, wanted)


@pytest.mark.parametrize('coupling', [0.5, 4.0, 100.0])
def test_loss_of_a_nearly_defective_matrix(coupling):
    """One value, of the matrix itself, and a gradient that is bounded."""
    ssm = SelectiveSSM(
        1, 8, state_matrix=dict(type='full', block_size=8, rank=0)
    )
    dense = torch.diag(torch.full((7,), coupling), 1) - torch.eye(8)
    dense[0, 0] = 0.5
    ssm.state_matrix.blocks.data.copy_(dense)
    loss = StabilityLoss(loss_weight=1.0)
    value = loss(ssm)
    with torch.no_grad():
        assert torch.equal(loss(ssm), value)
    assert value.item() == pytest.approx(0.49)
    value.backward()
    grad = ssm.state_matrix.blocks.grad[0, 0]
    assert 0 < torch.linalg.matrix_norm(grad, 2) <= 8


def test_conjugate_pairs_count_twice():
    """A stored complex eigenvalue, and the block of two that it stands for."""
    stored = SelectiveSSM(
        1, 1, state_matrix=dict(type='complex', real_part='free')
    )
    stored.state_matrix.re.data.fill_(0.51)
    stored.state_matrix.im.data.fill_(2.0)
    block = SelectiveSSM(1, 2, state_matrix=dict(type='full', rank=0))
    block.state_matrix.blocks.data.copy_(
        torch.tensor([[0.51, -2.0], [2.0, 0.51]])
    )
    for reduction, wanted in (('sum', 1.0), ('mean', 0.5)):
        loss = StabilityLoss(reduction=reduction, loss_weight=1.0)
        for ssm in (stored, block):
            assert loss(ssm).item() == pytest.approx(wanted, abs=1e-6)


def test_surrogate_bounds_the_real_parts():
    ssm = SelectiveSSM(1, 4, state_matrix=dict(type='full'))
    torch.nn.init.normal_(ssm.state_matrix.blocks)
    torch.nn.init.normal_(ssm.state_matrix.U)
    exact = StabilityLoss(eps=0.0, loss_weight=1.0)(ssm)
    bound = StabilityLoss(
        eps=0.0, loss_weight=1.0, surrogate='numerical_abscissa'
    )(ssm)
    dense = ssm.state_matrix.dense()[0]
    largest = torch.linalg.eigvalsh((dense + dense.T) / 2).max()
    assert bound.item() == pytest.approx(largest.item(), rel=1e-5)
    assert bound >= exact / 4  # the largest of four


# --------------------------------------------------------------- bad input


@pytest.mark.parametrize('hook', [SN, EC, SP], ids=lambda h: h['type'])
def test_a_model_without_state_matrix_is_refused(config, hook):
    config.model.backbone = dict(type='ResNet', depth=18, in_channels=1)
    config.model.neck = dict(type='GlobalAveragePooling')
    config.model.head.in_channels = 512
    config.custom_hooks = [hook]
    with pytest.raises(RuntimeError, match='found no state matrix in Image'):
        train(config)


@pytest.mark.parametrize(
    ('hook', 'options', 'message'),
    [
        (SpectralNormalizationHook, dict(rho_max=0), 'rho_max must be posit'),
        (
            SpectralNormalizationHook,
            dict(rho_max='ini'),
            "or 'init', got 'ini",
        ),
        (
            SpectralNormalizationHook,
            dict(rho_max='init', domain='discrete'),
            'needs the continuous domain',
        ),
        (
            SpectralNormalizationHook,
            dict(rho_max=2, domain='discrete'),
            'at most 1',
        ),
        (
            SpectralNormalizationHook,
            dict(mode='parametrize'),
            r"mode must be one of \('project', 'reparam'\)",
        ),
        (
            SpectralNormalizationHook,
            dict(domain='z'),
            r"domain must be one of \('continuous', 'discrete'\), got 'z'",
        ),
        (
            SpectralNormalizationHook,
            dict(granularity='row'),
            r"one of \('channel', 'layer', 'block'\), got 'row'",
        ),
        (
            EigenvalueClampingHook,
            dict(domain='z'),
            r"domain must be one of \('continuous', 'discrete'\), got 'z'",
        ),
        (EigenvalueClampingHook, dict(grad='no'), 'grad must be one of'),
        (EigenvalueClampingHook, dict(method='qr'), 'method must be one of'),
        (
            EigenvalueClampingHook,
            dict(method='schur', mode='reparam'),
            'which has no gradient',
        ),
        (
            EigenvalueClampingHook,
            dict(eps=3, lambda_max=2),
            'lambda_max must be at least',
        ),
        (StabilityLossHook, dict(reduction='max'), 'reduction must be one of'),
        (StabilityLossHook, dict(loss_weight=-1), 'loss_weight must be at le'),
        (StabilityLossHook, dict(surrogate='norm'), 'surrogate must be one'),
    ],
    ids=str,
)
def test_bad_arguments(hook, options, message):
    with pytest.raises(ValueError, match=message):
        hook(**options)


def test_defaults():
    """Those of the method as published, where it says them."""
    normalization = SpectralNormalizationHook()
    assert normalization.mode == EigenvalueClampingHook().mode == 'project'
    assert normalization.rule == SpectralNormalization()
    assert EigenvalueClampingHook().rule == EigenvalueClamping()
    loss = StabilityLoss()
    assert (loss.eps, loss.reduction, loss.loss_weight) == (0.01, 'sum', 1e-4)
    assert loss.surrogate is None
    assert StabilityLoss(reduction='mean').loss_weight == 1.0
    hook = StabilityLossHook()
    assert (hook.key, hook.loss.eps) == ('loss_stab', 0.01)


@pytest.mark.parametrize('matrix', ['signed', 'full'])
def test_gradient_options_reach_the_forward_pass(config, matrix):
    """Other gradients, other weights; the rules hold all the same."""
    config.model.backbone.state_matrix = dict(MATRICES[matrix])
    config.val_cfg = config.val_evaluator = config.val_dataloader = None
    results = []
    for grad, detach_scale in (('ste', False), ('clamp', True)):
        config.custom_hooks = [
            dict(SN, rho_max=2.0, mode='reparam', detach_scale=detach_scale),
            dict(EC, eps=0.75, mode='reparam', grad=grad),
        ]
        model = train(config).model
        assert abscissa(model) <= -0.75 + 1e-4
        results.append(model.state_dict())
    assert any(
        not torch.equal(a, results[1][k]) for k, a in results[0].items()
    )


def test_loss_needs_a_state_matrix():
    with pytest.raises(RuntimeError, match='found no state matrix in Linear'):
        StabilityLoss()(nn.Linear(2, 2))


@pytest.mark.parametrize('hook', [SN, EC], ids=lambda h: h['type'])
def test_nan_is_never_clamped_away(config, hook):
    """The run stops and names the matrix."""
    config.custom_hooks = [hook]
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.model.backbone.layers[1].mixer.ssm.state_matrix.A.data[2, 1] = (
        math.nan
    )
    wanted = r'layers\.1\.mixer\.ssm\.state_matrix has a NaN'
    with pytest.raises(ValueError, match=wanted):
        runner.train()

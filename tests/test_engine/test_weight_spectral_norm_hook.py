"""Norms of weights in real training runs: when they are bounded, and how."""

import copy
import math

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from small_runs import ROOT, digits_config, train, train_in_two_processes
from torch import nn
from torch.nn.utils import parametrize
from weight_norm_runs import (
    ALL,
    EMA,
    KINDS,
    REPARAM,
    WSN,
    Classifier,
    Run,
    equal,
    gains_of,
    hook_of,
    norms,
    numbers_of,
    saved,
)

from mmstabvim import WeightSpectralNormHook
from mmstabvim.engine.hooks import weight_spectral_norm_hook
from mmstabvim.stability import find_layers, spectral_norm
from mmstabvim.stability.weights.layers import weight_parameter


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / 'work')


# ------------------------------------------------------------- what it does


def test_norms_stay_bounded_where_training_alone_breaks_them(run):
    free = norms(run.train().model)
    run.hooks = [dict(WSN, max_norm=0.5, exact=True)]
    exact = norms(run.train().model)
    run.hooks = [dict(WSN, max_norm=0.5)]
    estimate = norms(run.train().model)
    assert free.keys() == exact.keys()
    names = (name.removesuffix('.0').removesuffix('.1') for name in free)
    assert {name.split('.')[-1] for name in names} == {
        'projection',
        'in_proj',
        'conv1d',
        'x_proj',
        'dt_proj',
        'out_proj',
        'head',
    }
    assert min(free.values()) > 0.52
    assert max(exact.values()) <= 0.5 * (1 + 2e-6)
    # from below, one step of power iteration for each large step
    assert 0.5 * (1 + 1e-4) < max(estimate.values()) < 0.58


def test_division_enlarges_too(run):
    run.hooks = [dict(WSN, rule='divide', max_norm=3.0, exact=True)]
    found = list(norms(run.train().model).values())
    assert found == pytest.approx([3.0] * 10, rel=2e-6)


def test_a_bound_that_holds_changes_nothing(run):
    baseline = run.train().model.state_dict()
    run.hooks = [dict(WSN, max_norm=1e3)]
    assert equal(run.train().model.state_dict(), baseline)


@pytest.mark.parametrize('rule', ['bound', 'divide', 'learned'])
def test_reparametrized_weights_obey(run, rule):
    """With free parameters that do not, up to one step's lag."""
    run.hooks = [dict(REPARAM, rule=rule, max_norm=0.5, steps=20)]
    model = run.train().model.eval()
    layers = find_layers(model, ALL)
    free = {n: weight_parameter(layer) for n, layer in layers.items()}
    assert max(w.flatten(1).norm() for w in free.values()) > 1
    found = norms(model)
    if rule == 'learned':
        gains = numbers_of(gains_of(model))
        # three steps of Adam at 0.05 each
        assert all(0.3 < gain < 0.7 for gain in gains.values())
        assert len(set(gains.values())) == 10
        assert found == pytest.approx(gains, rel=3e-2)
    elif rule == 'divide':
        found = list(found.values())
        assert found == pytest.approx([0.5] * 10, rel=3e-2)
    else:
        assert 0.49 < max(found.values()) < 0.5 * (1 + 3e-2)


def test_norms_of_the_start(run):
    """Fine-tuning keeps what a model comes with."""
    run.hooks = [dict(WSN, max_norm='init', exact=True)]
    run.optimizer['lr'] = 0.0
    runner = run.train()
    start = norms(runner.model)
    assert hook_of(runner).bounds == pytest.approx(start, rel=1e-6)
    path = f'{run.work_dir}/epoch_1.pth'
    state = saved(run)
    for name in find_layers(runner.model, ALL):
        state['state_dict'][f'{name}.weight'] *= 0.5
    torch.save(state, path)
    run.optimizer['lr'] = 0.05
    tuned = run.train(load_from=path)
    half = {name: norm / 2 for name, norm in start.items()}
    assert hook_of(tuned).bounds == pytest.approx(half, rel=1e-5)
    found = norms(tuned.model)
    assert all(found[name] <= half[name] * (1 + 1e-5) for name in half)


class Overlapping(BaseModel):
    """No Mamba, and patches that overlap."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs, labels=None, mode='tensor'):
        logits = self.head(self.conv(inputs).relu().mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, labels))


def test_any_model(run):
    run.model = Overlapping
    run.hooks = [dict(WSN, layers=['conv', 'head'], exact=True)]
    weight = run.train().model.conv.weight.detach()
    assert 3 * spectral_norm(weight.flatten(1)) == pytest.approx(1, rel=1e-5)
    units = torch.eye(3 * 8 * 8).reshape(-1, 3, 8, 8)
    matrix = nn.functional.conv2d(units, weight).flatten(1)
    assert spectral_norm(matrix) < 1


def test_other_hooks_keep_working(run):
    """Two hooks with bounds of their own beside the other stabilizers."""
    run.validate = True
    run.hooks = [
        EMA,
        dict(type='mmstabvim.SpectralNormalizationHook'),
        dict(type='mmstabvim.EigenvalueClampingHook'),
        dict(type='mmstabvim.StabilityMonitorHook', interval=1),
        dict(type='mmstabvim.DivergenceHook', activation_interval=1),
        dict(WSN, layers=['in_proj'], max_norm=0.5, exact=True),
        dict(REPARAM, layers=['head'], max_norm=2.0, rule='divide'),
    ]
    model = run.train().model
    (layer,) = find_layers(model, ['in_proj']).values()
    assert spectral_norm(layer.weight.detach()) <= 0.5 + 1e-5
    assert parametrize.is_parametrized(model.head)
    assert saved(run)['weight_spectral_norm']['bounds'] == {
        'backbone.layers.0.mixer.in_proj': 0.5,
        'head': 2.0,
    }


def test_the_base_config(tmp_path):
    cfg = digits_config(tmp_path)
    base = Config.fromfile(ROOT / 'configs/_base_/stabilizers/weight_sn.py')
    cfg.default_hooks.update(base.default_hooks)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    cfg.val_cfg = cfg.val_evaluator = cfg.val_dataloader = None
    cfg.train_dataloader.dataset.indices = 16
    runner = train(cfg)
    found = norms(runner.model)
    assert len(found) == 2 + 2 * 8
    assert hook_of(runner).bounds == dict.fromkeys(found, 1.0)
    assert max(found.values()) <= 1.01


# ------------------------------------------------------------ when it acts


@pytest.fixture
def projections(monkeypatch):
    """Steps of power iteration, for every time that the rule is applied."""
    calls = []
    original = weight_spectral_norm_hook.project_norms_

    def counted(groups, bounds, rule, steps):
        calls.append(steps)
        original(groups, bounds, rule, steps)

    monkeypatch.setattr(weight_spectral_norm_hook, 'project_norms_', counted)
    return calls


def test_once_exactly_and_then_after_each_step(run, projections):
    run.hooks = [dict(WSN, steps=2)]
    run.train()
    assert projections == [None, 2, 2, 2]


def test_estimates_start_near_the_norms(run):
    run.hooks, run.epochs = [dict(WSN, max_norm='init')], 0
    for group in hook_of(run.train())._groups:
        assert (group.estimate() > 0.9 * group.norms()).all()


def test_accumulating_iterations_do_nothing(run, projections):
    """Ten iterations of which three make a step, and the last one."""
    run.hooks = [WSN]
    run.count, run.batch_size = 20, 2
    run.options = dict(accumulative_counts=3)
    run.train()
    assert projections == [None, 1, 1, 1, 1]


def test_reparametrization_projects_nothing(run, projections):
    run.hooks = [REPARAM]
    run.train()
    assert projections == []


@pytest.mark.parametrize('fused', [False, True])
def test_a_step_skipped_by_fp16_does_nothing(run, projections, fused):
    """A fused optimizer is called all the same."""
    run.hooks, run.epochs = [WSN], 0
    run.optimizer['fused'] = fused
    runner = run.train()
    hook_of(runner).before_train(runner)
    projections.clear()
    scaler = torch.amp.GradScaler('cpu', init_scale=1.0)
    for gradient, calls in ((math.inf, 0), (0.0, 1)):
        for parameter in runner.model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.ones(()))  # as a backward pass would have
        scaler.step(runner.optim_wrapper.optimizer)
        scaler.update()
        assert len(projections) == calls


def test_a_second_run_acts_once_per_step(run, projections):
    """The first run's hook on the optimizer is gone."""
    run.hooks = [WSN]
    runner = run.train()
    projections.clear()
    runner.optim_wrapper.step()
    assert not projections


@pytest.mark.parametrize('kind', ['bound', 'learned'])
def test_frozen_layers(run, kind):
    """Are bounded at the start, and their gains are not trained."""

    class Frozen(Classifier):
        def __init__(self):
            super().__init__()
            self.head.weight.requires_grad_(False)

    run.model = Frozen
    run.hooks = [dict(KINDS[kind], max_norm=0.5, steps=20)]
    found = norms(run.train().model.eval())
    assert found['head'] == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize('kind', ['bound', 'reparam bound', 'learned'])
def test_evaluation_changes_nothing(run, kind):
    run.hooks, run.validate = [KINDS[kind]], True
    runner = run.train()
    hook = hook_of(runner)
    vectors = copy.deepcopy(hook._vectors())
    state = copy.deepcopy(runner.model.state_dict())
    runner.val_loop.run()
    hook.norms(runner)
    assert equal(runner.model.state_dict(), state)
    assert equal(hook._vectors(), vectors)


# ---------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_stay_equal(tmp_path):
    """Bit by bit; learned gains get the mean gradient."""
    cfg = digits_config(tmp_path)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    cfg.val_cfg = cfg.val_evaluator = cfg.val_dataloader = None
    cfg.model.backbone.arch = dict(embed_dims=16, num_layers=1, d_state=4)
    cfg.train_dataloader.batch_size = 8
    cfg.custom_hooks = [
        dict(WSN, layers=['in_proj', 'x_proj', 'patch_embed']),
        dict(KINDS['learned'], layers=['dt_proj', 'conv1d', 'out_proj']),
    ]
    a, b = train_in_two_processes(cfg, tmp_path, port=29711)
    assert equal(a, b)
    gains = [v for k, v in a.items() if k.endswith('.gain')]
    assert sorted(gain.numel() for gain in gains) == [1, 2, 2]
    assert all((gain != 1.0).all() for gain in gains)


# --------------------------------------------------------------- bad input


def test_a_pattern_that_matches_nothing_is_refused(run):
    run.hooks = [dict(WSN, layers=['in_proj', 'out_prj'])]
    with pytest.raises(ValueError, match=r"'out_prj'.*near.*'out_proj'"):
        run.train()


def test_hooks_with_layers_in_common_are_refused(run):
    run.hooks = [WSN, dict(WSN, layers=['in_proj'], max_norm=2.0)]
    with pytest.raises(ValueError, match=r'two hooks .*mixer\.in_proj'):
        run.train()


def test_parametrized_weights_are_not_projected(run):
    run.hooks = [WSN]
    runner = run.runner()
    torch.nn.utils.parametrizations.spectral_norm(runner.model.head)
    with pytest.raises(ValueError, match='of head is parametrized'):
        runner.train()


def test_shared_weights(run):
    """Are projected once; free ones would get out of step."""

    class Tied(Classifier):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(16, 3)
            self.other.weight = self.head.weight

    run.model = Tied
    run.hooks = [dict(WSN, max_norm=0.5, exact=True)]
    model = run.train().model
    assert model.other.weight is model.head.weight
    assert spectral_norm(model.head.weight.detach()) <= 0.5 * (1 + 2e-6)
    run.hooks = [REPARAM]
    with pytest.raises(ValueError, match='head: the weight is shared with'):
        run.train()


@pytest.mark.parametrize('kind', ['bound', 'divide', 'learned'])
def test_zero_weights(run, kind):
    """Have no norm to be kept or divided by; a bound they obey."""
    run.hooks, run.epochs = [dict(KINDS[kind], layers=['head'])], 0
    wanted = {
        'bound': r"max_norm='init': the norm of \['head'\] is 0",
        'learned': 'head: the weight is zero',
    }
    runner = run.runner()
    runner.model.head.weight.data.zero_()
    if kind == 'divide':
        runner.train()
        assert not runner.model.head.weight.any()
    else:
        with pytest.raises(ValueError, match=wanted[kind]):
            runner.train()


def test_nan_is_never_divided_away(run):
    run.hooks = [WSN]
    runner = run.runner()
    runner.model.backbone.layers[0].mixer.out_proj.weight.data[2, 1] = math.nan
    wanted = r'layers\.0\.mixer\.out_proj\.weight has a NaN'
    with pytest.raises(ValueError, match=wanted):
        runner.train()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(max_norm=0), 'max_norm must be a positive number'),
        (dict(max_norm=math.inf), 'max_norm must be a positive number'),
        (dict(max_norm='ini'), "or 'init', got 'ini'"),
        (dict(rule='clip'), r"rule must be one of \('bound', 'divide', 'lea"),
        (dict(mode='forward'), r"mode must be one of \('project', 'reparam'"),
        (dict(rule='learned'), "needs mode='reparam'"),
        (dict(mode='reparam', exact=True), "needs mode='project'"),
        (dict(steps=0), 'steps must be at least 1, got 0'),
    ],
    ids=range(8),
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        WeightSpectralNormHook(**options)

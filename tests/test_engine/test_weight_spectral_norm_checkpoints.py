"""Checkpoints, averages and learned gains of bounded weights."""

import copy

import pytest
import torch
from weight_norm_runs import (
    ALL,
    EMA,
    KINDS,
    WSN,
    Classifier,
    Run,
    average_of,
    equal,
    gains_of,
    hook_of,
    norms,
    saved,
)

from mmstabvim.engine.divergence.rollback import roll_back
from mmstabvim.stability import find_layers, spectral_norm
from mmstabvim.stability.weights.layers import weight_parameter


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / 'work')


CASES = [(kind, ema) for kind in KINDS for ema in (False, True)]


@pytest.mark.parametrize(('kind', 'ema'), CASES)
def test_checkpoints_fit_a_plain_model(run, kind, ema):
    """The weights that the layers compute with, under their usual names."""
    run.hooks = [KINDS[kind]] + [EMA] * ema
    model = run.train().model
    plain = Classifier()
    plain.load_state_dict(saved(run)['state_dict'])  # strictly
    image = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    with torch.no_grad():
        same = torch.equal(plain.eval()(image), model.eval()(image))
    # with EMAHook the file has the averages
    assert same != ema


@pytest.mark.parametrize(('kind', 'ema'), CASES)
def test_resume_repeats_the_uninterrupted_run(run, kind, ema):
    run.hooks, run.epochs = [KINDS[kind]] + [EMA] * ema, 2
    whole = run.train()
    path = f'{run.work_dir}/epoch_1.pth'
    resumed = run.train(load_from=path, resume=True)
    assert equal(resumed.model.state_dict(), whole.model.state_dict())
    assert hook_of(resumed).bounds == hook_of(whole).bounds
    assert equal(hook_of(resumed)._vectors(), hook_of(whole)._vectors())
    if ema:
        a, b = average_of(resumed), average_of(whole)
        assert equal(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(('kind', 'ema'), CASES)
def test_going_back_in_training(run, kind, ema):
    """Weights, vectors and averages become those of the file."""
    run.hooks = [KINDS[kind]] + [EMA] * ema
    runner = run.train()
    models = [runner.model] + ([average_of(runner)] if ema else [])
    states = [copy.deepcopy(model.state_dict()) for model in models]
    vectors = copy.deepcopy(hook_of(runner)._vectors())
    with torch.no_grad():
        for model in models:
            for p in [*model.parameters(), *model.buffers()]:
                p.add_(1)
        for group in hook_of(runner)._groups:
            group.u.fill_(0.1)
    roll_back(runner, f'{run.work_dir}/epoch_1.pth')
    for model, state in zip(models, states, strict=True):
        assert equal(model.state_dict(), state)
    assert equal(hook_of(runner)._vectors(), vectors)


def test_plain_weights_loaded_in_training(run):
    """Give the same outputs, whatever was trained before."""
    plain = Classifier()
    run.hooks = [KINDS['learned']]
    runner = run.train()
    path = f'{run.work_dir}/plain.pth'
    torch.save(dict(state_dict=plain.state_dict()), path)
    runner.load_checkpoint(path, strict=True)
    image = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    with torch.no_grad():
        wanted = plain.eval()(image)
        torch.testing.assert_close(runner.model.eval()(image), wanted)


def test_layers_added_when_resuming_start_anew(run):
    for kind in ('bound', 'reparam bound'):
        run.hooks = [dict(KINDS[kind], layers=['in_proj'])]
        whole = run.train()
        run.hooks, run.epochs = [KINDS[kind]], 2
        path = f'{run.work_dir}/epoch_1.pth'
        resumed = run.train(load_from=path, resume=True)
        bounds = hook_of(resumed).bounds
        assert bounds.keys() == find_layers(resumed.model, ALL).keys()
        assert hook_of(whole).bounds.items() <= bounds.items()
        run.epochs = 1


def test_averages_obey_exactly_before_they_are_used(run):
    run.hooks, run.validate = [EMA, dict(WSN, rule='divide')], True
    runner = run.train()
    layer = average_of(runner).module.backbone.layers[0].mixer.in_proj
    evaluated = []
    original = runner.model.forward

    def forward(*args, **kwargs):
        evaluated.append(list(norms(runner.model).values()))
        return original(*args, **kwargs)

    runner.model.forward = forward
    layer.weight.data.mul_(7)
    runner.val_loop.run()
    assert evaluated == [pytest.approx([1] * 10, rel=2e-6)]
    layer.weight.data.mul_(7)
    runner.save_checkpoint(run.work_dir, 'last.pth')
    state = saved(run, 'last.pth')['state_dict']
    weight = state['backbone.layers.0.mixer.in_proj.weight']
    assert spectral_norm(weight) == pytest.approx(1, rel=2e-6)


@pytest.mark.parametrize('update_buffers', [False, True])
def test_averages_of_reparametrized_weights(run, update_buffers):
    """Those of the free parameters; no other weight is lost."""
    ema = dict(EMA, update_buffers=update_buffers)
    run.hooks = [KINDS['learned'], ema]
    runner = run.train()
    average = average_of(runner)
    live = dict(runner.model.named_parameters())
    averaged = dict(average.module.named_parameters())
    assert live.keys() == averaged.keys()
    assert not any(p.requires_grad for p in averaged.values())
    assert not any(torch.equal(live[n], averaged[n]) for n in live)
    vectors = [n for n in average.module.state_dict() if n.endswith('._u')]
    assert vectors
    for name in vectors:
        a = average.module.state_dict()[name]
        b = runner.model.state_dict()[name]
        assert torch.equal(a, b) != update_buffers
        # an average of unit vectors is shorter
        assert (a.norm() < 1 - 1e-6) == update_buffers


def test_learned_gains_are_trained_as_their_weights_are(run):
    run.hooks = [KINDS['learned']]
    run.options = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
    runner = run.train()
    groups = runner.optim_wrapper.optimizer.param_groups
    gains = gains_of(runner.model)
    assert gains
    for name, layer in find_layers(runner.model, ALL).items():
        weight = weight_parameter(layer)
        (group,) = (g for g in groups if any(p is weight for p in g['params']))
        assert any(p is gains[name] for p in group['params'])
        assert gains[name].item() != 1.0


def test_learned_gains_leave_the_start_as_it_is(run):
    """With ``max_norm='init'``, in a model that has been loaded."""
    run.epochs = 1
    run.train()
    path = f'{run.work_dir}/epoch_1.pth'
    plain = saved(run)['state_dict']
    run.hooks, run.epochs = [dict(KINDS['learned'], max_norm='init')], 0
    model = run.train(load_from=path).model.eval()
    for name, layer in find_layers(model, ALL).items():
        wanted = plain[f'{name}.weight']
        torch.testing.assert_close(layer.weight.detach(), wanted)

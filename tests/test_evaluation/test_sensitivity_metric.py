"""The metric on known models, in an evaluation, and on a ResNet."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from rich.progress import Progress
from torch import nn

import mmstabvim
from mmstabvim.stability import (
    attribution_condition_number,
    attribution_instability,
    attributions,
    frechet_distance,
    gaussian_changes,
    input_jacobian,
    sensitivity_profile,
    singular_values,
    spectral_entropy,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_runs import digits_config

HOOK = dict(type='mmstabvim.ModelForMetricsHook')
FOUR = ('input_jacobian', 'parameter_jacobian', 'tangent_kernel', 'hessian')


def metric(**options):
    options = {'show_progress': False, **options}
    return mmstabvim.SensitivityMetric(**options)


@pytest.fixture
def model():
    """Four classes, six inputs."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 2), nn.Tanh(), nn.Dropout(), nn.Linear(2, 4)
    return nn.Sequential(*layers).double().train()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 3, 1, 2, 0])


# ----------------------------------------------------------- known models


@pytest.mark.parametrize('batch_size', [2, 16])
def test_what_the_functions_say(model, data, batch_size):
    x, labels = data
    tool = metric(batch_size=batch_size, std=0.3)
    found = tool.measure(model, *data)
    assert all(m.training for m in model.modules())
    model.eval()
    jacobian = input_jacobian(model, x)
    values = singular_values(jacobian)
    entropy = spectral_entropy(values)
    assert found['entropy'] == pytest.approx(entropy.mean().item())
    condition = attribution_condition_number(values).mean().item()
    assert found['condition_number'] == pytest.approx(condition)
    gain = jacobian.square().sum().item() / 5 / 6
    assert found['typical_gain'] == pytest.approx(gain)
    changes = gaussian_changes(x, 0.3)
    shaky = attribution_instability(model, x, changes)
    assert found['instability'] == pytest.approx(shaky.mean().item())
    classes = model(x).argmax(1)
    moved = attributions(model, x + changes[0], classes)
    distance = frechet_distance(attributions(model, x), moved).item()
    assert found['frechet_distance'] == pytest.approx(distance)
    parameters = list(model.parameters())
    profile = sensitivity_profile(model, x, labels, parameters)
    for name, value in profile.values().items():
        assert found[name] == pytest.approx(value), name
    assert found['index'] == max(found[name] for name in FOUR)
    lowest = profile.hessian_min.min().item()
    assert found['hessian_min'] == pytest.approx(lowest)
    assert (found['samples'], found['classes'], found['finite']) == (5, 4, 1)
    for i, row in enumerate(tool.rows):
        assert row['entropy'] == pytest.approx(entropy[i].item())
        assert row['hessian'] == pytest.approx(profile.hessian[i].item())
        assert row['instability'] == pytest.approx(shaky[i].item())
        assert row['prediction'] == classes[i]


def test_options(model, data):
    plain = metric().measure(model, *data)
    head = metric(parameters=['3.']).measure(model, *data)
    assert head['parameter_jacobian'] < plain['parameter_jacobian']
    assert head['entropy'] == plain['entropy']
    other = metric(
        power=2, base=2, combine='sum', quantile=0.5, per_sample=True
    ).measure(model, *data)
    assert other['index'] == pytest.approx(sum(other[name] for name in FOUR))
    kernel = plain['tangent_kernel'] / 5
    assert other['tangent_kernel'] == pytest.approx(kernel)
    assert other['hessian'] < plain['hessian']
    assert other['entropy'] != plain['entropy']
    short = metric(profile=False).measure(model, *data)
    assert not set(FOUR) & set(short)
    assert short.items() <= plain.items()


def test_attribution_of_the_label(model, data):
    x, labels = data
    options = dict(profile=False, std=0.3, batch_size=2)
    found = metric(target='label', **options).measure(model, x, labels)
    model.eval()
    assert (model(x).argmax(1) != labels).any()
    changes = gaussian_changes(x, 0.3)
    wanted = attribution_instability(model, x, changes, labels).mean().item()
    assert found['instability'] == pytest.approx(wanted)
    plain = metric(**options).measure(model, x, labels)
    assert plain['instability'] != found['instability']
    assert plain['frechet_distance'] != found['frechet_distance']


def test_many_classes(model, data):
    """Estimates with their errors; the spectrum of the likeliest classes."""
    exact = metric().measure(model, *data)
    found = metric(max_classes=2, steps=8).measure(model, *data)
    for name in ('input_jacobian', 'parameter_jacobian', 'tangent_kernel'):
        assert found[name] == pytest.approx(exact[name], rel=1e-5)
        assert found[f'{name}_error'] < 1e-2
    error = found['typical_gain_error']
    assert error > 0
    assert abs(found['typical_gain'] - exact['typical_gain']) < 4 * error
    assert found['classes'] == 2
    model.eval()
    top = model(data[0]).topk(2).indices
    values = singular_values(input_jacobian(model, data[0], top))
    entropy = spectral_entropy(values).mean().item()
    assert found['entropy'] == pytest.approx(entropy)
    assert 'typical_gain_error' not in exact


def test_not_finite(model, data):
    model[0].weight.data[0, 0] = math.nan
    found = metric().measure(model, *data)
    assert found['index'] == math.inf
    assert found['finite'] == 0
    assert found['frechet_distance'] == math.inf


class Squares(nn.Module):
    """Mean of squares: a smooth attribution over an image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        mean = (self.scale * x).square().mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


def test_pooled_and_unit_attributions():
    x = torch.arange(64.0).reshape(2, 1, 4, 8) / 30 + 1
    labels = torch.tensor([0, 1])
    options = dict(profile=False, std=0.3)
    whole, pooled, unit = (
        metric(**options, **more).measure(Squares(), x, labels)
        for more in ({}, {'pool': 4}, {'unit': True})
    )
    name = 'frechet_distance'
    assert 0 < pooled[name] < whole[name] < unit[name]
    assert pooled['instability'] == whole['instability']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(samples=1), 'samples must be at least 2'),
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (dict(quantile=95), 'quantile must be in'),
        (dict(method='hvp'), 'method must be one of'),
        (dict(combine='mean'), 'combine must be one of'),
        (dict(attribution='lime'), 'attribution must be one of'),
        (dict(target='class'), 'target must be one of'),
    ],
    ids=[
        'samples',
        'batch',
        'quantile',
        'method',
        'combine',
        'attribution',
        'target',
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        metric(**options)


def test_bad_data(model, data):
    x, labels = data
    for images, targets in ((x[:1], labels[:1]), (x, labels[:3])):
        with pytest.raises(ValueError, match='images and labels must be'):
            metric().measure(model, images, targets)
    with pytest.raises(ValueError, match=r"one of \('neck'"):
        metric(parameters=['neck']).measure(model, *data)
    flat = nn.Sequential(model, nn.Flatten(0))
    with pytest.raises(ValueError, match='function must give logits'):
        metric().measure(flat, *data)


# --------------------------------------------------------- in an evaluation


def run(tmp_path, hooks=(HOOK,)):
    """Evaluate a tiny model on 20 digits; its metrics and the runner."""
    cfg = digits_config(tmp_path)
    cfg.test_dataloader.dataset.indices = 20
    cfg.test_dataloader.batch_size = 4
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), *hooks]
    cfg.test_evaluator = [
        dict(type='Accuracy', topk=(1,)),
        dict(
            type='mmstabvim.SensitivityMetric',
            samples=6,
            steps=3,
            show_progress=False,
        ),
    ]
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    return runner.test(), runner


def test_in_an_evaluation(tmp_path):
    """The first images, normalized; nothing about the model changes."""
    found, runner = run(tmp_path)
    assert 0 <= found['accuracy/top1'] <= 100
    assert found['sensitivity/samples'] == 6
    assert found['sensitivity/finite'] == 1
    assert not any('loss' in name for name in found)
    model = runner.model
    assert all(p.grad is None for p in model.parameters())
    dataset = runner.test_dataloader.dataset
    items = [dataset[i] for i in range(6)]
    data = model.data_preprocessor(
        dict(
            inputs=[item['inputs'] for item in items],
            data_samples=[item['data_samples'] for item in items],
        )
    )
    labels = torch.cat([s.gt_label for s in data['data_samples']])
    wanted = metric(steps=3).measure(model, data['inputs'], labels)
    for name, value in wanted.items():
        got = found[f'sensitivity/{name}']
        assert got == pytest.approx(value, rel=1e-5), name
    assert runner.test() == found


def test_without_the_hook(tmp_path):
    with pytest.raises(RuntimeError, match='ModelForMetricsHook'):
        run(tmp_path, hooks=())


def test_bars_of_the_caller(model, data):
    """One for each stage, taken away when all is measured."""
    shown = []

    class Bars(Progress):
        def add_task(self, description, **options):
            shown.append(description)
            return super().add_task(description, **options)

    with Bars(disable=True) as bars:
        kept = bars.add_task('outer')
        found = metric().measure(model, *data, bars)
        assert bars.task_ids == [kept]
    assert shown == ['outer', 'input Jacobians', 'attributions', 'Hessians']
    assert found == metric().measure(model, *data)


def test_a_transformer():
    """MMPretrain's ViT, all parameters: two derivatives, differences."""
    import mmpretrain.models  # noqa: F401
    from mmpretrain.registry import MODELS

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='VisionTransformer',
                arch=dict(
                    embed_dims=8,
                    num_layers=1,
                    num_heads=2,
                    feedforward_channels=16,
                ),
                img_size=16,
                patch_size=8,
            ),
            head=dict(
                type='VisionTransformerClsHead', num_classes=3, in_channels=8
            ),
        )
    ).double()
    x, labels = torch.randn(2, 3, 16, 16).double(), torch.tensor([0, 2])
    found, close = (
        metric(steps=6, method=method).measure(model, x, labels)
        for method in ('auto', 'difference')
    )
    assert found['finite'] == 1
    for name in FOUR:
        assert found[name] == pytest.approx(close[name], rel=2e-3), name
    parameters = list(model.parameters())
    profile = sensitivity_profile(
        model.eval(), x, labels, parameters, method='double_backward', steps=6
    )
    assert found['hessian'] == pytest.approx(profile.hessian.max().item())


def test_a_residual_network():
    """Any classifier: here MMPretrain's ResNet, batch norms and all."""
    import mmpretrain.models  # noqa: F401
    from mmpretrain.registry import MODELS

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='ResNet', depth=18, base_channels=4),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
        )
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    found = metric(parameters=['head.'], steps=3).measure(model, x, labels)
    assert found['finite'] == 1
    assert 0 <= found['entropy'] <= math.log(3)
    # that of the head is known: features and one, as often as classes
    model.eval()
    features = model.extract_feat(x)[0]
    norm = (features.square().sum(1) + 1).sqrt().max().item()
    assert found['parameter_jacobian'] == pytest.approx(norm, rel=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])

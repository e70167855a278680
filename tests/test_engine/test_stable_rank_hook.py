"""Stable ranks of weights in real training runs."""

import copy
import itertools

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from small_runs import digits_config, train, train_in_two_processes
from torch import nn
from torch.utils.data import DataLoader

from mmstabvim import StableRankHook, VisionMamba
from mmstabvim.engine.hooks import stable_rank_hook
from mmstabvim.stability import (
    find_layers,
    kernel_stable_rank,
    layer_norms,
    stable_rank,
)

PROJECTIONS = ['in_proj', 'x_proj', 'dt_proj', 'out_proj']
TOKENS = 5  # four patches and the class token
SRN = dict(type='mmstabvim.StableRankHook')
EMA = dict(type='EMAHook', momentum=0.1)


class Classifier(BaseModel):
    """A Vision Mamba of one layer."""

    def __init__(self):
        super().__init__()
        self.backbone = VisionMamba(
            arch=dict(embed_dims=16, num_layers=1, d_state=4),
            img_size=8,
            patch_size=4,
        )
        self.head = nn.Linear(16, 3)

    def features(self, inputs):
        return self.backbone(inputs)[0]

    def forward(self, inputs, labels=None, mode='tensor'):
        logits = self.head(self.features(inputs))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return logits


class Convolutions(Classifier):
    """Patches, depthwise kernels and a head, without a Vision Mamba."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 2, 2),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, **options),
        )

    def features(self, inputs):
        return self.backbone(inputs).mean((2, 3))


def images(count, batch_size):
    """Fixed images and labels, in order."""
    generator = torch.Generator().manual_seed(5)
    data = [
        dict(inputs=torch.randn(3, 8, 8, generator=generator), labels=k % 3)
        for k in range(count)
    ]
    return DataLoader(data, batch_size)


class Run:
    """A training run of three large steps per epoch, and how to change it."""

    def __init__(self, work_dir):
        self.work_dir, self.model = str(work_dir), Classifier
        self.hooks, self.epochs, self.batch_size = [], 1, 4
        self.wrapper = dict(optimizer=dict(type='AdamW', lr=0.05))

    def runner(self, **options):
        torch.manual_seed(3)
        return Runner(
            self.model(),
            self.work_dir,
            train_dataloader=images(12, self.batch_size),
            train_cfg=dict(by_epoch=True, max_epochs=self.epochs),
            optim_wrapper=copy.deepcopy(self.wrapper),
            custom_hooks=copy.deepcopy(self.hooks),
            experiment_name=f'srn{next(COUNTER)}',
            log_level='ERROR',
            **options,
        )

    def train(self, **options):
        runner = self.runner(**options)
        runner.train()
        return runner


COUNTER = itertools.count()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / 'work')


@pytest.fixture
def messages(monkeypatch):
    """Messages of the hook: (level, text)."""
    lines = []

    def note(message, logger=None, level=20):
        lines.append((level, message))

    monkeypatch.setattr(stable_rank_hook, 'print_log', note)
    return lines


@pytest.fixture
def projections(monkeypatch):
    """One entry for every time that the weights are projected."""
    calls, original = [], StableRankHook.project

    def counted(hook):
        calls.append(hook.steps)
        original(hook)

    monkeypatch.setattr(StableRankHook, 'project', counted)
    return calls


def share(weight, length=TOKENS):
    """Largest stable rank of a layer over the largest possible one."""
    if weight.dim() == 3:
        return kernel_stable_rank(weight[:, 0], length).max().item() / length
    return stable_rank(weight).item() / min(weight.shape)


def shares(model, patterns, **options):
    layers = find_layers(model, patterns)
    return [share(layer.weight, **options) for layer in layers.values()]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------- what it does


def test_bounds_hold_where_free_training_breaks_them(run):
    targets = dict(in_proj=0.2, x_proj=0.3, out_proj=0.15, conv1d=0.5)
    free = run.train().model
    run.hooks = [dict(SRN, targets=targets)]
    bound = run.train().model
    for name, target in targets.items():
        assert min(shares(free, [name])) > 1.02 * target
        assert max(shares(bound, [name])) <= target * (1 + 2e-6)
    saved = torch.load(f'{run.work_dir}/epoch_1.pth', weights_only=False)
    assert equal(saved['state_dict'], bound.state_dict())


def test_projecting_changes_no_norm(run):
    """And reaches the target exactly: no step, but once before training."""
    run.epochs, model = 0, Classifier
    run.hooks = [dict(SRN, targets=dict(in_proj=0.25, out_proj=0.2))]
    torch.manual_seed(3)
    before = layer_norms(find_layers(model(), ['in_proj', 'out_proj']))
    after = run.train().model
    found = layer_norms(find_layers(after, ['in_proj', 'out_proj']))
    assert found == pytest.approx(before, rel=1e-6)
    assert shares(after, ['in_proj']) == pytest.approx([0.25], rel=1e-6)
    assert shares(after, ['out_proj']) == pytest.approx([0.2], rel=1e-6)


def test_preserved_values(run):
    run.epochs = 0
    torch.manual_seed(3)
    (before,) = find_layers(Classifier(), ['in_proj']).values()
    run.hooks = [dict(SRN, targets=dict(in_proj=0.3), preserved=2)]
    (after,) = find_layers(run.train().model, ['in_proj']).values()
    found, wanted = (
        torch.linalg.svdvals(layer.weight) for layer in (after, before)
    )
    assert torch.allclose(found[:2], wanted[:2])
    assert (found[2:] < 0.9 * wanted[2:]).all()
    run.hooks[0].update(targets=dict(head=0.34))
    with pytest.raises(ValueError, match='2 preserved singular values'):
        run.train()


def test_kernels_and_patches_of_any_model(run):
    """Two-dimensional depthwise kernels, and patches as a matrix."""
    run.model = Convolutions
    run.hooks = [
        dict(
            SRN, targets={'backbone.0': 0.3, 'backbone.1': 0.2}, length=[4, 4]
        )
    ]
    model = run.train().model
    patches, kernels = (layer.weight for layer in model.backbone)
    assert stable_rank(patches.flatten(1)).item() <= 0.3 * 12 * (1 + 2e-6)
    ranks = kernel_stable_rank(kernels[:, 0], (4, 4))
    assert ranks.max().item() <= 0.2 * 16 * (1 + 2e-6)


@pytest.mark.parametrize(
    ('kernel', 'wanted'),
    [
        (dict(mode='equal'), (0.6, 0.6)),
        (dict(mode='reduce'), (None, 0.6)),
        (
            dict(solver='rgd', solver_options=dict(steps=30, step=1e-3)),
            (None, None),
        ),
        (dict(solver='srn_c'), (None, None)),
    ],
    ids=lambda x: x.get('solver', x.get('mode')) if 'get' in dir(x) else '',
)
def test_ways_to_normalize_kernels(run, kernel, wanted):
    run.hooks = [dict(SRN, targets=dict(conv1d=0.6), **kernel)]
    model = run.train().model
    found = torch.cat(
        [
            kernel_stable_rank(layer.weight[:, 0], TOKENS) / TOKENS
            for layer in find_layers(model, ['conv1d']).values()
        ]
    )
    lowest, highest = wanted
    if lowest:
        assert found.min().item() == pytest.approx(lowest, rel=1e-5)
    if highest:
        assert found.max().item() <= highest * (1 + 2e-6)
    else:
        assert found.max().item() > 0.61


def test_length_is_the_number_of_tokens(run):
    run.epochs = 0
    hooks = [SRN, dict(SRN, length=TOKENS), dict(SRN, length=9)]
    states = []
    for hook in hooks:
        run.hooks = [hook]
        states.append(run.train().model.state_dict())
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


def test_low_stable_ranks_are_left_alone(run, messages):
    """Bit for bit the run without it, which a share of 1 says."""
    baseline = run.train().model.state_dict()
    run.hooks = [dict(SRN, targets=dict.fromkeys(PROJECTIONS, 1.0))]
    assert equal(run.train().model.state_dict(), baseline)
    warnings = [text for level, text in messages if level >= 30]
    assert len(warnings) == 1
    assert 'never changes in_proj, x_proj' in warnings[0]


def test_report(run, messages):
    run.hooks = [dict(SRN, targets=dict(conv1d=0.5))]
    run.train()
    ((_, text),) = messages
    assert '2 like backbone.layers.0.mixer.directions.0.conv1d: ' in text
    assert text.endswith('to 0.500')


def test_base_config(tmp_path):
    """The file that configs inherit, on the digits."""
    cfg = digits_config(tmp_path)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    stabilizer = 'configs/_base_/stabilizers/srn.py'
    cfg.merge_from_dict(dict(cfg.fromfile(stabilizer)))
    model = train(cfg).model
    tokens = model.backbone.grid[0] * model.backbone.grid[1] + 1
    assert max(shares(model, ['in_proj', 'out_proj'])) < 0.3001
    assert max(shares(model, ['conv1d'], length=tokens)) < 0.5001
    default = StableRankHook().targets
    assert default == dict(cfg.custom_hooks[0].targets)


# ------------------------------------------------------------- when it acts


def test_once_and_then_after_each_step(run, projections):
    run.hooks = [SRN]
    run.train()
    assert projections == [0, 1, 2, 3]


def test_accumulating_iterations_project_nothing(run, projections):
    """Twelve iterations, of which every fourth makes a step."""
    run.hooks, run.batch_size = [SRN], 1
    run.wrapper['accumulative_counts'] = 4
    run.train()
    assert projections == [0, 1, 2, 3]


def test_interval(run, projections):
    run.hooks, run.epochs = [dict(SRN, interval=4)], 3
    run.train()
    assert projections == [0, 4, 8]


def test_second_run_projects_once_per_step(run, projections):
    run.hooks = [SRN]
    runner = run.train()
    projections.clear()
    runner.optim_wrapper.step()
    assert not projections


@pytest.mark.parametrize('interval', [1, 2])
def test_resume_repeats_the_uninterrupted_run(run, tmp_path, interval):
    """With an interval also from a checkpoint with free weights."""
    run.hooks, run.epochs = [dict(SRN, interval=interval), EMA], 2
    whole = run.train().model.state_dict()
    options = dict(load_from=f'{run.work_dir}/epoch_1.pth', resume=True)
    run.work_dir = str(tmp_path / 'resumed')
    assert equal(run.train(**options).model.state_dict(), whole)


def test_averages_are_projected(run):
    """The average of two matrices of rank 1 has a larger stable rank."""
    run.hooks = [dict(SRN, targets=dict(head=0.34)), EMA]
    runner = run.train()
    ema = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    averaged = ema.ema_model.module.head.weight
    averaged.data.copy_(torch.eye(3, 16))
    runner.save_checkpoint(run.work_dir, 'last.pth')
    saved = torch.load(f'{run.work_dir}/last.pth', weights_only=False)
    assert stable_rank(saved['state_dict']['head.weight']) <= 1.02 * (1 + 2e-6)
    averaged.data.copy_(torch.eye(3, 16))
    runner.call_hook('before_val_epoch')
    assert stable_rank(runner.model.head.weight) <= 1.02 * (1 + 2e-6)


@pytest.mark.parametrize('mode', ['project', 'reparam'])
def test_together_with_spectral_norms(run, mode):
    """Both rules hold, whatever the order in the config."""
    norm = dict(
        type='mmstabvim.WeightSpectralNormHook',
        layers=['in_proj', 'out_proj'],
        mode=mode,
        rule='divide',
        **(dict(exact=True) if mode == 'project' else {}),
    )
    rank = dict(SRN, targets=dict(in_proj=0.3, out_proj=0.25))
    states = []
    for hooks in ([norm, rank], [rank, norm]):
        run.hooks = hooks
        model = run.train().model.eval()
        assert max(shares(model, ['in_proj'])) < 0.3001
        assert max(shares(model, ['out_proj'])) < 0.2501
        norms = layer_norms(find_layers(model, ['in_proj', 'out_proj']))
        if mode == 'project':  # the other mode's norms are estimates
            assert list(norms.values()) == pytest.approx([1, 1], rel=1e-5)
        states.append(model.state_dict())
    assert equal(*states)


@pytest.mark.slow
def test_two_processes_stay_equal(tmp_path):
    """Bit by bit."""
    cfg = digits_config(tmp_path)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.train_dataloader.batch_size = 8
    cfg.custom_hooks = [dict(SRN)]
    a, b = train_in_two_processes(cfg, tmp_path, port=29731)
    assert equal(a, b)
    names = [name for name in a if name.endswith('in_proj.weight')]
    assert names
    assert max(share(a[name]) for name in names) < 0.3001


# ------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(targets=dict(in_proj=0.0)), r'in \(0, 1\], got 0\.0'),
        (dict(targets=dict(in_proj=1.1)), "got 1.1 for 'in_proj'"),
        (dict(preserved=-1), 'not be negative, got -1'),
        (dict(interval=0), 'at least 1, got 0'),
        (dict(mode='raise'), 'mode must be one of'),
        (dict(solver='newton'), 'solver must be one of'),
    ],
    ids=str,
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        StableRankHook(**options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(targets=dict(inproj=0.3)), "near names: .*'in_proj'"),
        (
            dict(targets={'in_proj': 0.3, 'mixer': 0.4}),
            'in_proj matches two patterns',
        ),
        (
            dict(targets=dict(conv1d=0.2)),
            r'conv1d has 4 taps, so at least 0\.25, got 0\.2',
        ),
        (dict(length=[4, 4]), 'length must have 1 numbers'),
        (dict(targets={}), 'match frozen weights only'),
    ],
    ids=str,
)
def test_refused_at_the_start(run, options, message):
    run.hooks, run.epochs = [dict(SRN, **options)], 0
    with pytest.raises(ValueError, match=message):
        run.train()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(dilation=2), 'stride and dilation 1'),
        (dict(stride=2), 'stride and dilation 1'),
        ({}, r'length must have 2 numbers .* got None'),
    ],
    ids=str,
)
def test_refused_convolutions(run, options, message):
    run.model = lambda: Convolutions(**options)
    run.hooks = [dict(SRN, targets={'backbone.1': 0.5})]
    with pytest.raises(ValueError, match=message):
        run.train()


def test_frozen_weights_stay(run):
    def frozen():
        model = Classifier()
        model.head.requires_grad_(False)
        return model

    run.model, run.hooks = frozen, [dict(SRN, targets=dict(head=0.35))]
    with pytest.raises(ValueError, match='frozen weights only'):
        run.train()
    run.hooks[0]['targets'].update(in_proj=0.3)
    torch.manual_seed(3)
    before = frozen().head.weight
    assert run.train().model.head.weight.equal(before)


def test_weights_that_are_not_finite_are_named(run):
    """The one of several layers of a shape."""
    run.hooks = [dict(SRN, targets=dict(x_proj=0.5))]
    runner = run.train()
    hook = next(h for h in runner.hooks if isinstance(h, StableRankHook))
    layers = find_layers(runner.model, ['x_proj'])
    for name in layers:
        kept = layers[name].weight.data.clone()
        layers[name].weight.data[1, 2] = torch.nan
        with pytest.raises(ValueError, match=f'{name}.weight has a NaN'):
            hook.project()
        layers[name].weight.data.copy_(kept)
    assert len(layers) == 2

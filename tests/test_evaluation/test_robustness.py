"""The wrapper and its metric: in a real test of both toolkits."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from small_runs import digits_config, scenes_config

from mmstabvim.evaluation import RobustnessMetric
from mmstabvim.evaluation.fourier_modes import Grid, fourier_mode, rms_contrast
from mmstabvim.evaluation.robustness_summary import by_frequency, summarize

CONFIGS = {'classifier': digits_config, 'segmentor': scenes_config}
TRAINING = (
    'train_dataloader',
    'train_cfg',
    'optim_wrapper',
    'param_scheduler',
    'val_dataloader',
    'val_cfg',
    'val_evaluator',
)


NUMBERS = itertools.count()


def wrapped_config(kind, tmp_path, **options):
    """A config that tests the wrapped model."""
    cfg = CONFIGS[kind](tmp_path)
    # the default is the time in seconds, by which runners of two toolkits
    # would share a scope
    cfg.experiment_name = f'wrapped{next(NUMBERS)}'
    for name in TRAINING:
        cfg.pop(name)
    cfg.visualizer.vis_backends = None
    cfg.model = dict(
        type='mmstabvim.RobustnessWrapper',
        module=cfg.model,
        amplitude=options.pop('amplitude', 0.5),
        **options,
    )
    cfg.test_evaluator = [
        cfg.test_evaluator,
        dict(type='mmstabvim.RobustnessMetric'),
    ]
    return cfg


def build(kind, tmp_path, **options):
    return Runner.from_cfg(wrapped_config(kind, tmp_path, **options))


def first_batch(runner):
    return next(iter(runner.test_dataloader))


def logits_of(model, inputs, samples):
    """Logits of the model itself, (batch, classes, ...)."""
    if 'gt_sem_seg' not in samples[0]:
        return model(inputs, mode='tensor')
    found = model(inputs, copy.deepcopy(samples), mode='predict')
    return torch.stack([sample.seg_logits.data for sample in found])


@pytest.fixture(scope='module', params=sorted(CONFIGS))
def tested(request, tmp_path_factory):
    """Runner after a test with three frequencies, its metrics and rows."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    runner = build(request.param, folder, frequencies=3, clip=True)
    metrics = runner.test()
    return runner, metrics, runner.test_evaluator.metrics[1].rows


# ------------------------------------------------------------- a whole test


def test_clean_scores_are_those_of_the_toolkits(tested):
    """The other metric sees clean predictions, and agrees."""
    _, metrics, rows = tested
    if 'mIoU' in metrics:
        assert rows[0]['mIoU'] == pytest.approx(metrics['mIoU'], abs=6e-3)
        assert rows[0]['aAcc'] == pytest.approx(metrics['aAcc'], abs=6e-3)
    else:
        assert rows[0]['top1'] == pytest.approx(metrics['accuracy/top1'])
    assert rows[0]['flip_rate'] == rows[0]['logit_shift'] == 0


def test_the_sweep(tested):
    """Three frequencies, no silent sine, then the corruptions."""
    rows = tested[2]
    found = [(row['kind'], row['frequency'], row['phase']) for row in rows]
    assert found == [
        ('clean', None, None),
        ('fourier', 0.0, 0.0),
        ('fourier', 0.25, 0.0),
        ('fourier', 0.25, math.pi / 2),
        ('fourier', 0.5, 0.0),
        ('gaussian', None, None),
        ('brighter', None, None),
        ('darker', None, None),
        ('jpeg', None, None),
    ]
    assert all(row['images'] in (8, 48) for row in rows)
    assert all(row['logit_shift'] > 0 for row in rows[1:])
    assert {row['relative_rms'] <= 0.5001 for row in rows} == {True}


def test_brightness_is_the_mode_of_frequency_zero(tested):
    """A different way through the code, the same numbers."""
    rows = {(row['kind'], row['frequency']): row for row in tested[2]}
    mode, brighter = rows['fourier', 0.0], rows['brighter', None]
    for name in mode.keys() - {'kind', 'frequency', 'phase'}:
        assert mode[name] == pytest.approx(brighter[name], rel=1e-6)


def test_the_metrics_are_logged(tested):
    _, metrics, rows = tested
    name = 'mIoU' if 'mIoU' in rows[0] else 'top1'
    assert metrics[f'robustness/clean_{name}'] == rows[0][name]
    assert metrics['robustness/jpeg_flip_rate'] == rows[-1]['flip_rate']
    assert not [key for key in metrics if 'loss' in key]


# --------------------------------------------------------------- one by one


@pytest.mark.parametrize(
    ('kind', 'level', 'grid'),
    [
        ('classifier', 'token', Grid(8, 8, (4, 4))),
        ('classifier', 'pixel', Grid(32, 32)),
        ('segmentor', 'token', Grid(8, 8, (4, 4))),
    ],
    ids=['classifier', 'pixels', 'segmentor'],
)
def test_numbers_of_one_mode(kind, level, grid, tmp_path):
    """Redone by hand: noise before normalization, answers compared."""
    frequency, phase = 3 / 64, 0.4
    runner = build(
        kind,
        tmp_path,
        frequencies=[frequency],
        phases=[phase],
        level=level,
        corruptions=[],
    )
    model = runner.model.module.eval()
    data = first_batch(runner)
    samples = runner.model.test_step(copy.deepcopy(data))
    prepared = model.data_preprocessor(copy.deepcopy(data), False)
    clean = prepared['inputs']
    mode = fourier_mode(grid, frequency, phase, (32, 32))
    std = model.data_preprocessor.std
    noise = torch.stack(
        [
            0.5 * rms_contrast(image.float()) * mode.float() / std
            for image in data['inputs']
        ]
    )
    with torch.no_grad():
        old, new = (
            logits_of(model, inputs, prepared['data_samples'])
            for inputs in (clean, clean + noise)
        )
    shifts = (new - old).double().norm(dim=1)
    flips = (new.argmax(1) != old.argmax(1)).double()
    shifts, flips = (x.reshape(len(x), -1).mean(1) for x in (shifts, flips))
    found = [sample.robustness for sample in samples]
    np.testing.assert_allclose(
        [record['shift'][1] for record in found], shifts, rtol=1e-3
    )
    np.testing.assert_allclose(
        [record['flips'][1] for record in found], flips, atol=2e-3
    )
    assert all(record['relative_rms'][1] > 0.499 for record in found)


@pytest.mark.parametrize('kind', sorted(CONFIGS))
def test_modes_on_the_tokens(kind, tmp_path):
    """Level embed: the image stays, the tokens change, the hook goes."""
    runner = build(
        kind, tmp_path, frequencies=[0.25], level='embed', corruptions=[]
    )
    wrapper = runner.model.eval()
    embed = wrapper.module.backbone.patch_embed
    seen = []
    # after the wrapper's own, which it adds and removes for each pass
    outputs = []
    handle = embed.projection.register_forward_hook(
        lambda _module, _args, out: seen.append(out)
    )
    block = wrapper.module.backbone.layers[0]
    second = block.register_forward_pre_hook(
        lambda _module, args: outputs.append(args[0])
    )
    samples = wrapper.test_step(first_batch(runner))
    handle.remove()
    second.remove()
    assert torch.equal(seen[0], seen[-1])
    assert not torch.equal(outputs[0], outputs[-1])
    assert not embed._forward_hooks
    for sample in samples:
        sizes = sample.robustness['relative_rms'][1:]
        np.testing.assert_allclose(sizes, 0.5, rtol=1e-5)


def test_random_phases_are_seeded(tmp_path):
    phases = []
    for seed in (0, 0, 1):
        runner = build(
            'classifier', tmp_path, frequencies=[0.1, 0.2], phases=3, seed=seed
        )
        modes = list(runner.model._modes(Grid(8, 8)))
        assert [mode.frequency for mode in modes] == [0.1] * 3 + [0.2] * 3
        phases.append([mode.phase for mode in modes])
    assert phases[0] == phases[1] != phases[2]
    assert len(set(phases[0])) == 6


def test_plane_waves_and_options_in_a_config(tmp_path):
    """Pairs of frequencies, and a corruption with an option."""
    runner = build(
        'classifier',
        tmp_path,
        frequencies=[(0.125, 0.25)],
        corruptions=[dict(type='jpeg', quality=10)],
    )
    wrapper, data = runner.model.eval(), first_batch(runner)
    (sample, *_) = wrapper.test_step(data)
    modes = sample.robustness['modes']
    kinds = ['clean', 'fourier', 'fourier', 'jpeg10']
    assert [mode['kind'] for mode in modes] == kinds
    assert modes[1]['frequency'] == (0.125, 0.25)
    image = data['inputs'][0].float()
    noise = wrapper.sweep[0](image, Grid(8, 8, (4, 4))) - image
    turns = 0.125 * torch.arange(8) + 0.25 * torch.arange(8)[:, None]
    wave = torch.cos(2 * math.pi * turns)
    cells = noise[0, ::4, ::4]
    torch.testing.assert_close(cells / cells[0, 0], wave)


def test_the_model_inside_loads_its_checkpoint(tmp_path):
    """The keys of a checkpoint are those of the model alone."""
    runner = build('classifier', tmp_path)
    weights = {
        name: torch.full_like(value, 0.5)
        for name, value in runner.model.module.state_dict().items()
    }
    torch.save({'state_dict': weights}, tmp_path / 'half.pth')
    runner.load_checkpoint(str(tmp_path / 'half.pth'), strict=True)
    head = runner.model.module.head.fc.weight
    assert torch.equal(head, torch.full_like(head, 0.5))


def test_any_backbone_with_a_patch_size(tmp_path):
    """A ResNet has no patches; the wrapper asks for their size."""
    cfg = wrapped_config('classifier', tmp_path, frequencies=2)
    cfg.model.module.backbone = dict(
        type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8
    )
    cfg.model.module.neck = dict(type='GlobalAveragePooling')
    cfg.model.module.head.in_channels = 64
    runner = Runner.from_cfg(cfg)
    data = first_batch(runner)
    with pytest.raises(ValueError, match='needs a backbone with patch_embed'):
        runner.model.eval().test_step(data)
    runner.model.patch_size = 8
    samples = runner.model.test_step(data)
    modes = samples[0].robustness['modes']
    assert [mode['frequency'] for mode in modes[1:3]] == [0.0, 0.5]


def test_vision_transformers_of_the_toolkits(tmp_path):
    """Their patches are found, on the image and after the embedding."""
    for level in ('token', 'embed'):
        cfg = wrapped_config(
            'classifier', tmp_path, frequencies=2, level=level, corruptions=[]
        )
        cfg.model.module.backbone = dict(
            type='VisionTransformer',
            arch=dict(
                embed_dims=16,
                num_layers=1,
                num_heads=2,
                feedforward_channels=16,
            ),
            img_size=32,
            patch_size=8,
        )
        cfg.model.module.head = dict(
            type='VisionTransformerClsHead', num_classes=10, in_channels=16
        )
        runner = Runner.from_cfg(cfg)
        samples = runner.model.eval().test_step(first_batch(runner))
        assert all(s.robustness['shift'][1:].min() > 0 for s in samples)


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize('level', ['token', 'pixel'])
def test_sliding_windows_are_refused(level, tmp_path):
    cfg = wrapped_config('segmentor', tmp_path, level=level)
    cfg.model.module.test_cfg = dict(
        mode='slide', crop_size=(16, 16), stride=(8, 8)
    )
    with pytest.raises(ValueError, match=r"got test_cfg\.mode='slide'"):
        Runner.from_cfg(cfg)


def test_modes_of_sliding_windows(tmp_path):
    """On the tokens they are those of a window, 4 x 4 patches."""
    cfg = wrapped_config(
        'segmentor', tmp_path, level='embed', phases=[0.0], corruptions=[]
    )
    cfg.model.module.test_cfg = dict(
        mode='slide', crop_size=(16, 16), stride=(16, 16)
    )
    runner = Runner.from_cfg(cfg)
    (sample, *_) = runner.model.eval().test_step(first_batch(runner))
    found = [mode['frequency'] for mode in sample.robustness['modes'][1:]]
    assert found == [k / 16 for k in range(9)]
    assert sample.robustness['shift'][1:].min() > 0


def test_the_metric_wants_the_wrapper():
    with pytest.raises(ValueError, match='inside mmstabvim'):
        RobustnessMetric().process(None, [{'pred_label': 1}])


def test_a_sample_without_annotation(tmp_path):
    runner = build('classifier', tmp_path)
    data = first_batch(runner)
    for sample in data['data_samples']:
        del sample.gt_label
    with pytest.raises(ValueError, match='must have one gt_label'):
        runner.model.eval().test_step(data)


def test_a_model_without_logits(tmp_path):
    runner = build('classifier', tmp_path)
    module = runner.model.eval().module
    module.head.forward = lambda feats: feats[0][0]
    module.head.predict = lambda feats, samples: samples
    with pytest.raises(TypeError, match=r'must return logits \(batch'):
        runner.model.test_step(first_batch(runner))


def test_registered_under_the_name_of_the_package():
    import mmstabvim

    found = MODELS.get('mmstabvim.RobustnessWrapper')
    assert found is mmstabvim.RobustnessWrapper


# ------------------------------------------------------------------- summary


def record(top1, flips, shifts, relative=0.1):
    """Record that the wrapper attaches to one image."""
    modes = [
        dict(kind='clean', frequency=None, phase=None),
        dict(kind='fourier', frequency=0.0, phase=0.0),
        dict(kind='fourier', frequency=0.5, phase=0.0),
        dict(kind='fourier', frequency=0.5, phase=1.0),
        dict(kind='jpeg', frequency=None, phase=None),
    ]
    return dict(
        modes=modes,
        correct=np.array(top1),
        counted=np.ones(5),
        flips=np.array(flips),
        shift=np.array(shifts),
        relative_rms=np.array([0.0, *[relative] * 4]),
    )


def test_means_over_images_phases_and_frequencies():
    metric = RobustnessMetric()
    first = record([1, 1, 0, 0, 1], [0, 0, 1, 1, 0], [0, 1.0, 2.0, 4.0, 1.5])
    second = record([1, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 3.0, 2.0, 0.0, 0.5])
    plain = record([0] * 5, [0] * 5, [0.0] * 5, relative=math.nan)
    samples = [
        BaseDataElement(robustness=r).to_dict() for r in (first, second, plain)
    ]
    metric.process(None, samples[:2])
    metric.process(None, samples[2:])
    found = metric.evaluate(3)
    expected = {
        'clean_top1': 200 / 3,
        'fourier_top1_mean': (100 / 3 + 50 / 3) / 2,
        'fourier_top1_worst': 50 / 3,
        'fourier_top1_worst_frequency': 0.5,
        'fourier_flip_rate_mean': (100 / 3 + 50) / 2,
        'fourier_flip_rate_worst': 50.0,
        'fourier_flip_rate_worst_frequency': 0.5,
        'fourier_logit_shift_mean': 4 / 3,
        'fourier_logit_shift_worst': 4 / 3,
        'fourier_logit_shift_worst_frequency': 0.0,
        'jpeg_top1': 200 / 3,
        'jpeg_flip_rate': 0.0,
        'jpeg_logit_shift': 2 / 3,
    }
    assert found == pytest.approx(
        {f'robustness/{name}': value for name, value in expected.items()}
    )
    # of the two images that have contrast
    assert metric.rows[1]['relative_rms'] == pytest.approx(0.1)


def test_several_processes_are_summed():
    """Each has one sum; that of all gives what one process finds."""
    first = record([1, 1, 0, 0, 1], [0, 0, 1, 1, 0], [0, 1.0, 2.0, 4.0, 1.5])
    second = record([1, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 3.0, 2.0, 0.0, 0.5])
    parts = [RobustnessMetric(), RobustnessMetric()]
    whole = RobustnessMetric()
    for part, sample in zip(parts, (first, second), strict=True):
        part.process(None, [{'robustness': sample}])
        whole.process(None, [{'robustness': sample}])
    sums = [part.results[0] for part in parts]
    assert parts[0].compute_metrics(sums) == whole.compute_metrics(
        whole.results
    )
    assert whole.rows[0]['images'] == 2


def test_samples_must_agree_on_the_sweep():
    metric = RobustnessMetric()
    first = record([1] * 5, [0] * 5, [0.0] * 5)
    other = dict(first, modes=first['modes'][:4])
    metric.process(None, [{'robustness': first}])
    with pytest.raises(ValueError, match='same corruptions, got 5 and 4'):
        metric.process(None, [{'robustness': other}])


def test_what_is_not_a_number_is_the_worst():
    rows = [
        dict(kind=kind, frequency=f, phase=0.0, top1=t, flip_rate=0.0)
        | dict(logit_shift=shift)
        for kind, f, t, shift in [
            ('clean', None, 90.0, 0.0),
            ('fourier', 0.0, 10.0, 5.0),
            ('fourier', 0.3, 20.0, math.nan),
        ]
    ]
    found = summarize(rows, 'top1')
    assert found['fourier_logit_shift_worst_frequency'] == 0.3
    assert math.isnan(found['fourier_logit_shift_mean'])
    assert found['fourier_top1_worst_frequency'] == 0.0


def test_plane_waves_have_two_frequencies():
    rows = [
        dict(kind='clean', frequency=None, phase=None, top1=1.0)
        | dict(flip_rate=0.0, logit_shift=0.0),
        dict(kind='fourier', frequency=(0.1, 0.2), phase=0.0, top1=0.5)
        | dict(flip_rate=1.0, logit_shift=2.0),
    ]
    found = summarize(rows, 'top1')
    assert found['fourier_top1_worst_frequency_x'] == 0.1
    assert found['fourier_top1_worst_frequency_y'] == 0.2
    assert by_frequency(rows)[0]['frequency'] == (0.1, 0.2)

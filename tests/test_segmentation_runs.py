"""Segmentation end to end: real runners of MMSegmentation on few scenes."""

import copy
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import (
    assert_same_weights,
    load_tool,
    run_tool,
    scalars,
    scenes_config,
    shake_generators,
    train,
    train_in_two_processes,
    vary_predictions,
)

from mmstabvim.layers.state_matrix import state_matrices
from mmstabvim.stability import find_layers, layer_norms, stable_rank

trainer = load_tool('train')
# not `test`: pytest would collect it
tester = load_tool('test')

FULL = dict(type='full', groups=2)
SN = dict(type='mmstabvim.SpectralNormalizationHook', rho_max=2.0)
EC = dict(type='mmstabvim.EigenvalueClampingHook', eps=1.5)
# a negative one penalizes the slowest modes, which start at -1: never zero
SP = dict(type='mmstabvim.StabilityLossHook', eps=-2.0, reduction='mean')
WEIGHT_SN = dict(
    type='mmstabvim.WeightSpectralNormHook',
    layers=['in_proj'],
    max_norm=0.5,
    exact=True,
)
SRN = dict(type='mmstabvim.StableRankHook', targets=dict(out_proj=0.2))


@pytest.fixture
def config(tmp_path):
    return scenes_config(tmp_path)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Config and runner of one training without extras."""
    cfg = scenes_config(tmp_path_factory.mktemp('plain'))
    cfg.val_evaluator.type = 'mmstabvim.ClassIoUMetric'
    return cfg, train(cfg)


def sum_of_heads(cfg):
    """The losses of both heads, by iteration."""
    first, second = (
        scalars(cfg, f'{head}.loss_ce') for head in ('decode', 'aux')
    )
    return {step: first[step] + second[step] for step in first}


def dump(cfg, path):
    cfg.dump(path)
    return path


# ------------------------------------------------- train, validate, resume


def test_trains_validates_saves_and_logs(plain):
    """Finite losses of every step, scores of every class, spectra."""
    cfg, runner = plain
    losses = scalars(cfg)
    assert sorted(losses) == [1, 2, 3, 4]
    assert np.isfinite(list(losses.values())).all()
    assert losses == pytest.approx(sum_of_heads(cfg), rel=1e-6)
    assert sorted(scalars(cfg, 'mIoU')) == [2, 4]
    means, classes = scalars(cfg, 'mIoU'), runner.val_dataloader.dataset
    each = [scalars(cfg, f'IoU/{n}')[4] for n in classes.metainfo['classes']]
    assert means[4] == pytest.approx(np.nanmean(each), abs=0.01)
    assert sorted(scalars(cfg, 'stab/spectral_abscissa')) == [1, 2, 3, 4]
    names = {path.name for path in Path(cfg.work_dir).glob('*.pth')}
    assert names == {'iter_2.pth', 'iter_4.pth'}


@pytest.mark.parametrize('hooks', [[], [SN, EC, SP]], ids=['plain', 'all'])
def test_resume_repeats_the_uninterrupted_run(config, tmp_path, hooks):
    """Losses, score and weights, bit by bit, with drop path and dropout."""
    config.custom_hooks = hooks
    config.model.backbone.state_matrix = dict(type='signed')
    whole = train(config)
    resumed = copy.deepcopy(config)
    resumed.work_dir = str(tmp_path / 'resumed')
    resumed.resume = True
    resumed.load_from = f'{config.work_dir}/iter_2.pth'
    shake_generators()
    again = train(resumed)
    losses = scalars(config)
    assert scalars(resumed) == {i: losses[i] for i in (3, 4)}
    assert scalars(resumed, 'mIoU')[4] == scalars(config, 'mIoU')[4]
    assert_same_weights(whole, again)


def test_bfloat16_autocast_on_a_cpu(plain, config):
    """Finite, near float32, and not the same: through the tool's --amp."""
    path = dump(config, Path(config.work_dir).with_name('amp.py'))
    run_tool(trainer, path, '--amp')
    low, exact = scalars(config), scalars(plain[0])
    assert sorted(low) == [1, 2, 3, 4]
    assert low != exact
    assert low[1] == pytest.approx(exact[1], rel=0.02)
    assert np.isfinite(list(low.values())).all()
    assert 0 <= scalars(config, 'mIoU')[4] <= 100


def test_recomputing_blocks_changes_nothing(plain, config):
    """Gradient checkpointing gives the same steps, bit by bit."""
    config.model.backbone.with_cp = True
    again = train(config)
    assert scalars(config) == scalars(plain[0])
    assert_same_weights(plain[1], again)


def test_two_processes(config, tmp_path):
    """The ranks see different scenes and keep one set of weights.

    With SyncBN, which PyTorch does not have on a CPU: the tool makes it BN,
    and so each rank has statistics of its own.
    """
    norm = dict(type='SyncBN', requires_grad=True)
    for part in ('neck', 'decode_head', 'auxiliary_head'):
        config.model[part].norm_cfg = norm
    config.custom_hooks = []
    first, second = train_in_two_processes(config, tmp_path, 29643)
    steps = scalars(config)
    assert sorted(steps) == [1, 2, 3, 4]
    assert sorted(scalars(config, 'mIoU')) == [2, 4]
    means = [name for name in first if name.endswith('running_mean')]
    own = [*means, *(n.replace('mean', 'var') for n in means)]
    assert means
    assert not any(torch.equal(first[n], second[n]) for n in means)
    for name in {*first} - {*own}:
        assert torch.equal(first[name], second[name]), name
    halfway = torch.load(f'{config.work_dir}/iter_2.pth', weights_only=False)
    name = 'backbone.patch_embed.projection.weight'
    assert not torch.equal(first[name], halfway['state_dict'][name])


# ------------------------------------------------------------- stabilizers


def eigenvalues(model):
    found = [m.eigenvalues() for m in state_matrices(model).values()]
    assert found
    return torch.cat([values.flatten() for values in found])


def norms(model):
    return layer_norms(find_layers(model, ['in_proj'])).values()


def ranks(model):
    layers = find_layers(model, ['out_proj'])
    return torch.stack([stable_rank(m.weight) for m in layers.values()])


# what a hook bounds, and by how much: a model without it is above
BOUNDS = {
    'sn': (SN, lambda model: eigenvalues(model).abs().max(), 2.0),
    'ec': (EC, lambda model: eigenvalues(model).real.max(), -1.5),
    'weight-sn': (WEIGHT_SN, lambda model: max(norms(model)), 0.5),
    'srn': (SRN, lambda model: ranks(model).max(), 0.2 * 16),
}


def quick(cfg):
    """Two large steps, with matrices that every hook can change."""
    cfg.train_cfg.update(max_iters=2, val_interval=3)
    cfg.optim_wrapper.optimizer.lr = 0.05
    cfg.model.backbone.state_matrix = FULL
    return cfg


@pytest.fixture(scope='module')
def free(tmp_path_factory):
    """A model trained without stabilizers."""
    return train(quick(scenes_config(tmp_path_factory.mktemp('free')))).model


@pytest.mark.parametrize('name', BOUNDS)
def test_stabilizer_acts_in_a_segmentor(free, config, name):
    """What it bounds is within the bound after training with it only."""
    hook, measure, bound = BOUNDS[name]
    config.custom_hooks = [hook]
    stabilized = train(quick(config)).model
    assert measure(free) > bound + 0.1
    assert measure(stabilized) <= bound + 1e-3
    assert all(p.isfinite().all() for p in stabilized.parameters())


def test_stability_loss_is_logged_and_counted(config):
    """Beside the heads' losses, as a part of the total."""
    config.custom_hooks = [SP]
    train(quick(config))
    total, stab = scalars(config), scalars(config, 'loss_stab')
    heads = sum_of_heads(config)
    assert sorted(stab) == [1, 2]
    for step, value in stab.items():
        assert value > 0
        assert total[step] == pytest.approx(heads[step] + value, rel=1e-6)


# ---------------------------------------------------------------- test tool


@pytest.fixture(scope='module')
def checkpoint(plain, tmp_path_factory):
    """Weights with which several classes are predicted."""
    source = f'{plain[0].work_dir}/iter_4.pth'
    folder = tmp_path_factory.mktemp('varied')
    return vary_predictions(source, folder / 'varied.pth')


@pytest.fixture
def test_config(plain, tmp_path, monkeypatch):
    """The config of the plain run for the test tool, in a new folder."""
    monkeypatch.chdir(tmp_path)
    cfg = copy.deepcopy(plain[0])
    cfg.work_dir = str(tmp_path / 'test')
    return cfg


def test_testing_gives_what_validation_gave(plain, test_config, tmp_path):
    path = dump(test_config, tmp_path / 'test.py')
    last = f'{plain[0].work_dir}/iter_4.pth'
    run_tool(tester, path, last, '--out', 'metrics.json')
    tested = mmengine.load('metrics.json')
    assert tested['mIoU'] == scalars(plain[0], 'mIoU')[4]
    assert tested['aAcc'] == scalars(plain[0], 'aAcc')[4]


def masks_of(tool_args, config, checkpoint, folder):
    run_tool(tester, config, checkpoint, '--out', folder, *tool_args)
    paths = sorted(Path(folder).glob('*.png'))
    assert [p.name for p in paths] == [f'{i:05d}.png' for i in range(8)]
    return np.stack([np.asarray(Image.open(p)) for p in paths])


@pytest.mark.parametrize('metric', ['IoUMetric', 'mmstabvim.ClassIoUMetric'])
def test_masks_are_written(test_config, checkpoint, tmp_path, metric):
    """The predicted classes, at the images' size, by either metric."""
    test_config.test_evaluator.type = metric
    path = dump(test_config, tmp_path / 'test.py')
    masks = masks_of([], path, checkpoint, 'masks')
    assert masks.shape == (8, 32, 32)
    assert 2 <= len(np.unique(masks)) <= 11
    assert masks.max() < 11


def test_tta_joins_predictions_of_several_sizes(
    test_config, checkpoint, tmp_path
):
    """Not those of one size; and the same as without TTA for that size."""
    whole = dump(test_config, tmp_path / 'several.py')
    several = masks_of(['--tta'], whole, checkpoint, 'several')
    sizes = test_config.tta_pipeline[1].transforms[0]
    test_config.tta_pipeline[1].transforms[0] = [
        size for size in sizes if size.scale_factor == 1.0
    ]
    single = dump(test_config, tmp_path / 'single.py')
    joined = masks_of(['--tta'], single, checkpoint, 'joined')
    usual = masks_of([], single, checkpoint, 'usual')
    assert np.array_equal(joined, usual)
    assert several.shape == usual.shape
    assert 0 < np.mean(several != usual) < 0.5


@pytest.mark.parametrize('tta', [[], ['--tta']], ids=['plain', 'tta'])
def test_overlays(test_config, checkpoint, tmp_path, tta):
    """Truth and prediction side by side, one file for each image."""
    path = dump(test_config, tmp_path / 'test.py')
    run_tool(tester, path, checkpoint, '--show-dir', 'shown', *tta)
    files = sorted(Path('shown').rglob('*.png'))
    assert len(files) == 8
    for file in files:
        pixels = np.asarray(Image.open(file))
        assert pixels.shape == (256, 512, 3)  # enlarged eight times
        truth, prediction = pixels[:, :256], pixels[:, 256:]
        assert not np.array_equal(truth, prediction)
        assert all(len(np.unique(half)) > 20 for half in (truth, prediction))


# ---------------------------------------------------------------- bad input


@pytest.fixture
def street_config(config, tmp_path):
    """Four images and masks in folders, in CamVid's layout."""
    root, rng = tmp_path / 'street', np.random.default_rng(0)
    for kind, shape in (('img', (32, 32, 3)), ('ann', (32, 32))):
        (root / kind).mkdir(parents=True)
        for i in range(4):
            suffix = 'jpg' if kind == 'img' else 'png'
            pixels = rng.integers(0, 12, shape, np.uint8)
            Image.fromarray(pixels).save(root / kind / f'{i}.{suffix}')
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'].dataset = dict(
            type='mmstabvim.CamVidDataset',
            data_root=str(root),
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            pipeline=config[f'{split}_dataloader'].dataset.pipeline,
        )
    for name in ('decode_head', 'auxiliary_head'):
        # weights of classes and ignored pixels do not go together
        config.model[name].loss_decode.class_weight = None
    return config


def remove_masks(config, root):
    for path in (root / 'ann').iterdir():
        path.unlink()


def remove_mask_folder(config, root):
    (root / 'ann').rename(root / 'elsewhere')


def shrink_a_mask(config, root):
    Image.new('L', (32, 16)).save(root / 'ann/2.png')


def spoil_labels(config, root):
    Image.new('L', (32, 32), 77).save(root / 'ann/2.png')


def widen(config, root):
    config.model.backbone.arch.embed_dims = 24
    config.model.neck.in_channels = 24
    config.model.decode_head.in_channels = [24, 24]
    config.model.auxiliary_head.in_channels = 24


def load_narrow_weights(config, root):
    widen(config, root)
    config.load_from = CHECKPOINT


def start_from_narrow_weights(config, root):
    widen(config, root)
    config.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=CHECKPOINT, prefix='backbone.'
    )


def expect_a_class_token(config, root):
    config.model.backbone.cls_token = 'middle'
    config.load_from = CHECKPOINT


def return_a_map_too_many(config, root):
    config.model.backbone.out_indices = [0, 1, 2]


def return_too_few_maps(config, root):
    config.model.backbone.out_indices = [2]
    config.model.neck = None


CHECKPOINT = 'checkpoint.pth'
WIDTH = r'the checkpoint has embed_dims 16, the model 24: choose the arch'
MISTAKES = {
    remove_masks: r'4 of 4 images have no mask.*img/0\.jpg.*ann/0\.png',
    remove_mask_folder: r'4 of 4 images have no mask.*img/0\.jpg.*ann/0\.png',
    shrink_a_mask: r'ann/2\.png must be of the size.*\(32, 32\).*\(32, 16\)',
    spoil_labels: r'ann/2\.png must hold labels.*0 to 10.*\[77\] in 1024',
    load_narrow_weights: WIDTH,
    start_from_narrow_weights: WIDTH,
    expect_a_class_token: r"cls_token None, the model 'middle'",
    return_a_map_too_many: r'out_indices must give 1 map, or 2,.*got 3',
    return_too_few_maps: r'in_index must be below 1, .*out_indices \[2\]',
}


@pytest.mark.parametrize('spoil', MISTAKES, ids=lambda f: f.__name__)
def test_bad_input_is_named_before_training(
    plain, street_config, tmp_path, monkeypatch, spoil
):
    """By the training tool, before the first iteration."""
    monkeypatch.chdir(tmp_path)
    Path(CHECKPOINT).symlink_to(f'{plain[0].work_dir}/iter_4.pth')
    spoil(street_config, tmp_path / 'street')
    path = dump(street_config, tmp_path / 'spoilt.py')
    with pytest.raises(ValueError, match=MISTAKES[spoil]):
        run_tool(trainer, path)
    assert scalars(street_config) == {}


def test_good_input_of_the_same_kind_is_trained_on(street_config, tmp_path):
    """What the mistakes are made in; void pixels are ignored."""
    run_tool(trainer, dump(street_config, tmp_path / 'good.py'))
    assert np.isfinite(list(scalars(street_config).values())).all()
    assert len(scalars(street_config)) == 4

"""Examples that mix this project into the toolkits' own configs.

Each is loaded, built, trained and evaluated in a real Runner: at its own
width, so that numbers of channels must fit, but with two to four layers, and
segmentation at an eighth of the image size.
"""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import cv2
import mmpretrain
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from test_configs import make_imagenet

import mmstabvim
from mmstabvim.layers.state_matrix import state_matrices

ROOT = Path(__file__).resolve().parents[1]
MIX_IN = ROOT / 'configs' / 'mix_in'
PAGE = ROOT / 'docs' / 'mix_in.md'
README = ROOT / 'README.md'
DEIT = 'vim-tiny-p16_4xb256-deit_in1k.py'
UPERNET = 'vim-tiny-p16_upernet_8xb2-160k-swin_ade20k-512x512.py'
SEGMENTER = 'vim-tiny-p16_segmenter-mask_8xb1-160k_ade20k-512x512.py'
FCN = 'vim-small-p16_fcn_8xb1-160k_ade20k-512x512.py'
RESNET = 'resnet18_8xb16-hooks_cifar10.py'
PYTHON_STYLE = 'vim_nano_p4_1xb64_20e_all_digits.py'
CLASSES = ['n01440764', 'n01443537']
# lengths in pixels; the 512 channels of UPerHead shrink along
SMALLER = {2048: 256, 512: 64, 480: 48}


def load(name):
    return Config.fromfile(MIX_IN / name)


# --- smaller ----------------------------------------------------------------


def make_ade(root):
    """Two training images and one validation image in ADE20K's folders."""
    rng = np.random.default_rng(0)
    for split, count in (('training', 2), ('validation', 1)):
        images = root / 'images' / split
        masks = root / 'annotations' / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 256, (70, 90, 3), np.uint8)
            mask = rng.integers(0, 151, (7, 9), np.uint8)
            mask = mask.repeat(10, axis=0).repeat(10, axis=1)
            cv2.imwrite(str(images / f'{index}.jpg'), image)
            cv2.imwrite(str(masks / f'{index}.png'), mask)


def loaders(cfg):
    return [cfg[f'{part}_dataloader'] for part in ('train', 'val', 'test')]


def shallow(cfg, num_layers):
    """Take blocks away, once the whole backbone was built without memory."""
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    assert backbone.num_layers == 24
    cfg.model.backbone.arch = dict(
        embed_dims=backbone.embed_dims, num_layers=num_layers
    )


def small_imagenet(cfg, folder):
    """Two layers; two steps of four images, at the full image size."""
    make_imagenet(folder / 'imagenet', CLASSES)
    shallow(cfg, 2)
    for loader in loaders(cfg):
        loader.batch_size = 4
        loader.dataset.data_root = str(folder / 'imagenet')
        loader.dataset.metainfo = dict(classes=CLASSES)
    cfg.val_evaluator.topk = cfg.test_evaluator.topk = 1
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.param_scheduler = None
    return cfg


def small_ade(cfg, folder):
    """Four layers; one step of two crops of 64 x 64."""
    make_ade(folder / 'ade')
    shallow(cfg, 4)
    cfg = Config(smaller(cfg.to_dict()))
    backbone = cfg.model.backbone
    if 'out_indices' in backbone:
        assert backbone.out_indices == (5, 11, 17, 23)
        backbone.out_indices = (0, 1, 2, 3)
    for loader in loaders(cfg):
        loader.dataset.data_root = str(folder / 'ade')
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=1, val_interval=1
    )
    # the first step of a warm-up is too small to see in float32
    cfg.param_scheduler = None
    return cfg


def smaller(node):
    """A config with every length that SMALLER names replaced."""
    if isinstance(node, dict):
        return {key: smaller(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(smaller, node))
    return SMALLER.get(node, node) if isinstance(node, int) else node


def digits_for_cifar(cfg, folder):
    """A narrow ResNet; digits, which have CIFAR's size and classes."""
    cfg.model.backbone.update(stem_channels=8, base_channels=8)
    cfg.model.head.in_channels = 64
    splits = ('train', 'test', 'test')
    for split, loader in zip(splits, loaders(cfg), strict=True):
        loader.batch_size = 4
        loader.dataset = dict(
            type='mmstabvim.Digits',
            split=split,
            indices=8,
            pipeline=loader.dataset.pipeline,
        )
    cfg.train_cfg.max_epochs = 1
    return cfg


def small_digits(cfg, folder):
    """Three epochs of one step: the warm-up and the start of the cosine."""
    cfg = Config(cfg.to_dict())
    for loader in loaders(cfg):
        loader.dataset.indices = 8
        loader.batch_size = 8
    cfg.train_cfg.max_epochs = 3
    return cfg


PREPARE = {
    DEIT: small_imagenet,
    UPERNET: small_ade,
    SEGMENTER: small_ade,
    FCN: small_ade,
    RESNET: digits_for_cifar,
    PYTHON_STYLE: small_digits,
}


class Witness(Hook):
    """Keeps the weights of the start, and which ones got a gradient."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.start = deepcopy(runner.model.state_dict())
        self.reached = set()
        runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda *_: self.reached.update(
                name
                for name, p in runner.model.named_parameters()
                if p.grad is not None and p.grad.any()
            )
        )


def without_workers(cfg):
    for loader in loaders(cfg):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.default_hooks.logger.interval = 1
    cfg.randomness = dict(seed=0)


def train(cfg, folder):
    """Train and validate; the runner and its witness."""
    without_workers(cfg)
    cfg.work_dir = str(folder / 'work')
    cfg.log_level = 'ERROR'
    # mmengine keeps visualizers by their names for the whole process
    cfg.experiment_name = cfg.visualizer.name = folder.name
    runner = Runner.from_cfg(cfg)
    witness = Witness()
    runner.register_hook(witness)
    runner.train()
    return runner, witness


def log_rows(runner):
    path = Path(runner.log_dir, 'vis_data', 'scalars.json')
    return [json.loads(row) for row in path.read_text().splitlines()]


# --- the walk ---------------------------------------------------------------


def test_every_example_is_walked():
    assert set(PREPARE) == {path.name for path in MIX_IN.glob('*.py')}


def check_run(cfg, folder):
    """One example, from its config to an evaluated model."""
    hooks = [hook['type'] for hook in cfg.default_hooks.values() if hook]
    runner, witness = train(cfg, folder)
    rows = log_rows(runner)
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert losses
    assert np.isfinite(losses).all()
    metric = 'mIoU' if cfg.default_scope == 'mmseg' else 'accuracy/top1'
    assert 0 <= rows[-1][metric] <= 100
    present = {type(hook).__name__ for hook in runner.hooks}
    assert {hook.rpartition('.')[2] for hook in hooks} <= present
    parameters = dict(runner.model.named_parameters())
    assert witness.reached == set(parameters)
    assert not all(
        torch.equal(value, witness.start[name])
        for name, value in parameters.items()
    )
    return runner


@pytest.mark.parametrize('name', sorted(PREPARE))
def test_trains_and_validates(name, tmp_path):
    """Every parameter learns, a metric comes out, the hooks are there."""
    cfg = PREPARE[name](load(name), tmp_path)
    runner = check_run(cfg, tmp_path)
    matrices = state_matrices(runner.model)
    assert bool(matrices) == (name != RESNET)
    records = Path(runner.log_dir, 'stability.jsonl')
    record = json.loads(records.read_text().splitlines()[0])
    if matrices:
        assert len(record['layers']) == 2 * len(matrices)
    else:
        assert record['grad_norm'][-1] > 0


def without_scopes(node):
    """A config without the marks of a base in another package."""
    if isinstance(node, dict):
        return {
            key: without_scopes(value)
            for key, value in node.items()
            if key != '_scope_'
        }
    if isinstance(node, (list, tuple)):
        return list(map(without_scopes, node))
    return node


def differences(new, old, prefix=''):
    """Dotted names of what a config adds, changes or leaves out."""
    for key in {*new, *old}:
        a, b = new.get(key), old.get(key)
        name = f'{prefix}{key}'
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f'{name}.')
        elif a != b:
            yield name


@pytest.mark.parametrize('name', sorted({*PREPARE} - {PYTHON_STYLE}))
def test_only_backbone_and_hooks_differ(name):
    """From the toolkit's config, apart from what must follow the backbone."""
    base = get_config(runpy.run_path(str(MIX_IN / name))['_base_'])
    both = [without_scopes(cfg.to_dict()) for cfg in (load(name), base)]
    found = set(differences(*both))
    assert {'custom_imports', 'default_hooks.divergence'} <= found
    follow = re.compile(
        r'custom_imports|default_hooks\.(sn|ec|stability|divergence|random_state)'
        r'|model\.(backbone\..*|neck|init_cfg|pretrained)'
        r'|model\.(decode|auxiliary)_head\.in_channels'
        r'|optim_wrapper\.paramwise_cfg\..*'
    )
    assert [key for key in found if not follow.fullmatch(key)] == []
    assert any('backbone' in key for key in found) == (name != RESNET)


def build(cfg):
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def step_sizes(model):
    """Step sizes with which every direction of every layer starts."""
    return torch.cat(
        [
            F.softplus(value)
            for name, value in model.named_parameters()
            if name.endswith('dt_bias')
        ]
    )


@pytest.mark.parametrize('std', [0.0, 0.02])
def test_deit_recipe_keeps_the_step_sizes(std, tmp_path):
    """With MMPretrain's rule for linear layers too: all would be 0.69."""
    cfg = small_imagenet(load(DEIT), tmp_path)
    if std:
        rule = dict(type='TruncNormal', layer='Linear', std=std)
        cfg.model.init_cfg = [rule]
    model = build(cfg)
    found = model.backbone.layers[0].mixer.in_proj.weight.std().item()
    assert (found == pytest.approx(std, rel=0.1)) == bool(std)
    steps = step_sizes(model)
    assert steps.min() > 0
    assert steps.max() < 0.101


@pytest.mark.parametrize('name', [DEIT, UPERNET])
def test_state_matrix_does_not_decay(name, tmp_path):
    cfg = PREPARE[name](load(name), tmp_path)
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {
        p: group['weight_decay']
        for group in optimizer.param_groups
        for p in group['params']
    }
    for name, value in model.named_parameters():
        if name.endswith(('A_log', '.D', 'pos_embed', 'cls_token')):
            assert decay[value] == 0, name
    assert max(decay.values()) > 0


def test_hooks_without_mamba_act(tmp_path):
    """A ResNet whose weights explode is taken back."""
    cfg = digits_for_cifar(load(RESNET), tmp_path)
    cfg.optim_wrapper.optimizer.lr = 1e30
    cfg.optim_wrapper.optimizer.weight_decay = 0.0
    runner, witness = train(cfg, tmp_path)
    assert Path(runner.log_dir, 'divergence_report.md').is_file()
    for name, value in runner.model.named_parameters():
        assert torch.equal(value, witness.start[name]), name


def test_stabilizer_without_a_state_matrix_says_so(tmp_path):
    cfg = digits_for_cifar(load(RESNET), tmp_path)
    cfg.custom_hooks = [dict(type='mmstabvim.EigenvalueClampingHook')]
    message = 'EigenvalueClampingHook found no state matrix'
    with pytest.raises(RuntimeError, match=message):
        train(cfg, tmp_path)


def test_python_style_config_has_classes():
    """Its types are classes, and its bases' content is there."""
    cfg = load(PYTHON_STYLE)
    hook = cfg.default_hooks.sn.type
    assert hook is mmstabvim.SpectralNormalizationHook
    assert cfg.optim_wrapper.paramwise_cfg.flat_decay_mult == 0.0


needs_installation = pytest.mark.skipif(
    not Path(mmstabvim.__file__).with_name('.mim').exists(),
    reason='mmstabvim is not installed',
)


@needs_installation
def test_own_config_is_a_base_anywhere(tmp_path, monkeypatch):
    """It also runs: bare names in it are the toolkit's, not this package's."""
    monkeypatch.chdir(tmp_path)
    Path('mine.py').write_text(
        "_base_ = 'mmstabvim::vim/vim-nano-p4_1xb64-20e_digits.py'\n"
        "model = dict(backbone=dict(state_matrix=dict(type='signed')))\n"
        'default_hooks = dict(logger=dict(interval=1))\n'
        "custom_hooks = [dict(type='mmstabvim.EigenvalueClampingHook')]\n"
    )
    cfg = small_digits(Config.fromfile('mine.py'), tmp_path)
    runner = check_run(cfg, tmp_path)
    matrices = state_matrices(runner.model).values()
    assert all(m.parametrization.can_be_unstable for m in matrices)


@needs_installation
def test_example_is_a_base_anywhere(tmp_path, monkeypatch):
    """Its own base, a toolkit's, is found through it."""
    monkeypatch.chdir(tmp_path)
    Path('mine.py').write_text(
        f"_base_ = 'mmstabvim::mix_in/{DEIT}'\n"
        "model = dict(backbone=dict(arch='small'), head=dict(in_channels=384))"
    )
    cfg = Config.fromfile('mine.py')
    assert cfg.model.backbone.type == 'mmstabvim.VisionMamba'
    assert cfg.model.backbone.arch == 'small'
    assert cfg.model.init_cfg is None
    assert cfg.train_dataloader.batch_size == 256


def test_classification_weights_in_a_segmentation_model(tmp_path):
    """As the page says: ``Pretrained`` with the prefix of the backbone."""
    classifier = build(small_imagenet(load(DEIT), tmp_path))
    path = tmp_path / 'vim.pth'
    torch.save({'state_dict': classifier.state_dict()}, path)
    cfg = small_ade(load(SEGMENTER), tmp_path)
    cfg.model.backbone.arch.num_layers = 2
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(path), prefix='backbone.'
    )
    loaded = build(cfg).backbone.layers.state_dict()
    for name, value in classifier.backbone.layers.state_dict().items():
        assert torch.equal(loaded[name], value), name


# --- the page ---------------------------------------------------------------


def blocks(page, language):
    """Code blocks of a page."""
    pattern = rf'^```{language}\n(.*?)^```$'
    return re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not shutil.which('git'), reason='git is not installed')
def test_five_lines(tmp_path):
    """The diff, in the README too, applies to MMPretrain's config and runs."""
    (diff,) = blocks(PAGE, 'diff')
    assert set(blocks(README, 'diff')) <= {diff}
    assert len(re.findall(r'^\+(?!\+\+)', diff, re.MULTILINE)) == 5
    source = Path(mmpretrain.__file__).parent / '.mim' / 'configs'
    for name in ('_base_', 'deit'):
        shutil.copytree(source / name, tmp_path / 'configs' / name)
    subprocess.run(
        ['git', 'apply', '-'],
        input=diff.encode(),
        cwd=tmp_path,
        env={**os.environ, 'GIT_CEILING_DIRECTORIES': str(tmp_path.parent)},
        check=True,
    )
    path = tmp_path / 'configs' / 'deit' / 'deit-tiny_4xb256_in1k.py'
    cfg = small_imagenet(Config.fromfile(path), tmp_path)
    runner = check_run(cfg, tmp_path)
    assert isinstance(runner.model.backbone, mmstabvim.VisionMamba)
    assert step_sizes(runner.model).max() < 0.2


def test_plain_pytorch_example(capsys):
    """It learns, and its bounds hold."""
    (code,) = blocks(PAGE, 'python')
    names = {}
    exec(compile(code, str(PAGE), 'exec'), names)
    assert re.search(r'accuracy \d+\.\d%', capsys.readouterr().out)
    assert names['accuracy'] > 0.7
    for matrix in state_matrices(names['backbone']).values():
        assert matrix.eigenvalues().abs().max() <= 8.0 + 1e-5
        assert matrix.eigenvalues().real.max() <= -0.01
        matrix.free[0].data.add_(9.0)
        names['project']()
        assert matrix.eigenvalues().real.max() <= -0.01


def test_plain_pytorch_example_of_the_readme():
    """It runs as it stands there, and its bound holds."""
    (code,) = [
        block
        for block in blocks(README, 'python')
        if 'backbone = VisionMamba(' in block
    ]
    names = {}
    exec(compile(code, str(README), 'exec'), names)
    assert all(x.isfinite().all() for x in names['features'])
    for matrix in state_matrices(names['backbone']).values():
        assert matrix.eigenvalues().real.max() <= -0.01 + 1e-6


# --- mim --------------------------------------------------------------------

MIM = 'import sys; from mim.cli import cli; sys.exit(cli())'


@pytest.mark.slow
@needs_installation
@pytest.mark.skipif(
    not importlib.util.find_spec('mim'), reason='openmim is not installed'
)
@pytest.mark.parametrize(
    ('package', 'name'),
    [
        ('mmpretrain', DEIT),
        ('mmsegmentation', UPERNET),
        ('mmstabvim', SEGMENTER),
    ],
)
def test_mim_trains(package, name, tmp_path):
    """With the package's own script, from another folder."""
    cfg = PREPARE[name](load(name), tmp_path)
    without_workers(cfg)
    cfg.dump(tmp_path / 'mine.py')
    command = ['train', package, 'mine.py', '--work-dir', 'work']
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', MIM, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Training finished successfully' in done.stdout
    (scalars,) = (tmp_path / 'work').rglob('scalars.json')
    rows = [json.loads(row) for row in scalars.read_text().splitlines()]
    assert np.isfinite([row['loss'] for row in rows if 'loss' in row]).all()
    assert 'accuracy/top1' in rows[-1] or 'mIoU' in rows[-1]

"""Every config: it loads, builds, runs, and says in its name what it is."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmstabvim.ablation.matrix import load_matrix
from mmstabvim.engine.launch import read_settings

CONFIG_ROOT = Path(__file__).parents[1] / 'configs'
ALL = sorted(
    str(path.relative_to(CONFIG_ROOT))
    for path in CONFIG_ROOT.rglob('*.py')
    # what is directly in ablation/ are matrices of configs
    if '_base_' not in path.parts and path.parent.name != 'ablation'
)
CLASSIFIERS = [name for name in ALL if name.startswith('vim/')]
# mix_in/ takes the rest of its settings from the toolkits
OWN = [name for name in ALL if not name.startswith('mix_in/')]
NAME = re.compile(
    r'vim-(?P<size>nano|micro|tiny|small|base)-p(?P<patch>\d+)'
    r'(-s(?P<stride>\d+))?'
    r'_(?P<gpus>\d+)xb(?P<batch>\d+)(-(?P<epochs>\d+)e)?'
    r'(-(?P<recipe>[a-z]+))?'
    r'_(?P<data>in1k|cifar10|cifar10-subset|cifar100|digits)\.py'
)
DATA = {  # dataset type, classes, image size
    'in1k': ('ImageNet', 1000, 224),
    'cifar10': ('CIFAR10', 10, 32),
    'cifar10-subset': ('CustomDataset', 10, 32),
    'cifar100': ('CIFAR100', 100, 32),
    'digits': ('mmstabvim.Digits', 10, 32),
}
# lr, weight decay, drop path, total batch, epochs; for in1k as published
RECIPES = {
    'vim/vim-tiny-p16_8xb128_in1k.py': (1e-3, 0.1, 0.0, 1024, 300),
    'vim/vim-tiny-p16_8xb128-official_in1k.py': (1e-3, 0.1, 0.0, 1024, 300),
    'vim/vim-small-p16_8xb64_in1k.py': (1e-3, 0.05, 0.05, 512, 300),
    'vim/vim-base-p16_8xb128_in1k.py': (1e-3, 0.05, 0.1, 1024, 300),
    'vim/vim-tiny-p16-s8_8xb128-30e_in1k.py': (1e-5, 1e-8, 0.0, 1024, 30),
    'vim/vim-small-p16-s8_8xb128-30e_in1k.py': (1e-5, 1e-8, 0.0, 1024, 30),
    'vim/vim-micro-p4_1xb128-200e_cifar10.py': (1e-3, 0.05, 0.1, 128, 200),
    'vim/vim-micro-p4_1xb128-200e_cifar100.py': (1e-3, 0.05, 0.1, 128, 200),
    'vim/vim-nano-p4_1xb64-20e_digits.py': (2e-3, 0.05, 0.0, 64, 20),
    'vim/vim-nano-p4_1xb64-10e_cifar10-subset.py': (2e-3, 0.05, 0.0, 64, 10),
}
# published: 7M, 26M, 98M; stride 8 adds 729 - 196 position vectors
PARAMETERS = {
    'vim/vim-tiny-p16_8xb128_in1k.py': 7_148_008,
    'vim/vim-tiny-p16_8xb128-official_in1k.py': 7_148_008,
    'vim/vim-small-p16_8xb64_in1k.py': 25_796_584,
    'vim/vim-base-p16_8xb128_in1k.py': 97_598_440,
    'vim/vim-tiny-p16-s8_8xb128-30e_in1k.py': 7_148_008 + 533 * 192,
    'vim/vim-small-p16-s8_8xb128-30e_in1k.py': 25_796_584 + 533 * 384,
    'vim/vim-micro-p4_1xb128-200e_cifar10.py': 1_633_546,
    'vim/vim-micro-p4_1xb128-200e_cifar100.py': 1_633_546 + 90 * 129,
    'vim/vim-nano-p4_1xb64-20e_digits.py': 111_946,
    'vim/vim-nano-p4_1xb64-10e_cifar10-subset.py': 111_946,
}
WIDTHS = {'tiny': 192, 'small': 384, 'base': 768, 'micro': 128, 'nano': 64}


@pytest.fixture(autouse=True)
def _scope():
    import mmpretrain  # noqa: F401

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    np.random.seed(0)


def load(name):
    return Config.fromfile(CONFIG_ROOT / name)


def parse(name):
    match = NAME.fullmatch(Path(name).name)
    assert match, f'{name} does not follow the naming rule'
    return match.groupdict()


def model_config(cfg, num_layers=None, img_size=None):
    """Model config as a Runner builds it, optionally smaller."""
    model = cfg.model.to_dict()
    model['data_preprocessor'] = cfg.data_preprocessor.to_dict()
    backbone = model['backbone']
    if num_layers is not None:
        arch = backbone['arch']
        if isinstance(arch, str):
            arch = {'embed_dims': WIDTHS[arch]}
        backbone['arch'] = {**arch, 'num_layers': num_layers}
    if img_size is not None:
        backbone['img_size'] = img_size
    return model


def small_model(cfg):
    """Two layers and at most 32 pixels."""
    return MODELS.build(model_config(cfg, num_layers=2, img_size=32))


def fake_samples(num_classes, img_size=32):
    """Two packed samples of different classes."""
    pack = Compose([{'type': 'PackInputs'}])
    images = np.random.randint(0, 256, (2, img_size, img_size, 3), np.uint8)
    return [
        pack({'img': image, 'gt_label': label})
        for image, label in zip(images, (0, num_classes - 1), strict=True)
    ]


def test_every_config_is_listed():
    """A new classification config comes with its recipe in this file."""
    assert set(RECIPES) == set(CLASSIFIERS)
    assert len(CLASSIFIERS) >= 9


@pytest.mark.parametrize('name', ALL)
def test_loads_and_imports_the_package(name, tmp_path):
    """Loads, imports the package, and survives a dump as Runner makes it."""
    cfg = load(name)
    assert 'mmstabvim' in cfg.custom_imports.imports
    assert cfg.custom_imports.allow_failed_imports is False
    cfg.dump(tmp_path / 'dumped.py')
    again = Config.fromfile(tmp_path / 'dumped.py')
    assert again.to_dict() == cfg.to_dict()


@pytest.mark.parametrize('name', OWN)
def test_writes_tensorboard_and_json(name):
    """Scalars go to a JSON file and to TensorBoard."""
    backends = [backend.type for backend in load(name).visualizer.vis_backends]
    assert backends == ['LocalVisBackend', 'TensorboardVisBackend']


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_name_tells_the_content(name):
    """Model, patches, batch, epochs, recipe and data are as the name says."""
    cfg, said = load(name), parse(name)
    backbone = cfg.model.backbone
    arch = backbone.arch
    if isinstance(arch, str):
        assert arch == said['size']
    else:
        assert arch.embed_dims == WIDTHS[said['size']]
    assert backbone.patch_size == int(said['patch'])
    stride = int(said['stride']) if said['stride'] else None
    assert backbone.get('patch_stride') == stride
    assert cfg.train_dataloader.batch_size == int(said['batch'])
    assert cfg.train_cfg.max_epochs == int(said['epochs'] or 300)
    assert backbone.get('init_recipe', 'default') == (
        said['recipe'] or 'default'
    )


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_data_fits_the_model(name):
    """One number of classes and one image size from data to head."""
    cfg, said = load(name), parse(name)
    dataset, num_classes, img_size = DATA[said['data']]
    for part in ('train', 'val', 'test'):
        assert cfg[f'{part}_dataloader'].dataset.type == dataset
    assert cfg.val_dataloader == cfg.test_dataloader
    for part in ('train', 'val'):
        dataset = cfg[f'{part}_dataloader'].dataset
        split = dataset.get('split') or dataset.data_prefix
        assert (split == 'train') == (part == 'train')
    assert cfg.model.head.num_classes == num_classes
    assert cfg.data_preprocessor.num_classes == num_classes
    assert cfg.model.backbone.img_size == img_size
    assert cfg.model.head.in_channels == WIDTHS[said['size']]


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_recipe(name):
    """The numbers of the published recipes, and of ours."""
    cfg, said = load(name), parse(name)
    lr, weight_decay, drop_path, batch, epochs = RECIPES[name]
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW'
    assert optimizer.lr == pytest.approx(lr)
    assert optimizer.weight_decay == weight_decay
    assert (tuple(optimizer.betas), optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert cfg.model.backbone.get('drop_path_rate', 0.0) == drop_path
    assert int(said['gpus']) * int(said['batch']) == batch
    assert cfg.auto_scale_lr.base_batch_size == batch
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.optim_wrapper.type == 'OptimWrapper'  # full precision


@pytest.mark.parametrize(
    'name', [name for name in CLASSIFIERS if name.endswith('_in1k.py')]
)
def test_imagenet_recipe(name):
    """Averaged weights, no clipping, mixup or cutmix, repeated views."""
    cfg = load(name)
    ema = cfg.default_hooks.ema
    assert (ema.type, ema.momentum) == ('EMAHook', pytest.approx(1 - 0.99996))
    assert 'clip_grad' not in cfg.optim_wrapper
    augments = [(a.type, a.alpha) for a in cfg.model.train_cfg.augments]
    assert augments == [('Mixup', 0.8), ('CutMix', 1.0)]
    assert cfg.train_dataloader.sampler.type == 'RepeatAugSampler'
    loss = cfg.model.head.loss
    assert (loss.label_smooth_val, loss.mode) == (0.1, 'original')


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_parameter_count(name):
    """Full size, built without memory on the meta device."""
    with torch.device('meta'):
        model = MODELS.build(model_config(load(name)))
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[name]


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_forward(name):
    """A gradient for every parameter, and a prediction."""
    cfg = load(name)
    num_classes = cfg.model.head.num_classes
    model = small_model(cfg)
    model.init_weights()
    data = pseudo_collate(fake_samples(num_classes))
    model.train()
    batch = model.data_preprocessor(data, training=True)
    losses = model(**batch, mode='loss')
    losses['loss'].backward()
    assert losses['loss'].item() == pytest.approx(
        math.log(num_classes), rel=0.2
    )
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.any(), parameter_name
    model.eval()
    batch = model.data_preprocessor(data, training=False)
    with torch.no_grad():
        samples = model(**batch, mode='predict')
    for sample in samples:
        assert sample.pred_score.shape == (num_classes,)
        assert sample.pred_score.sum().item() == pytest.approx(1, abs=1e-5)


def run_pipeline(dataset_cfg, folder, seed):
    """Pass one fake image through a dataset's pipeline."""
    rng = np.random.default_rng(0)
    sample = {'gt_label': 1}
    if dataset_cfg.pipeline[0].type == 'LoadImageFromFile':
        sample['img_path'] = str(folder / 'image.jpg')
        # the files of the CIFAR-10 subset have the model's size
        small = dataset_cfg.type == 'CustomDataset'
        shape = (32, 32, 3) if small else (40, 48, 3)
        cv2.imwrite(sample['img_path'], rng.integers(0, 256, shape, np.uint8))
    else:
        sample['img'] = rng.integers(0, 256, (32, 32, 3), np.uint8)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return Compose(dataset_cfg.pipeline)(sample)


@pytest.mark.parametrize('part', ['train', 'val', 'test'])
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_pipeline(name, part, tmp_path):
    """Gives the model's image size; random for training and only there."""
    cfg = load(name)
    dataset_cfg = cfg[f'{part}_dataloader'].dataset
    runs = [run_pipeline(dataset_cfg, tmp_path, seed) for seed in range(3)]
    size = cfg.model.backbone.img_size
    for run in runs:
        assert run['inputs'].shape == (3, size, size)
        assert run['inputs'].dtype == torch.uint8
        assert run['data_samples'].gt_label.tolist() == [1]
    same = all(torch.equal(runs[0]['inputs'], r['inputs']) for r in runs)
    assert same == (part != 'train')


def must_not_decay(name, parameter, official):
    """The rule of the published recipe, and ours."""
    if parameter.ndim <= 1 or name.endswith('.bias'):
        return True
    if name.endswith(('pos_embed', 'cls_token')):
        return True
    return 'state_matrix' in name and not official


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_weight_decay_groups(name):
    """Each parameter of the built optimizer decays, or does not."""
    cfg = load(name)
    model = small_model(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {
        p: parameter_name for parameter_name, p in model.named_parameters()
    }
    official = 'official' in name
    decays = {}
    for group in optimizer.param_groups:
        assert group['lr'] == cfg.optim_wrapper.optimizer.lr
        for p in group['params']:
            skip = must_not_decay(names[p], p, official)
            wanted = 0.0 if skip else cfg.optim_wrapper.optimizer.weight_decay
            assert group['weight_decay'] == wanted, names[p]
            decays[names[p]] = wanted > 0
    assert len(decays) == len(names)
    direction = 'backbone.layers.1.mixer.ssm.'
    assert decays[direction + 'state_matrix.A_log'] is official
    for excluded in (
        'backbone.pos_embed',
        'backbone.cls_token',
        'backbone.patch_embed.projection.bias',
        'backbone.layers.1.norm.weight',
        'backbone.norm.weight',
        direction + 'D',
        'backbone.layers.1.mixer.conv1d.bias',
        direction + 'dt_bias',
        'head.fc.bias',
    ):
        assert not decays[excluded], excluded
    for included in (
        'backbone.patch_embed.projection.weight',
        'backbone.layers.1.mixer.in_proj.weight',
        'backbone.layers.1.mixer.out_proj.weight',
        'backbone.layers.1.mixer.conv1d.weight',
        direction + 'x_proj.weight',
        direction + 'dt_proj.weight',
        'head.fc.weight',
    ):
        assert decays[included], included


def test_configs_differ_only_as_they_say():
    """The official recipe is the tiny one, but for its two accidents."""
    tiny = load('vim/vim-tiny-p16_8xb128_in1k.py').to_dict()
    official = load('vim/vim-tiny-p16_8xb128-official_in1k.py').to_dict()
    assert official['model']['backbone'].pop('init_recipe') == 'official'
    del official['optim_wrapper']['paramwise_cfg']
    del tiny['optim_wrapper']['paramwise_cfg']
    assert official == tiny


def small_options(num_layers=2, embed_dims=32):
    """Overrides for a narrow model on 32 pixels, without workers."""
    return {
        'model.backbone.arch._delete_': True,
        'model.backbone.arch.embed_dims': embed_dims,
        'model.backbone.arch.num_layers': num_layers,
        'model.backbone.img_size': 32,
        'model.head.in_channels': embed_dims,
        'train_dataloader.batch_size': 4,
        **{
            f'{part}_dataloader.{key}': value
            for part in ('train', 'val', 'test')
            for key, value in (
                ('num_workers', 0),
                ('persistent_workers', False),
            )
        },
    }


def learning_rates(name, work_dir):
    """Learning rate of the first step of each epoch, from a real Runner."""
    cfg = load(name)
    cfg.merge_from_dict(small_options())
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'lr-{Path(name).stem}'
    cfg.train_dataloader.dataset = {
        'type': 'mmstabvim.Digits',
        'split': 'train',
        'indices': 8,
    }
    runner = Runner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(cfg.train_cfg)
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    runner.optim_wrapper = wrapper
    schedulers = runner.build_param_scheduler(cfg.param_scheduler)
    steps = len(runner.train_dataloader)
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        rates.append(wrapper.get_lr()['lr'][0])
        for i in range(steps):
            wrapper.step()
            for scheduler in schedulers:
                if not scheduler.by_epoch or i == steps - 1:
                    scheduler.step()
    return rates


@pytest.mark.parametrize(
    ('name', 'warm_up', 'first', 'last'),
    [
        ('vim/vim-tiny-p16_8xb128_in1k.py', 5, 1e-6, 1e-5),
        ('vim/vim-small-p16_8xb64_in1k.py', 5, 1e-6, 1e-5),
        ('vim/vim-tiny-p16-s8_8xb128-30e_in1k.py', 0, 1e-5, 1e-5),
        ('vim/vim-small-p16-s8_8xb128-30e_in1k.py', 0, 1e-5, 1e-5),
        ('vim/vim-micro-p4_1xb128-200e_cifar10.py', 10, 1e-6, 1e-5),
        ('vim/vim-nano-p4_1xb64-20e_digits.py', 2, 2e-5, 2e-5),
    ],
)
def test_learning_rate_curve(name, warm_up, first, last, tmp_path):
    """Warm-up from ``first``, a peak, and a cosine down to ``last``."""
    rates = learning_rates(name, tmp_path)
    peak = RECIPES[name][0]
    assert rates[0] == pytest.approx(first)
    assert rates[warm_up] == pytest.approx(peak, rel=0.01)
    rising, falling = rates[: warm_up + 1], rates[warm_up:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    epochs = len(falling)
    progress = (epochs - 1) / epochs
    cosine = last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2
    assert rates[-1] == pytest.approx(cosine, rel=0.1)


def make_imagenet(root, classes):
    """A few images in ImageNet's folders."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 256, (48, 56, 3), np.uint8)
                cv2.imwrite(str(folder / f'{name}_{index}.JPEG'), image)


def imagenet_options(root, classes):
    """Overrides for a small folder of images."""
    options = {
        **small_options(),
        'train_dataloader.dataset.pipeline.1.scale': 32,
        # the cosine starts after 5 epochs, and may not be empty
        'train_cfg.max_epochs': 6,
        'train_cfg.val_interval': 6,
        'default_hooks.logger.interval': 1,
        'model.head.num_classes': len(classes),
        'data_preprocessor.num_classes': len(classes),
        'val_evaluator.topk': 1,
        'test_evaluator.topk': 1,
    }
    for part in ('train', 'val', 'test'):
        dataset = f'{part}_dataloader.dataset'
        options[f'{dataset}.data_root'] = str(root)
        options[f'{dataset}.metainfo.classes'] = f'[{",".join(classes)}]'
    for part in ('val', 'test'):
        pipeline = f'{part}_dataloader.dataset.pipeline'
        options[f'{pipeline}.1.scale'] = 36
        options[f'{pipeline}.2.crop_size'] = 32
    return [f'{key}={value}' for key, value in options.items()]


@pytest.mark.slow
def test_trains_on_imagenet_folders(tmp_path):
    """A few iterations of the tiny config on images in ImageNet's layout."""
    classes = ['n01440764', 'n01443537']
    make_imagenet(tmp_path / 'imagenet', classes)
    command = [
        sys.executable,
        str(CONFIG_ROOT.parent / 'tools/train.py'),
        str(CONFIG_ROOT / 'vim/vim-tiny-p16_8xb128_in1k.py'),
        f'--work-dir={tmp_path / "work"}',
        '--seed=0',
        '--cfg-options',
        *imagenet_options(tmp_path / 'imagenet', classes),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (scalars,) = (tmp_path / 'work').rglob('scalars.json')
    rows = [json.loads(row) for row in scalars.read_text().splitlines()]
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert len(losses) == 12  # 8 images, 4 at a time, 6 epochs
    assert np.isfinite(losses).all()
    assert rows[-1]['accuracy/top1'] in (0, 25, 50, 75, 100)
    assert list((tmp_path / 'work').rglob('events.out.tfevents.*'))
    check_checkpoint(tmp_path / 'work' / 'epoch_6.pth')


def check_checkpoint(path):
    """Both the averaged and the plain weights are there, and differ."""
    # written by the test itself, so unpickling it is safe
    saved = torch.load(path, weights_only=False)
    name = 'backbone.layers.0.mixer.in_proj.weight'
    averaged = saved['state_dict'][name]
    plain = saved['ema_state_dict'][f'module.{name}']
    assert not torch.equal(averaged, plain)


STABILIZERS = {
    'sn': 'mmstabvim.SpectralNormalizationHook',
    'ec': 'mmstabvim.EigenvalueClampingHook',
    'sp': 'mmstabvim.StabilityLossHook',
}
COMBINATIONS = {
    'none': (),
    'sn': ('sn',),
    'ec': ('ec',),
    'sp': ('sp',),
    'sn_ec': ('sn', 'ec'),
    'sn_sp': ('sn', 'sp'),
    'ec_sp': ('ec', 'sp'),
    'all': ('sn', 'ec', 'sp'),
}
FRAGMENTS = CONFIG_ROOT / '_base_/stabilizers'
SEPARATE = {  # files of the combinations, on full state matrices
    'digits': 'vim/vim-nano-p4_1xb64-20e_digits.py',
    'in1k': 'vim/vim-tiny-p16_8xb128_in1k.py',
    'ade20k': 'upernet/vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py',
}
MATRICES = sorted((CONFIG_ROOT / 'ablation').glob('*.py'))
CLAMPING = 'EigenvalueClampingHook'
DEMOS = [
    'vim/vim-nano-p4_1xb64-20e_digits.py',
    'upernet/vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64.py',
]


@pytest.mark.parametrize('name', COMBINATIONS)
def test_fragment_has_the_stabilizers_of_its_name(name):
    """Under one key each, with the settings that it has alone."""
    cfg = Config.fromfile(FRAGMENTS / f'{name}.py')
    keys = COMBINATIONS[name]
    hooks = {k: v for k, v in cfg.default_hooks.items() if v is not None}
    assert list(hooks) == list(keys)
    for key, hook in hooks.items():
        alone = Config.fromfile(FRAGMENTS / f'{key}.py')
        assert hook.type == STABILIZERS[key]
        assert hook == alone.default_hooks[key]


@pytest.mark.parametrize('combination', COMBINATIONS)
@pytest.mark.parametrize('data', SEPARATE)
def test_ablation_is_its_base_and_one_fragment(data, combination):
    """Nothing else differs, and the name says what does."""
    base = load(SEPARATE[data])
    folder = CONFIG_ROOT / 'ablation' / data
    head, _, tail = Path(base.filename).stem.rpartition(f'_{data}')
    path = folder / f'{head}-full-{combination}_{data}{tail}.py'
    assert len(list(folder.iterdir())) == len(COMBINATIONS)
    cfg = Config.fromfile(path)
    state_matrix = cfg.model.backbone.pop('state_matrix')
    assert state_matrix.type == 'full'
    fragment = Config.fromfile(FRAGMENTS / f'{combination}.py')
    keys = [k for k, v in fragment.default_hooks.items() if v is not None]
    base.merge_from_dict(
        {f'default_hooks.{key}': fragment.default_hooks[key] for key in keys}
    )
    assert cfg.to_dict() == base.to_dict()


@pytest.mark.parametrize('path', MATRICES, ids=lambda path: path.stem)
def test_matrix_is_a_product(path):
    """Full matrices with each combination are what their files say."""
    matrix = load_matrix(path)
    shared = Config.fromfile(path).get('cfg_options', {})
    files = {
        name: read_settings(str(file), dict(shared))
        for name in COMBINATIONS
        for file in path.with_suffix('').glob(f'*-full-{name}_{path.stem}*.py')
    }
    assert set(files) == ({*COMBINATIONS} if path.stem in SEPARATE else set())
    found = set()
    for cell in matrix.cells:
        labels = {'init': 's4d_real', **cell.labels}
        if cell.seed or (labels.get('matrix'), labels['init']) != (
            'full',
            's4d_real',
        ):
            continue
        name = labels.get('stabilizers')
        if name in files:
            found.add(name)
            cfg = read_settings(cell.config, cell.options)
            assert present(cfg) == present(files[name])
    assert found == set(files)


def present(cfg):
    """Settings of a config without hooks that None takes out."""
    settings = cfg.to_dict()
    hooks = settings['default_hooks'].items()
    settings['default_hooks'] = {k: v for k, v in hooks if v is not None}
    return settings


@pytest.fixture
def stabilizers_in_training(tmp_path):
    """Build a config's hooks; names of the stabilizers in their order."""

    def build(path, options):
        cfg = read_settings(str(path), options)
        runner = Runner(
            torch.nn.Linear(1, 1),
            str(tmp_path / 'work'),
            default_hooks=cfg.default_hooks,
            custom_hooks=cfg.get('custom_hooks'),
            default_scope=cfg.default_scope,
            experiment_name=f'{Path(path).stem}-{len(options)}',
        )
        names = [kind.rpartition('.')[2] for kind in STABILIZERS.values()]
        hooks = {type(hook).__name__: hook for hook in runner.hooks}
        return {name: hooks[name] for name in hooks if name in names}

    return build


@pytest.mark.parametrize('name', DEMOS)
def test_command_line_toggles_a_stabilizer(
    name, tmp_path, stabilizers_in_training
):
    """On by its type, changed by a setting, off by None; so do fragments."""
    plain = CONFIG_ROOT / name
    assert stabilizers_in_training(plain, {}) == {}
    options = {'default_hooks.ec.type': STABILIZERS['ec']}
    assert [*stabilizers_in_training(plain, options)] == [CLAMPING]
    options['default_hooks.ec.eps'] = 0.1
    with pytest.raises(ValueError, match=r'default_hooks\.ec has no type'):
        stabilizers_in_training(plain, {'default_hooks.ec.eps': 0.1})
    found = stabilizers_in_training(plain, options)
    assert found[CLAMPING].rule.eps == 0.1
    text = (FRAGMENTS / 'all.py').read_text()
    every = tmp_path / 'every.py'
    every.write_text(f'_base_ = {str(plain)!r}\n{text}')
    assert [*stabilizers_in_training(every, {})] == [
        'SpectralNormalizationHook',
        CLAMPING,
        'StabilityLossHook',
    ]
    changes = {'default_hooks.sn': None, 'default_hooks.ec.eps': 0.1}
    found = stabilizers_in_training(every, changes)
    assert [*found] == [CLAMPING, 'StabilityLossHook']
    assert found[CLAMPING].rule.eps == 0.1
    text = (FRAGMENTS / 'none.py').read_text()
    none = tmp_path / 'none.py'
    none.write_text(f"_base_ = './every.py'\n{text}")
    assert stabilizers_in_training(none, {}) == {}
    with pytest.raises(ValueError, match=r'default_hooks\.ec\._delete_=True'):
        stabilizers_in_training(none, options)
    options['default_hooks.ec._delete_'] = True
    assert [*stabilizers_in_training(none, options)] == [CLAMPING]

"""Every segmentation config: what it says, builds, learns and predicts."""

import copy
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData

import mmstabvim  # noqa: F401  lets mmseg be imported
from mmstabvim.ablation.matrix import load_matrix
from mmstabvim.engine.launch import read_settings
from mmstabvim.layers.state_matrix import state_matrices

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'configs/upernet'
ALL = sorted(path.name for path in FOLDER.glob('*.py'))
NAME = re.compile(
    r'vim-(?P<size>nano|micro|tiny|small|base)-p(?P<patch>\d+)_upernet'
    r'_(?P<gpus>\d+)xb(?P<batch>\d+)'
    r'-(?P<iters>\d+)k(-(?P<recipe>official))?'
    r'_(?P<data>ade20k|cityscapes|camvid|digit-scenes)'
    r'-(?P<height>\d+)x(?P<width>\d+)\.py'
)
DATA = {  # dataset type and classes
    'ade20k': ('ADE20KDataset', 150),
    'cityscapes': ('CityscapesDataset', 19),
    'camvid': ('mmstabvim.CamVidDataset', 11),
    'digit-scenes': ('mmstabvim.DigitScenes', 11),
}
WIDTHS = {'tiny': 192, 'small': 384, 'base': 768, 'micro': 128, 'nano': 64}
# learning rate, weight decay, rate of the layer decay; as published for tiny
# and small with 60k iterations
RECIPES = {
    ('tiny', 'ade20k', 60_000): (2e-4, 0.1, 0.92),
    ('small', 'ade20k', 60_000): (1e-4, 0.05, 0.95),
    ('base', 'ade20k', 60_000): (1e-4, 0.05, 0.95),
    ('tiny', 'ade20k', 160_000): (6e-5, 0.01, 0.92),
    ('small', 'ade20k', 160_000): (6e-5, 0.01, 0.95),
    ('base', 'ade20k', 160_000): (6e-5, 0.01, 0.95),
    ('tiny', 'cityscapes', 160_000): (6e-5, 0.01, 0.92),
    ('small', 'cityscapes', 160_000): (6e-5, 0.01, 0.95),
}
# window and step of the sliding window; as published for ADE20K
WINDOWS = {
    'ade20k': ((512, 512), (341, 341)),
    'cityscapes': ((512, 1024), (341, 683)),
}
# parameters, classes and patches of the classifiers; as published but for nano
CLASSIFIERS = {
    'tiny': (7_148_008, 1000, 196),
    'small': (25_796_584, 1000, 196),
    'base': (97_598_440, 1000, 196),
    'nano': (111_946, 10, 64),
}
FEATURES = {  # of the published recipe
    'tiny': ('mixer_output', 'none'),
    'small': ('residual', 'add'),
}
SMALL = 16  # width of the models that are built here


@pytest.fixture(autouse=True)
def _scope():
    import mmseg.models  # noqa: F401

    init_default_scope('mmseg')
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    init_default_scope('mmpretrain')


def load(name):
    return Config.fromfile(FOLDER / name)


def parse(name):
    match = NAME.fullmatch(name)
    assert match, f'{name} does not follow the naming rule'
    said = match.groupdict()
    for key in ('patch', 'gpus', 'batch', 'iters', 'height', 'width'):
        said[key] = int(said[key])
    said['iters'] *= 1000
    said['shape'] = (said['height'], said['width'])
    return said


def shrink(model, num_layers=4):
    """Make a model's config narrow and shallow, in place."""
    shape = (32, 64)
    model.data_preprocessor.size = shape
    model.backbone.update(
        arch=dict(embed_dims=SMALL, num_layers=num_layers, d_state=4),
        img_size=shape,
        out_indices=list(range(4))[-len(model.backbone.out_indices) :],
    )
    model.neck.in_channels = SMALL
    maps = len(model.decode_head.in_index)
    model.decode_head.update(in_channels=[SMALL] * maps, channels=SMALL)
    if 'auxiliary_head' in model:
        model.auxiliary_head.update(in_channels=SMALL, channels=SMALL)
    if model.test_cfg.mode == 'slide':
        model.test_cfg.update(crop_size=shape, stride=(24, 40))
    return model


def small_model(cfg):
    """Four narrow blocks for 32 x 64 pixels."""
    model = MODELS.build(shrink(copy.deepcopy(cfg.model)))
    model.init_weights()
    return model


def fake_sample(num_classes, height=32, width=64, ignored=4):
    """An image and its mask as a pipeline packs them."""
    from mmseg.structures import SegDataSample

    labels = torch.randint(0, num_classes, (1, height, width))
    labels[0, :ignored] = 255
    sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
    shape = (height, width)
    sample.set_metainfo(dict(img_shape=shape, ori_shape=shape))
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return dict(inputs=image, data_samples=sample)


def test_every_config_is_there():
    """Tiny, small and base; both schedules."""
    said = [parse(name) for name in ALL]
    ade20k = {
        (s['size'], s['iters'], s['recipe'])
        for s in said
        if s['data'] == 'ade20k'
    }
    for size in ('tiny', 'small', 'base'):
        assert (size, 60_000, None) in ade20k
        assert (size, 160_000, None) in ade20k
    for size in FEATURES:
        assert (size, 60_000, 'official') in ade20k
    assert {s['data'] for s in said} == set(DATA)


@pytest.mark.parametrize('name', ALL)
def test_name_tells_the_content(name):
    """Model, patches, batch, length, recipe, data and crop."""
    cfg, said = load(name), parse(name)
    backbone = cfg.model.backbone
    width = WIDTHS[said['size']]
    if isinstance(backbone.arch, str):
        assert backbone.arch == said['size']
    else:
        assert backbone.arch.embed_dims == width
    assert backbone.patch_size == cfg.model.neck.stride == said['patch']
    assert cfg.model.neck.in_channels == width
    assert cfg.train_dataloader.batch_size == said['batch']
    assert cfg.auto_scale_lr.base_batch_size == said['gpus'] * said['batch']
    assert cfg.train_cfg.max_iters == said['iters']
    assert cfg.optim_wrapper.type == 'OptimWrapper'  # full precision
    feature = FEATURES[said['size']] if said['recipe'] else ('normed', 'none')
    assert feature == (
        backbone.get('feature', 'normed'),
        backbone.get('last_layer', 'none'),
    )


@pytest.mark.parametrize('name', ALL)
def test_data_fit_the_model(name):
    """One number of classes and one crop from data to heads."""
    cfg, said = load(name), parse(name)
    dataset, num_classes = DATA[said['data']]
    for part in ('train', 'val', 'test'):
        assert cfg[f'{part}_dataloader'].dataset.type == dataset
    assert cfg.val_dataloader == cfg.test_dataloader
    for head in ('decode_head', 'auxiliary_head'):
        if head in cfg.model:
            assert cfg.model[head].num_classes == num_classes
    img_size = cfg.model.backbone.img_size
    pair = (img_size,) * 2 if isinstance(img_size, int) else tuple(img_size)
    assert pair == said['shape']
    assert tuple(cfg.model.data_preprocessor.size) == said['shape']
    pipeline = cfg.train_dataloader.dataset.pipeline
    crops = [t.crop_size for t in pipeline if t.type == 'RandomCrop']
    assert all(tuple(crop) == said['shape'] for crop in crops)
    assert cfg.val_evaluator.iou_metrics == ['mIoU']


@pytest.mark.parametrize('name', ALL)
def test_test_windows(name):
    """Sliding windows of the training crop, or the whole image."""
    cfg, said = load(name), parse(name)
    test_cfg = cfg.model.test_cfg
    if said['data'] not in WINDOWS:
        assert test_cfg.mode == 'whole'
        return
    window = (tuple(test_cfg.crop_size), tuple(test_cfg.stride))
    assert test_cfg.mode == 'slide'
    assert window == WINDOWS[said['data']]


LONG = [name for name in ALL if parse(name)['data'] in WINDOWS]


@pytest.mark.parametrize('name', LONG)
def test_recipe(name):
    """The numbers of the published recipes, and of ours."""
    cfg, said = load(name), parse(name)
    key = (said['size'], said['data'], said['iters'])
    lr, weight_decay, rate = RECIPES[key]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ('AdamW', lr)
    assert optimizer.weight_decay == weight_decay
    assert (tuple(optimizer.betas), optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert 'clip_grad' not in cfg.optim_wrapper
    assert cfg.model.backbone.drop_path_rate == 0.1
    if not said['recipe']:
        assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == rate
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.type, warm_up.begin, warm_up.end) == ('LinearLR', 0, 1500)
    assert warm_up.start_factor == 1e-6
    assert (poly.type, poly.begin, poly.end) == (
        'PolyLR',
        1500,
        said['iters'],
    )
    assert (poly.power, poly.eta_min) == (1.0, 0.0)
    assert not warm_up.by_epoch
    assert not poly.by_epoch


def learning_rates(cfg):
    """Learning rate of each iteration, by mmengine's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    wrapper = OptimWrapper(optimizer)
    schedulers = [
        PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=wrapper))
        for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(cfg.train_cfg.max_iters):
        rates.append(optimizer.param_groups[0]['lr'])
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


def test_learning_rate_curve():
    """1,500 iterations up, then a straight line down to zero."""
    rates = learning_rates(
        load('vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py')
    )
    assert rates[0] == pytest.approx(1e-6, rel=1e-3)
    assert max(rates) == rates[1500] == pytest.approx(1, rel=1e-3)
    assert rates[750] == pytest.approx(0.5, rel=1e-2)
    assert rates[30_750] == pytest.approx(0.5, rel=1e-2)
    assert rates[-2] == pytest.approx(1 / 58_500, rel=1e-2)
    assert rates[-1] == 0  # mmengine is there one iteration early


def test_published_size():
    """12,901,100 parameters were published for Vim-tiny at 1024 x 1024."""
    model = load('vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py').model
    model.backbone.img_size = 1024
    with torch.device('meta'):
        model = MODELS.build(model)
    assert sum(p.numel() for p in model.parameters()) == 12_901_100


@pytest.mark.parametrize('name', ALL)
def test_full_size_builds(name):
    """The published backbone, but for tokens, positions and head."""
    with torch.device('meta'):
        backbone = MODELS.build(load(name).model).backbone
    count = sum(p.numel() for p in backbone.parameters())
    total, num_classes, patches = CLASSIFIERS[parse(name)['size']]
    width = WIDTHS[parse(name)['size']]
    head = num_classes * (width + 1)
    rest = total - head - (patches + 2) * width
    assert count - backbone.pos_embed.numel() == rest


@pytest.mark.parametrize('name', ALL)
def test_forward(name):
    """A training step with every gradient, and a prediction."""
    cfg = load(name)
    num_classes = cfg.model.decode_head.num_classes
    model = small_model(cfg).train()
    # weights of classes and ignored pixels do not go together
    weighted = 'class_weight' in cfg.model.decode_head.loss_decode
    samples = [
        fake_sample(num_classes, ignored=0 if weighted else 4)
        for _ in range(2)
    ]
    data = pseudo_collate(samples)
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    logged = model.train_step(data, wrapper)
    assert logged['decode.loss_ce'].item() == pytest.approx(
        math.log(num_classes), rel=0.3
    )
    for parameter_name, p in model.named_parameters():
        changed = not torch.equal(p, before[parameter_name])
        assert changed == p.requires_grad, parameter_name
    model.eval()
    # larger than the window, and no multiple of the patches
    data = pseudo_collate([fake_sample(num_classes, 45, 71)])
    with torch.no_grad():
        (sample,) = model.test_step(data)
    assert sample.pred_sem_seg.data.shape == (1, 45, 71)
    assert sample.pred_sem_seg.data.max() < num_classes
    assert sample.seg_logits.data.isfinite().all()


def excluded_from_decay(name, parameter, official):
    """The rule of the published recipe, and ours."""
    if parameter.ndim <= 1 or name.endswith('.bias'):
        return True
    ours = '.state_matrix.' in name or name.endswith('.pos_embed')
    return ours and not official


def wanted_scale(name, num_layers, rate, official):
    """Factor of the learning rate by the depth that a name tells."""
    if re.match(r'backbone\.(pos_embed|patch_embed)', name):
        return rate**25 if official else rate ** (num_layers + 1)
    block = re.match(r'backbone\.layers\.(\d+)\.', name)
    if block and not official:
        return rate ** (num_layers - int(block[1]))
    return 1.0


@pytest.mark.parametrize('name', LONG)
def test_groups_of_the_optimizer(name):
    """Every parameter once, its rate by its depth, decay where due."""
    cfg, said = load(name), parse(name)
    model = small_model(cfg)
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    lr, weight_decay, rate = RECIPES[said['size'], said['data'], said['iters']]
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    seen = []
    for group in wrapper.optimizer.param_groups:
        for p in group['params']:
            scale = wanted_scale(names[p], 4, rate, bool(said['recipe']))
            assert group['lr'] == pytest.approx(lr * scale), names[p]
            skip = excluded_from_decay(names[p], p, bool(said['recipe']))
            wanted = 0.0 if skip else weight_decay
            assert group['weight_decay'] == wanted, names[p]
            seen.append(names[p])
    assert sorted(seen) == sorted(names.values())


def write_sample(folder, shape, labels):
    """An image and its mask on disk, as a dataset describes them."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    mask = rng.choice(np.array(labels, np.uint8), shape)
    cv2.imwrite(str(folder / 'image.png'), image)
    cv2.imwrite(str(folder / 'mask.png'), mask)
    return dict(
        img_path=str(folder / 'image.png'),
        seg_map_path=str(folder / 'mask.png'),
        seg_fields=[],
    )


STREETS = [n for n in ALL if parse(n)['data'] in ('ade20k', 'cityscapes')]
ONE_OF_EACH = list({parse(n)['data']: n for n in STREETS}.values())


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_pipelines(name, tmp_path):
    """A crop for training, the whole image for a test, the right labels."""
    cfg, said = load(name), parse(name)
    ade20k = said['data'] == 'ade20k'
    labels = [0, 3, 7] if ade20k else [0, 3, 255]
    sample = write_sample(tmp_path, (300, 600), labels)
    sample.update(reduce_zero_label=ade20k, label_map=None)
    wanted = {2, 6, 255} if ade20k else {0, 3, 255}
    train = Compose(cfg.train_dataloader.dataset.pipeline)(dict(sample))
    height, width = train['inputs'].shape[1:]
    assert max(height, width) <= max(said['shape'])
    mask = train['data_samples'].gt_sem_seg.data
    assert mask.shape == (1, height, width)
    assert set(mask.unique().tolist()) <= wanted
    test = Compose(cfg.test_dataloader.dataset.pipeline)(dict(sample))
    assert min(test['inputs'].shape[1:]) == (512 if ade20k else 1024)
    mask = test['data_samples'].gt_sem_seg.data
    assert mask.shape == (1, 300, 600)
    assert set(mask.unique().tolist()) == wanted


@pytest.mark.parametrize('part', ['train', 'test'])
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_pipelines_check_the_mask(name, part, tmp_path):
    """A label that is no class: an error with the file's name."""
    cfg = load(name)
    sample = write_sample(tmp_path, (30, 60), [1, 200])
    sample.update(reduce_zero_label=False, label_map=None)
    with pytest.raises(ValueError, match=r'mask\.png.*got \[200\]'):
        Compose(cfg[f'{part}_dataloader'].dataset.pipeline)(sample)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_time_augmentation(name, tmp_path):
    """Several sizes and their mirror images give one prediction."""
    cfg = load(name)
    ade20k = parse(name)['data'] == 'ade20k'
    sample = write_sample(tmp_path, (25, 51), [1, 2])
    sample.update(reduce_zero_label=ade20k, label_map=None)
    sizes = cfg.tta_pipeline[1].transforms[0]
    for size in sizes:  # 32 pixels, where the config has 512 or 1024
        size.scale = tuple(s // (16 if ade20k else 32) for s in size.scale)
    data = Compose(cfg.tta_pipeline)(sample)
    shapes = [tuple(image.shape[1:]) for image in data['inputs']]
    assert len(shapes) == 12
    ratios = sorted({min(shape) / 32 for shape in shapes})
    assert ratios == pytest.approx([0.5, 0.75, 1, 1.25, 1.5, 1.75], abs=0.04)
    flips = [s.metainfo['flip'] for s in data['data_samples']]
    assert sum(flips) == 6
    model = shrink(cfg.model)
    tta = MODELS.build(dict(cfg.tta_model, module=model)).eval()
    with torch.no_grad():
        (merged,) = tta.test_step(pseudo_collate([data]))
    assert merged.pred_sem_seg.data.shape[-2:] == (25, 51)
    assert merged.gt_sem_seg.data.shape == (1, 25, 51)


@pytest.mark.parametrize('size', list(FEATURES))
def test_official_differs_only_as_it_says(size):
    """In the feature and in the groups of the optimizer."""
    name = f'vim-{size}-p16_upernet_8xb4-60k_ade20k-512x512.py'
    sane = load(name).to_dict()
    official = load(name.replace('60k', '60k-official')).to_dict()
    del official['embeddings']
    for cfg in (sane, official):
        del cfg['optim_wrapper']['paramwise_cfg']
        del cfg['optim_wrapper']['constructor']
        for key in ('feature', 'last_layer'):
            cfg['model']['backbone'].pop(key, None)
    assert official == sane


def test_model_index():
    """Lists every config of the folder, with what it says."""
    metafile = yaml.safe_load((FOLDER / 'metafile.yml').read_text())
    models = {Path(m['Config']).name: m for m in metafile['Models']}
    assert sorted(models) == ALL
    for name, model in models.items():
        cfg = load(name)
        metadata = model['Metadata']
        assert model['Name'] == Path(name).stem
        assert metadata['Batch Size'] == cfg.auto_scale_lr.base_batch_size
        assert metadata['Iterations'] == cfg.train_cfg.max_iters
    assert len({m['Name'] for m in metafile['Models']}) == len(ALL)
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert 'configs/upernet/metafile.yml' in index['Import']


def expand(pattern):
    """Names that a pattern with one {a,b,c} stands for."""
    head, brace, rest = pattern.partition('{')
    if not brace:
        return [pattern]
    choices, _, tail = rest.partition('}')
    return [head + choice + tail for choice in choices.split(',')]


def test_page_lists_every_config():
    """In the table of docs/segmentation.md."""
    page = (ROOT / 'docs/segmentation.md').read_text()
    patterns = re.findall(r'^\| `(vim-\S+\.py)` \|', page, re.MULTILINE)
    listed = [name for pattern in patterns for name in expand(pattern)]
    assert sorted(listed) == ALL


def tiny_run(cfg, work_dir):
    """Shrink a config to two iterations and one validation."""
    shrink(cfg.model)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.parent.name
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.stability.interval = 1
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    for part in ('train', 'val', 'test'):
        loader = cfg[f'{part}_dataloader']
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    return cfg


def make_ade20k(root):
    """Two images to train on and two to validate on, in ADE20K's folders."""
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            image = rng.integers(0, 256, (40, 72, 3), np.uint8)
            mask = rng.integers(0, 151, (40, 72), np.uint8)
            cv2.imwrite(str(root / f'images/{split}/{i}.jpg'), image)
            cv2.imwrite(str(root / f'annotations/{split}/{i}.png'), mask)


def test_trains_on_ade20k_folders(tmp_path):
    """A real run in bfloat16: check of the data, groups, slide test, best."""
    make_ade20k(tmp_path / 'ade')
    name = 'vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py'
    cfg = tiny_run(load(name), tmp_path / 'work')
    cfg.optim_wrapper.update(
        type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0
    )
    for part in ('train', 'val', 'test'):
        dataset = cfg[f'{part}_dataloader'].dataset
        dataset.data_root = str(tmp_path / 'ade')
        for step in dataset.pipeline:
            if 'scale' in step:
                step.scale = (128, 40)
            if 'crop_size' in step:
                step.crop_size = (32, 64)
    runner = Runner.from_cfg(cfg)
    runner.train()
    (best,) = (tmp_path / 'work').glob('best_mIoU_iter_2.pth')
    assert best.stat().st_size > 0
    (log,) = (tmp_path / 'work').glob('*/*.log')
    text = log.read_text()
    assert text.count('Groups of the optimizer') == 1
    assert re.search(r'\| +wall +\|', text)  # IoU of each class
    metrics = runner.message_hub.log_scalars
    assert 0 <= metrics['val/mIoU'].current() <= 100
    assert math.isfinite(metrics['train/decode.loss_ce'].current())


@pytest.mark.parametrize('matrix', ['neg_exp', 'signed', 'full'])
def test_ablation_trains(matrix, tmp_path):
    """All stabilizers at once on each kind of state matrix."""
    (cell,) = (
        cell
        for cell in load_matrix(
            ROOT / 'configs/ablation/digit_scenes.py'
        ).cells
        if cell.labels == dict(matrix=matrix, stabilizers='all')
    )
    cfg = read_settings(cell.config, cell.options)
    cfg = tiny_run(cfg, tmp_path / 'work')
    # normalization alone leaves slower modes
    cfg.default_hooks.ec.eps = 0.5
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].dataset.indices = 4
    runner = Runner.from_cfg(cfg)
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert math.isfinite(scalars['train/decode.loss_ce'].current())
    assert math.isfinite(scalars['train/loss_stab'].current())
    found = state_matrices(runner.model)
    assert len(found) == 4
    for one in found.values():
        values = one.eigenvalues()
        assert values.real.max() <= -0.5 + 1e-6
        assert values.abs().max() <= 1.1


def test_starts_from_a_classifier(tmp_path):
    """As docs/segmentation.md has it: a classifier's checkpoint, as it is."""
    import mmpretrain.models  # noqa: F401

    classifier = Config.fromfile(
        ROOT / 'configs/vim/vim-tiny-p16_8xb128_in1k.py'
    )
    arch = dict(embed_dims=SMALL, num_layers=4, d_state=4)
    classifier.model.backbone.update(arch=arch, img_size=64)
    classifier.model.head.in_channels = SMALL
    classifier.model.pop('train_cfg')
    init_default_scope('mmpretrain')
    classifier = MODELS.build(classifier.model)
    checkpoint = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=classifier.state_dict()), checkpoint)
    init_default_scope('mmseg')
    cfg = load('vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py')
    page = (ROOT / 'docs/segmentation.md').read_text()
    options = re.findall(r'(model\.backbone\.init_cfg\.\w+)=(\S+)', page)
    values = {
        **dict(options),
        'model.backbone.init_cfg.checkpoint': checkpoint,
    }
    assert len(values) == 3
    cfg.merge_from_dict({key: str(value) for key, value in values.items()})
    backbone = small_model(cfg).backbone.state_dict()
    loaded = classifier.backbone.state_dict()
    assert backbone['pos_embed'].shape == (1, 2 * 4, SMALL)
    for name in loaded.keys() - {'cls_token', 'pos_embed'}:
        assert torch.equal(backbone[name], loaded[name]), name

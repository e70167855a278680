"""The command-line tools, as real runs on tiny images."""

import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmstabvim import apis
from mmstabvim.apis import testing, training
from mmstabvim.engine import launch
from mmstabvim.engine.training_summary import _split_name

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'

CLASSIFICATION = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmstabvim'])
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR',
        depth=18,
        base_channels=4,
        stem_channels=4,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32, topk=(1,)),
)
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, num_classes=2)
_dataset = dict(
    type='CustomDataset',
    data_root={data_root!r},
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=_dataset,
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=_dataset,
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
randomness = dict(seed=0)
vis_backends = [
    dict(type='LocalVisBackend'),
    dict(type='TensorboardVisBackend'),
]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)
"""

SEGMENTATION = """
default_scope = 'mmseg'
custom_imports = dict(imports=['mmstabvim'])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5] * 3,
        std=[127.5] * 3,
        size=(16, 16),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=8,
        num_stages=1,
        strides=(1,),
        dilations=(1,),
        out_indices=(0,),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=8,
        in_index=0,
        channels=8,
        num_convs=1,
        num_classes=2,
        norm_cfg=dict(type='BN'),
    ),
    test_cfg=dict(mode='whole'),
)
_train = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
_dataset = dict(
    type='BaseSegDataset',
    data_root={data_root!r},
    data_prefix=dict(img_path='images', seg_map_path='masks'),
    img_suffix='.png',
    metainfo=dict(classes=('dark', 'bright'), palette=[[9] * 3, [99] * 3]),
    pipeline=_train,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=_dataset,
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=_dataset,
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2)
)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4),
)
randomness = dict(seed=0)
"""

_numbers = itertools.count()


def load_tool(name):
    """Import a tool, as its file is no part of a package."""
    spec = importlib.util.spec_from_file_location(
        f'tool_{name}', TOOLS / f'{name}.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train = load_tool('train')
# not `test`: pytest would collect it
tester = load_tool('test')


def run(tool, config, *args):
    """Run a tool; mmengine's global state wants a new name each time."""
    name = f'experiment_name=command{next(_numbers)}'
    tool.main([str(config), *map(str, args), '--cfg-options', name])


def scalars(work_dir):
    """Logged lines of all runs in a folder: training and validation."""
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    lines = ''.join(file.read_text() for file in files).splitlines()
    return [json.loads(line) for line in lines]


def losses(work_dir):
    return [line['loss'] for line in scalars(work_dir) if 'loss' in line]


def make_image(level, seed):
    """A noisy grey image with one bright corner, so that flips matter."""
    noise = np.random.default_rng(seed).integers(0, 40, (16, 16, 3))
    image = noise + level
    image[:8, :8] += 100
    return image.astype(np.uint8)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four dark and four bright images in one folder per class."""
    root = tmp_path_factory.mktemp('images')
    for label, level in (('dark', 0), ('bright', 100)):
        (root / label).mkdir()
        for i in range(4):
            image = Image.fromarray(make_image(level, i + level))
            image.save(root / label / f'{label}{i}.png')
    return root


@pytest.fixture(scope='module')
def masked_images(tmp_path_factory):
    """Four images whose mask is the bright corner."""
    root = tmp_path_factory.mktemp('masked_images')
    mask = np.zeros((16, 16), np.uint8)
    mask[:8, :8] = 1
    for folder in ('images', 'masks'):
        (root / folder).mkdir()
    for i in range(4):
        Image.fromarray(make_image(20, i)).save(root / f'images/{i}.png')
        Image.fromarray(mask).save(root / f'masks/{i}.png')
    return root


@pytest.fixture(scope='module')
def config(images):
    """A classification config beside the images."""
    path = images.with_name('classify.py')
    path.write_text(CLASSIFICATION.replace('{data_root!r}', repr(str(images))))
    return path


@pytest.fixture(scope='module')
def seg_config(masked_images):
    """A segmentation config beside the images."""
    path = masked_images.with_name('segment.py')
    root = repr(str(masked_images))
    path.write_text(SEGMENTATION.replace('{data_root!r}', root))
    return path


@pytest.fixture(scope='module')
def trained(config):
    """Work dir of one classification training."""
    work_dir = config.with_name('trained')
    run(train, config, '--work-dir', work_dir)
    return work_dir


@pytest.fixture(scope='module')
def seg_trained(seg_config):
    """Work dir of one segmentation training."""
    work_dir = seg_config.with_name('seg_trained')
    run(train, seg_config, '--work-dir', work_dir)
    return work_dir


def test_classification_round_trip(trained, config):
    """Testing the checkpoint gives what the last validation gave."""
    run(tester, config, trained / 'epoch_2.pth', '--out', 'metrics.json')
    tested = mmengine.load('metrics.json')
    validated = [s for s in scalars(trained) if 'accuracy/top1' in s][-1]
    assert tested['accuracy/top1'] == validated['accuracy/top1']


def test_training_and_testing_from_python(config):
    """Options by keyword; the same numbers as from the command line."""
    options = dict(work_dir='from_python', seed=1, no_validate=True)
    name = dict(experiment_name='from_python')
    runner = apis.train(config, **options, cfg_options=name)
    assert runner.epoch == 2
    name = dict(experiment_name='from_python_tested')
    found = apis.evaluate(config, 'from_python', cfg_options=name)
    last = 'from_python/epoch_2.pth'
    run(tester, config, last, '--out', 'metrics.json')
    wanted = mmengine.load('metrics.json')
    assert found['accuracy/top1'] == wanted['accuracy/top1']
    with pytest.raises(TypeError, match=r"some of .*'amp'.* got \['apm'\]"):
        apis.train(config, apm=True)


def test_segmentation_round_trip(seg_trained, seg_config):
    run(tester, seg_config, seg_trained / 'iter_4.pth', '--out', 'seg.json')
    tested = mmengine.load('seg.json')
    validated = [s for s in scalars(seg_trained) if 'mIoU' in s][-1]
    assert tested['mIoU'] == validated['mIoU']


def test_summary_names_metrics_checkpoint_and_curves(trained):
    log = next(trained.glob('*/*.log')).read_text()
    summary = log[log.index('Training is done.') :]
    assert 'Test set: accuracy/top1 ' in summary
    assert f'Last checkpoint: {trained / "epoch_2.pth"}' in summary
    curves = next(trained.glob('*/vis_data/scalars.json'))
    assert f'Curves: {curves}' in summary
    assert f'tensorboard --logdir {trained}' in summary


def test_summary_tells_validation_from_test():
    cfg = Config(
        dict(
            val_dataloader=dict(dataset=dict(split='val')),
            test_dataloader=dict(dataset=dict(split='test')),
        )
    )
    assert _split_name(cfg) == 'Validation set'


def test_work_dir_defaults_to_config_name(config):
    run(train, config, '--no-validate')
    assert Path('work_dirs/classify/epoch_2.pth').is_file()


def test_no_validate(config):
    run(train, config, '--work-dir', 'out', '--no-validate')
    assert not [s for s in scalars('out') if 'accuracy/top1' in s]
    assert 'Test set' not in next(Path('out').glob('*/*.log')).read_text()


def test_cfg_options_change_the_config(config):
    cfg = parse_train(config, '--cfg-options', 'optim_wrapper.optimizer.lr=7')
    assert cfg.optim_wrapper.optimizer.lr == 7


def parse_train(config, *args):
    """The config that train.py would run."""
    return training.make_config(train.parse_args([str(config), *args]))


def test_unknown_cfg_option_names_near_ones(config):
    with pytest.raises(ValueError, match=r"'optim_wraper'.*optim_wrapper"):
        parse_train(config, '--cfg-options', 'optim_wraper.optimizer.lr=7')


def test_cfg_option_without_value(config, capsys):
    with pytest.raises(SystemExit):
        parse_train(config, '--cfg-options', 'seed')
    assert "key=value pairs, got 'seed'" in capsys.readouterr().err


def test_missing_config_names_near_ones(config):
    missing = config.with_name('clasify.py')
    with pytest.raises(FileNotFoundError, match=r'clasify.*classify\.py'):
        run(train, missing)


def test_resume_continues_from_the_latest_checkpoint(config):
    short = ('--work-dir', 'out', '--no-validate')
    one_epoch = config.with_name('one_epoch.py')
    one_epoch.write_text(config.read_text().replace('epochs=2', 'epochs=1'))
    run(train, one_epoch, *short)
    run(train, config, *short, '--resume')
    assert [s['epoch'] for s in scalars('out')] == [1] * 4 + [2] * 4


def test_resume_path(trained, config):
    first = trained / 'epoch_1.pth'
    args = ('--work-dir', 'out', '--no-validate', '--resume', first)
    run(train, config, *args)
    assert [s['epoch'] for s in scalars('out')] == [2] * 4


def test_resume_without_checkpoint_keeps_load_from(config):
    option = 'load_from=pretrained.pth'
    cfg = parse_train(
        config, '--work-dir', 'new', '--resume', '--cfg-options', option
    )
    assert cfg.load_from == 'pretrained.pth'
    assert not cfg.get('resume')


def test_resume_from_a_missing_file(config):
    with pytest.raises(FileNotFoundError, match=r"'no\.pth'"):
        parse_train(config, '--resume', 'no.pth')


def test_amp_trains_in_bfloat16_on_cpu(config, monkeypatch):
    from mmpretrain.models import LinearClsHead

    seen = []
    forward = LinearClsHead.forward

    def watch(self, feats):
        scores = forward(self, feats)
        seen.append(scores.dtype)
        return scores

    monkeypatch.setattr(LinearClsHead, 'forward', watch)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    run(train, config, '--work-dir', 'out', '--no-validate', '--amp')
    assert set(seen) == {torch.bfloat16}
    assert np.isfinite(losses('out')).all()


def test_amp_dtype(config):
    cfg = parse_train(config, '--amp', '--amp-dtype', 'bfloat16')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.dtype == 'bfloat16'
    assert cfg.optim_wrapper.loss_scale == 1.0
    cfg = parse_train(config, '--amp', '--amp-dtype', 'float16')
    assert cfg.optim_wrapper.loss_scale == 'dynamic'


@pytest.mark.parametrize(
    ('device', 'dtype', 'loss_scale'),
    [('cuda', 'float16', 'dynamic'), ('cpu', 'bfloat16', 1.0)],
)
def test_amp_follows_the_device(
    config, monkeypatch, device, dtype, loss_scale
):
    monkeypatch.setattr(training, 'get_device', lambda: device)
    wrapper = parse_train(config, '--amp').optim_wrapper
    assert (wrapper.dtype, wrapper.loss_scale) == (dtype, loss_scale)


def test_amp_dtype_needs_amp(config):
    with pytest.raises(ValueError, match='--amp-dtype needs --amp'):
        parse_train(config, '--amp-dtype', 'bfloat16')


def test_amp_refuses_another_wrapper(config):
    option = 'optim_wrapper.type=ApexOptimWrapper'
    with pytest.raises(ValueError, match=r'--amp wants .*ApexOptimWrapper'):
        parse_train(config, '--amp', '--cfg-options', option)


def test_auto_scale_lr(config):
    """Batch 2 where the config's rate is meant for 8."""
    run(train, config, '--work-dir', 'out', '--no-validate', '--auto-scale-lr')
    assert scalars('out')[0]['lr'] == pytest.approx(1e-3 / 4)


def test_auto_scale_lr_needs_a_base(seg_config):
    with pytest.raises(ValueError, match='base_batch_size'):
        parse_train(seg_config, '--auto-scale-lr')


def test_seed_repeats_a_run(config):
    args = ('--no-validate', '--deterministic')
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        run(train, config, '--work-dir', name, '--seed', seed, *args)
    torch.use_deterministic_algorithms(False)
    assert losses('a') == losses('b')
    assert losses('a') != losses('c')


def test_loader_options(config):
    options = (
        '--cfg-options',
        'train_dataloader.num_workers=1',
        'val_dataloader.pin_memory=True',
    )
    cfg = parse_train(config, *options)
    assert cfg.train_dataloader.persistent_workers
    assert not cfg.val_dataloader.persistent_workers
    assert cfg.train_dataloader.pin_memory == torch.cuda.is_available()
    assert cfg.val_dataloader.pin_memory
    cfg = parse_train(
        config, '--no-pin-memory', '--no-persistent-workers', *options
    )
    assert not cfg.train_dataloader.persistent_workers
    assert not cfg.val_dataloader.pin_memory


def edit(config, name, old, new):
    """A copy of the config with one replacement."""
    text = config.read_text()
    assert old in text
    path = Path(name).resolve()
    path.write_text(text.replace(old, new))
    return path


def test_misspelt_type_names_near_ones(config):
    wrong = edit(config, 'wrong.py', "'ResNet_CIFAR'", "'ResNet_CIFR'")
    with pytest.raises(KeyError, match=r'ResNet_CIFR.*ResNet_CIFAR'):
        run(train, wrong)


@pytest.mark.parametrize(
    ('option', 'near'),
    [
        ('optim_wrapper.optimizer.type=SGDD', 'SGD'),
        ('optim_wrapper.type=OptimWraper', 'OptimWrapper'),
        ('param_scheduler.type=LinearL', 'LinearLR'),
    ],
)
def test_misspelt_types_that_mmengine_words_differently(config, option, near):
    with pytest.raises(KeyError, match=f'near names:.*{near}'):
        run(train, config, '--cfg-options', option)


@pytest.mark.parametrize('exists', [True, False], ids=['empty', 'missing'])
def test_classification_without_images(config, images, tmp_path, exists):
    root = tmp_path / 'nothing_here'
    if exists:
        root.mkdir()
    wrong = edit(config, 'wrong.py', str(images), str(root))
    state = 'an empty folder' if exists else 'does not exist'
    with pytest.raises(ValueError, match=rf'{root}.*{state}'):
        run(train, wrong)


def test_a_wrapped_dataset_without_images(config, images, tmp_path):
    """The message is about the folder inside the wrapper."""
    nothing = f'{tmp_path}/nothing'
    wrong = edit(config, 'wrong.py', str(images), nothing)
    lazy = "type='CustomDataset', lazy_init=True"
    wrong = edit(wrong, 'wrong.py', "type='CustomDataset'", lazy)
    wrapped = "dataset=dict(type='RepeatDataset', times=2, dataset=_dataset)"
    wrong = edit(wrong, 'wrong.py', 'dataset=_dataset', wrapped)
    with pytest.raises(ValueError, match=rf'CustomDataset found.*{nothing}'):
        run(train, wrong)


@pytest.mark.parametrize('exists', [True, False], ids=['empty', 'missing'])
def test_segmentation_without_images(
    seg_config, masked_images, tmp_path, exists
):
    root = tmp_path / 'nothing_here'
    if exists:
        (root / 'images').mkdir(parents=True)
    wrong = edit(seg_config, 'wrong.py', str(masked_images), str(root))
    state = 'an empty folder' if exists else 'does not exist'
    with pytest.raises(ValueError, match=rf'{root}/images.*{state}'):
        run(train, wrong)


@pytest.mark.parametrize(
    ('out', 'item', 'expected'),
    [
        (None, None, None),
        ('a.pkl', None, 'pred'),
        ('a.json', None, 'metrics'),
        ('a.pkl', 'metrics', 'metrics'),
        ('folder', None, 'masks'),
        ('folder', 'pred', 'masks'),
    ],
)
def test_out_item(out, item, expected):
    assert testing.choose_out_item(out, item) == expected


@pytest.mark.parametrize(
    ('out', 'item'),
    [(None, 'pred'), ('a.json', 'pred'), ('a.txt', None), ('a', 'metrics')],
)
def test_out_item_refuses(out, item):
    with pytest.raises(ValueError, match='--out'):
        testing.choose_out_item(out, item)


def predict(config, checkpoint, out, *args):
    """Class scores that test.py writes, (images, classes)."""
    run(tester, config, checkpoint, '--out', out, *args)
    return torch.stack([p['pred_score'] for p in mmengine.load(out)])


def test_predictions_and_amp(trained, config):
    checkpoint = trained / 'epoch_2.pth'
    exact = predict(config, checkpoint, 'exact.pkl')
    mixed = predict(config, checkpoint, 'mixed.pkl', '--amp')
    assert exact.shape == (8, 2)
    assert not torch.equal(exact, mixed)
    assert (exact - mixed).abs().max() < 0.05


def test_tta_is_the_mean_over_flips(trained, config):
    checkpoint = trained / 'epoch_2.pth'
    flip = "dict(type='RandomFlip', prob=1.0), dict(type='PackInputs')"
    flipped = edit(config, 'flipped.py', "dict(type='PackInputs')", flip)
    plain = predict(config, checkpoint, 'plain.pkl')
    mirror = predict(flipped, checkpoint, 'mirror.pkl')
    mean = predict(config, checkpoint, 'tta.pkl', '--tta')
    assert not torch.equal(plain, mirror)
    torch.testing.assert_close(mean, (plain + mirror) / 2)


def test_segmentation_tta(seg_trained, seg_config):
    checkpoint = seg_trained / 'iter_4.pth'
    with pytest.raises(ValueError, match='tta_pipeline'):
        run(tester, seg_config, checkpoint, '--tta')
    with_tta = Path('with_tta.py')
    with_tta.write_text(
        seg_config.read_text() + '\ntta_pipeline = ['
        "dict(type='LoadImageFromFile'), dict(type='TestTimeAug', "
        "transforms=[[dict(type='RandomFlip', prob=p) for p in (0., 1.)], "
        "[dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])]"
    )
    run(tester, with_tta, checkpoint, '--tta', '--out', 'tta.json')
    assert 0 <= mmengine.load('tta.json')['mIoU'] <= 100


def test_masks(seg_trained, seg_config):
    run(tester, seg_config, seg_trained / 'iter_4.pth', '--out', 'masks')
    masks = [np.asarray(Image.open(f)) for f in Path('masks').glob('*.png')]
    assert len(masks) == 4
    assert all(mask.shape == (16, 16) for mask in masks)
    assert np.max(masks) <= 1


def test_masks_are_for_segmentation(trained, config):
    with pytest.raises(ValueError, match=r'\.pkl or \.json'):
        run(tester, config, trained / 'epoch_2.pth', '--out', 'masks')


def test_show_dir(trained, config):
    checkpoint = trained / 'epoch_2.pth'
    run(tester, config, checkpoint, '--show-dir', 'all')
    assert len(list(Path('all').glob('*.png'))) == 8
    run(tester, config, checkpoint, '--show-dir', 'some', '--interval', 4)
    assert len(list(Path('some').glob('*.png'))) == 2


def test_segmentation_show_dir(seg_trained, seg_config):
    checkpoint = seg_trained / 'iter_4.pth'
    run(tester, seg_config, checkpoint, '--show-dir', 'shown')
    assert len(list(Path('shown').rglob('*.png'))) == 4


def test_checkpoint_of_another_model(trained, config):
    three = edit(config, 'three.py', 'num_classes=2, in', 'num_classes=3, in')
    with pytest.raises(ValueError, match=r'does not fit[\s\S]*head\.fc\.w'):
        run(tester, three, trained / 'epoch_2.pth')


def test_missing_checkpoint(trained, config):
    with pytest.raises(FileNotFoundError, match=r'epoch_2\.pth'):
        run(tester, config, trained / 'epoch_22.pth')


def shell(script, *args, **env):
    """Run a shell script of the tools."""
    return subprocess.run(
        ['bash', str(TOOLS / script), *map(str, args)],
        env={**os.environ, 'PYTHON': sys.executable, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return str(sock.getsockname()[1])


def test_two_processes(config, monkeypatch):
    """Two ranks share the eight images, so an epoch has two steps of 2."""
    monkeypatch.delenv('LOCAL_RANK')
    cpu = {'CUDA_VISIBLE_DEVICES': ''}
    args = (config, 2, '--work-dir', 'out')
    done = shell('dist_train.sh', *args, PORT=free_port(), **cpu)
    assert done.returncode == 0, done.stderr
    assert len(losses('out')) == 4
    args = (config, 'out/epoch_2.pth', 2, '--out', 'metrics.json')
    done = shell('dist_test.sh', *args, PORT=free_port(), **cpu)
    assert done.returncode == 0, done.stderr
    validated = [s for s in scalars('out') if 'accuracy/top1' in s][-1]
    tested = mmengine.load('metrics.json')
    assert tested['accuracy/top1'] == validated['accuracy/top1']


def test_launchers_that_need_a_gpu(config, monkeypatch):
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    with pytest.raises(ValueError, match="'slurm'"):
        parse_train(config, '--launcher', 'slurm')


@pytest.mark.parametrize(
    ('script', 'names'),
    [('slurm_train.sh', ['a b.py']), ('slurm_test.sh', ['a b.py', 'c.pth'])],
)
def test_slurm_scripts(script, names, tmp_path):
    """They hand every argument to srun unbroken."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    done = shell(
        script, 'gpu', 'job', *names, '--seed', 1, PATH=path, GPUS='4'
    )
    assert done.returncode == 0, done.stderr
    passed = done.stdout.splitlines()
    assert {'--partition=gpu', '--job-name=job', '--ntasks=4'} <= {*passed}
    expected = [*names, '--launcher', 'slurm', '--seed', '1']
    assert passed[-len(expected) :] == expected


@pytest.mark.parametrize('script', sorted(p.name for p in TOOLS.glob('*.sh')))
def test_scripts_explain_themselves(script):
    done = shell(script)
    assert done.returncode == 2
    assert 'Usage: ' in done.stderr


def test_show_dir_with_tta(trained, config):
    """The first view of each image is drawn."""
    run(tester, config, trained, '--tta', '--show-dir', 'tta_shown')
    run(tester, config, trained, '--show-dir', 'plain_shown')
    names = [
        {path.name for path in Path(folder).rglob('*.png')}
        for folder in ('tta_shown', 'plain_shown')
    ]
    assert names[0] == names[1] != set()


def test_work_dir_in_place_of_a_checkpoint(trained, config, capsys):
    run(tester, config, trained, '--out', 'folder.json')
    assert f'Checkpoint: {trained / "epoch_2.pth"}' in capsys.readouterr().out
    run(tester, config, trained / 'epoch_2.pth', '--out', 'file.json')
    assert mmengine.load('folder.json') == mmengine.load('file.json')


def test_mistakes_end_without_a_traceback(config):
    """With the message, and 1 for scripts."""
    done = subprocess.run(
        [
            sys.executable,
            TOOLS / 'train.py',
            config,
            '--cfg-options',
            'train_cfg.val_interval=0',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'train_cfg.val_interval must be a whole number' in done.stderr
    assert 'Traceback' not in done.stderr

"""Settings that nothing reads, and values that cannot work."""

import argparse
from pathlib import Path

import pytest
from mmengine.config import Config

from mmstabvim.engine import launch
from mmstabvim.engine.mistakes import Mistake, run_tool

CONFIGS = Path(__file__).parents[2] / 'configs'
DIGITS = 'vim/vim-nano-p4_1xb64-20e_digits.py'
SCENES = 'upernet/vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64.py'
ADE = 'upernet/vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py'
IN1K = 'vim/vim-tiny-p16_8xb128_in1k.py'


@pytest.fixture
def load(tmp_path):
    """Load a child of one of the configs, with options."""

    def load(base, text='', options=None):
        path = tmp_path / 'child.py'
        head = '' if base is None else f"_base_ = 'mmstabvim::{base}'\n"
        path.write_text(head + text)
        return launch.read_settings(str(path), options or {})

    return load


WITHOUT_EFFECT = [
    (ADE, 'data_root', '/data', 'train_dataloader.dataset.data_root'),
    (SCENES, 'num_classes', 5, 'model.decode_head.num_classes'),
    (IN1K, 'dataset_type', 'CustomDataset', 'train_dataloader.dataset.type'),
    (IN1K, 'train_pipeline', [], 'train_dataloader.dataset.pipeline'),
    (IN1K, 'img_size', 96, 'model.backbone.img_size'),
    (IN1K, 'lr', 1e-3, 'optim_wrapper.optimizer.lr'),
    (IN1K, 'batch_size', 3, 'train_dataloader.batch_size'),
    (IN1K, 'max_epochs', 3, 'train_cfg.max_epochs'),
    (DIGITS, 'model.backbon.img_size', 3, 'model.backbone.img_size'),
    (DIGITS, 'optim_wrapper.optimiser.lr', 1, 'optim_wrapper.optimizer.lr'),
    (DIGITS, 'model.backbone.image_size', 3, 'model.backbone.img_size'),
    (DIGITS, 'train_cfg.epochs', 3, 'train_cfg.max_epochs'),
    (DIGITS, 'randomness.sead', 3, 'randomness.seed'),
    (DIGITS, 'default_hooks.logging.interval', 3, 'default_hooks.logger'),
]


@pytest.mark.parametrize(
    ('base', 'option', 'value', 'meant'), WITHOUT_EFFECT, ids=str
)
def test_option_without_effect(load, base, option, value, meant):
    with pytest.raises(ValueError, match=f'--cfg-options {option}') as error:
        load(base, options={option: value})
    assert meant in str(error.value)


@pytest.mark.parametrize(
    ('base', 'option', 'value'),
    [
        (ADE, 'train_dataloader.dataset.data_root', '/data'),
        (SCENES, 'model.decode_head.num_classes', 5),
        (DIGITS, 'optim_wrapper.optimizer.weight_decay', 0.5),
        (DIGITS, 'optim_wrapper.clip_grad', dict(max_norm=1.0)),
        (DIGITS, 'default_hooks.ema', dict(type='EMAHook')),
        (DIGITS, 'default_hooks.stability', None),
        (DIGITS, 'custom_hooks', [dict(type='EMAHook')]),
        (DIGITS, 'default_hooks.ec.type', 'EigenvalueClampingHook'),
        (DIGITS, 'model.backbone.drop_path_rate', 0.2),
        (DIGITS, 'load_from', 'a.pth'),
        (DIGITS, 'find_unused_parameters', True),
        (DIGITS, 'train_dataloader.dataset.indices', 8),
    ],
    ids=str,
)
def test_option_with_effect(load, base, option, value):
    """Settings that are there, and those that a class would take."""
    cfg = load(base, options={option: value})
    node = cfg
    for key in option.split('.'):
        node = node[key]
    assert node == value or dict(node) == value


def test_entries_of_lists(load):
    text = "custom_hooks = [dict(type='EMAHook', momentum=0.1)]"
    cfg = load(DIGITS, text, {'custom_hooks.0.momentum': 0.2})
    assert cfg.custom_hooks[0].momentum == 0.2
    for wrong in ('1', 'x'):
        with pytest.raises(ValueError, match='is a list, wanted an index'):
            load(DIGITS, text, {f'custom_hooks.{wrong}.momentum': 0.2})


@pytest.mark.parametrize(
    ('option', 'value', 'said'),
    [
        ('model..img_size', 8, 'wanted names between the dots'),
        (
            'val_evaluator.topk.0',
            2,
            r'is a tuple, whose entries cannot be set',
        ),
        ('train_cfg.max_epochs', 'many', r'wants a number \(it is 20\), got'),
        ('train_dataloader.persistent_workers', 'a', 'wants True or False'),
        ('launcher', 'pytorch', 'has no effect: --launcher sets it'),
        ('data_preprocessor.mean', [1.0], "reads 'data_preprocessor', as the"),
        ('optim_wrapper.paramwise_cfg.norm_decay', 0, 'norm_decay_mult'),
        ('train_cfg.max_epochs', True, 'must be a whole number, at least'),
    ],
)
def test_options_that_cannot_be(load, option, value, said):
    text = (
        "model = dict(data_preprocessor=dict(type='ClsDataPreprocessor'))\n"
        'train_dataloader = dict(persistent_workers=False)\n'
        "val_evaluator = dict(type='Accuracy', topk=(1, 5))\n"
        'optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))\n'
    )
    with pytest.raises(ValueError, match=said):
        load(DIGITS, text, {option: value})


def test_words_where_a_class_takes_them(load):
    text = (
        'custom_hooks = [dict('
        "type='mmstabvim.SpectralNormalizationHook', rho_max=1.0)]"
    )
    cfg = load(DIGITS, text, {'custom_hooks.0.rho_max': 'init'})
    assert cfg.custom_hooks[0].rho_max == 'init'


def test_child_sets_a_variable_of_its_base_again(load):
    """Which was used while the base was read."""
    with pytest.raises(ValueError, match="'data_root' has no effect") as error:
        load(ADE, "data_root = '/data/mine'")
    assert 'train_dataloader.dataset.data_root' in str(error.value)
    text = (
        "data_root = '/data/mine'\n"
        'train_dataloader = dict(dataset=dict(data_root=data_root))'
    )
    cfg = load(ADE, text)
    assert cfg.train_dataloader.dataset.data_root == '/data/mine'


def test_child_misspells_a_setting(load):
    with pytest.raises(ValueError, match='near names: train_dataloader'):
        load(DIGITS, 'train_dataloder = dict(batch_size=3)')
    load(DIGITS, 'my_notes = 3')  # a warning


@pytest.mark.parametrize(
    'path',
    [
        path
        for folder in ('vim', 'upernet', 'own_data', 'mix_in', 'transfer')
        for path in sorted((CONFIGS / folder).glob('*.py'))
    ],
    ids=lambda path: path.stem,
)
def test_own_configs_have_no_setting_without_effect(path):
    launch.read_settings(str(path), {})


# --- values -----------------------------------------------------------------


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('train_cfg.max_epochs', 'abc'),
        ('train_cfg.max_epochs', 0),
        ('train_cfg.val_interval', 0),
        ('train_dataloader.batch_size', 0),
        ('train_dataloader.batch_size', 2.5),
        ('optim_wrapper.optimizer.lr', 'fast'),
        ('optim_wrapper.optimizer.lr', -1.0),
        ('default_hooks.checkpoint.interval', 0),
        ('model.backbone', 'VisionMamba'),
        ('randomness.seed', 'x'),
    ],
)
def test_value_that_cannot_work(load, option, value):
    with pytest.raises(ValueError, match=option):
        load(DIGITS, options={option: value})


# --- files ------------------------------------------------------------------


def test_broken_syntax_names_file_and_line(load):
    with pytest.raises(ValueError, match=r'child\.py, line 3'):
        load(DIGITS, 'x = 1\nmodel = dict(backbone=dict(')


def test_error_in_a_config_names_file_and_line(load):
    with pytest.raises(ValueError, match=r'line 2: NameError.*batch'):
        load(DIGITS, 'train_dataloader = dict(batch_size=batch)')


def test_empty_config(load):
    with pytest.raises(ValueError, match=r'child\.py.* is empty'):
        load(None)


def test_config_without_a_model(load):
    with pytest.raises(ValueError, match='must have a model'):
        load(None, 'work_dir = "a"')


def test_missing_base_names_both_files(load):
    with pytest.raises(FileNotFoundError, match=r'child\.py: its base'):
        load(None, "_base_ = './none.py'")


def arguments(path, **changes):
    given = dict(config=str(path), work_dir=None, launcher='none')
    given |= dict(local_rank=0, cfg_options={})
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize('work_dir', ['', '  ', __file__])
def test_work_dir_that_cannot_be_one(work_dir):
    with pytest.raises(ValueError, match='--work-dir wants a folder'):
        launch.load_config(arguments(CONFIGS / DIGITS, work_dir=work_dir))


def test_launcher_without_its_starter(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(ValueError, match='wants to be started by torchrun'):
        launch.load_config(arguments(CONFIGS / DIGITS, launcher='pytorch'))


def test_a_mistake_ends_a_tool_without_a_traceback(capsys):
    def main():
        raise Mistake('the cure is simple')

    assert run_tool(main) == 1
    assert capsys.readouterr().err.endswith('error: the cure is simple\n')


def test_lazy_configs(tmp_path):
    """Python-style configs are read, and options apply to them."""
    (tmp_path / 'base.py').write_text(
        'train_cfg = dict(by_epoch=True, max_epochs=3)\nmodel = dict(x=1)\n'
    )
    (tmp_path / 'child.py').write_text(
        'from mmengine.config import read_base\n\n'
        'with read_base():\n    from .base import *\n'
    )
    cfg = launch.read_settings(
        str(tmp_path / 'child.py'), {'train_cfg.max_epochs': 7}
    )
    assert isinstance(cfg, Config)
    assert cfg.train_cfg.max_epochs == 7

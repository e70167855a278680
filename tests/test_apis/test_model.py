"""The door from config and checkpoint to a model."""

import logging
import sys

import pytest
import torch
from mmengine.config import Config
from small_runs import digits_config, scenes_config

from mmstabvim.apis import console, get_model


@pytest.fixture
def cfg(tmp_path):
    return digits_config(tmp_path)


def saved(model, path, **meta):
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.mark.parametrize('as_file', [True, False], ids=['path', 'config'])
def test_weights_of_a_checkpoint(cfg, tmp_path, as_file):
    """From a file, and from the folder of a training."""
    donor = get_model(cfg)
    saved(donor, tmp_path / 'epoch_2.pth', dataset_meta=dict(classes=['a']))
    cfg.dump(tmp_path / 'small.py')
    config = tmp_path / 'small.py' if as_file else cfg
    for place in (tmp_path / 'epoch_2.pth', tmp_path):
        model = get_model(config, place)
        image = torch.randn(1, 3, 32, 32)
        assert torch.equal(model(image), donor(image))
        assert model.dataset_meta == {'classes': ['a']}
    assert not model.training


def test_options_change_a_copy(cfg):
    model = get_model(cfg, cfg_options={'model.head.num_classes': 3})
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert model.cfg.model.head.num_classes == 3
    assert cfg.model.head.num_classes == 10
    assert 'data_preprocessor' not in cfg.model
    with pytest.raises(ValueError, match='num_clases'):
        get_model(cfg, cfg_options={'model.head.num_clases': 3})


def test_every_weight_must_find_the_other(cfg, tmp_path):
    path = saved(get_model(cfg), tmp_path / 'small.pth')
    with pytest.raises(ValueError, match=r'(?s)not fit .*head\.fc'):
        get_model(cfg, path, {'model.head.num_classes': 3})


def test_classes_of_the_test_set(cfg):
    """Where no checkpoint tells them; also inside of a wrapper."""
    names = [str(digit) for digit in range(10)]
    assert [*get_model(cfg).dataset_meta['classes']] == names
    inner = cfg.test_dataloader.dataset
    inner.metainfo = dict(classes=['x'])
    cfg.test_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=inner
    )
    assert get_model(cfg).dataset_meta['classes'] == ['x']


def test_the_toolkits_take_the_model(cfg, tmp_path):
    """MMPretrain's inferencer and MMSegmentation's function."""
    import numpy as np
    from mmpretrain import ImageClassificationInferencer
    from mmseg.apis import inference_model

    image = np.zeros((32, 32, 3), np.uint8)
    cfg.test_dataloader.dataset.pipeline = [dict(type='PackInputs')]
    infer = ImageClassificationInferencer(get_model(cfg))
    assert infer(image)[0]['pred_class'] in infer.classes
    model = get_model(scenes_config(tmp_path))
    assert inference_model(model, image).pred_sem_seg.shape == (32, 32)


def test_a_config_without_a_model(tmp_path):
    path = tmp_path / 'empty.py'
    path.write_text('train_cfg = dict()\n')
    with pytest.raises(ValueError, match='must have a model'):
        get_model(path)
    with pytest.raises(ValueError, match='must have a model'):
        get_model(Config())


def test_quiet_ends(capsys):
    logger = logging.getLogger('test_quiet_ends')
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    with console.quiet():
        logger.info('dropped')
        logger.warning('kept')
    logger.info('kept too')
    assert capsys.readouterr().out == 'kept\nkept too\n'

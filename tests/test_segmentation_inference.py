"""Predictions of segmentors: image sizes, inferencers, the page's snippet."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from small_runs import (
    ROOT,
    digits_config,
    load_tool,
    run_tool,
    scenes_config,
    train,
    vary_predictions,
)

import mmstabvim

NUM_CLASSES = 5
SIZES = [(713, 1000), (360, 480)]  # neither is a multiple of the patches


@pytest.fixture(scope='module', autouse=True)
def _scope():
    yield
    init_default_scope('mmpretrain')


# -------------------------------------------------------------- image sizes


@pytest.fixture(scope='module')
def segmentor():
    """The ADE20K config's model for 512 x 512, with one narrow block."""
    import mmseg.models  # noqa: F401

    init_default_scope('mmseg')
    name = 'vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py'
    model = Config.fromfile(ROOT / 'configs/upernet' / name).model
    model.backbone.update(
        arch=dict(embed_dims=16, num_layers=1, d_state=4), out_indices=[0]
    )
    model.neck.update(in_channels=16, norm_cfg=dict(type='BN'))
    model.decode_head.update(
        in_channels=[16] * 4,
        channels=8,
        num_classes=NUM_CLASSES,
        norm_cfg=dict(type='BN'),
    )
    model.auxiliary_head = None
    torch.manual_seed(0)
    model = MODELS.build(model)
    model.init_weights()
    # so that the classes differ from place to place
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    return model.eval()


def image_of(size):
    generator = torch.Generator().manual_seed(0)
    shape = (3, *size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@torch.no_grad()
def predict(model, size, **test_cfg):
    """Scores and classes of one image; the model's own settings if none."""
    from mmseg.structures import SegDataSample

    sample = SegDataSample()
    sample.set_metainfo(dict(img_shape=size, ori_shape=size))
    before = model.test_cfg
    if test_cfg:
        model.test_cfg = ConfigDict(test_cfg)
    try:
        (result,) = model.test_step(
            dict(inputs=[image_of(size)], data_samples=[sample])
        )
    finally:
        model.test_cfg = before
    return result.seg_logits.data, result.pred_sem_seg.data


@pytest.mark.parametrize('mode', ['slide', 'whole'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_sizes_never_seen_in_training(segmentor, size, mode):
    """Finite scores for each pixel, and more than one class."""
    assert segmentor.test_cfg.mode == 'slide'
    other = {} if mode == 'slide' else dict(mode='whole')
    scores, classes = predict(segmentor, size, **other)
    assert scores.shape == (NUM_CLASSES, *size)
    assert scores.isfinite().all()
    assert classes.shape == (1, *size)
    assert 2 <= len(classes.unique()) <= NUM_CLASSES


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_one_window_is_the_whole_image(segmentor, size):
    """Bit by bit; windows of less than the image give something else."""
    whole, _ = predict(segmentor, size, mode='whole')
    window = dict(mode='slide', stride=(341, 341))
    covering, _ = predict(segmentor, size, crop_size=(720, 1024), **window)
    assert torch.equal(covering, whole)
    smaller, _ = predict(segmentor, size, crop_size=(352, 352), **window)
    assert not torch.allclose(smaller, whole, atol=1e-3)


# -------------------------------------------------------------- inferencers


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder with config.py, checkpoint.pth and image.png."""
    folder = tmp_path_factory.mktemp('trained')
    cfg = scenes_config(folder)
    train(cfg)
    cfg.dump(folder / 'config.py')
    vary_predictions(f'{cfg.work_dir}/iter_4.pth', folder / 'checkpoint.pth')
    pixels = image_of((50, 70)).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / 'image.png')
    return folder


def inferencer_of(folder):
    from mmseg.apis import MMSegInferencer

    return MMSegInferencer(
        str(folder / 'config.py'), weights=str(folder / 'checkpoint.pth')
    )


def test_mmseg_inferencer_predicts_as_the_test_tool(
    trained, tmp_path, monkeypatch
):
    """Scene by scene, with the classes' names from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    paths = [trained / 'config.py', trained / 'checkpoint.pth']
    run_tool(load_tool('test'), *paths, '--out', 'masks')
    inferencer = inferencer_of(trained)
    scenes = [f'digit-scenes://test/32/0/img/{i:05d}.png' for i in range(3)]
    result = inferencer(scenes, batch_size=2)
    for i, found in enumerate(result['predictions']):
        mask = np.asarray(Image.open(f'masks/{i:05d}.png'))
        assert np.array_equal(found, mask)
        assert len(np.unique(mask)) > 1
    classes = inferencer.model.dataset_meta['classes']
    assert classes == ('background', *'0123456789')


def test_mmseg_functions(trained, tmp_path):
    """Files and arrays, of another size than in training."""
    from mmseg.apis import inference_model, init_model, show_result_pyplot

    paths = [trained / 'config.py', trained / 'checkpoint.pth']
    model = init_model(*map(str, paths), device='cpu')
    image = str(trained / 'image.png')
    result = inference_model(model, image)
    assert result.pred_sem_seg.shape == (50, 70)
    pixels = np.asarray(Image.open(image))
    from_array = inference_model(model, pixels[..., ::-1])
    assert torch.equal(from_array.pred_sem_seg.data, result.pred_sem_seg.data)
    drawn = show_result_pyplot(model, image, result, show=False)
    assert drawn.shape == (50, 70, 3)
    assert not np.array_equal(drawn, pixels)


def snippet(page):
    """A page's Python code from an image to an overlay."""
    blocks = re.findall(
        r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL
    )
    (code,) = (block for block in blocks if 'Inferencer' in block)
    return code


def test_snippet_of_the_page(trained):
    """It runs as it stands there, in a new process."""
    page, opacity = 'docs/segmentation.md', 0.5
    claim = "assert result['predictions'].shape == (50, 70)"
    shutil.rmtree(trained / 'results', ignore_errors=True)
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'{snippet(page)}\n{claim}'],
        cwd=trained,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    image, overlay, mask = (
        np.asarray(Image.open(trained / name))
        for name in (
            'image.png',
            'results/vis/image.png',
            'results/pred/00000000_pred.png',
        )
    )
    assert overlay.shape == image.shape
    assert mask.shape == (50, 70)
    palette = np.array(mmstabvim.DigitScenes.METAINFO['palette'])
    expected = (1 - opacity) * image + opacity * palette[mask]
    # labels are drawn over it
    assert np.mean(np.abs(overlay - expected).max(-1) <= 1) > 0.8
    assert len(np.unique(mask)) > 1


def test_mmpretrain_inferencer(tmp_path):
    """Config and checkpoint of a classifier, an image of another size."""
    from mmpretrain import ImageClassificationInferencer

    cfg = digits_config(tmp_path)
    cfg.train_cfg.update(max_epochs=1, val_interval=2)
    model = train(cfg).model.eval()
    cfg.dump(tmp_path / 'config.py')
    inferencer = ImageClassificationInferencer(
        str(tmp_path / 'config.py'),
        pretrained=f'{cfg.work_dir}/epoch_1.pth',
    )
    image = image_of((50, 70))
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    (result,) = inferencer(pixels, show_dir=str(tmp_path / 'shown'))
    mean, std = 79.6, 90.8
    with torch.no_grad():
        scores = model((image[None].float() - mean) / std).softmax(-1)[0]
    np.testing.assert_allclose(result['pred_scores'], scores, rtol=1e-4)
    assert result['pred_class'] == str(int(scores.argmax()))
    (shown,) = (tmp_path / 'shown').iterdir()
    assert np.asarray(Image.open(shown)).ndim == 3

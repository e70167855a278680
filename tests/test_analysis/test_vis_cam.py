"""Class activation maps: exact by differences, and right where planted."""

import csv
import json
import sys
from functools import partial

import cv2
import numpy as np
import planted
import pytest
import torch
import vis_cam as tool

from mmstabvim.analysis import cam
from mmstabvim.apis import tokens, trained
from mmstabvim.visualization.overlay import Panel, Patches, overlay_figure

PLACES = [
    dict(cls_token='middle'),
    dict(cls_token='head'),
    dict(cls_token='double'),
    dict(cls_token=None, out_type='avg_featmap'),
]
places = pytest.mark.parametrize('place', PLACES, ids=lambda p: p['cls_token'])


def load(arguments):
    args = tool.parse_args(arguments)
    return args, *trained.load_model(args)


def rough_head(model):
    """Larger weights: logits that depend on the image."""
    for name, parameter in model.named_parameters():
        if 'proj' in name or 'head' in name or 'cls_token' in name:
            parameter.normal_(std=0.3)


def positions(place, patches):
    """Sequence index of each patch, counted by hand."""
    if place is None:
        return list(range(patches))
    if place == 'middle':
        half = patches // 2
        return [i if i < half else i + 1 for i in range(patches)]
    return list(range(1, patches + 1))


def scaled_token(layer, index, factor):
    """Hook that multiplies one token of a layer's output."""

    def change(_module, _inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        changed = first.clone()
        changed[:, index] *= factor
        if isinstance(output, tuple):
            return changed, *output[1:]
        return changed

    return layer.register_forward_hook(change)


@places
@pytest.mark.parametrize('size', [(24, 40), (40, 17)], ids=str)
def test_a_patch_counts_as_much_as_its_token_matters(digits, place, size):
    """Scaling a token changes the logit as HiResCAM says: not one beside.

    The image's last patches are padded in the second size.
    """
    _, _, model = load(digits(rough_head, **place))
    model.double()
    torch.manual_seed(0)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    name = cam.default_layer('backbone', model.backbone)
    last = 'norm' if place['cls_token'] is None else 'layers.1.norm'
    assert name == f'backbone.{last}'
    found = cam.class_map(model, image, 3, method='hirescam')
    assert found.values.shape == (rows, columns)
    at = positions(place['cls_token'], rows * columns)
    wanted = []
    for index in at:
        logits = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            handle = scaled_token(model.get_submodule(name), index, factor)
            with torch.no_grad():
                logits.append(model(image, mode='tensor')[0, 3].item())
            handle.remove()
        wanted.append((logits[0] - logits[1]) / 2e-5)
    wanted = torch.tensor(wanted).view(rows, columns)
    assert (wanted.abs() > 1e-5).sum() >= 12
    torch.testing.assert_close(
        found.values.double(), wanted.double(), rtol=1e-4, atol=1e-6
    )


@places
def test_the_mean_gradient_is_that_of_patches_alone(digits, place):
    """Grad-CAM written out, on tokens found by hand."""
    _, _, model = load(digits(rough_head, **place))
    torch.manual_seed(0)
    image = torch.randn(1, 3, 24, 40)
    seen = []
    name = 'backbone.layers.1.norm'
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: seen.append(output[0])
    )
    logits = model(image.requires_grad_(), mode='tensor')[0]
    handle.remove()
    target = int(logits.argmax())
    (gradient,) = torch.autograd.grad(logits[target], seen)
    at = positions(place['cls_token'], 15)
    weights = gradient[0, at].mean(0)
    wanted = (seen[0][0, at] @ weights).view(3, 5).detach()
    found = cam.class_map(model, image, layer=name)
    assert found.target == target
    torch.testing.assert_close(found.values, wanted)
    torch.testing.assert_close(found.logits, logits.detach())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('method', cam.METHODS)
@pytest.mark.parametrize('place', ['middle', 'head', 'double'])
def test_lights_up_the_patch_that_decides(tmp_path, place, method):
    """Before, beside and after the class token."""
    model = planted.build_model(tmp_path, cls_token=place)
    generator = torch.Generator().manual_seed(5)
    without = model(planted.make_image(generator), mode='tensor')[0, 1]
    for row in range(planted.ROWS):
        for column in range(planted.COLUMNS):
            image = planted.make_image(generator, (row, column))
            found = cam.class_map(model, image, 1, method=method)
            assert found.logits[1] > 2 * without.abs()
            right = found.values[row, column]
            others = found.values.clone()
            others[row, column] = -1
            assert right > 2 * others.max()


def test_files_and_numbers(digits, tmp_path, capsys):
    arguments = digits(img_size=32)
    out = tmp_path / 'out'
    tool.main([*arguments, '--samples=3', '--seed=1', f'--out={out}'])
    facts = json.loads((out / 'cam.json').read_text())
    rows = facts.pop('rows')
    assert len(rows) == 3 * 16
    assert facts['layer'] == 'backbone.layers.1.norm'
    assert facts['place'] == 'class token in the middle'
    assert facts['images'] == '3 images of the test set'
    for suffix in ('md', 'png'):
        assert (out / f'cam.{suffix}').stat().st_size > 500
    with (out / 'cam.csv').open() as file:
        table = list(csv.DictReader(file))
    assert [float(r['signed']) for r in table] == [r['signed'] for r in rows]
    args, cfg, model = load([*arguments, '--samples=3', '--seed=1'])
    samples = list(tokens.named_images(args, cfg, model))
    images = list(trained.load_images(args, cfg, model))
    assert len(samples) == len(images)
    for number, (sample, image) in enumerate(
        zip(samples, images, strict=True)
    ):
        assert torch.equal(sample.image, image)
        found = cam.class_map(model, image, layer=facts['layer'])
        own = [row for row in rows if row['sample'] == number]
        assert [r['row'] * 4 + r['column'] for r in own] == list(range(16))
        assert [r['signed'] for r in own] == pytest.approx(
            found.values.flatten().tolist(), rel=1e-4, abs=1e-9
        )
        for row in own:
            assert row['value'] == max(row['signed'], 0)
            assert row['target'] == row['predicted'] == found.target
            assert (row['name'], row['label']) == (sample.name, sample.label)
    assert 'Written: ' in capsys.readouterr().out


def test_images_of_a_folder_and_a_chosen_class(digits, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
        pixels = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f'{name}.png'), pixels)
    out = tmp_path / 'out'
    options = [f'--images={folder}', f'--out={out}', '--target=7']
    tool.main([*digits(), *options, '--method=hirescam'])
    facts = json.loads((out / 'cam.json').read_text())
    assert facts['images'] == f'2 images of {folder}'
    assert facts['grids'] == [[3, 5]]
    assert {row['name'] for row in facts['rows']} == {'a.png', 'b.png'}
    assert {row['target'] for row in facts['rows']} == {7}
    assert len(facts['rows']) == 2 * 15
    page = (out / 'cam.md').read_text()
    assert '# HiResCAM by patch' in page


def test_the_picture_is_what_the_model_reads(digits, tmp_path):
    args, cfg, model = load(digits())
    raw = next(trained.test_samples(args, cfg))['inputs']
    sample = next(tokens.named_images(args, cfg, model))
    picture = tokens.picture_of(model, sample.image)
    wanted = raw.permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(picture, wanted, atol=1e-6)


def paint(rows, image, patches, **panel):
    """Pixel colours of a figure, by image coordinates."""
    panels = {'one': Panel('', image, **panel)}
    figure = overlay_figure(rows, panels, patches, 1)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    axes = figure.axes[0]

    def color(x, y):
        at = axes.transData.transform((x, y))
        column, line = int(at[0]), int(pixels.shape[0] - at[1])
        return pixels[line, column, :3].astype(int)

    return color


@pytest.mark.parametrize('stride', [4, 2])
def test_the_overlay_lies_on_its_patch(stride):
    """One patch of 3 x 5 has a value: its square changes, others do not."""
    rows, columns, size = 3, 5, 4
    height = (rows - 1) * stride + size
    width = (columns - 1) * stride + size - 1  # the last patch is cut
    image = np.ones((height, width, 3))
    values = [
        dict(panel='one', row=r, column=c, value=float((r, c) == (2, 1)))
        for r in range(rows)
        for c in range(columns)
    ]
    patches = Patches(size, stride)
    color = paint(values, image, patches)
    dull = color(0.5 + (size - stride) / 2, 0.5 + (size - stride) / 2)
    for r in range(rows):
        for c in range(columns):
            left, top = patches.cell(r, c)
            centre = r * stride + size / 2, c * stride + size / 2
            assert centre == (top + stride / 2, left + stride / 2)
            for dy in (0.15, 0.85):
                for dx in (0.15, 0.85):
                    x, y = left + dx * stride, top + dy * stride
                    if x > width - 0.3:
                        continue
                    changed = np.abs(color(x, y) - dull).max() > 30
                    assert changed == ((r, c) == (2, 1)), (r, c, dx, dy)


def test_colours_say_the_sign():
    image = np.full((4, 8, 3), 0.5)
    rows = [
        dict(panel='one', row=0, column=c, value=v)
        for c, v in enumerate((-1.0, 1.0))
    ]
    color = paint(rows, image, Patches(4, 4))
    blue, red = color(2, 2), color(6, 2)
    assert blue[2] > blue[0] + 30
    assert red[0] > red[2] + 30


def test_a_mark_around_a_patch():
    image = np.full((12, 20, 3), 0.5)
    color = paint([], image, Patches(4, 4), mark=(1, 3))
    near = np.linspace(-0.2, 0.2, 41)
    for upper in (4, 8):
        assert min(color(14, upper + d).max() for d in near) < 60
    for left in (12, 16):
        assert min(color(left + d, 6).max() for d in near) < 60
    assert abs(color(14, 6) - 127).max() < 3
    assert abs(color(2, 6) - 127).max() < 3


@pytest.mark.parametrize('layer', ['layers.1.mixer', 'layers.1', 'norm'])
def test_an_empty_map_is_an_error(digits, layer, tmp_path):
    """After the last mixer the class token is all that the head reads."""
    arguments = [*digits(), f'--layer=backbone.{layer}', f'--out={tmp_path}']
    with pytest.raises(ValueError, match=r'every gradient is 0.*last mixer'):
        tool.main(arguments)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            ['--layer=backbone.layer.1.norm'],
            r"no module 'backbone.layer.1.norm'; near .*layers\.1\.norm",
        ),
        (['--layer=head'], r"'head' must give \(1, 17, channels\).*\(1, 10\)"),
        (['--layer=backbone.patch_embed'], r'\(1, 17, .*got \(1, 16, 16\)'),
        (
            [
                '--layer=backbone.drop_path',
                '--cfg-options',
                'model.backbone.feature=mixer_output',
            ],
            'takes no part',
        ),
        (['--target=10'], '--target must be from 0 to 9, got 10'),
        (['--target=-1'], 'got -1'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_clear_errors(digits, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tool.main([*digits(), f'--out={tmp_path}', *options])


def test_a_segmentor_has_no_class_of_the_image(scenes, tmp_path):
    with pytest.raises(ValueError, match=r'must be a classifier.*Encoder'):
        tool.main([*scenes, f'--out={tmp_path}'])


def test_names_of_classes(digits, tmp_path, monkeypatch):
    """In the table and the titles, where the model knows them."""
    _, _, model = load(digits())
    assert tokens.class_name(model, 3) == 'class 3'  # named '3'
    model.dataset_meta = dict(classes=['cat, felis', 'dog'])
    assert tokens.class_name(model, 0) == 'cat'
    assert tokens.class_name(model, 2) == 'class 2'
    image = torch.rand(1, 3, 32, 32)
    sample = tokens.Sample('a.png', image, 1)
    facts = dict(config='c', checkpoint='d', source='a test')
    as_text = partial(cam.writing.save, formats=['svg'])
    monkeypatch.setattr(cam.writing, 'save', as_text)
    table = cam.write_maps(model, [sample], tmp_path, facts, target=0)
    assert '| a.png | dog |' in table
    assert '| cat (' in table
    assert 'for cat (' in (tmp_path / 'cam.svg').read_text()


def test_the_package_is_named_where_it_is_missing(digits, monkeypatch):
    _, _, model = load(digits())
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(ImportError, match='pip install grad-cam'):
        cam.class_map(model, torch.rand(1, 3, 32, 32))

"""Operations of models, counted by hand beside the tool's counter."""

import csv
import json
from pathlib import Path

import get_flops as tool
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from small_runs import digits_config, scenes_config
from torch import nn

from mmstabvim.layers import MambaMixer

ROOT = Path(__file__).parents[2]


def by_hand(height, width, classes, D, layers, N, patch, factor=7, numbers=1):
    """The formula of the tool's docstring; class token in the middle."""
    E, K, R = 2 * D, 4, -(-D // 16)
    patches = -(-height // patch) * -(-width // patch)
    L = patches + 1
    scan = L * E * (factor * N + 6)
    projections = 2 * L * E * (R + 2 * numbers * N) + 2 * L * R * E
    directions = 2 * (2 * L * E * K + projections + scan)
    block = 2 * L * D * 2 * E + directions + 2 * L * E * D
    embedding = 2 * patches * 3 * patch**2 * D
    return dict(
        total=embedding + layers * block + 2 * D * classes,
        scan=2 * layers * scan,
        embedding=embedding,
    )


def write(folder, cfg):
    folder.mkdir(exist_ok=True)
    cfg.dump(folder / 'small.py')
    return str(folder / 'small.py')


def run(config, folder, *more):
    """Facts and rows that the tool writes."""
    tool.main([config, f'--out={folder}', *more])
    facts = json.loads((folder / 'flops.json').read_text())
    return facts, facts.pop('rows')


def pick(rows, ending, operator):
    return sum(
        row['flops']
        for row in rows
        if row['part'].endswith(ending) and operator in row['operator']
    )


@pytest.fixture
def digits(tmp_path):
    """A classifier of 16 channels, two layers, state of four."""

    def build(**backbone):
        cfg = digits_config(tmp_path)
        cfg.model.backbone.update(backbone)
        return write(tmp_path / 'config', cfg)

    return build


@pytest.mark.parametrize('shape', [(32, 32), (20, 48), (9, 30)], ids=str)
def test_classifier_by_hand(digits, tmp_path, shape):
    facts, rows = run(digits(), tmp_path / 'out', '--shape', *map(str, shape))
    wanted = by_hand(*shape, 10, D=16, layers=2, N=4, patch=4)
    assert facts['flops'] == wanted['total']
    assert pick(rows, 'mixer', 'scan') == wanted['scan']
    assert pick(rows, 'projection', 'conv') == wanted['embedding']
    assert facts['gmac'] == pytest.approx(wanted['total'] / 2e9)
    assert sum(row['share'] for row in rows) == pytest.approx(1)


def test_both_directions_and_any_backend(digits, tmp_path):
    """One direction would be half; plain PyTorch would hide the scan."""
    shape = ['--shape', '32']
    wanted = by_hand(32, 32, 10, D=16, layers=2, N=4, patch=4)
    facts, rows = run(digits(backend='reference'), tmp_path / 'out', *shape)
    assert facts['flops'] == wanted['total']
    assert pick(rows, 'mixer', 'both directions') > wanted['scan']


def test_complex_states(digits, tmp_path):
    """28 operations per state; B and C have two numbers each."""
    config = digits(state_matrix=dict(type='complex'))
    facts, rows = run(config, tmp_path / 'out', '--shape', '32')
    wanted = by_hand(
        32, 32, 10, D=16, layers=2, N=4, patch=4, factor=28, numbers=2
    )
    assert pick(rows, 'mixer', 'scan') == wanted['scan']
    assert facts['flops'] == wanted['total']


def test_vim_tiny_as_published():
    """7 M parameters, 1.5 G multiply-adds (arXiv:2401.09417, Table 1)."""
    config = ROOT / 'configs/vim/vim-tiny-p16_8xb128_in1k.py'
    args = tool.parse_args([str(config)])
    cfg, model = tool.build_model(args)
    shape = tool.image_shape(args, cfg)
    assert shape == (224, 224)
    counts = tool.count(model, torch.zeros(1, 3, *shape))
    rows = tool.make_rows(model, counts)
    total = sum(row['flops'] for row in rows)
    wanted = by_hand(*shape, 1000, D=192, layers=24, N=16, patch=16)
    assert total == wanted['total']
    assert round(total / 2e9, 1) == 1.5
    assert round(sum(row['parameters'] for row in rows) / 1e6) == 7


def count_layers(model, image):
    """Linear layers and convolutions that are called, from their shapes."""
    found = 0

    def linear(layer, _, output):
        nonlocal found
        found += 2 * output.numel() * layer.in_features

    def convolution(layer, _, output):
        nonlocal found
        found += 2 * output.numel() * layer.weight[0].numel()

    kinds = {nn.Linear: linear, nn.Conv2d: convolution}
    for module in model.modules():
        if type(module) in kinds:
            module.register_forward_hook(kinds[type(module)])
    with torch.no_grad():
        model(image, mode='tensor')
    return found


def directions_by_hand(L, D, N):
    """What runs in a mixer outside of its layers."""
    E, K, R = 2 * D, 4, -(-D // 16)
    projections = 2 * L * E * (R + 2 * N) + 2 * L * R * E
    return 2 * (2 * L * E * K + projections + L * E * (7 * N + 6))


def test_segmentor(tmp_path):
    """Backbone, neck and head, without the head of the training alone."""
    cfg = scenes_config(tmp_path)
    facts, rows = run(write(tmp_path / 'config', cfg), tmp_path / 'out')
    assert (facts['height'], facts['width']) == (32, 32)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    image = torch.zeros(1, 3, 32, 32)
    grid = (32 // cfg.model.backbone.patch_size) ** 2
    tokens = grid + model.backbone.num_extra_tokens
    wanted = count_layers(model, image)
    wanted += 3 * directions_by_hand(tokens, 16, 4)
    assert facts['flops'] == wanted
    assert any(row['part'].startswith('decode_head') for row in rows)
    everything = sum(p.numel() for p in model.parameters())
    assert facts['parameters'] == everything


def test_another_network(tmp_path):
    """MMPretrain's own transformer; the CPU's fused attention counts."""
    cfg = digits_config(tmp_path)
    cfg.model = Config(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='VisionTransformer',
                arch=dict(
                    embed_dims=8,
                    num_layers=1,
                    num_heads=2,
                    feedforward_channels=16,
                ),
                img_size=16,
                patch_size=8,
            ),
            head=dict(
                type='VisionTransformerClsHead', num_classes=3, in_channels=8
            ),
        )
    )._cfg_dict
    facts, _ = run(write(tmp_path / 'config', cfg), tmp_path / 'out')
    L, D = 5, 8
    layers = 2 * L * D * (4 * D + 2 * 16)
    attention = 2 * 2 * L * L * D
    wanted = 2 * 4 * 3 * 64 * D + layers + attention + 2 * D * 3
    assert facts['flops'] == wanted


def test_parameters_stand_with_their_part(digits, tmp_path):
    facts, rows = run(digits(), tmp_path / 'out')
    mixer = MambaMixer(16, d_state=4)
    own = sum(
        p.numel()
        for name, p in mixer.named_parameters()
        if name.startswith('directions')
    )
    found = [r['parameters'] for r in rows if r['part'].endswith('mixer')]
    assert found == [2 * own, 0, 0]
    assert facts['parameters'] == sum(row['parameters'] for row in rows)


def test_depth_adds_up(digits, tmp_path):
    config = digits()
    whole, rows = run(config, tmp_path / 'out')
    short, few = run(config, tmp_path / 'few', '--depth=1')
    assert short['flops'] == whole['flops']
    assert {row['part'] for row in few} == {'backbone', 'head'}
    assert len(few) < len(rows)


def test_files(digits, tmp_path, capsys):
    out = tmp_path / 'out'
    facts, rows = run(digits(), out, '--shape', '32')
    with (out / 'flops.csv').open() as file:
        numbers = [int(row['flops']) for row in csv.DictReader(file)]
    assert numbers == [row['flops'] for row in rows]
    page = (out / 'flops.md').read_text()
    assert f'{facts["parameters"]:,} parameters' in page
    assert '| total |' in page
    for ending in ('png', 'pdf', 'svg'):
        assert (out / f'flops.{ending}').stat().st_size > 3000
    said = capsys.readouterr()
    assert 'scan, both directions' in said.out
    assert 'modules' in said.err


def test_a_mixer_that_hides_its_scan(digits):
    args = tool.parse_args([digits()])
    _, model = tool.build_model(args)
    model.backbone.layers[1].mixer.forward = lambda x: x
    with pytest.raises(ValueError, match=r'layers\.1\.mixer must run a scan'):
        tool.count(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (['--shape', '0'], '--shape must be one or two positive'),
        (['--shape', '1', '2', '3'], '--shape must be one or two positive'),
        (['--depth', '0'], '--depth must be at least 1'),
    ],
    ids=['zero', 'three', 'depth'],
)
def test_bad_arguments(option, message, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(['config.py', *option])
    assert message in capsys.readouterr().err


def test_no_such_config(tmp_path):
    with pytest.raises(FileNotFoundError, match='config file'):
        tool.main([str(tmp_path / 'absent.py')])

"""Operations of models, counted by hand beside PyTorch's counter."""

import csv
from pathlib import Path

import get_flops as tool
import pytest
import torch
from mmengine.config import Config
from small_runs import digits_config, scenes_config
from torch import nn

from mmstabvim.analysis import flops
from mmstabvim.apis import get_model
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


def count(cfg, shape=None, depth=None):
    """Rows of a config's model, operations and parameters of all."""
    model = get_model(cfg)
    shape = shape or flops.image_shape(model.cfg)
    counts = flops.count_flops(model, torch.zeros(1, 3, *shape))
    rows = flops.flops_rows(model, counts, depth)
    return rows, *(
        sum(row[k] for row in rows) for k in ('flops', 'parameters')
    )


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
        return cfg

    return build


@pytest.mark.parametrize('shape', [(32, 32), (20, 48), (9, 30)], ids=str)
def test_classifier_by_hand(digits, shape):
    rows, found, _ = count(digits(), shape)
    wanted = by_hand(*shape, 10, D=16, layers=2, N=4, patch=4)
    assert found == wanted['total']
    assert pick(rows, 'mixer.ssm', 'scan') == wanted['scan']
    assert pick(rows, 'projection', 'conv') == wanted['embedding']
    assert sum(row['share'] for row in rows) == pytest.approx(1)


def test_both_directions_and_any_backend(digits):
    """One direction would be half; plain PyTorch would hide the scan."""
    wanted = by_hand(32, 32, 10, D=16, layers=2, N=4, patch=4)
    rows, found, _ = count(digits(backend='reference'), (32, 32))
    assert found == wanted['total']
    assert pick(rows, 'mixer.ssm', 'scan') == wanted['scan']
    assert pick(rows, 'conv1d', 'both directions') > 0


def test_complex_states(digits):
    """28 operations per state; B and C have two numbers each."""
    cfg = digits(state_matrix=dict(type='complex'))
    rows, found, _ = count(cfg, (32, 32))
    wanted = by_hand(
        32, 32, 10, D=16, layers=2, N=4, patch=4, factor=28, numbers=2
    )
    assert pick(rows, 'mixer.ssm', 'scan') == wanted['scan']
    assert found == wanted['total']


def test_vim_tiny_as_published():
    """7 M parameters, 1.5 G multiply-adds (arXiv:2401.09417, Table 1)."""
    _, found, parameters = count(
        ROOT / 'configs/vim/vim-tiny-p16_8xb128_in1k.py'
    )
    wanted = by_hand(224, 224, 1000, D=192, layers=24, N=16, patch=16)
    assert found == wanted['total']
    assert round(found / 2e9, 1) == 1.5
    assert round(parameters / 1e6) == 7


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
    rows, found, parameters = count(cfg)
    model = get_model(cfg)
    grid = (32 // cfg.model.backbone.patch_size) ** 2
    tokens = grid + model.backbone.num_extra_tokens
    wanted = count_layers(model, torch.zeros(1, 3, 32, 32))
    wanted += 3 * directions_by_hand(tokens, 16, 4)
    assert found == wanted
    assert any(row['part'].startswith('decode_head') for row in rows)
    assert parameters == sum(p.numel() for p in model.parameters())


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
    _, found, _ = count(cfg)
    L, D = 5, 8
    layers = 2 * L * D * (4 * D + 2 * 16)
    attention = 2 * 2 * L * L * D
    wanted = 2 * 4 * 3 * 64 * D + layers + attention + 2 * D * 3
    assert found == wanted


def test_parameters_stand_with_their_part(digits):
    rows, _, parameters = count(digits())
    mixer = MambaMixer(16, d_state=4)
    own = sum(
        p.numel()
        for name, p in mixer.named_parameters()
        if name in ('ssm.D', 'ssm.dt_bias') or 'state_matrix' in name
    )
    found = [r['parameters'] for r in rows if r['part'].endswith('mixer.ssm')]
    assert sum(found) == 2 * own
    model = get_model(digits())
    assert parameters == sum(p.numel() for p in model.parameters())


def test_depth_adds_up(digits):
    rows, whole, _ = count(digits())
    few, short, _ = count(digits(), depth=1)
    assert short == whole
    assert {row['part'] for row in few} == {'backbone', 'head'}
    assert len(few) < len(rows)


def test_the_command_line(digits, tmp_path, capsys):
    """Page and numbers, printed and written."""
    digits().dump(tmp_path / 'small.py')
    out = tmp_path / 'out'
    tool.main([f'{tmp_path}/small.py', '--shape=32', f'--out={out}'])
    wanted = by_hand(32, 32, 10, D=16, layers=2, N=4, patch=4)['total']
    with (out / 'flops.csv').open() as file:
        assert sum(int(r['flops']) for r in csv.DictReader(file)) == wanted
    page = (out / 'flops.md').read_text()
    assert f'32 x 32 pixels: {wanted / 1e9:.4g} GFLOP' in page
    assert '| total |' in page
    assert page in capsys.readouterr().out


def test_a_mixer_that_hides_its_scan(digits):
    model = get_model(digits())
    model.backbone.layers[1].mixer.forward = lambda x: x
    with pytest.raises(
        ValueError, match=r'layers\.1\.mixer\.ssm must run a scan'
    ):
        flops.count_flops(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (['--shape', '0'], '--shape: must be at least 1, got 0'),
        (['--shape', '1', '2', '3'], '--shape wants one or two numbers'),
        (['--depth', 'all'], '--depth: must be at least 1, got all'),
    ],
    ids=['zero', 'three', 'depth'],
)
def test_bad_arguments(option, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(['config.py', *option])
    assert message in capsys.readouterr().err

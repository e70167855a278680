"""The Lipschitz report, on real models and images."""

import argparse
import json
import math

import lipschitz_report as tool
import pytest
import torch

from mmstabvim.analysis import lipschitz
from mmstabvim.analysis.mixers import WAYS, no_progress, run_to_mixers
from mmstabvim.apis import trained
from mmstabvim.layers import VisionMambaBlock
from mmstabvim.layers.mixer_ranges import trace_mixer
from mmstabvim.stability import local_jacobian_norm
from mmstabvim.stability.weights.layers import find_layers, weight_parts


def run(arguments, folder, *more):
    """Rows and facts that the tool writes."""
    tool.main([*arguments, f'--out={folder}', '--samples=2', *more])
    facts = json.loads((folder / 'lipschitz.json').read_text())
    return facts.pop('rows'), facts


def pick(rows, **wanted):
    return [row for row in rows if wanted.items() <= row.items()]


def load(arguments):
    parser = argparse.ArgumentParser()
    trained.add_options(parser, 2)
    args = parser.parse_args(arguments)
    return args, *trained.load_model(args)


def local_norms(model, images, steps, method='difference'):
    arguments = model, images, steps, method, no_progress()
    return list(lipschitz.local_norms(*arguments))


@pytest.fixture
def small(digits, rough):
    return digits(rough, 8)


@pytest.fixture
def report(small, tmp_path):
    return run(small, tmp_path / 'out', '--steps=4')


def test_norms_and_stable_ranks(small, report):
    rows, facts = report
    _, _, model = load(small)
    logs = 0.0
    parts = {}
    for name, layer in find_layers(model, ['*']).items():
        parts |= weight_parts(name, layer, layer.weight.detach())
    for name, part in parts.items():
        (row,) = pick(rows, name=name)
        if row['kind'] == 'DirectionalConv1d':
            continue
        weight = part.view().flatten(1).double()
        singular = torch.linalg.svdvals(weight)
        assert row['sigma'] == pytest.approx(float(singular[0]), rel=1e-6)
        rank = float(singular.square().sum() / singular[0].square())
        assert row['stable_rank'] == pytest.approx(rank, rel=1e-6)
        assert row['exact']
        logs += math.log10(row['sigma'])
    for row in pick(rows, kind='DirectionalConv1d'):
        taps = parts[row['name']].view()
        sigma = float(torch.fft.fft(taps.double(), 4096).abs().max())
        assert row['sigma'] == pytest.approx(sigma, rel=1e-3)
        energy = float(taps.square().sum()) / row['sigma'] ** 2
        assert row['stable_rank'] == pytest.approx(energy, rel=1e-5)
        logs += math.log10(row['sigma'])
    assert facts['log10_linear_norm_product'] == pytest.approx(logs)


def test_what_is_not_lipschitz(report, tmp_path):
    rows, facts = report
    mixers = pick(rows, kind='MambaMixer')
    assert len(mixers) == 2
    for row in mixers:
        assert row['lipschitz'] is None
        assert row['statement'].startswith('not globally Lipschitz')
        assert row['local'] > 0
    assert facts['globally_lipschitz'] is False
    page = (tmp_path / 'out/lipschitz.md').read_text()
    assert 'not globally Lipschitz' in page
    assert 'Lipschitz constant' not in page
    for suffix in ('csv', 'png'):
        assert (tmp_path / f'out/lipschitz.{suffix}').stat().st_size > 1000


def test_product_bounds_hold(small, report):
    """Near tokens that are almost zero, and between far ones."""
    rows, _ = report
    _, _, model = load(small)
    mixer = model.backbone.layers[1].mixer.double()
    # where softplus is steep; the bounds do not depend on it
    mixer.ssm.dt_bias.data.fill_(5.0)
    bounds = pick(rows, kind='product bound', name='backbone.layers.1.mixer')
    assert len(bounds) == 8
    torch.manual_seed(0)
    for row in bounds:
        target, way = row['statement'].split(' to ')[1].split(', ')

        def compute(x, name=target, way=way):
            number = WAYS.index(way)
            return trace_mixer(mixer, x).directions[number][name]

        start = 0.1 * torch.randn(3, 9, 8, dtype=torch.float64)
        gains = local_jacobian_norm(compute, start, 30, 'difference')
        assert 0.05 * row['lipschitz'] < gains.max() <= row['lipschitz']
        far = 10 * torch.randn(40, 9, 8, dtype=torch.float64)
        with torch.no_grad():
            moved = compute(far) - compute(far.flip(0))
        ratio = moved.flatten(1).norm(dim=1)
        ratio /= (far - far.flip(0)).flatten(1).norm(dim=1)
        assert (ratio <= row['lipschitz']).all()


def test_product_bounds_are_attained_by_one_channel():
    """Where SiLU is steepest, and softplus all but linear."""
    options = dict(d_state=1, d_conv=1, expand=1, backend='reference')
    block = VisionMambaBlock(1, **options).double()
    for parameter in block.parameters():
        parameter.data.fill_(0.9)
    block.mixer.ssm.dt_bias.data.fill_(50.0)
    rows = list(lipschitz.mixer_rows('block', block))[1:]
    start = torch.full((1, 1, 1), (2.39936 - 0.9) / 0.9**2).double()
    for row in rows:
        target, way = row['statement'].split(' to ')[1].split(', ')

        def compute(x, name=target, way=way):
            number = WAYS.index(way)
            return trace_mixer(block.mixer, x).directions[number][name]

        gain = local_jacobian_norm(compute, start, 1)
        assert gain.item() == pytest.approx(row['lipschitz'], rel=1e-3)


@pytest.mark.parametrize('method', ['difference', 'double_backward'])
def test_local_norms_are_those_of_the_jacobian(small, method):
    args, cfg, model = load([*small, '--samples=1'])
    images = list(trained.load_images(args, cfg, model))
    found = local_norms(model, images, 40, method)
    for image, norms in zip(images, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: model(x, mode='tensor')[0], image.double()
        )
        wanted = torch.linalg.matrix_norm(jacobian.flatten(1), 2).item()
        assert norms[''] == pytest.approx(wanted, rel=1e-3)
    blocks = trained.find_blocks(model)
    tokens = run_to_mixers(model, blocks, image.double())[1]
    mixer = model.backbone.layers[0].mixer
    jacobian = torch.autograd.functional.jacobian(
        mixer, tokens['backbone.layers.0'].detach()
    )
    wanted = torch.linalg.matrix_norm(jacobian.reshape(17 * 8, -1), 2)
    norm = norms['backbone.layers.0.mixer']
    assert norm == pytest.approx(wanted.item(), rel=1e-2)


def test_the_local_norm_of_a_mixer_is_the_largest(small, tmp_path):
    rows, facts = run(small, tmp_path / 'out', '--steps=3')
    args, cfg, model = load(small)
    images = trained.load_images(args, cfg, model)
    found = local_norms(model, images, 3)
    for row in pick(rows, kind='MambaMixer'):
        largest = max(norms[row['name']] for norms in found)
        assert row['local'] == pytest.approx(largest)
    assert facts['local_jacobian_norms'] == [norms[''] for norms in found]


def test_figure_draws_shared_weights_once(small):
    args, cfg, model = load(small)
    images = trained.load_images(args, cfg, model)
    report = lipschitz.lipschitz_report(model, images, 1)
    marks = lipschitz.report_marks(report)
    places = {(m['facet'], m['series']) for m in marks}
    assert places == {
        *(('both directions', name) for name in ('in_proj', 'out_proj')),
        ('both directions', 'mixer, on images'),
        *((w, n) for w in WAYS for n in ('conv1d', 'x_proj', 'dt_proj')),
    }
    keys = [
        tuple(m[k] for k in ('quantity', 'facet', 'series', 'x'))
        for m in marks
    ]
    assert len(set(keys)) == len(keys)


def test_clear_errors(small, capsys):
    for option, message in (
        ('--samples=0', '--samples must be at least 1, got 0'),
        ('--steps=0', '--steps must be at least 1, got 0'),
    ):
        with pytest.raises(SystemExit):
            tool.main([*small, option])
        assert message in capsys.readouterr().err


def test_bars(small, tmp_path, capsys):
    """All that takes long in large models."""
    run(small, tmp_path / 'out', '--steps=1')
    shown = capsys.readouterr().err
    for name in ('weights', 'mixers', 'Jacobians'):
        assert name in shown

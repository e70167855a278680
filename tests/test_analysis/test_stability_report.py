"""The stability report: numbers, findings, page; on real models."""

import argparse
import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import stability_report as tool
import torch
from small_runs import digits_config, train, unformatted_configs

from mmstabvim.ablation.results import Curves
from mmstabvim.analysis import ranges
from mmstabvim.analysis.stability_report import (
    StabilityReport,
    compare,
    directions,
    find,
    sections,
    source,
    stability_report,
)
from mmstabvim.analysis.stability_report.findings import (
    NOTHING,
    condense,
    headline,
    listed,
)
from mmstabvim.analysis.stability_report.thresholds import THRESHOLDS
from mmstabvim.apis import tokens, trained
from mmstabvim.layers import ScanOrder, SelectiveSSM
from mmstabvim.reporting import to_json
from mmstabvim.stability import sensitivity_profile
from mmstabvim.stability.weights.layers import find_layers, weight_parts

WAYS = ('forward', 'backward')
MATRICES = [
    dict(type='neg_exp'),
    dict(type='signed'),
    dict(type='complex'),
    dict(type='full', groups=2),
]


def run(arguments, folder, *more):
    """Everything that the tool writes as JSON."""
    options = ['--samples=2', '--profile-samples=0', *more]
    tool.main([*arguments, f'--out={folder}', *options])
    return json.loads((folder / 'stability_report.json').read_text())


def measure(arguments, **options):
    """The same without figures and files."""
    args, cfg, model = load(arguments)
    samples = list(tokens.named_images(args, cfg, model))
    report = stability_report(
        model,
        [sample.image for sample in samples],
        [sample.label for sample in samples],
        **dict(profile_samples=0) | options,
    )
    return json.loads(to_json(sections.numbers_of(report, find(report))))


def html_of(folder):
    return (folder / 'stability_report.html').read_text()


def pick(rows, **wanted):
    return [row for row in rows if wanted.items() <= row.items()]


def load(arguments):
    parser = argparse.ArgumentParser()
    trained.add_options(parser, 2)
    args = parser.parse_args(arguments)
    return args, *trained.load_model(args)


def load_images(arguments):
    args, cfg, model = load(arguments)
    return model, list(trained.load_images(args, cfg, model))


def observed_steps(model, images):
    """Step sizes (images, length, d_inner) of each direction's observers."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, SelectiveSSM):

            def look(delta, name=name):
                for k, one in enumerate(delta.detach()):
                    seen.setdefault(f'{name}.{k}', []).append(one)

            module.observers.append(look)
    with torch.no_grad():
        for image in images:
            model(image, mode='tensor')
    return {
        name: torch.cat(found).double().numpy() for name, found in seen.items()
    }


def shift_states(value, layer=1, way=1):
    """Give one eigenvalue of one direction another real part."""

    def change(model):
        matrix = model.backbone.layers[layer].mixer.ssm.state_matrix
        matrix.by_direction(matrix.A)[way][3, 2] = value

    return change


# ----------------------------------------------------------------- numbers


@pytest.mark.parametrize('matrix', MATRICES, ids=lambda m: m['type'])
def test_numbers_of_a_direction_by_hand(digits, rough, matrix):
    arguments = digits(rough, state_matrix=matrix)
    data = measure(arguments)
    model, images = load_images(arguments)
    steps = observed_steps(model, images)
    assert len(data['directions']) == len(steps) == 4
    for row in data['directions']:
        layer, way = row['layer'], WAYS.index(row['direction'])
        name = f'backbone.layers.{layer}.mixer.ssm.{way}'
        assert row['name'] == name
        ssm = model.get_submodule(name[:-2])
        dense = ssm.state_matrix.by_direction(ssm.state_matrix.dense())[way]
        values = dense.detach().to(torch.complex128)
        values = torch.linalg.eigvals(values).numpy()  # (rows, N)
        if matrix['type'] == 'complex':  # one of each pair is stored
            values = np.concatenate([values, values.conj()], 1)
        assert row['abscissa'] == pytest.approx(values.real.max(), rel=1e-4)
        assert row['radius'] == pytest.approx(abs(values).max(), rel=1e-4)
        delta = steps[name]
        real = np.repeat(values.real, delta.shape[2] // len(values), 0)
        check_steps(row, data, delta, real)
        drawn = pick(
            data['eigenvalues'], layer=layer, direction=row['direction']
        )
        assert len(drawn) == values.size
        # a group of channels has the same eigenvalues
        points = {(p['real'], p['imag']) for p in drawn}
        for value in values.ravel():
            near = min(abs(complex(*point) - value) for point in points)
            assert near < 1e-4 * abs(value)


def check_steps(row, data, delta, real):
    """Against numpy: ``delta`` (images, length, dim), ``real`` (dim, N)."""
    place = dict(layer=row['layer'], direction=row['direction'])
    length = delta.shape[1]
    assert row['tokens'] == length == 17
    for q, name in ((0.05, 'q05'), (0.5, 'q50'), (0.95, 'q95')):
        wanted = np.quantile(delta, q)
        assert row[f'delta_{name}'] == pytest.approx(wanted, rel=1e-5)
    assert row['delta_max'] == pytest.approx(delta.max(), rel=1e-6)
    assert row['skipped'] == pytest.approx((delta < 1e-4).mean())
    # memory
    mean = delta.mean((0, 1))[:, None]
    horizon = 1 / (-real * mean)
    assert row['horizon_q50'] == pytest.approx(np.median(horizon), rel=1e-3)
    wanted = np.quantile(horizon, 0.95)
    assert row['horizon_q95'] == pytest.approx(wanted, rel=1e-3)
    assert row['short'] == pytest.approx((horizon < 2).mean(), abs=0.01)
    assert row['long'] == pytest.approx((horizon > 10 * length).mean())
    # from the last token walked to the first: all steps but the first's
    first = 0 if row['direction'] == 'forward' else -1
    after = delta.sum(1) - delta[:, first]  # (images, dim)
    gains = after[..., None] * real
    assert row['vanished'] == pytest.approx((gains < -20).mean(), abs=1e-3)
    assert row['exploding'] == 0
    # histograms
    decay = np.exp(delta[..., None] * real)
    bins = pick(data['decay'], **place)
    for part in bins:
        low, high = part['low'], float(part['high'])
        inside = (decay > low) & (decay <= high)
        inside |= (decay == 0) & (low == 0)
        assert part['share'] == pytest.approx(inside.mean(), abs=2e-3)
    assert sum(part['share'] for part in bins) == pytest.approx(1)
    bins = pick(data['delta'], **place)
    for part in bins:
        inside = (delta >= part['low']) & (delta < float(part['high']))
        assert part['share'] == pytest.approx(inside.mean(), abs=2e-3)


def test_gradient_flow_sees_the_direction():
    """The first token walked is the last one of the backward direction."""
    deltas = torch.tensor([[[9.0], [0.1], [0.1]]])
    found = {}
    for way, reverse in zip(WAYS, (False, True), strict=True):
        ssm = SelectiveSSM(1, 1, order=ScanOrder((reverse,)))
        ssm.state_matrix.A_log.data.fill_(math.log(3.0))
        direction = directions.Direction(0, way, way, ssm, 0)
        direction.add(deltas)
        found[way] = direction.row()['vanished']
    assert found == dict(forward=0, backward=1)


def test_weights_by_hand(digits, rough):
    arguments = digits(rough)
    data = measure(arguments)
    _, _, model = load(arguments)
    seen = 0
    parts = {}
    for name, layer in find_layers(model, ['*']).items():
        parts |= weight_parts(name, layer, layer.weight.detach())
    for row in data['weights']:
        weight = parts[row['name']].view()
        if row['kind'] == 'conv1d':
            response = np.fft.fft(weight.double().numpy(), 4096)
            wanted = abs(response).max()
            assert row['sigma'] == pytest.approx(wanted, rel=1e-3)
            continue
        matrix = weight.double().flatten(1).numpy()
        values = np.linalg.svd(matrix, compute_uv=False)
        assert row['sigma'] == pytest.approx(values[0], rel=1e-6)
        rank = (matrix**2).sum() / values[0] ** 2
        assert row['stable_rank'] == pytest.approx(rank, rel=1e-6)
        share = values / values.sum()
        entropy = math.exp(-(share * np.log(share)).sum())
        assert row['effective_rank'] == pytest.approx(entropy, rel=1e-6)
        seen += 1
    assert seen == 2 + 2 * (2 + 2 * 2)
    assert len(pick(data['weights'], kind='conv1d')) == 4


def test_token_gradients_by_differences(digits, rough):
    arguments = digits(rough)
    data = measure(arguments)
    model, images = load_images(arguments)
    model.double()
    image, moved = images[0].double(), {}

    def move(_, inputs):
        return (inputs[0] + moved.get('by', 0.0),)

    mixer = model.backbone.layers[1].mixer
    mixer.register_forward_pre_hook(move)
    with torch.no_grad():
        best = model(image, mode='tensor')[0].argmax()
        for token in (0, 8, 12):
            slopes = []
            for channel in range(16):
                step = torch.zeros(1, 17, 16).double()
                step[0, token, channel] = 1e-5
                values = []
                for sign in (1, -1):
                    moved['by'] = sign * step
                    values.append(model(image, mode='tensor')[0, best])
                slopes.append((values[0] - values[1]) / 2e-5)
            wanted = torch.stack(slopes).norm().item()
            (row,) = pick(data['token_gradients'], layer=1, token=token)
            assert row['value'] == pytest.approx(wanted, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize('classes', [10, 3])
def test_sensitivity_by_hand(digits, rough, classes):
    arguments = digits(rough, 8)
    options = dict(profile_samples=2, steps=40, classes=classes)
    found = measure(arguments, **options)['sensitivity']
    model, images = load_images(arguments)
    batch = torch.cat(images)
    parameters = list(model.parameters())
    kept = model(batch).amax(0).topk(classes).indices.sort().values
    jacobian = torch.autograd.functional.jacobian(model, batch)[:, kept]
    own = [jacobian[i, :, i].flatten(1).double() for i in (0, 1)]
    norms = [torch.linalg.matrix_norm(part, 2).item() for part in own]
    assert found['input_jacobian'] == pytest.approx(max(norms), rel=1e-4)
    rows = []
    for i in (0, 1):
        for k in kept:
            logit = model(batch[i : i + 1])[0, k]
            parts = torch.autograd.grad(
                logit, parameters, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten() for g in parts]).double())
    gram = torch.stack(rows) @ torch.stack(rows).T
    kernel = torch.linalg.eigvalsh(gram)[-1].item()
    assert found['tangent_kernel'] == pytest.approx(kernel, rel=1e-4)
    halves = [gram[:classes, :classes], gram[classes:, classes:]]
    largest = max(torch.linalg.eigvalsh(h)[-1].item() for h in halves)
    wanted = math.sqrt(largest)
    assert found['parameter_jacobian'] == pytest.approx(wanted, rel=1e-4)
    # the loss is that over all classes, however few are kept
    model.double()
    exact = sensitivity_profile(
        model, batch.double(), labels_of(arguments), parameters, steps=60
    )
    hessian = exact.values()['hessian']
    assert found['hessian'] == pytest.approx(hessian, rel=0.02)
    four = ('input_jacobian', 'parameter_jacobian', 'tangent_kernel')
    largest = max(found[name] for name in (*four, 'hessian'))
    assert found['index'] == largest
    assert found['labels'] == 'given'
    assert (found['classes'], found['total_classes']) == (classes, 10)


def labels_of(arguments):
    args, cfg, _ = load(arguments)
    samples = trained.test_samples(args, cfg)
    return torch.cat([s['data_samples'].gt_label for s in samples])


# -------------------------------------------------------------------- page


def test_page_and_files(digits, tmp_path, capsys):
    out = tmp_path / 'out'
    data = run(digits(), out, '--profile-samples=2', '--formats', 'pdf', 'svg')
    text = html_of(out)
    for name in sections.GUIDES:
        assert (f'<section id="{name}">' in text) == (name != 'comparison')
    for _, words in sections.GUIDES.values():
        # one sentence each
        assert words.endswith('.')
        assert '. ' not in words
    figures = sorted((out / 'figures').glob('*.png'))
    assert len(figures) == 10
    for path in figures:
        for ending in ('pdf', 'svg'):
            assert path.with_suffix(f'.{ending}').stat().st_size > 1000
        with path.with_suffix('.csv').open() as file:
            assert len(list(csv.DictReader(file))) > 0
    assert text.count('<img ') == len(figures)
    check_offline(text)
    markdown = (out / 'stability_report.md').read_text()
    links = re.findall(r'\]\((figures/\w+\.png)\)', markdown)
    assert len(links) == len(figures)
    assert all((out / link).is_file() for link in links)
    assert '| layer | direction |' in markdown
    said = capsys.readouterr().out
    assert f'{len(data["findings"])} finding' in said or NOTHING in said
    # an earlier report leaves nothing behind
    (out / 'figures/old.png').write_bytes(b'')
    run(digits(), out)
    assert not (out / 'figures/old.png').exists()
    assert not list((out / 'figures').glob('*.pdf'))


def check_offline(text):
    """Nothing that a browser would fetch, and nothing that it would run."""
    assert not re.search(r'<(script|link|iframe|object|embed)\b', text)
    sources = re.findall(r'\b(?:src|srcset|data)\s*=\s*"([^"]*)"', text)
    assert sources
    assert all(s.startswith('data:image/png;base64,') for s in sources)
    assert all(
        link.startswith('#') for link in re.findall(r'href="([^"]*)"', text)
    )
    assert not re.search(r'url\(|@import', text)
    assert 'http' not in re.sub(r'base64,[^"]*', '', text)


def test_page_shows_the_numbers(digits, tmp_path):
    data = run(digits(), tmp_path / 'out')
    text = html_of(tmp_path / 'out')
    (row,) = pick(data['directions'], layer=1, direction='backward')
    cells = [f'{row["horizon_q50"]:.3g}', f'{row["delta_max"]:.3g}']
    cells += [f'{row["radius"]:.3g}']
    for cell in cells:
        assert f'<td class="number">{cell}</td>' in text
    rows = pick(data['weights'], kind='out_proj')
    assert f'<td class="number">{rows[0]["sigma"]:.3g}</td>' in text


def test_a_growing_mode_is_found(digits, tmp_path):
    """In layer 1 backward, and nowhere else."""
    arguments = digits(shift_states(0.5), state_matrix=dict(type='signed'))
    data = run(arguments, tmp_path / 'out')
    high = pick(data['findings'], severity='high')
    assert {(f['kind'], f['layer'], f['direction']) for f in high} == {
        ('unstable', 1, 'backward')
    }
    assert data['findings'][0] == high[0]
    (row,) = pick(data['directions'], layer=1, direction='backward')
    assert row['unstable'] == pytest.approx(1 / (32 * 4))
    assert row['decay_max'] == pytest.approx(
        math.exp(0.5 * max_step(arguments)), rel=1e-5
    )
    grown = [r for r in data['decay'] if r['low'] >= 1 and r['share']]
    assert {(r['layer'], r['direction']) for r in grown} == {(1, 'backward')}
    assert sum(r['share'] for r in grown) == pytest.approx(row['growing'])
    text = html_of(tmp_path / 'out')
    assert 'layer 1 backward: 0.78 % of the eigenvalues have a positive' in (
        text
    )
    assert pick(data['findings'], kind='uncertified')
    assert 'bfloat16: not certified in 1 of 2 layers' in text


def max_step(arguments):
    """Of the channel with the growing mode."""
    steps = observed_steps(*load_images(arguments))
    return steps['backbone.layers.1.mixer.ssm.1'][..., 3].max()


@pytest.mark.parametrize(
    ('matrix', 'name'),
    [
        (dict(type='neg_exp'), 'in_proj.weight'),
        (dict(type='neg_exp'), 'ssm.state_matrix.A_log'),
        (dict(type='full'), 'ssm.state_matrix.blocks'),
        (dict(type='complex'), 'ssm.dt_bias'),
    ],
    ids=lambda value: value if isinstance(value, str) else value['type'],
)
def test_weights_that_are_not_finite(digits, tmp_path, matrix, name):
    """The page comes, names the layer, and keeps what can be measured."""
    full = f'backbone.layers.1.mixer.{name}'

    def change(model):
        model.get_parameter(full).flatten()[0] = math.nan

    arguments = digits(change, state_matrix=matrix)
    data = run(arguments, tmp_path / 'out', '--profile-samples=2')
    worst = data['findings'][0]
    assert worst['severity'] == 'broken'
    assert (worst['kind'], worst['layer']) == ('nonfinite_weight', 1)
    assert worst['name'] == full
    assert f'values of {full} are NaN or infinite' in html_of(tmp_path / 'out')
    # the layer before is as it would be
    for row in pick(data['directions'], layer=0):
        assert row['abscissa'] < 0
        # full matrices are diagonalized together, before the first layer
        assert ('horizon_q50' in row) == (matrix['type'] != 'full')
    for row in pick(data['tensors'], layer=0):
        assert 0 < row['bound'] < math.inf
    broken = pick(data['directions'], layer=1)
    assert any('horizon_q50' not in row for row in broken)
    assert not data['sensitivity']
    assert 'not finite' in data['without_sensitivity']
    assert 'not finite' in html_of(tmp_path / 'out')


def test_an_overflow_without_broken_weights(digits):
    """Finite weights, infinite tensors: the first of them is named."""

    def change(model):
        model.backbone.layers[1].mixer.in_proj.weight.fill_(1e38)

    data = measure(digits(change), profile_samples=2)
    assert not data['nonfinite_weights']
    first = data['first_nonfinite']
    assert (first['layer'], first['tensor']) == (1, 'x')
    (finding,) = pick(data['findings'], severity='broken')
    assert finding['text'].startswith('layer 1: x is the first tensor')
    assert not data['sensitivity']


def test_a_segmentor(scenes, tmp_path):
    data = run(scenes, tmp_path / 'out', '--profile-samples=2')
    assert {row['layer'] for row in data['directions']} == {0, 1, 2}
    assert not data['sensitivity']
    assert 'the model is a segmentor' in html_of(tmp_path / 'out')
    assert data['token_gradients']
    outside = [r['name'] for r in data['weights'] if r['layer'] is None]
    assert any('decode_head' in name for name in outside)


# -------------------------------------------------------------- comparison


def test_against_another_model(digits, tmp_path):
    plain = digits(state_matrix=dict(type='signed'))
    kept = str(shutil.copy(plain[1], tmp_path / 'plain.pth'))
    other = digits(shift_states(0.5), state_matrix=dict(type='signed'))
    out = tmp_path / 'out'
    data = run(other, out, f'--against={kept}')
    alone = run([plain[0], kept], tmp_path / 'alone')
    assert data['against']['directions'] == alone['directions']
    changed = pick(data['changed_findings'], kind='unstable')
    assert [row['change'] for row in changed] == ['only here']
    text = html_of(out)
    assert '<section id="comparison">' in text
    assert '<td>only here</td><td>high</td>' in text
    check_offline(text)
    with (out / 'tables/comparison_summary.csv').open() as file:
        rows = {row['name']: row for row in csv.DictReader(file)}
    assert float(rows['abscissa']['small']) == 0.5
    there = alone['summary']['abscissa']
    assert float(rows['abscissa']['plain']) == there
    assert rows['abscissa']['change'] == f'{0.5 - there:+.3g}'
    assert rows['sigma']['change'] == 'equal'
    with (out / 'figures/eigenvalues_of_both.csv').open() as file:
        names = {row['series'] for row in csv.DictReader(file)}
    assert names == {'small', 'plain'}
    # the other way round
    back = run([plain[0], kept], tmp_path / 'back', f'--against={other[1]}')
    changed = pick(back['changed_findings'], kind='unstable')
    assert [row['change'] for row in changed] == ['only there']


def test_against_another_config(digits, tmp_path):
    ours = digits()
    config = str(shutil.copy(ours[0], tmp_path / 'ours.py'))
    kept = str(shutil.copy(ours[1], tmp_path / 'ours.pth'))
    other = digits(state_matrix=dict(type='complex'))
    data = run(
        [config, kept],
        tmp_path / 'out',
        f'--against={other[1]}',
        f'--against-config={other[0]}',
    )
    assert data['against']['facts']['state_matrix'] == 'Complex'
    assert data['facts']['state_matrix'] == 'NegExp'


def test_changes_in_words():
    assert compare.change(2.0, 2.0) == 'equal'
    assert compare.change(3.0, 2.0) == '1.5 times'
    assert compare.change(-1.0, 2.0) == '-3'
    assert compare.change(None, 2.0) == ''
    assert compare.change(math.inf, 2.0) == '+inf'
    assert compare.change(math.nan, 2.0) == ''


def test_nan_is_the_largest_value():
    assert math.isnan(ranges.worse(1.0, math.nan))
    assert math.isnan(ranges.worse(math.nan, 1.0))


# ---------------------------------------------------------------- training


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    """Of a training with a log, a monitor and two checkpoints."""
    folder = tmp_path_factory.mktemp('report')
    cfg = digits_config(folder)
    cfg.train_cfg.max_epochs = 2
    cfg.default_hooks.stability.interval = 1
    with unformatted_configs():
        train(cfg)
    path = folder / 'config.py'
    cfg.dump(path)
    return str(path), Path(cfg.work_dir)


def test_a_work_dir(work_dir, tmp_path):
    config, folder = work_dir
    moved = shutil.copytree(folder, tmp_path / 'moved')
    note = moved / 'last_checkpoint'
    note.write_text('/not/there/any/more/epoch_2.pth')
    data = run([config, str(moved)], tmp_path / 'out')
    assert data['facts']['checkpoint'] == str(moved / 'epoch_2.pth')
    losses = pick(data['training'], quantity='loss')
    lines = [
        json.loads(line)
        for path in folder.glob('*/vis_data/scalars.json')
        for line in path.read_text().splitlines()
    ]
    wanted = [line['loss'] for line in lines if 'loss' in line]
    assert [row['value'] for row in losses] == wanted
    assert len(wanted) == 6
    (path,) = folder.glob('*/stability.jsonl')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = pick(data['training'], quantity='spectral_abscissa')
    assert [row['value'] for row in found] == [
        max(record['spectral_abscissa']) for record in records
    ]
    # validations by epochs, on the axis of iterations
    scores = pick(data['training'], quantity='accuracy/top1')
    assert [row['step'] for row in scores] == [3, 6]
    text = html_of(tmp_path / 'out')
    assert 'alt="Training curves"' in text
    assert 'alt="Largest |exp(ΔA)| over training"' in text
    assert data['summary']['loss'] == wanted[-1]


def test_work_dirs_of_two_runs(work_dir, tmp_path):
    config, folder = work_dir
    first = str(folder / 'epoch_1.pth')
    out = tmp_path / 'out'
    data = run([config, str(folder)], out, f'--against={first}')
    assert data['training']
    assert data['against']['training'] == []
    assert (out / 'figures/both_training.png').is_file()


def test_clear_errors(digits, tmp_path, capsys):
    arguments = digits()
    empty = tmp_path / 'empty'
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match='no file "last_checkpoint"'):
        run([arguments[0], str(empty)], tmp_path / 'o')
    shutil.copy(arguments[1], empty / 'mine.pth')
    with pytest.raises(FileNotFoundError, match=r'name one of mine\.pth'):
        run([arguments[0], str(empty)], tmp_path / 'o')
    (empty / 'last_checkpoint').write_text('/gone/epoch_9.pth')
    with pytest.raises(FileNotFoundError, match=r'epoch_9\.pth, is gone'):
        run([arguments[0], str(empty)], tmp_path / 'o')
    with pytest.raises(FileNotFoundError, match=r'near names.*small\.pth'):
        run([arguments[0], str(tmp_path / 'smal.pth')], tmp_path / 'o')
    other = ['--cfg-options', 'model.head.num_classes=8']
    with pytest.raises(ValueError, match='checkpoint does not fit'):
        run(arguments, tmp_path / 'o', *other)
    for option, message in (
        ('--samples=0', '--samples must be at least 1, got 0'),
        ('--steps=0', '--steps must be at least 1, got 0'),
        ('--classes=0', '--classes must be at least 1, got 0'),
        ('--against-config=x.py', '--against-config wants --against'),
    ):
        with pytest.raises(SystemExit):
            tool.main([*arguments, option])
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- findings


def measured(**parts):
    """Numbers of a model that has only these."""
    training = parts.pop('training', source.Training())
    where = source.Source('c.py', 'c.pth', 'c', training)
    return StabilityReport(where, **parts)


def direction(**numbers):
    return dict(layer=7, direction='backward', **numbers)


def said(**parts):
    return [(f.kind, f.text) for f in find(measured(**parts))]


def test_nothing_to_remark():
    assert find(measured()) == []
    quiet = direction(
        abscissa=-1.0,
        unstable=0.0,
        short=0.099,
        long=0.0,
        vanished=0.89,
        exploding=0.0,
        skipped=0.05,
        condition=99.0,
        max_phase=3.1,
        max_decay_exponent=80.0,
    )
    assert find(measured(directions=[quiet])) == []
    assert headline([]) == NOTHING


@pytest.mark.parametrize(
    ('numbers', 'kind', 'words'),
    [
        (
            dict(short=0.12, horizon_q50=9.0),
            'short_memory',
            '12 % of the modes forget within 2 tokens (median memory 9 '
            'tokens)',
        ),
        (
            dict(long=0.5, tokens=197.0),
            'integrators',
            '50 % of the modes remember more than 1,970 tokens',
        ),
        (
            dict(unstable=0.25, abscissa=0.5, decay_max=1.0513),
            'unstable',
            '25 % of the eigenvalues have a positive real part, up to 0.5 '
            'per step: one token multiplies a state by up to 1.051',
        ),
        (
            dict(vanished=0.95),
            'vanishing',
            'the first has vanished in 95 % of the modes',
        ),
        (
            dict(exploding=0.0004),
            'exploding',
            'the first has grown in less than 0.1 % of the modes',
        ),
        (dict(skipped=0.3), 'skipped', '30 % of the step sizes are below'),
        (dict(max_phase=3.2), 'aliasing', 'turns by 3.2 in one step'),
        (dict(max_decay_exponent=90.0), 'underflow', 'reaches 90'),
        (
            dict(condition=5e3),
            'ill_conditioned',
            'a condition number of 5e+03',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_findings_of_a_direction(numbers, kind, words):
    ((found, text),) = said(directions=[direction(**numbers)])
    assert found == kind
    assert text.startswith('layer 7 backward: ')
    assert words in text


def tensor(**numbers):
    row = dict(
        layer=2,
        direction='shared',
        tensor='out',
        observed=1.0,
        bound=100.0,
        small=0.0,
    )
    return row | numbers


@pytest.mark.parametrize(
    ('numbers', 'kinds'),
    [
        (dict(observed=6400.0, bound=6500.0), []),
        (dict(observed=7000.0, bound=7001.0), ['near_overflow']),
        (dict(observed=70000.0, bound=8e4), ['overflow', 'may_overflow']),
        (dict(observed=101.0), ['above_bound']),
        (dict(bound=math.inf), ['uncertified']),
        (dict(bound=1e5), ['may_overflow']),
        (dict(bound=math.nan), []),
        (dict(small=0.6), ['small_values']),
        (dict(tensor='state', observed=7e4, bound=8e4, small=None), []),
    ],
)
def test_findings_of_tensors(numbers, kinds):
    assert [kind for kind, _ in said(tensors=[tensor(**numbers)])] == kinds


def weight(sigma, rank=5.0, layer=0, **more):
    row = dict(
        layer=layer,
        direction='',
        name=f'layers.{layer}.x_proj',
        kind='x_proj',
        sigma=sigma,
        stable_rank=rank,
        full_rank=8,
    )
    return row | more


def test_findings_of_weights():
    rows = [weight(1.0), weight(1.0, layer=1), weight(10.0, layer=2)]
    ((kind, text),) = said(weights=rows)
    assert kind == 'large_weight'
    assert text.startswith('layer 2: layers.2.x_proj has a norm of 10, 10 t')
    ((kind, text),) = said(weights=[weight(1.0, 1.4)])
    assert kind == 'low_rank'
    assert 'stable rank of 1.4 of 8 possible' in text
    # a vector has no other rank
    assert not said(weights=[weight(1.0, 1.0, full_rank=1)])
    assert said(weights=[weight(0.0, 0.0)])[0][0] == 'zero_weight'


def curves(**series):
    lines = [
        dict(step=10 * (i + 1), **dict(zip(series, values, strict=True)))
        for i, values in enumerate(zip(*series.values(), strict=True))
    ]
    return source.Training(Curves(lines))


def test_findings_of_a_training():
    falling = [2.0, 1.5, 1.2, 1.0, 0.9]
    assert not said(training=curves(loss=falling, grad_norm=[1.0] * 5))
    ((kind, text),) = said(training=curves(loss=[2.0, 1.0, 1.6]))
    assert kind == 'loss_rise'
    assert 'ended at 1.6, 1.6 times its lowest, 1' in text
    norms = [1.0, 1.0, 12.0, 1.0, 1.0]
    ((kind, text),) = said(training=curves(loss=falling, grad_norm=norms))
    assert kind == 'spikes'
    assert 'reached 12 at iteration 30, 12 times its median' in text
    ((kind, text),) = said(training=curves(loss=[2.0, math.nan, math.nan]))
    assert kind == 'nonfinite_loss'
    assert 'at iteration 20' in text
    records = [
        dict(step=5, spectral_abscissa=[-1.0, -2.0]),
        dict(step=6, spectral_abscissa=[-1.0, 0.25]),
    ]
    training = source.Training(stability=records)
    ((kind, text),) = said(training=training)
    assert kind == 'unstable_before'
    assert '0.25 per step, first recorded at iteration 6' in text


def test_the_worst_comes_first():
    rows = [
        direction(short=0.2, horizon_q50=1.0),
        dict(layer=3, direction='forward', short=0.9, horizon_q50=1.0),
        direction(exploding=0.1),
    ]
    broken = [
        dict(layer=0, direction='', name='w', count=1, of=2),
    ]
    found = find(measured(directions=rows, broken=broken))
    assert [f.kind for f in found] == [
        'nonfinite_weight',
        'exploding',
        'short_memory',
        'short_memory',
    ]
    assert [f.layer for f in found] == [0, 7, 3, 7]


def test_many_findings_are_counted():
    rows = [
        dict(layer=i, direction='forward', skipped=0.1 * (i + 1))
        for i in range(6)
    ]
    lines = condense(find(measured(directions=rows)))
    assert headline(find(measured(directions=rows))) == '6 findings: 6 low'
    assert headline(find(measured(directions=rows[:1]))) == '1 finding: 1 low'
    assert len(lines) == 4
    assert lines[0]['text'].startswith('layer 5 forward: 60 %')
    assert lines[3]['text'] == '… and 3 more of this kind, in layers 0 to 2'


def test_layers_in_words():
    assert listed([3]) == 'layer 3'
    assert listed([0, 1, 2, 5, 7, 8]) == 'layers 0 to 2, 5, 7, 8'


def test_every_threshold_is_documented():
    text = Path(__file__).parents[2].joinpath('docs/stability_report.md')
    documented = text.read_text()
    for kind in THRESHOLDS:
        assert f'`{kind}`' in documented, kind


# ------------------------------------------------------------ small numbers


def test_horizons_of_growing_modes_have_no_end():
    values = torch.tensor([[-1.0, 0.5, 0.0]])
    found = directions.horizons(values, torch.tensor([0.1, 0.2]))
    assert found.tolist() == [
        pytest.approx([10, math.inf, math.inf]),
        pytest.approx([5, math.inf, math.inf]),
    ]
    quantiles = directions.quantiles(found.flatten())
    assert quantiles[0] == pytest.approx(6.25)
    assert quantiles[2:] == [math.inf] * 3


def test_bins():
    real = torch.tensor([[0.0]])
    counts = directions.decay_counts(torch.ones(5, 1), real)
    # exactly 1 is no growth
    assert counts.nonzero().flatten().tolist() == [49]
    counts = directions.decay_counts(torch.full((5, 1), 1e-6), real + 1)
    assert counts.nonzero().flatten().tolist() == [50]
    counts = directions.decay_counts(torch.full((5, 1), 9.0), real + 1)
    assert counts.nonzero().flatten().tolist() == [60]
    counts = directions.delta_counts(torch.tensor([0.0, 1.5, 1e5]))
    # below 1e-6, the bin that begins at 1, beyond 100
    assert counts.nonzero().flatten().tolist() == [0, 62, 81]

"""Certified ranges: the tool, on real models and images."""

import argparse
import csv
import json
import math

import certify_ranges as tool
import cv2
import pytest
import torch

from mmstabvim.analysis import ranges
from mmstabvim.analysis.mixers import no_progress
from mmstabvim.apis import trained
from mmstabvim.layers.mixer_ranges import largest_values, trace_mixer

SIGNED = dict(type='signed')


def run(arguments, folder, *more):
    """Rows and facts that the tool writes."""
    tool.main([*arguments, f'--out={folder}', '--samples=3', *more])
    facts = json.loads((folder / 'ranges.json').read_text())
    rows = facts.pop('rows')
    for row in rows:
        row['bound'] = float(row['bound'])
    return rows, facts


def pick(rows, **wanted):
    return [row for row in rows if wanted.items() <= row.items()]


def load(arguments):
    parser = argparse.ArgumentParser()
    trained.add_options(parser, 1)
    args = parser.parse_args(arguments)
    return args, *trained.load_model(args)


def test_files_and_numbers(digits, tmp_path, capsys):
    arguments = digits()
    rows, facts = run(arguments, tmp_path / 'out')
    assert len(rows) == 2 * (5 + 2 * 10)
    assert facts['images'] == '3 images of the test set'
    for row in rows:
        assert 0 < row['observed'] <= row['bound'] < math.inf, row
        half = row['tensor'] not in ('delta', 'drive', 'state')
        assert row['kept_in'] == ('float16' if half else 'float32')
        assert row['limit'] == (65504 if half else (2 - 2**-23) * 2.0**127)
        assert row['can_overflow'] == (row['bound'] > row['limit'])
    assert facts['verdict'].startswith('**float16 cannot overflow**')
    for suffix in ('md', 'png'):
        assert (tmp_path / f'out/ranges.{suffix}').stat().st_size > 1000
    assert not list((tmp_path / 'out').glob('*.pdf'))
    with (tmp_path / 'out/ranges.csv').open() as file:
        table = list(csv.DictReader(file))
    assert [float(r['bound']) for r in table] == [r['bound'] for r in rows]
    page = (tmp_path / 'out/ranges.md').read_text()
    assert '| 1 | backward | ' in page
    assert 'float16 cannot overflow' in capsys.readouterr().out
    other, _ = run(arguments, tmp_path / 'other', '--seed=1')
    assert [r['bound'] for r in other] == [r['bound'] for r in rows]
    assert [r['observed'] for r in other] != [r['observed'] for r in rows]


def test_largest_step_size_is_the_models_own(digits, tmp_path):
    """What the model's observers see on the same images."""
    arguments = digits()
    rows, _ = run(arguments, tmp_path / 'out')
    args, cfg, model = load([*arguments, '--samples=3'])
    seen = []
    ssm = model.backbone.layers[1].mixer.ssm
    ssm.observers.append(lambda delta: seen.append(delta[1].max().item()))
    with torch.no_grad():
        for image in trained.load_images(args, cfg, model):
            model(image, mode='tensor')
    assert len(seen) == 3
    (row,) = pick(rows, layer=1, direction='backward', tensor='delta')
    assert row['observed'] == pytest.approx(max(seen), rel=1e-6)


def test_images_of_a_folder(digits, tmp_path):
    """A file with a test image gives what the test image gives."""
    arguments = digits()
    args, cfg, _ = load([*arguments, '--samples=1'])
    (sample,) = trained.test_samples(args, cfg)  # of the same seed
    (tmp_path / 'images').mkdir()
    pixels = sample['inputs'].permute(1, 2, 0).numpy()
    cv2.imwrite(str(tmp_path / 'images/one.png'), pixels)
    (tmp_path / 'images/notes.txt').write_text('no image')
    given = f'--images={tmp_path / "images"}'
    rows, facts = run(arguments, tmp_path / 'files', given)
    wanted, _ = run(arguments, tmp_path / 'set', '--samples=1')
    assert rows == wanted
    assert facts['images'] == f'1 images of {tmp_path / "images"}'


def test_first_layer_that_may_overflow(digits, tmp_path, capsys):
    """An eigenvalue that does not decay, in layer 1 only."""

    def change(model):
        matrix = model.backbone.layers[1].mixer.ssm.state_matrix
        matrix.by_direction(matrix.A)[1][3, 2] = 0.0

    arguments = digits(change, state_matrix=SIGNED)
    rows, facts = run(arguments, tmp_path / 'out')
    assert not any(row['can_overflow'] for row in pick(rows, layer=0))
    risky = [r['tensor'] for r in pick(rows, can_overflow=True)]
    assert risky == ['state', 'y', 'merged', 'out']
    assert '1 of 2 layers' in facts['verdict']
    assert 'layer 1 (`backbone.layers.1`): `state`, b' in facts['verdict']
    assert '∞' in capsys.readouterr().out


def test_dtype_decides(digits, rough, tmp_path):
    """Large weights: too large for float16, not for bfloat16."""
    arguments = digits(rough)
    rows, facts = run(arguments, tmp_path / 'half', '--samples=0')
    assert 'float16 is not certified' in facts['verdict']
    assert all(row['observed'] is None for row in rows)
    found, facts = run(
        arguments, tmp_path / 'b', '--samples=0', '--dtype=bfloat16'
    )
    assert facts['verdict'].startswith('**bfloat16 cannot overflow**')
    # coarser rounding, wider bounds
    for wide, narrow in zip(found, rows, strict=True):
        assert wide['bound'] > narrow['bound']


@pytest.mark.parametrize(
    'matrix',
    [
        dict(type='neg_exp'),
        SIGNED,
        dict(type='complex'),
        dict(type='full', groups=2),
    ],
    ids=lambda matrix: matrix['type'],
)
def test_never_violated_by_gradient_ascent_on_the_image(digits, rough, matrix):
    """The image is changed until a layer's state is as large as it gets."""
    arguments = digits(rough, state_matrix=matrix, backend='reference')
    _, _, model = load(arguments)
    blocks = trained.find_blocks(model)
    bounds = ranges.certified_bounds(blocks, torch.float16, no_progress())
    torch.manual_seed(0)
    image = torch.randn(2, 3, 16, 16).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.3)
    tokens = {}
    for name, block in blocks.items():
        block.mixer.register_forward_pre_hook(
            lambda _, inputs, name=name: tokens.update({name: inputs[0]})
        )
    first = last = None
    for _ in range(12):
        model(image, mode='tensor')
        traces = {
            n: trace_mixer(b.mixer, tokens[n]) for n, b in blocks.items()
        }
        for name, trace in traces.items():
            seen = largest_values(trace)
            for part, most in zip(seen, bounds[name], strict=True):
                for tensor, value in part.items():
                    assert value <= most[tensor], (name, tensor)
        state = traces['backbone.layers.1'].directions[0]['state']
        largest = state.abs().flatten(1).amax(1)
        first = first or largest.detach().max().item()
        last = largest.detach().max().item()
        optimizer.zero_grad()
        (-largest.log().sum()).backward()
        optimizer.step()
    assert last > 1.5 * first  # it did climb


def test_a_violation_is_an_error():
    row = dict(
        name='layer', direction='forward', tensor='y', observed=2.0, bound=1.0
    )
    with pytest.raises(RuntimeError, match='layer, forward, y: seen 2'):
        ranges.check([row])
    with pytest.raises(RuntimeError, match='seen nan'):
        ranges.check([dict(row, observed=math.nan)])
    ranges.check([dict(row, observed=None), dict(row, observed=1.0)])


def test_figure_has_the_limit_in_its_legend():
    """Drawn for the tensor that autocast keeps in half precision."""
    marks = [
        dict(quantity=name, facet=way, series=kind, x=x, value=value)
        for name in ranges.MAIN
        for way in ranges.WAYS
        for kind, value in (('bound', 2.0), ('seen', 1.0))
        for x in (0, 1)
    ]
    figure = ranges.bound_figure(marks)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ['bound', 'seen', 'largest float16']
    assert [len(axes.lines) for axes in figure.axes] == [2] * 6 + [3] * 2
    assert figure.axes[-1].lines[-1].get_ydata()[0] == 65504
    assert len(ranges.bound_figure(marks, 'bfloat16').legends[0].texts) == 2


def test_a_segmentor(scenes, tmp_path):
    rows, facts = run(scenes, tmp_path / 'out', '--samples=1')
    blocks = trained.find_blocks(load(scenes)[-1])
    assert len(blocks) > 1
    assert {row['name'] for row in rows} == set(blocks)
    assert all(row['observed'] <= row['bound'] for row in rows)
    assert facts['images'] == '1 images of the test set'


def test_clear_errors(digits, tmp_path, capsys):
    arguments = digits()
    with pytest.raises(SystemExit):
        tool.main([*arguments, '--samples=-1'])
    assert '--samples must be at least 0, got -1' in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r'near names.*small\.pth'):
        tool.main([arguments[0], str(tmp_path / 'smal.pth')])
    (tmp_path / 'none').mkdir()
    with pytest.raises(FileNotFoundError, match='has no image'):
        run(arguments, tmp_path / 'o', f'--images={tmp_path / "none"}')
    other = ['--cfg-options', 'model.head.num_classes=8']
    with pytest.raises(ValueError, match='checkpoint does not fit'):
        run(arguments, tmp_path / 'o', *other)

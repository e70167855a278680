"""The tool on hidden attention, on real models and images."""

import csv
import json

import cv2
import numpy as np
import planted
import pytest
import torch
import vis_hidden_attention as tool
from torch import nn

from mmstabvim.analysis import hidden_attention as analysis
from mmstabvim.apis import tokens, trained
from mmstabvim.layers.mixer_attention import mixer_attention
from mmstabvim.stability.ranges.hidden_attention import attention_rollout

PLACES = [
    dict(cls_token='middle'),
    dict(cls_token='head'),
    dict(cls_token='double'),
    dict(cls_token=None, out_type='avg_featmap'),
]
CLASS_TOKENS = {'middle': [8], 'head': [0], 'double': [0, 17], None: []}
places = pytest.mark.parametrize('place', PLACES, ids=lambda p: p['cls_token'])


def run(arguments, folder, *more):
    """Rows, other facts and arrays of the first image."""
    tool.main([*arguments, f'--out={folder}', *more])
    facts = json.loads((folder / 'image_0.json').read_text())
    with np.load(folder / 'image_0.npz') as file:
        arrays = dict(file)
    return facts.pop('rows'), facts, arrays


def load(arguments):
    args = tool.parse_args(arguments)
    return args, *trained.load_model(args)


def pick(rows, **wanted):
    return [row for row in rows if wanted.items() <= row.items()]


def values(rows, **wanted):
    return [row['value'] for row in pick(rows, **wanted)]


@places
def test_maps_are_rows_of_the_matrices(digits, place, tmp_path, capsys):
    arguments = digits(**place)
    rows, facts, arrays = run(arguments, tmp_path / 'out')
    at = CLASS_TOKENS[place['cls_token']]
    length = 16 + len(at)
    assert facts['class_tokens'] == arrays['class_tokens'].tolist() == at
    assert facts['grid'] == arrays['grid'].tolist() == [4, 4]
    patches = [i for i in range(length) if i not in at]
    chosen = at or patches  # without class token, the mean patch
    assert facts['positions'] == chosen
    for layer in ('0', '1'):
        summed = 0
        for name in ('forward', 'backward', 'both'):
            own = pick(rows, layer=layer, direction=name)
            assert len(own) == length
            if name != 'both':
                matrix = arrays[name][int(layer)]
                assert matrix.shape == (length, length)
                summed = summed + matrix
            wanted = (matrix if name != 'both' else summed)[chosen].mean(0)
            for row in own:
                assert row['value'] == pytest.approx(
                    wanted[row['position']], rel=1e-5
                )
            there = pick(own, token='patch')
            assert [r['position'] for r in there] == patches
            numbers = [4 * r['row'] + r['column'] for r in there]
            assert numbers == list(range(16))
            assert [r['position'] for r in pick(own, token='class')] == at
    forward, backward = arrays['forward'], arrays['backward']
    assert not np.triu(forward, 1).any()
    assert not np.tril(backward, -1).any()
    for suffix in ('md', 'png'):
        assert (tmp_path / f'out/image_0.{suffix}').stat().st_size > 1000
    with (tmp_path / 'out/image_0.csv').open() as file:
        table = list(csv.DictReader(file))
    assert [float(r['value']) for r in table] == [r['value'] for r in rows]
    assert '| 1 | backward | ' in capsys.readouterr().out


@pytest.mark.parametrize('how', ['abs', 'mean', 'norm'])
def test_matrices_are_those_of_the_mixers_that_ran(digits, how):
    """From the tokens that each mixer read while the model ran."""
    arguments = digits(state_matrix=dict(type='complex'), b_disc='zoh')
    args, cfg, model = load(arguments)
    sample = next(tokens.named_images(args, cfg, model))
    arrays = analysis.find_matrices(model, sample.image, how, with_skip=True)
    seen = []
    block = model.backbone.layers[1]
    block.norm.register_forward_hook(lambda *given: seen.append(given[2][0]))
    with torch.no_grad():
        model(sample.image, mode='tensor')
    alpha = mixer_attention(block.mixer, seen[0], None, with_skip=True)
    for direction, found in zip(('forward', 'backward'), alpha, strict=True):
        wanted = {
            'abs': found[0].abs().mean(0),
            'mean': found[0].mean(0),
            'norm': found[0].norm(dim=0),
        }[how]
        np.testing.assert_allclose(
            arrays[direction][1], wanted, rtol=1e-4, atol=1e-7
        )


def test_the_class_token_takes_from_the_patch_that_matters(tmp_path):
    """With B open for bright patches only, on a grid of 3 x 5."""
    model = planted.build_model(tmp_path, cls_token='middle')
    (block,) = model.backbone.layers
    with torch.no_grad():
        for weights in block.mixer.direction_weights():
            weights.B_rows.zero_()
            weights.B_rows[:, planted.BRIGHT] = 1
    generator = torch.Generator().manual_seed(0)
    for row, column in [(0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]:
        image = planted.make_image(generator, (row, column))
        layout = tokens.layout_of(model.backbone, image)
        found = analysis.find_matrices(model, image)
        positions = analysis.find_token(None, layout).positions
        assert positions == [7]
        rows = analysis.map_rows(found['both'][0], positions, layout)
        patches = sorted(pick(rows, token='patch'), key=lambda r: r['value'])
        assert (patches[-1]['row'], patches[-1]['column']) == (row, column)
        assert patches[-1]['value'] > 5 * patches[-2]['value']
        # before the class token it is the forward scan that carries it
        carrier = 'forward' if 5 * row + column < 7 else 'backward'
        at = layout.position(row, column)
        assert found[carrier][0][7, at] == patches[-1]['value']


def test_one_patch_on_a_grid_that_is_not_square(digits, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / 'one.png'), pixels)
    given = [f'--images={folder}', '--token=2,1', '--layers', '-1']
    rows, facts, arrays = run(digits(), tmp_path / 'out', *given)
    assert facts['grid'] == [3, 5]
    assert facts['name'] == 'one.png'
    # 11 patches and the class token come before it
    assert facts['positions'] == [12]
    assert facts['token'] == 'the patch in row 2, column 1'
    assert {row['layer'] for row in rows} == {'1'}
    found = values(rows, direction='forward', token='patch')
    wanted = np.delete(arrays['forward'][1][12], 7)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert len(arrays['forward']) == 2


def test_rollout(digits, tmp_path):
    given = ['--rollout', '--layers', '0']
    rows, _, arrays = run(digits(), tmp_path / 'out', *given)
    both = torch.tensor(arrays['forward'] + arrays['backward'])
    wanted = attention_rollout(both[:, None])[0]
    np.testing.assert_allclose(arrays['rollout'], wanted, rtol=1e-5)
    row = np.delete(wanted[8].numpy(), 8)
    found = values(rows, layer='rollout', token='patch')
    np.testing.assert_allclose(found, row, rtol=1e-5)
    page = (tmp_path / 'out/image_0.md').read_text()
    assert 'half the identity: a heuristic' in page.replace('\n', ' ')
    assert 'not about pixels' in page


def test_summary_by_hand():
    """Three tokens, the class token in the middle."""
    matrix = torch.tensor([[1.0, 0, 0], [3, 1, -4], [0, 0, 0]])
    layout = tokens.Layout('middle', 1, 2, None)
    found = analysis.summarize(matrix, [1], layout)
    assert found == dict(
        sum=0.0,
        own=1 / 8,
        cls=1 / 8,
        distance=7 / 8,
        largest='-4 at 0, 1',
    )
    mean = analysis.summarize(matrix, [0, 2], layout)
    assert mean['own'] == 0.5  # of nothing, the last takes no share
    assert mean['sum'] == 0.5
    assert mean['distance'] == 0


def test_each_row_begins_with_the_image(digits, tmp_path):
    _, _, model = load(digits())
    layout = tokens.layout_of(model.backbone, torch.zeros(1, 3, 32, 32))
    rows = []
    for layer in '01':
        for direction in ('forward', 'backward', 'both'):
            of = dict(layer=layer, direction=direction)
            rows += analysis.map_rows(torch.eye(17), [8], layout, **of)
    figure = analysis.draw_maps(rows, np.zeros((32, 32, 3)), layout)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[::4] == ['image', 'image']
    assert titles[5] == 'layer 1, forward'


def test_without_matrices(digits, tmp_path):
    given = ['--no-matrices', '--samples=2', '--layers', '0']
    tool.main([*digits(), f'--out={tmp_path / "out"}', *given])
    assert not list((tmp_path / 'out').glob('*.npz'))
    found = sorted(path.stem for path in (tmp_path / 'out').glob('*.csv'))
    assert found == ['image_0', 'image_1']


def test_a_segmentor(scenes, tmp_path):
    """No class token: the mean patch."""
    rows, facts, _ = run(scenes, tmp_path / 'out')
    assert facts['token'] == 'the mean patch'
    assert facts['grid'] == [8, 8]
    assert len(pick(rows, layer='2', direction='both')) == 64


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--token=4,0'], r"from 0 to 3 and columns from 0 to 3, got '4,0'"),
        (['--token=1,-1'], r"got '1,-1'"),
        (['--token=head'], r"must be 'cls', 'mean' or ROW,COLUMN.*'head'"),
        (['--token=1,2,3'], r"got '1,2,3'"),
        (['--layers', '0', '2'], r'must be from -2 to 1, got \[2\]'),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else '',
)
def test_clear_errors(digits, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tool.main([*digits(), f'--out={tmp_path}', *options])


def test_more_clear_errors(digits, scenes, tmp_path, capsys):
    with pytest.raises(ValueError, match='the model has no class token'):
        tool.main([*scenes, f'--out={tmp_path}', '--token=cls'])
    with pytest.raises(SystemExit):
        tool.main([*scenes, '--rollout', '--how=mean'])
    assert '--rollout needs values >= 0' in capsys.readouterr().err
    with pytest.raises(ValueError, match=r'one VisionMamba.*Linear with none'):
        tokens.find_backbone(nn.Linear(2, 2))

    def spoil(model):
        model.backbone.layers[1].mixer.in_proj.weight[0, 0] = torch.nan

    with pytest.raises(ValueError, match='forward: a matrix has a NaN'):
        tool.main([*digits(spoil), f'--out={tmp_path}'])

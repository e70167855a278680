"""What the monitor records, and that it changes nothing."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from small_runs import digits_config, scalars, train

from mmstabvim import StabilityMonitorHook
from mmstabvim.engine.hooks import stability_monitor_hook
from mmstabvim.engine.hooks.stability_monitor_hook import (
    gradient_norms,
    quantiles,
    some_rows,
    to_host,
)
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import (
    SpectralNormalization,
    build_state_matrix,
    state_matrices,
)

LAYERS = [
    f'backbone.layers.{layer}.mixer.ssm.{direction}'
    for layer in range(2)
    for direction in range(2)
]


@pytest.fixture
def config(tmp_path):
    cfg = digits_config(tmp_path)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=5)
    cfg.default_hooks.pop('stability')
    cfg.custom_hooks = [
        dict(type='mmstabvim.StabilityMonitorHook', interval=2)
    ]
    return cfg


def records(cfg):
    (path,) = Path(cfg.work_dir).glob('*/stability.jsonl')
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize('kind', ['neg_exp', 'signed', 'complex', 'full'])
def test_records_every_layer_and_direction(config, kind):
    config.model.backbone.state_matrix = dict(type=kind)
    config.custom_hooks += [
        dict(type='mmstabvim.SpectralNormalizationHook', rho_max=2.0),
        dict(type='mmstabvim.EigenvalueClampingHook'),
    ]
    runner = train(config)
    rows = records(config)
    assert [row['step'] for row in rows] == [1, 3, 5]
    for row in rows:
        assert row['layers'] == LAYERS
        for key, values in row.items():
            if key in ('step', 'layers', 'eigenvalues'):
                continue
            assert len(values) == 4, key
            assert all(map(math.isfinite, values)), key
    last = rows[-1]
    assert max(last['spectral_radius']) <= 2.0 * (1 + 1e-3)
    assert min(last['condition']) >= 1
    for low, middle, high in zip(
        last['decay_min'], last['delta_mean'], last['decay_max'], strict=True
    ):
        assert 0 <= low < high <= 1
        assert 0 < middle < 1
    ordered = ['delta_min', 'delta_q01', 'delta_q50', 'delta_q99', 'delta_max']
    columns = [last[name] for name in ordered]
    assert all(list(c) == sorted(c) for c in zip(*columns, strict=True))
    assert min(last['grad_norm']) > 0
    assert all(set(row['eigenvalues']) == set(LAYERS) for row in rows)
    # nobody looks any more
    for module in runner.model.modules():
        assert not getattr(module, 'observers', [])


@pytest.mark.parametrize(
    ('interval', 'eigenvalue_interval', 'wanted'),
    [
        (2, 0, []),
        (2, 2, [1, 5]),
        (1, None, [1, 3, 5, 7, 9, 11]),  # six of twelve
    ],
)
def test_how_often_eigenvalues_are_kept(
    config, interval, eigenvalue_interval, wanted, monkeypatch
):
    monkeypatch.setattr(stability_monitor_hook, '_SNAPSHOTS', 6)
    if eigenvalue_interval is None:
        config.train_cfg.max_epochs = 4  # of three iterations
    config.custom_hooks[0].update(
        interval=interval, eigenvalue_interval=eigenvalue_interval
    )
    train(config)
    found = [row['step'] for row in records(config) if 'eigenvalues' in row]
    assert found == wanted


def test_numbers_of_the_first_step(config):
    """Against the model itself: nothing has been trained before it."""
    config.optim_wrapper.optimizer.lr = 0.0
    runner = train(config)
    row = records(config)[0]
    matrix = build_state_matrix(32, 4)
    real = matrix.eigenvalues()
    assert row['spectral_radius'] == pytest.approx([4.0] * 4)
    assert row['spectral_abscissa'] == pytest.approx([-1.0] * 4)
    assert row['stability_penalty'] == [0.0] * 4
    assert row['condition'] == [1.0] * 4
    for low, high, least, most in zip(
        row['decay_min'],
        row['decay_max'],
        row['delta_min'],
        row['delta_max'],
        strict=True,
    ):
        assert low == pytest.approx(math.exp(-4.0 * most), rel=1e-5)
        assert high == pytest.approx(math.exp(-1.0 * least), rel=1e-5)
    eigenvalues = torch.tensor(row['eigenvalues'][LAYERS[0]])
    assert torch.allclose(eigenvalues[:, 0], real.detach().flatten())
    assert not eigenvalues[:, 1].any()
    assert runner.iter == 6


def test_projections_are_measured(config):
    """Literal normalization moves every entry of S4D-Real the first time."""
    config.custom_hooks += [
        dict(type='mmstabvim.SpectralNormalizationHook', rho_max=0.5)
    ]
    config.optim_wrapper.optimizer = dict(
        type='SGD', lr=30.0, weight_decay=0.0
    )
    config.param_scheduler = []
    train(config)
    last = records(config)[-1]
    assert max(last['projected_share']) > 0
    assert max(last['projection_distance']) > 0
    assert max(last['projected_share']) <= 1


def test_penalty_counts_what_exceeds(config):
    config.model.backbone.state_matrix = dict(type='signed')
    config.custom_hooks[0]['eps'] = -2.5
    config.optim_wrapper.optimizer.lr = 0.0
    train(config)
    # -1 and -2 of the modes -1 ... -4 exceed -2.5, on 32 channels
    assert records(config)[0]['stability_penalty'] == [32 * (1.5 + 0.5)] * 4


def test_reaches_the_log_and_the_visual_backends(config):
    train(config)
    assert list(scalars(config, 'stab/spectral_radius').values())
    name = f'stab/{LAYERS[2]}/delta_q50'
    assert sorted(scalars(config, name)) == [1, 3, 5]


def test_training_is_the_same_with_and_without(config):
    watched = train(config).model.state_dict()
    config.custom_hooks = []
    plain = train(config).model.state_dict()
    assert all(torch.equal(watched[name], plain[name]) for name in plain)


def test_bfloat16(config):
    """Step sizes of autocast, eigenvalues in float32."""
    config.optim_wrapper.type = 'AmpOptimWrapper'
    config.optim_wrapper.dtype = 'bfloat16'
    train(config)
    radius = records(config)[0]['spectral_radius']
    assert radius == pytest.approx([4.0] * 4, rel=0.01)


def test_table_to_the_host():
    table = {
        ('a', 'row', 'x'): torch.tensor(1.0),
        ('a', 'free', 0): torch.eye(2).bfloat16(),
        ('b', 'row', 'x'): torch.tensor(3),
        ('b', 'row', 'z'): torch.zeros(0),
    }
    found = to_host(table)
    assert found['a', 'row', 'x'] == 1
    assert torch.equal(found['a', 'free', 0], torch.eye(2))
    assert found['b', 'row', 'x'] == 3
    assert found['b', 'row', 'z'].shape == (0,)
    assert to_host({}) == {}
    wide = torch.tensor(0.1, dtype=torch.float64)
    assert to_host({('a',): wide})['a',].item() == 0.1


@pytest.mark.parametrize('kind', ['neg_exp', 'complex', 'full'])
def test_one_transfer_to_the_host(config, kind, monkeypatch):
    """Every number of a record comes from it, eigenvalues too."""
    transfers = []

    def doubled(table):
        transfers.append(table)
        return {key: 2 * x for key, x in to_host(table).items()}

    monkeypatch.setattr(stability_monitor_hook, 'to_host', doubled)
    config.model.backbone.state_matrix = dict(type=kind)
    config.optim_wrapper.optimizer.lr = 0.0
    config.custom_hooks.append(
        dict(type='mmstabvim.EigenvalueClampingHook', mode='reparam')
    )
    config.custom_hooks[0]['eigenvalue_interval'] = 1
    runner = train(config)
    rows = records(config)
    assert len(transfers) == len(rows) == 3
    matrices = state_matrices(runner.model)
    largest = []
    for matrix in matrices.values():
        doubled = copy.deepcopy(matrix)
        for parameter in doubled.parameters():
            parameter.data.mul_(2)
        with torch.no_grad():
            values = matrix.by_direction(doubled.eigenvalues()).abs()
        largest += values.flatten(1).amax(1).tolist()
    for place, radius in enumerate(largest):
        assert rows[0]['spectral_radius'][place] == pytest.approx(radius)
        found = torch.tensor(rows[0]['eigenvalues'][LAYERS[place]])
        largest = found.norm(dim=-1).max().item()
        assert largest == pytest.approx(radius, rel=1e-5)


@pytest.mark.parametrize('kind', ['neg_exp', 'signed', 'complex', 'full'])
def test_nothing_waits_for_the_device_before(kind):
    """Tensors without values go through, so no value is looked at."""
    with torch.device('meta'):
        ssm = SelectiveSSM(8, 4, state_matrix=dict(type=kind))
        delta = torch.empty(1, 2, 7, 8)
        bound = torch.empty(8)
    matrix = ssm.state_matrix
    matrix.reparametrizations = [SpectralNormalization(rho_max=bound)]
    for parameter in matrix.parameters():
        parameter.grad = torch.empty_like(parameter)
    hook = StabilityMonitorHook()
    hook._observer('a')(delta)
    hook._grads = gradient_norms({'a.state_matrix': matrix})
    tensors = hook._table({'a': ssm}, []).values()
    assert {x.device.type for x in tensors} == {'meta'}
    assert len(tensors) == 5 + 1 + 1 + len(list(matrix.parameters()))


@pytest.mark.parametrize('kind', ['signed', 'complex', 'full'])
def test_what_reparametrization_changes(config, kind):
    """The share of the eigenvalues that differ, and by how much."""
    config.model.backbone.state_matrix = dict(type=kind)
    config.optim_wrapper.optimizer.lr = 0.0
    config.custom_hooks += [
        dict(
            type='mmstabvim.SpectralNormalizationHook',
            rho_max='init',
            mode='reparam',
        ),
        dict(type='mmstabvim.EigenvalueClampingHook', eps=2.5, mode='reparam'),
    ]
    train(config)
    row = records(config)[0]
    share, distance = row['projected_share'], row['projection_distance']
    if kind == 'complex':  # s4d_lin: all real parts are -1/2
        assert share == [1.0] * 4
        assert distance == pytest.approx([2.0 * math.sqrt(4 * 32)] * 4)
        return
    if kind == 'full':  # -1 ... -4 are shifted by 1.5, and back to radius 4
        assert share == pytest.approx([1.0] * 4)
        assert all(0.5 < value < 3.1 for value in distance)
        return
    # of -1 ... -4, two move, by 1.5 and 0.5
    assert share == pytest.approx([0.5] * 4)
    wanted = math.sqrt(32 * (1.5**2 + 0.5**2))
    assert distance == pytest.approx([wanted] * 4, rel=1e-5)


def test_quantiles_of_many_numbers():
    x = torch.linspace(0, 1, 1 << 18)[torch.randperm(1 << 18)]
    found = quantiles(x.reshape(512, 512))
    assert found.tolist() == pytest.approx([0.01, 0.5, 0.99], abs=0.01)


@pytest.mark.parametrize(
    ('rows', 'columns', 'kept'),
    [(384, 16, 16), (128, 8, 32), (4, 16, 4), (3, 1000, 1)],
)
def test_some_rows_are_whole(rows, columns, kept):
    """All modes of some channels, not some modes of all channels."""
    x = torch.arange(rows * columns).reshape(rows, columns)
    found = some_rows(x, 256)
    assert found.shape == (kept, columns)
    steps = found[:, 0].diff() // columns
    assert len(set(steps.tolist())) <= 1


def test_gradient_norms():
    matrix = build_state_matrix(2, 2, 'complex', real_part='free')
    matrix.re.grad = torch.full((2, 2), 1.0)
    matrix.im.grad = torch.full((2, 2), -2.0)
    still = build_state_matrix(2, 2)
    norms = gradient_norms({'a': matrix, 'b': still})
    assert list(norms) == ['a']
    assert norms['a'].item() == pytest.approx(math.sqrt(20))


def test_gradients_of_a_model_without_state_matrix(config):
    config = Config(config.to_dict())
    config.model.backbone = dict(type='ResNet', depth=18, base_channels=4)
    config.model.neck = dict(type='GlobalAveragePooling')
    config.model.head.in_channels = 32
    model = train(config).model
    found = records(config)
    assert found
    for record in found:
        names, norms = record['layers'], record['grad_norm']
        assert 'backbone.layer1.0.conv1' in names
        assert names[-1] == 'head.fc'
        assert len(norms) == len(names)
        assert all(0 <= norm < math.inf for norm in norms)
        assert norms[-1] > 0
        assert 'spectral_radius' not in record
    with_weights = {
        name.rpartition('.')[0] for name, _ in model.named_parameters()
    }
    assert set(found[0]['layers']) == with_weights


@pytest.mark.parametrize(
    'options',
    [dict(interval=0), dict(eigenvalue_interval=-1), dict(max_eigenvalues=0)],
    ids=str,
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match='must be at least 1'):
        StabilityMonitorHook(**options)


def test_found_by_the_model_s_names(config):
    model = train(config).model
    names = [f'{name}.state_matrix' for name in LAYERS]
    assert list(state_matrices(model)) == names

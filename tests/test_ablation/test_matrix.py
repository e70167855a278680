"""Which cells a matrix file means."""

import pytest
from mmengine.config import DictAction

from mmstabvim.ablation import matrix
from mmstabvim.ablation.matrix import load_matrix, option_text, short_number


def names(loaded):
    return [cell.name for cell in loaded.cells]


def test_every_combination_seed_by_seed(write_matrix):
    path = write_matrix(
        ['ok', 'fail'], seeds=[3, 1], precisions=['fp32', 'bf16'], lrs=[1e-2]
    )
    assert names(load_matrix(path)) == [
        'ok.fp32.lr1e-2.seed3',
        'ok.bf16.lr1e-2.seed3',
        'fail.fp32.lr1e-2.seed3',
        'fail.bf16.lr1e-2.seed3',
        'ok.fp32.lr1e-2.seed1',
        'ok.bf16.lr1e-2.seed1',
        'fail.fp32.lr1e-2.seed1',
        'fail.bf16.lr1e-2.seed1',
    ]


def test_learning_rates(write_matrix):
    own, changed = load_matrix(write_matrix(lrs=[None, 0.5])).cells
    assert (own.lr, own.lr_used, own.options) == (None, 1e-3, {})
    assert (changed.lr, changed.lr_used) == (0.5, 0.5)
    assert changed.options == {'optim_wrapper.optimizer.lr': 0.5}
    assert own.epochs == 4


def test_overrides_beat_the_file_and_its_groups(write_matrix):
    group = dict(
        configs='fake_ok.py', seeds=[7], cfg_options={'model.pause': 1.0}
    )
    path = write_matrix(seeds=[5], groups=[group])
    assert [cell.seed for cell in load_matrix(path).cells] == [7]
    overrides = dict(seeds=[1, 2], lrs=None, cfg_options={'model.pause': 2.0})
    cells = load_matrix(path, overrides).cells
    assert [cell.seed for cell in cells] == [1, 2]
    assert cells[0].options == {'model.pause': 2.0}
    assert cells[0].labels == dict(config='fake_ok')


def test_labels_with_changes_of_the_config(write_matrix):
    labels = dict(kind='long', steps={'1': {'model.pause': 1.0}, '2': None})
    path = write_matrix(groups=[dict(configs='fake_ok.py', labels=labels)])
    loaded = load_matrix(path)
    assert names(loaded) == ['long.1.fp32.seed0', 'long.2.fp32.seed0']
    assert [cell.options for cell in loaded.cells] == [
        {'model.pause': 1.0},
        {},
    ]
    assert loaded.orders == dict(kind=['long'], steps=['1', '2'])


def test_labels_that_name_fragments(write_matrix, tmp_path):
    """Merged one after the other, and written as ``cfg_options``."""
    hook = "default_hooks = dict({}=dict(type='EMAHook', momentum={}))\n"
    (tmp_path / 'a.py').write_text(hook.format('a', 0.1))
    (tmp_path / 'b.py').write_text(hook.format('b', 0.2))
    off = tmp_path / 'off.py'
    off.write_text('default_hooks = dict(a=None, b=None)\n')
    hooks = {
        'off': 'off.py',
        'a': 'a.py',
        'a_b': ['a.py', 'b.py', {'default_hooks.b.momentum': 0.3}],
    }
    text = 'default_hooks = dict()\n'
    labels = dict(size=['ok', 'fail'], hooks=hooks)
    groups = [dict(configs='fake_{size}.py', labels=labels)]
    path = write_matrix(['ok', 'fail'], groups=groups)
    for config in tmp_path.glob('fake_*.py'):
        config.write_text(config.read_text() + text)
    loaded = load_matrix(path)
    assert names(loaded) == [
        f'{size}.{value}.fp32.seed0'
        for size in ('ok', 'fail')
        for value in hooks
    ]
    assert loaded.cells[0].options == dict.fromkeys(
        ['default_hooks.a', 'default_hooks.b']
    )
    assert loaded.cells[2].options == {
        'default_hooks.a.type': 'EMAHook',
        'default_hooks.a.momentum': 0.1,
        'default_hooks.b.type': 'EMAHook',
        'default_hooks.b.momentum': 0.3,
    }
    (tmp_path / 'b.py').rename(tmp_path / 'bb.py')
    with pytest.raises(FileNotFoundError, match=r'config fragment .*b\.py'):
        load_matrix(path)


def test_globs_are_told_apart_by_their_names(write_matrix):
    path = write_matrix(['ok', 'fail'], groups=[dict(configs='fake_*.py')])
    assert names(load_matrix(path)) == [
        'fake_fail.fp32.seed0',
        'fake_ok.fp32.seed0',
    ]


def test_hash_follows_all_that_matters(write_matrix):
    def hashes(**settings):
        loaded = load_matrix(write_matrix(**settings))
        return [cell.config_hash for cell in loaded.cells]

    (plain,) = hashes()
    assert hashes(title='Other', notes=['x']) == [plain]
    different = [
        *hashes(seeds=[1]),
        *hashes(precisions=['bf16']),
        *hashes(lrs=[1.0]),
        *hashes(cfg_options={'model.pause': 9.0}),
    ]
    assert len({plain, *different}) == 5


def test_divergence_hook_is_noticed(write_matrix):
    path = write_matrix()
    config = path.with_name('fake_ok.py')
    hook = "custom_hooks = [dict(type='mmstabvim.DivergenceHook'{})]\n"
    plain = config.read_text()
    for argument, action in (('', 'stop'), (", action='rollback'",) * 2):
        config.write_text(plain + hook.format(argument))
        expected = 'rollback' if 'rollback' in action else 'stop'
        (cell,) = load_matrix(path).cells
        assert cell.on_divergence == expected
    text = "default_hooks = dict(guard=dict(type='mmstabvim.DivergenceHook'))"
    config.write_text(f'{plain}{text}\n')
    (cell,) = load_matrix(path).cells
    assert cell.on_divergence == 'stop'


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(seed=[0]), "unknown setting 'seed'"),
        (dict(groups=[dict(config='x.py')]), "unknown setting 'config'"),
        (dict(groups=[]), 'no cells'),
        (dict(groups=[{}]), 'wants configs'),
        (dict(seeds=0), r'seeds wants a list, got 0'),
        (dict(seeds=[]), r'seeds wants a list, got \[\]'),
        (dict(precisions=['fp8']), "one of fp32, bf16, fp16, got 'fp8'"),
        (dict(cfg_options={'pausee': 1}), "no 'pausee'"),
        (dict(cfg_options={'model.pause': {'a': 1}}), 'command line'),
        (dict(baseline=dict(behaviour='bad')), "got 'bad'"),
        (
            dict(groups=[dict(configs='{x}.py', labels=dict(y=[1]))]),
            r"names \['x'\]",
        ),
        (
            dict(groups=[dict(configs='fake_ok.py', labels=dict(y=[1, 2]))]),
            r'wants \{y\} in its path',
        ),
        (dict(groups=[dict(configs='fake_ok.py')] * 2), 'two cells'),
    ],
)
def test_clear_errors(settings, message, write_matrix):
    with pytest.raises(ValueError, match=message):
        load_matrix(write_matrix(**settings))


def test_absent_files(write_matrix, tmp_path):
    path = write_matrix()
    with pytest.raises(FileNotFoundError, match='matrix file'):
        load_matrix(tmp_path / 'matrixx.py')
    (tmp_path / 'fake_ok.py').rename(tmp_path / 'fake_okay.py')
    with pytest.raises(FileNotFoundError, match=r'near names.*fake_okay\.py'):
        load_matrix(path)


def test_a_config_that_cannot_change_precision(write_matrix):
    path = write_matrix()
    config = path.with_name('fake_ok.py')
    config.write_text(
        config.read_text().replace(
            'dict(optimizer', "dict(type='AmpOptimWrapper', optimizer"
        )
    )
    with pytest.raises(ValueError, match='wants an OptimWrapper'):
        load_matrix(path)
    assert load_matrix(path, dict(precisions=['bf16'])).cells


@pytest.mark.parametrize(
    ('value', 'text'),
    [(2e-3, '2e-3'), (0.5, '5e-1'), (1.0, '1e0'), (1.25e9, '1.25e9')],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
    assert float(text) == value


@pytest.mark.parametrize(
    'value',
    [1, -2.5e-7, True, None, 'a/b.py', [1, 'x'], [(1, 2), (3, 4)], 1e22, []],
)
def test_options_survive_the_command_line(value):
    text = option_text('a.b', value)
    name, _, value_text = text.partition('=')
    assert name == 'a.b'
    assert DictAction._parse_iterable(value_text) == value


@pytest.mark.parametrize('value', [{}, 'None', '1', 'a b', 'x[,', "it's"])
def test_options_that_would_not(value):
    with pytest.raises(ValueError, match='command line'):
        matrix.option_text('a', value)

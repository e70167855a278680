"""Configs that bound weights or start state matrices elsewhere."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmstabvim.ablation.matrix import load_matrix
from mmstabvim.layers.state_matrix import INITS, state_matrices

CONFIG_ROOT = Path(__file__).parents[1] / 'configs'
DATASETS = ('digits', 'cifar10_subset', 'cifar10', 'in1k')
NORM = 'mmstabvim.WeightSpectralNormHook'
RANK = 'mmstabvim.StableRankHook'
RULES = {'weight-sn': [NORM], 'srn': [RANK], 'weight-sn-srn': [NORM, RANK]}
# those that differ from what a full matrix starts with anyway
STARTS = [init.replace('_', '-') for init in INITS if init != 's4d_real']


def find(dataset, variant):
    """The one config of a dataset that its name says to be so."""
    (path,) = (
        path
        for path in (CONFIG_ROOT / 'ablation' / dataset).glob('*.py')
        if re.search(rf'\d(e|xb128)-{variant}_', path.stem)
    )
    return path


def base_of(path, variant):
    """The config of the same name without the variant."""
    name = path.name.replace(f'-{variant}', '')
    folders = (path.parent, CONFIG_ROOT / 'vim')
    (base,) = [f / name for f in folders if (f / name).exists()]
    return Config.fromfile(base)


@pytest.mark.parametrize('dataset', DATASETS)
@pytest.mark.parametrize('variant', RULES)
def test_rules_on_weights(dataset, variant):
    """The recipe and the hooks of the name, as in the fragments."""
    path = find(dataset, variant)
    cfg = Config.fromfile(path)
    hooks = cfg.pop('custom_hooks')
    assert [hook.type for hook in hooks] == RULES[variant]
    alone = [
        Config.fromfile(
            CONFIG_ROOT / f'_base_/stabilizers/{fragment}.py'
        ).custom_hooks[0]
        for fragment in ('weight_sn', 'srn')
    ]
    assert all(hook in alone for hook in hooks)
    assert cfg.to_dict() == base_of(path, variant).to_dict()


@pytest.mark.parametrize('dataset', DATASETS)
@pytest.mark.parametrize('variant', STARTS)
def test_starts_of_state_matrices(dataset, variant):
    """Those of the full matrices without stabilizers, but for ``init``."""
    path = find(dataset, f'full-{variant}')
    cfg = Config.fromfile(path)
    init = cfg.model.backbone.state_matrix.pop('init')
    assert init.replace('_', '-') == variant
    plain = Config.fromfile(find(dataset, 'full-none'))
    assert cfg.to_dict() == plain.to_dict()


@pytest.mark.parametrize('dataset', DATASETS)
def test_the_models_start_as_their_names_say(dataset):
    """With the states of the recipe; all are stable and differ."""
    seen, norms = {}, {}
    for variant in ('none', *STARTS):
        cfg = Config.fromfile(find(dataset, f'full-{variant}'))
        backbone = cfg.model.backbone.to_dict()
        if isinstance(backbone['arch'], dict):
            backbone['arch']['num_layers'] = 1
        else:  # of Vim-tiny, one of whose layers is enough
            backbone['arch'] = dict(embed_dims=192, num_layers=1)
        torch.manual_seed(0)
        first, _ = state_matrices(MODELS.build(backbone)).values()
        seen[variant] = first.eigenvalues().detach()[0]
        dense = first.dense().detach()[0]
        norms[variant] = torch.linalg.matrix_norm(dense, 2).item()
    states = len(seen['none'])
    assert states == (8 if 'nano' in find(dataset, 'srn').stem else 16)
    for values in seen.values():
        assert len(values) == states
        assert values.real.max() < -0.01
    whole = -torch.arange(1.0, states + 1)
    reals = seen['none'].real.sort(descending=True).values
    torch.testing.assert_close(reals, whole, rtol=1e-4, atol=0)
    for variant in ('s4d-lin', 's4d-inv', 's4d-legs'):
        half = torch.full((states,), -0.5)
        torch.testing.assert_close(seen[variant].real, half)
    # HiPPO has the eigenvalues of s4d_real, and is far from normal
    hippo = {8: 40.809929, 16: 163.033634}[states]
    assert norms['hippo'] == pytest.approx(hippo, rel=1e-5)
    assert 1e-3 < abs(norms['ptd'] - hippo) <= 0.41
    assert len({round(norm, 2) for norm in norms.values()}) == 6


def test_the_matrix_of_all():
    """30 trainings on digits, each compared with the plain one."""
    found = load_matrix(CONFIG_ROOT / 'ablation/spectra.py')
    assert found.orders == dict(
        matrix=['neg_exp', 'full'],
        variant=['plain', *RULES, *STARTS],
    )
    assert found.baseline == dict(variant='plain')
    assert len(found.cells) == 3 * (1 + len(RULES) + 1 + len(STARTS))
    for cell in found.cells:
        matrix, variant = cell.labels.values()
        prefix = '' if matrix == 'neg_exp' else 'full-'
        if variant == 'plain':
            variant = 'none' if prefix else ''
        name = f'vim-nano-p4_1xb64-20e-{prefix}{variant}_digits.py'
        assert Path(cell.config).name == name.replace('-_', '_')
        assert cell.epochs == 10

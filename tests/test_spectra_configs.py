"""Matrices that bound weights or initialize state matrices otherwise."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmstabvim.ablation.matrix import load_matrix
from mmstabvim.engine.launch import read_settings
from mmstabvim.layers.state_matrix import INITS, state_matrices

CONFIG_ROOT = Path(__file__).parents[1] / 'configs'
RULES = {
    'weight_sn': ['weight_sn'],
    'srn': ['srn'],
    'weight_sn_srn': ['weight_sn', 'srn'],
}
# those that differ from what a full matrix starts with anyway
STARTS = [init for init in INITS if init != 's4d_real']
# matrix file and what its label of the data says
DATASETS = {
    'digits': ('spectra', 'digits'),
    'cifar10_subset': ('spectra', 'CIFAR-10 subset'),
    'cifar10': ('cifar10', None),
    'in1k': ('in1k', None),
}


@pytest.fixture(scope='module', params=DATASETS)
def variants(request):
    """Resolved config of each variant of one dataset, the first seed's."""
    matrix, data = DATASETS[request.param]
    found = {}
    for cell in load_matrix(CONFIG_ROOT / f'ablation/{matrix}.py').cells:
        labels = dict(cell.labels)
        if cell.seed == 0 and labels.pop('data', None) == data:
            chosen = {*labels.values()} - {'none', 's4d_real', 'plain'}
            key = ' '.join(v for v in labels.values() if v in chosen)
            found[key] = read_settings(cell.config, cell.options)
    return found


def without_hooks(cfg):
    """A config's settings, but for hooks that the matrix adds or removes."""
    settings = cfg.to_dict()
    for key in ('sn', 'ec', 'sp', 'weight_sn', 'srn'):
        settings['default_hooks'].pop(key, None)
    return settings


def test_rules_on_weights(variants):
    """The recipe and the hooks of the name, as in the fragments."""
    plain = without_hooks(variants['neg_exp'])
    for variant, keys in RULES.items():
        cfg = variants[f'neg_exp {variant}']
        hooks = cfg.default_hooks
        assert [key for key in ('weight_sn', 'srn') if key in hooks] == keys
        for key in keys:
            path = CONFIG_ROOT / f'_base_/stabilizers/{key}.py'
            assert hooks[key] == Config.fromfile(path).default_hooks[key]
        assert without_hooks(cfg) == plain


def test_initializations_of_state_matrices(variants):
    """Those of the full matrices without stabilizers, but for ``init``."""
    plain = without_hooks(variants['full'])
    for init in STARTS:
        settings = without_hooks(variants[f'full {init}'])
        backbone = settings['model']['backbone']
        assert backbone['state_matrix'].pop('init') == init
        assert settings == plain


def test_the_models_start_as_their_names_say(variants):
    """With the states of the recipe; all are stable and differ."""
    seen, norms = {}, {}
    for variant in ('', *STARTS):
        cfg = variants[f'full {variant}'.strip()]
        backbone = cfg.model.backbone.to_dict()
        if isinstance(backbone['arch'], dict):
            backbone['arch']['num_layers'] = 1
        else:  # of Vim-tiny, one of whose layers is enough
            backbone['arch'] = dict(embed_dims=192, num_layers=1)
        torch.manual_seed(0)
        (first,) = state_matrices(MODELS.build(backbone)).values()
        seen[variant] = first.eigenvalues().detach()[0]
        dense = first.dense().detach()[0]
        norms[variant] = torch.linalg.matrix_norm(dense, 2).item()
    states = len(seen[''])
    assert states == backbone['arch'].get('d_state', 16)
    for values in seen.values():
        assert len(values) == states
        assert values.real.max() < -0.01
    whole = -torch.arange(1.0, states + 1)
    reals = seen[''].real.sort(descending=True).values
    torch.testing.assert_close(reals, whole, rtol=1e-4, atol=0)
    for variant in ('s4d_lin', 's4d_inv', 's4d_legs'):
        half = torch.full((states,), -0.5)
        torch.testing.assert_close(seen[variant].real, half)
    # HiPPO has the eigenvalues of s4d_real, and is far from normal
    hippo = {8: 40.809929, 16: 163.033634}[states]
    assert norms['hippo'] == pytest.approx(hippo, rel=1e-5)
    assert 1e-3 < abs(norms['ptd'] - hippo) <= 0.41
    assert len({round(norm, 2) for norm in norms.values()}) == 6


def test_the_matrix_of_all():
    """30 trainings of each data set, each compared with the plain one."""
    found = load_matrix(CONFIG_ROOT / 'ablation/spectra.py')
    assert found.orders == dict(
        data=['digits', 'CIFAR-10 subset'],
        matrix=['neg_exp', 'full'],
        variant=['plain', *RULES, *STARTS],
    )
    assert found.baseline == dict(variant='plain')
    assert len(found.cells) == 2 * 3 * (1 + len(RULES) + 1 + len(STARTS))
    assert {cell.epochs for cell in found.cells} == {10}

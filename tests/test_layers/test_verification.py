"""What is said of a whole model, and that no state contradicts it."""

import math

import pytest
import torch
from torch import nn

from mmstabvim import StabilityError, VisionMamba, verify
from mmstabvim.layers.mixer_ranges import trace_mixer
from mmstabvim.layers.state_matrix import EigenvalueClamping, state_matrices

KINDS = {
    'neg_exp': dict(type='neg_exp'),
    'signed': dict(type='signed'),
    'complex': dict(type='complex'),
    'ptd': dict(type='complex', init='ptd', hippo_bias=True),
    'full': dict(type='full', groups=4, init='ptd'),
    'hippo': dict(type='full', groups=2, init='hippo'),
}


def make(kind='neg_exp', d_state=4):
    torch.manual_seed(0)
    return VisionMamba(
        dict(embed_dims=16, num_layers=2, d_state=d_state),
        img_size=16,
        patch_size=4,
        state_matrix=KINDS[kind],
    )


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('kind', KINDS)
def test_no_state_exceeds_the_bound(kind, b_disc):
    """On rough weights and large tokens, in every layer and direction."""
    model = make(kind).double()
    rows = verify(model, length=17)
    names = [f'{n}.{k}' for n in state_matrices(model) for k in range(2)]
    assert [row.name for row in rows] == names
    number = 0
    for block in model.layers:
        block.mixer.ssm.b_disc = b_disc
        tokens = block.norm(100 * torch.randn(2, 17, 16).double(), None)[0]
        with torch.no_grad():
            traced = trace_mixer(block.mixer, tokens).directions
        for found in traced:
            row = rows[number]
            size = found['state'].abs().square().sum(-1).sqrt().max()
            assert 0 < size <= row.state * (1 + 1e-9), row.name
            assert found['delta'].max() <= row.delta_max
            number += 1


def test_the_table():
    rows = verify(make('full', 8), length=65)
    text = str(rows).splitlines()
    assert len(text) == 5
    assert all(word in text[0] for word in ('abscissa', 'condition', 'growth'))
    row = rows[0]
    assert row.kind == 'complex64'
    assert row.growth == 0
    assert 1 < row.condition < 1e3
    assert math.isfinite(row.state)
    assert verify(make('hippo', 16), length=65)[0].kind == 'complex128'


def test_an_unstable_matrix_is_named():
    model = make('signed')
    matrix = model.layers[1].mixer.ssm.state_matrix
    with torch.no_grad():
        matrix.A[3, 2] = 0.25
    with pytest.raises(
        StabilityError,
        match=r'0\.25 in layers\.1\.mixer\.ssm\.state_matrix\.0',
    ):
        verify(model, length=65)
    rows = verify(model, length=65, strict=False)
    assert rows[2].abscissa == 0.25
    assert 0 < rows[2].growth <= rows[2].delta_max * 65 * 0.25
    longer = verify(model, length=650, strict=False)
    assert longer[2].growth == pytest.approx(10 * rows[2].growth)
    assert longer[2].state > rows[2].state
    assert longer[1] == rows[1]
    matrix.apply_(EigenvalueClamping())
    verify(model, length=65, eps=0.01)


def test_what_is_asked_for():
    model = make('full', 8)
    with pytest.raises(StabilityError, match=r'real part above -3, the larg'):
        verify(model, length=65, eps=3.0)
    with pytest.raises(StabilityError, match='condition number of'):
        verify(model, length=65, condition_max=1.5)


def test_a_model_that_cannot_be_verified():
    with pytest.raises(ValueError, match='Linear has no state matrix'):
        verify(nn.Linear(2, 2), length=65)
    with pytest.raises(ValueError, match='want length > 0'):
        verify(make(), length=0)
    model = make()
    with torch.no_grad():
        model.layers[0].mixer.ssm.state_matrix.A_log[0] = math.nan
    with pytest.raises(
        ValueError, match=r'layers\.0\.mixer\.ssm\.state_matrix has a NaN'
    ):
        verify(model, length=65)


def test_a_matrix_outside_of_a_mixer():
    """Its eigenvalues are checked; nothing is known of its inputs."""
    row = verify(model := make().layers[0].mixer.ssm, length=65)[0]
    assert row.abscissa == -1
    assert row.delta_max == row.state == math.inf
    assert row.growth == 0
    assert list(state_matrices(model)) == ['state_matrix']

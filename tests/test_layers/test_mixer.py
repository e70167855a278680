"""The mixer's parts against independent formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmstabvim.layers import MambaMixer, RMSNorm, ScanOrder, SelectiveSSM
from mmstabvim.layers.state_matrix import build_state_matrix
from mmstabvim.ops import rms_norm


def test_rms_norm_formula_and_dtype():
    x, weight = torch.randn(5, 8), torch.rand(8)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight), exact)
    assert rms_norm(x.bfloat16(), weight).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r'weight must be \(8,\)'):
        rms_norm(x, weight[1:])
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(RMSNorm(8)(x), rms_norm(x, torch.ones(8)))


def test_mixer_by_its_definition():
    """Two directions, one gate, half their sum, one projection."""
    torch.manual_seed(0)
    mixer = MambaMixer(8, d_state=3)
    x = torch.randn(2, 11, 8)
    inner, z = mixer.in_proj(x).chunk(2, dim=-1)
    assert mixer.ssm.order == ((False, True),)
    outputs = []
    for k, weights in enumerate(mixer.direction_weights()):
        ssm = SelectiveSSM(16, 3, 1, ScanOrder((k == 1,)))
        ssm.load_state_dict(
            {
                name: mixer.ssm.by_direction(weight)[k]
                for name, weight in mixer.ssm.state_dict().items()
            }
        )
        tokens = inner.flip(1) if k else inner
        conv = F.conv1d(
            F.pad(tokens.mT, (3, 0)),
            weights.taps[:, None],
            weights.conv_bias,
            groups=16,
        ).mT
        u = F.silu(conv.flip(1) if k else conv)
        outputs.append(ssm(u[None])[0] * F.silu(z))
    torch.testing.assert_close(mixer(x), mixer.out_proj(sum(outputs) / 2))


def test_backward_direction_is_the_flipped_forward():
    """With the same weights, ``reverse`` is nothing but a flip."""
    torch.manual_seed(0)
    one = SelectiveSSM(6, d_state=4, dt_rank=2)
    other = SelectiveSSM(6, 4, 2, ScanOrder((True,)))
    other.load_state_dict(one.state_dict())
    u = torch.randn(1, 2, 9, 6)
    assert not torch.allclose(one(u), other(u))
    torch.testing.assert_close(one(u.flip(2)).flip(2), other(u))


def test_initial_step_sizes_and_state_matrix():
    ssm = SelectiveSSM(4096, d_state=5, dt_rank=4)
    dt = F.softplus(ssm.dt_bias)
    assert 1e-3 <= dt.min() < 1.5e-3
    assert 0.08 < dt.max() <= 0.1 + 1e-6
    # log-uniform: the median is the geometric mean of the ends
    assert dt.median().log().item() == pytest.approx(math.log(0.01), abs=0.2)
    assert ssm.dt_proj.weight.abs().max() <= 0.5
    exact = -torch.arange(1.0, 6).expand(4096, 5)
    torch.testing.assert_close(ssm.state_matrix(), exact)


def test_state_matrix_is_float32_or_wider():
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert build_state_matrix(2, 3).to(dtype)().dtype == wide


def test_bad_options():
    with pytest.raises(ValueError, match=r"one of .*, got 'negexp'"):
        MambaMixer(8, state_matrix=dict(type='negexp'))
    with pytest.raises(ValueError, match='dt_rank must be'):
        MambaMixer(8, dt_rank=0)
    with pytest.raises(TypeError, match='d_stat'):
        MambaMixer(8, d_stat=3)

"""Hidden attention against the scan itself, unrolled and differentiated."""

import pytest
import torch

from mmstabvim.layers import MambaMixer
from mmstabvim.layers.mixer_attention import mixer_attention
from mmstabvim.layers.mixer_ranges import trace_mixer
from mmstabvim.layers.state_matrix import Full
from mmstabvim.ops import selective_scan
from mmstabvim.stability.ranges import hidden_attention as module
from mmstabvim.stability.ranges.hidden_attention import (
    AGGREGATIONS,
    aggregate_attention,
    attention_rollout,
    hidden_attention,
)
from mmstabvim.stability.state.eigenbasis import matrix_exponential_scan

BATCH, DIM, STATE = 2, 6, 3
both_ways = pytest.mark.parametrize('reverse', [False, True])
discretizations = pytest.mark.parametrize('b_disc', ['euler', 'zoh'])


def make_inputs(kind='real', length=13, groups=2, dtype=torch.float64):
    """Delta, A, B, C and D of a scan, and its input."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return x

    delta = torch.rand(
        BATCH, length, DIM, dtype=torch.float64, generator=generator
    )
    A = -torch.exp(randn(DIM, STATE))
    if kind == 'unstable':
        A = 0.3 * randn(DIM, STATE)
    B, C = (randn(BATCH, length, groups, STATE) for _ in range(2))
    if kind == 'complex':
        A = torch.complex(A, 3 * randn(DIM, STATE))
        B, C = (torch.complex(m, randn(*m.shape)) for m in (B, C))
    real = [delta, A, B, C, randn(DIM), randn(BATCH, length, DIM)]
    wide = dtype.to_complex()
    return [x.to(wide if x.is_complex() else dtype) for x in real]


def scan(u, delta, A, B, C, D, reverse, b_disc, backend='reference'):
    return selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        reverse=reverse,
        b_disc=b_disc,
        channels_last=True,
        backend=backend,
    )


def apply(alpha, u):
    return torch.einsum('bdts,bsd->btd', alpha, u)


@both_ways
@discretizations
@pytest.mark.parametrize('length', [1, 13, 65])
@pytest.mark.parametrize('kind', ['real', 'complex', 'unstable'])
def test_the_matrix_gives_the_scans_output(kind, length, b_disc, reverse):
    delta, A, B, C, D, u = make_inputs(kind, length)
    wanted = scan(u, delta, A, B, C, D, reverse, b_disc)
    alpha = hidden_attention(delta, A, B, C, None, reverse, b_disc)
    assert alpha.shape == (BATCH, DIM, length, length)
    error = (apply(alpha, u) + u * D - wanted).abs().max()
    assert error <= 1e-10 * wanted.abs().max().clamp(min=1)
    skipped = hidden_attention(delta, A, B, C, D, reverse, b_disc)
    torch.testing.assert_close(apply(skipped, u), wanted)
    off = torch.ones(length, length).triu(1).bool()
    assert not alpha[..., off.mT if reverse else off].any()


@both_ways
@discretizations
@pytest.mark.parametrize('kind', ['real', 'complex'])
def test_entries_are_the_derivatives_of_the_scan(kind, b_disc, reverse):
    delta, A, B, C, _, u = make_inputs(kind, 7)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: scan(x, delta, A, B, C, None, reverse, b_disc), u
    )  # (batch, t, channel, batch, s, channel)
    alpha = hidden_attention(delta, A, B, C, None, reverse, b_disc)
    for b in range(BATCH):
        for d in range(DIM):
            torch.testing.assert_close(
                alpha[b, d], jacobian[b, :, d, b, :, d], rtol=0, atol=1e-12
            )


def test_the_formula_entry_by_entry():
    """A sum of products, written out."""
    delta, A, B, C, _, _ = make_inputs('real', 5, groups=1)
    alpha = hidden_attention(delta, A, B, C)
    for t in range(5):
        for s in range(t + 1):
            decay = torch.ones(STATE, dtype=torch.float64)
            for r in range(s + 1, t + 1):
                decay = decay * torch.exp(delta[1, r, 4] * A[4])
            drive = delta[1, s, 4] * B[1, s, 0]
            wanted = (C[1, t, 0] * decay * drive).sum()
            torch.testing.assert_close(alpha[1, 4, t, s], wanted)


@both_ways
@discretizations
@pytest.mark.parametrize('groups', [1, 3])
def test_dense_matrices_by_the_matrix_exponential(groups, b_disc, reverse):
    """One that has no eigenbasis among them."""
    delta, _, B, C, D, u = make_inputs('real', 9, groups)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(
        groups, STATE, STATE, dtype=delta.dtype, generator=generator
    )
    A[0] = torch.diag(torch.ones(STATE - 1), 1) - torch.eye(STATE)
    wanted, _ = matrix_exponential_scan(u, delta, A, B, C, D, b_disc, reverse)
    alpha = hidden_attention(delta, A, B, C, D, reverse, b_disc)
    assert (apply(alpha, u) - wanted).abs().max() <= 1e-10
    diagonal = torch.diag_embed(torch.tensor([[-1.0, -2.0, -3.0]]).double())
    torch.testing.assert_close(
        hidden_attention(delta, diagonal, B, C, None, reverse, b_disc),
        hidden_attention(
            delta,
            diagonal[0].diagonal().expand(DIM, -1),
            B,
            C,
            None,
            reverse,
            b_disc,
        ),
    )


@pytest.mark.parametrize(
    'matrix',
    [
        dict(type='neg_exp'),
        dict(type='signed'),
        dict(type='complex'),
        dict(type='complex', init='ptd'),
        dict(type='full', groups=2),
        dict(type='full', kappa_max=1.0),
    ],
    ids=lambda matrix: '-'.join(map(str, matrix.values())),
)
@discretizations
def test_the_scans_of_a_mixer(matrix, b_disc, monkeypatch):
    """Every state matrix, both directions, with the mixer's own tensors."""
    if 'kappa_max' in matrix:  # as where there is no usable eigenbasis
        monkeypatch.setattr(Full, '_kind', lambda *_: 2)
    torch.manual_seed(0)
    mixer = MambaMixer(4, 4, state_matrix=matrix, b_disc=b_disc).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith(('U', 'V')):
                parameter.normal_(std=0.3)
            elif 'proj.weight' in name:
                parameter.mul_(3)
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    given = mixer_attention(mixer, x, None, with_skip=True)
    traced = trace_mixer(mixer, x).directions
    B, C = (torch.stack([t[name] for t in traced]) for name in 'BC')
    failed = mixer.ssm.state_matrix.scan_matrices(B, C)
    assert (failed is None) == (matrix.get('kappa_max') == 1.0)
    skips = mixer.ssm.by_direction(mixer.ssm.D).detach()
    for k, (alpha, tensors) in enumerate(zip(given, traced, strict=True)):
        y = tensors['y']
        error = (apply(alpha, tensors['u']) - y).abs().max()
        assert error <= 1e-10 * y.abs().max()
        without = mixer_attention(mixer, x, None)[k]
        skip = (alpha - without).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(skip, skips[k][:, None].expand_as(skip))


@both_ways
@pytest.mark.parametrize('values', [1, 200, 2**18])
@pytest.mark.parametrize('how', AGGREGATIONS)
def test_aggregation_in_groups_of_channels(how, values, reverse, monkeypatch):
    delta, A, B, C, D, _ = make_inputs('complex')
    alpha = hidden_attention(delta, A, B, C, D, reverse)
    wanted = {
        'abs': alpha.abs().mean(1),
        'mean': alpha.mean(1),
        'norm': alpha.norm(dim=1),
    }[how]
    monkeypatch.setattr(module, '_VALUES', values)
    found = aggregate_attention(delta, A, B, C, D, reverse, how=how)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        hidden_attention(delta, A, B, C, D, reverse), alpha
    )


def test_precision_and_gradient():
    given = make_inputs('real', 65, dtype=torch.float32)[:4]
    given = [x.requires_grad_() for x in given]
    alpha = hidden_attention(*given)
    assert alpha.dtype == torch.float32
    assert not alpha.requires_grad
    exact = hidden_attention(*(x.double() for x in given))
    assert (alpha - exact).abs().max() <= 1e-6 * exact.abs().max()
    half = [x.detach().bfloat16() for x in given]
    with torch.autocast('cpu', torch.bfloat16):
        found = hidden_attention(*half)
    wide = hidden_attention(*(x.float() for x in half))
    torch.testing.assert_close(found, wide, rtol=0, atol=0)


def test_rollout_by_hand():
    """Two layers of two tokens; a row of zeros keeps half of itself."""
    first = torch.tensor([[2.0, 0.0], [3.0, 1.0]])
    second = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    a = torch.tensor([[1.0, 0.0], [3 / 8, 5 / 8]])
    b = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    found = attention_rollout(torch.stack([first, second])[:, None])
    torch.testing.assert_close(found, (b @ a)[None])
    # order matters, and rows without a zero stay of sum 1
    layers = torch.rand(4, 3, 7, 7) + 0.01
    found = attention_rollout(layers)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 7))
    assert not torch.allclose(found, attention_rollout(layers.flip(0)))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(delta=torch.ones(2, 3)), r'delta must be real, .*\(2, 3\)'),
        (dict(A=torch.ones(5, 3)), r'A must be \(6, N\).*got \(5, 3\)'),
        (dict(A=torch.ones(4, 3, 3)), r'got \(4, 3, 3\)'),
        (dict(A=torch.ones(6, 3) * 1j), r'B must be .*complex where A is'),
        (dict(C=torch.ones(2, 13, 1, 3)), r'C must be \(2, 13, groups, 3\)'),
        (dict(B=torch.ones(2, 13, 4, 3)), r'groups dividing 6'),
        (dict(D=torch.ones(5)), r'D must be \(6,\), got \(5,\)'),
        (dict(b_disc='bilinear'), r"b_disc must be one of .*'bilinear'"),
        (dict(how='median'), r"how must be one of .*got 'median'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_clear_errors(change, message):
    names = ('delta', 'A', 'B', 'C')
    given = dict(zip(names, make_inputs()[:4], strict=True)) | change
    with pytest.raises(ValueError, match=message):
        aggregate_attention(**given)


@pytest.mark.parametrize(
    ('layers', 'message'),
    [
        (torch.ones(2, 3, 3), r'must be \(layers, batch'),
        (-torch.ones(1, 1, 3, 3), '>= 0'),
        (torch.full((1, 1, 3, 3), torch.nan), 'finite'),
    ],
)
def test_clear_errors_of_the_rollout(layers, message):
    with pytest.raises(ValueError, match=message):
        attention_rollout(layers)

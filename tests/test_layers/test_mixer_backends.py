"""The mixer computes the same whatever computes its operators."""

import pytest
import torch

from mmstabvim.layers import MambaMixer
from mmstabvim.layers.state_matrix import state_matrices

MATRICES = {
    'neg_exp': dict(type='neg_exp'),
    'complex': dict(type='complex'),
    'full': dict(type='full', groups=2),
}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


def run(mixer, x, backend):
    """Output, and the gradients of the input and of every parameter."""
    mixer.ssm.backend = backend
    mixer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = mixer(x)
    y.float().sin().sum().backward()
    grads = {name: p.grad for name, p in mixer.named_parameters()}
    return {'y': y.detach(), 'dx': x.grad, **grads}


def make(kind, length, device='cpu'):
    torch.manual_seed(0)
    mixer = MambaMixer(8, d_state=4, state_matrix=MATRICES[kind])
    with torch.no_grad():
        for matrix in state_matrices(mixer).values():
            for parameter in matrix.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return mixer.to(device), torch.randn(2, length, 8).to(device)


def check(actual, exact, bound):
    for name, wanted in exact.items():
        error = (actual[name] - wanted).abs().max()
        limit = bound * wanted.abs().max()
        assert error <= limit, f'{name}: {error:.2e} > {limit:.2e}'


@pytest.mark.parametrize('kind', MATRICES)
def test_triton_scan_in_the_mixer(kind):
    """Both directions in one launch, interpreted without a GPU."""
    pytest.importorskip('triton')
    mixer, x = make(kind, 9)
    exact = run(mixer, x, 'reference')
    check(run(mixer, x, 'triton'), exact, 2e-5)
    check(run(mixer, x, 'cpu'), exact, 2e-5)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize('kind', MATRICES)
@pytest.mark.parametrize('length', [1, 65, 197])
def test_all_kernels_in_the_mixer(kind, length, monkeypatch):
    """Convolution, scan and merge on a GPU against the definitions."""
    mixer, x = make(kind, length, 'cuda')
    with monkeypatch.context() as patch:
        patch.setenv('MMSTABVIM_BACKEND', 'reference')
        exact = run(mixer, x, 'auto')
    check(run(mixer, x, 'auto'), exact, 1e-4)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_a_gpu(dtype):
    """Near float32, with parameters and their gradients in float32."""
    mixer, x = make('neg_exp', 197, 'cuda')
    exact = run(mixer, x, 'auto')
    with torch.autocast('cuda', dtype):
        narrow = run(mixer, x, 'auto')
    assert narrow['y'].dtype == dtype
    assert narrow['ssm.state_matrix.A_log'].dtype == torch.float32
    check(narrow, exact, 0.05)

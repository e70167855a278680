"""Equal numbers on a GPU, and results that stay there."""

import pytest
import torch
from stability_oracles import batch_of, detmat
from torch.utils._pytree import tree_leaves

from mmstabvim import stability

A = batch_of(4, 3)
STEPS = detmat(10, 4).abs().reshape(2, 5, 4)
SCAN = (detmat(10, 4).reshape(2, 5, 4), STEPS, A[:2], detmat(10, 3, 2))

CASES = {
    'spectral_radius': (A,),
    'spectral_abscissa': (A[:, :2, :2],),
    'numerical_abscissa': (A,),
    'gelfand_bound': (A,),
    'radius_scale': (A.abs(), 0.5),
    'log_radius_scale': (A, 0.5),
    'discrete_shift': (A, 0.9, 0.1),
    'clamp_real_part': (A, 0.1),
    'clamp_matrix': (A, 0.1),
    'fit_block_low_rank': (A, 1, 1),
    'stability_penalty': (A,),
    'decompose': (A,),
    'gradient_flow': (STEPS, detmat(4, 3)),
    'step_ranges': (STEPS, detmat(4, 3)),
    'count_nonfinite': ({'A': A},),
    'matrix_exponential_scan': (
        *SCAN[:3],
        SCAN[3].reshape(2, 5, 3),
        SCAN[3].reshape(2, 5, 3),
    ),
}


def moved(x):
    if isinstance(x, dict):
        return {name: moved(value) for name, value in x.items()}
    return x.cuda() if isinstance(x, torch.Tensor) else x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', CASES)
def test_same_on_a_gpu(name):
    function = getattr(stability, name)
    wanted = tree_leaves(function(*CASES[name]))
    found = tree_leaves(function(*map(moved, CASES[name])))
    assert {x.device.type for x in found} == {'cuda'}
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.cpu(), y)


def test_every_case_runs():
    """The cases themselves are sound, wherever they run."""
    for name, args in CASES.items():
        assert tree_leaves(getattr(stability, name)(*args)), name

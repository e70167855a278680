"""What the Triton scan's kernels are made of, and what they compile to."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton')

from mmstabvim.ops.selective_scan import kernels, kernels_math  # noqa: E402

tl = triton.language

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

SCRIPT = Path(__file__).parents[2] / 'tools/benchmarks/kernel_resources.py'

RESOURCES = {
    ('forward', 'real', 'euler', 90): (127, 12.3),
    ('backward', 'real', 'euler', 90): (233, 37.9),
    ('forward ends', 'real', 'euler', 90): (69, 8.0),
    ('backward ends', 'real', 'euler', 90): (96, 7.8),
    ('forward', 'real', 'euler', 80): (128, 12.1),
    ('forward', 'real', 'euler', 100): (131, 11.6),
    ('backward', 'real', 'euler', 80): (241, 37.3),
    ('backward', 'real', 'euler', 100): (230, 34.6),
    ('forward', 'complex', 'euler', 90): (155, 84.0),
    ('forward ends', 'complex', 'euler', 90): (134, 71.5),
    ('backward ends', 'complex', 'euler', 90): (96, 69.0),
    ('forward', 'real', 'zoh', 90): (141, 69.8),
    ('backward', 'complex', 'euler', 80): (240, 230.8),
    ('backward', 'complex', 'euler', 90): (213, 219.9),
    ('backward', 'complex', 'euler', 100): (212, 203.4),
    ('forward', 'complex', 'euler', 80): (160, 84.7),
    ('forward', 'complex', 'euler', 100): (153, 80.3),
    ('forward', 'complex', 'zoh', 90): (139, 189.7),
    ('backward', 'real', 'zoh', 90): (251, 187.0),
    ('backward', 'complex', 'zoh', 90): (242, 584.1),
}
"""Registers and instructions per (token, channel, state), as SCRIPT prints."""

COMPILE_SMALLEST = """
import kernel_resources

numbers = dict(
    batch=1, length=1, channels=1, STATE=1, NR=1, NL=1, DL=1, DR=1,
    u_strides=(1, 1, 1), delta_strides=(1, 1, 1), dy_strides=(1, 1, 1),
    B_strides=(1, 1, 1, 1), C_strides=(1, 1, 1, 1),
)
options = dict(
    D_ptr=None, bias_ptr=None, dlast_ptr=None,
    SOFTPLUS=False, CONSTANT_C=True, WHOLE=False,
)
for name in kernel_resources.KERNELS:
    kernel_resources.compile_kernel(name, **numbers)
    kernel_resources.compile_kernel(name, split=True, **options)
"""


@triton.jit
def _evaluate_kernel(
    x_ptr, softplus_ptr, slope_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    cos, sin = kernels_math._cos_sin(x)
    softplus, slope = kernels_math._softplus(x)
    tl.store(softplus_ptr + offs, softplus)
    tl.store(slope_ptr + offs, slope)
    tl.store(cos_ptr + offs, cos)
    tl.store(sin_ptr + offs, sin)


def evaluate(x):
    """Functions of the kernels at x, by name, and x in float64."""
    results = {
        name: torch.empty_like(x)
        for name in ('softplus', 'slope', 'cos', 'sin')
    }
    _evaluate_kernel[(1,)](x, *results.values(), BLOCK=x.numel())
    return results, x.double()


@triton.jit
def _phi1_kernel(
    x_ptr, phi1_ptr, slope_ptr, COMPLEX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < BLOCK
    width = 2 if COMPLEX else 1
    x = kernels._load(x_ptr + width * offs, mask, COMPLEX)
    exp_x = kernels_math._decay(1.0, x, COMPLEX)
    phi1, slope = kernels_math._phi1(x, exp_x, COMPLEX)
    kernels._store(phi1_ptr + width * offs, phi1, mask, COMPLEX)
    kernels._store(slope_ptr + width * offs, slope, mask, COMPLEX)


def test_softplus_is_accurate():
    """To four roundings with its slope, and the identity above 20."""
    x = torch.linspace(-80, 100, 1 << 14, device=DEVICE)
    results, wide = evaluate(x)
    exact = wide.clamp(min=0) + torch.log1p(torch.exp(-wide.abs()))
    # and the rounding of x log2(e)
    bound = (4 + wide.abs()) * torch.finfo(torch.float32).eps
    assert ((results['softplus'] - exact).abs() <= bound * exact).all()
    slope = torch.sigmoid(wide)
    assert ((results['slope'] - slope).abs() <= bound * slope).all()
    assert torch.equal(results['softplus'][x > 20], x[x > 20])


@pytest.mark.parametrize(
    ('largest', 'slack'), [(10.0, 0.0), (1e5, 1e-3), (1e6, 0.5)]
)
def test_angles_are_accurate(largest, slack):
    """Closer than half a rounding of the angle, which a scan cannot avoid.

    Multiples of a quarter turn, where one of both is nearly zero, included.
    """
    x = torch.linspace(-largest, largest, 1 << 14, device=DEVICE)
    quarters = (x / (torch.pi / 2)).round() * (torch.pi / 2)
    results, wide = evaluate(torch.cat([x, quarters]))
    bound = torch.finfo(torch.float32).eps * (1 + slack * wide.abs())
    for name, function in (('cos', torch.cos), ('sin', torch.sin)):
        error = (results[name] - function(wide)).abs()
        assert (error <= bound).all(), name


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize(
    'size', [0.0, 1e-30, 1e-4, 0.1, 0.9999, 1.0, 2.5, 6.0]
)
def test_phi1_is_accurate(size, complex_a):
    """Value and derivative, near zero and on both sides of the switch."""
    turn = torch.linspace(-torch.pi, torch.pi, 256 if complex_a else 2)
    x = torch.polar(torch.full_like(turn, size), turn)
    x = (x if complex_a else x.real).to(DEVICE)
    x = torch.cat([x, -x])
    parts = torch.view_as_real(x) if complex_a else x
    phi1, slope = torch.empty_like(parts), torch.empty_like(parts)
    _phi1_kernel[(1,)](parts, phi1, slope, complex_a, x.numel())
    wide = x.to(torch.complex128)
    exact_phi1, exact_slope = torch.ones_like(wide), torch.ones_like(wide) / 2
    for k in range(1, 40):
        exact_phi1 += wide**k / float(math.factorial(k + 1))
        exact_slope += (k + 1) * wide**k / float(math.factorial(k + 2))
    for result, exact in ((phi1, exact_phi1), (slope, exact_slope)):
        value = torch.view_as_complex(result) if complex_a else result
        error = ((value - exact).abs() / exact.abs()).max()
        assert error <= 1e-6


def python(*args, **environment):
    """Output of Python with a fresh cache: interpreted kernels are no use."""
    done = subprocess.run(
        [sys.executable, *args],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    'table', ['quick', pytest.param('slow', marks=pytest.mark.slow)]
)
def test_resources(table, tmp_path):
    """For Ampere, Hopper and Blackwell: no spills, and as recorded.

    Registers exactly, instructions to a tenth.
    """
    rows = json.loads(
        python(
            SCRIPT, '--table', table, '--json', TRITON_CACHE_DIR=str(tmp_path)
        )
    )
    assert rows
    for *row, registers, stack, _, instructions in rows:
        assert stack == 0, row
        if triton.__version__ == '3.6.0':
            recorded, about = RESOURCES[tuple(row)]
            assert registers == recorded, row
            assert abs(instructions / about - 1) <= 0.1, row


@pytest.mark.skipif(triton.__version__ != '3.6.0', reason='another compiler')
def test_a_constant_matrix_spills_little(tmp_path):
    """Its gradient stays in registers; the decays must not, as well."""
    stack = python(
        '-c',
        'import kernel_resources as k;'
        "row = ('backward', 'real', 'euler', 90);"
        'print(k.measure(*row, CONSTANT_C=True).stack)',
        PYTHONPATH=str(SCRIPT.parent),
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert int(stack) <= 8


def test_smallest_sizes_compile(tmp_path):
    """Triton compiles ones and absent tensors in, which changes types.

    The interpreter does not see that.
    """
    python(
        '-c',
        COMPILE_SMALLEST,
        PYTHONPATH=str(SCRIPT.parent),
        TRITON_CACHE_DIR=str(tmp_path),
    )

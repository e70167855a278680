"""Behaviour that every operator has, with each of its backends."""

import functools

import pytest
import torch
from operator_tester import (
    DEVICE,
    HALF,
    TESTERS,
    assert_equal,
    convert,
    copied,
    make_seed,
    strided,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from mmstabvim.ops import native
from mmstabvim.ops.causal_conv1d import fused as fused_conv
from mmstabvim.ops.selective_scan import fused as fused_scan

pytestmark = pytest.mark.usefixtures('one_thread', 'fast_interpreter')

EVERY = [(name, x) for name in TESTERS for x in TESTERS[name].backends]
REGISTERED = [pair for pair in EVERY if 'reference' not in pair]
ONE_DIRECTION = {'selective_scan', 'causal_conv1d', 'rms_norm'}
"""Functions that prepare the inputs of another one's operator."""

KERNELS = [pair for pair in REGISTERED if not ONE_DIRECTION & set(pair)]
ALL = [(name, 'reference') for name in TESTERS] + KERNELS


def cases(pairs):
    """Parametrize a test by operator and backend."""
    return pytest.mark.parametrize('case', pairs, ids='-'.join, indirect=True)


@pytest.fixture
def case(request, monkeypatch):
    """A tester, the backend, and the device on which it runs."""
    name, backend = request.param
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    if backend == 'fused' and not all(
        module.library() for module in (fused_conv, fused_scan)
    ):
        pytest.skip('no C++ compiler that can build the kernels')
    device = 'cpu' if backend in ('cpu', 'fused') else DEVICE
    return TESTERS[name], backend, device


@cases(EVERY)
def test_matches_float64(case):
    """Outputs, gradients of every input, and their dtypes."""
    tester, backend, device = case
    tester.check(tester.make(device=device), backend)


@pytest.mark.parametrize('dtype', HALF, ids=str)
@cases(KERNELS)
def test_half_precision(case, dtype):
    """Inside, all is float32."""
    tester, backend, device = case
    tester.check(convert(tester.make(device=device), dtype), backend)


@pytest.mark.parametrize('axes', [(0,), (1, 2), (-1,)], ids=str)
@cases(KERNELS)
def test_non_contiguous(case, axes):
    """Strides of inputs and of the outputs' gradients change no bit."""
    tester, backend, device = case
    inputs = tester.make(device=device)
    outputs = tester.function(**inputs, backend=backend)
    seeds = {k: make_seed(y) for k, y in outputs.items()}
    views, gradients = (
        {k: strided(x, axes) for k, x in arrays.items()}
        for arrays in (inputs, seeds)
    )
    copies = {k: copied(x) for k, x in inputs.items()}
    assert_equal(
        tester.run(views, backend, seeds=gradients),
        tester.run(copies, backend, seeds=seeds),
    )


@cases(KERNELS)
def test_expanded_gradient(case):
    """What ``sum`` hands back has no strides."""
    tester, backend, device = case
    inputs = tester.make(device=device)
    outputs = tester.function(**inputs, backend=backend)
    once = {k: y.new_full((), 0.5) for k, y in outputs.items()}
    expanded = {k: x.expand(outputs[k].shape) for k, x in once.items()}
    dense = {k: copied(x) for k, x in expanded.items()}
    assert_equal(
        tester.run(inputs, backend, seeds=expanded),
        tester.run(inputs, backend, seeds=dense),
    )


@cases(ALL)
def test_same_bits(case):
    """From run to run."""
    tester, backend, device = case
    inputs = tester.make(device=device)
    assert_equal(tester.run(inputs, backend), tester.run(inputs, backend))


@pytest.mark.parametrize('dtype', HALF, ids=str)
@cases(ALL)
def test_autocast(case, dtype):
    """Of no consequence, or as if the inputs had been rounded before."""
    tester, backend, device = case
    inputs = tester.make(device=device)
    with torch.autocast(device, dtype):
        actual = tester.function(**inputs, backend=backend)
    given = convert(inputs, dtype) if tester.autocast else inputs
    assert_equal(actual, tester.function(**given, backend=backend))


@cases(ALL)
def test_autocast_keeps_the_parameters_gradients(case):
    tester, backend, device = case
    inputs = tester.make(device=device)
    with torch.autocast(device, torch.bfloat16):
        results = tester.run(inputs, backend)
    for name, x in inputs.items():
        assert results[f'd{name}'].dtype == x.dtype


@cases(ALL)
def test_tensors_without_data(case):
    """Shapes, dtypes and device; nothing runs."""
    tester, backend, device = case
    inputs = tester.make(device=device)
    wanted = tester.function(**inputs, backend=backend)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(x) for k, x in inputs.items()}
        found = tester.function(**fakes, backend=backend)
        for name, y in wanted.items():
            fake = found[name]
            assert (fake.shape, fake.dtype) == (y.shape, y.dtype)
            assert fake.device.type == device
    if backend == 'reference':
        metas = {k: x.to('meta') for k, x in inputs.items()}
        for name, y in tester.function(**metas, backend='auto').items():
            assert (y.shape, y.dtype) == (wanted[name].shape, y.dtype)


@cases(KERNELS)
def test_registered_with_pytorch(case):
    """One operator; schema, fake tensors and autograd are sound."""
    tester, backend, device = case
    inputs = tester.make(device=device)
    given = {k: x.requires_grad_() for k, x in inputs.items()}
    ((operator, args),) = tester.calls(given, backend)
    assert args[-1] == backend
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x
        for x in args
    ]
    torch.library.opcheck(operator, leaves)


@cases(ALL)
def test_compiles_in_one_graph(case):
    tester, backend, device = case
    inputs = tester.make(device=device)
    options = dict(backend=backend)
    torch._dynamo.reset()
    function = functools.partial(tester.function, **options)
    compiled = torch.compile(function, backend='aot_eager', fullgraph=True)
    leaves = [
        {k: x.detach().requires_grad_() for k, x in inputs.items()}
        for _ in range(2)
    ]
    for call, given in zip((function, compiled), leaves, strict=True):
        outputs = call(**given)
        sum(y.abs().square().sum() for y in outputs.values()).backward()
    for name in inputs:
        grads = (given[name].grad for given in leaves)
        torch.testing.assert_close(*grads, msg=name)


class Program(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.tester, self.backend, _ = case
        self.names = list(self.tester.make())

    def forward(self, *given):
        inputs = dict(zip(self.names, given, strict=True))
        outputs = self.tester.function(**inputs, backend=self.backend)
        return next(iter(outputs.values()))


@cases(ALL)
def test_is_exported(case):
    """One operator in the graph, or with ``reference`` PyTorch's alone."""
    tester, backend, device = case
    given = tuple(tester.make(device=device).values())
    program = torch.export.export(Program(case), given, strict=False)
    own = [x for x in program.graph.nodes if 'mmstabvim' in str(x.target)]
    assert len(own) == (backend != 'reference')
    torch.testing.assert_close(program.module()(*given), Program(case)(*given))


# -------------------------------------------- derivatives beyond the first


def scalar(case, inputs):
    """A number from the first input, and that input."""
    tester, backend, _ = case
    name = next(iter(inputs))

    def loss(x):
        outputs = tester.function(**inputs | {name: x}, backend=backend)
        return sum(y.abs().sin().sum() for y in outputs.values())

    return loss, inputs[name]


def forward_mode(loss, x):
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(x, torch.ones_like(x)))


def double_backward(loss, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert not slope.isnan().any()  # the first derivative is there
    slope.square().sum().backward()


def compiled_jvp(loss, x):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: torch.func.jvp(loss, (x,), (x,))[1], backend='eager'
    )
    return compiled(x)


TRANSFORMS = {
    'grad': lambda loss, x: torch.func.grad(loss)(x),
    'jvp': lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    'jacfwd': lambda loss, x: torch.func.jacfwd(loss)(x),
    'jacrev': lambda loss, x: torch.func.jacrev(loss)(x),
    'hessian': lambda loss, x: torch.func.hessian(loss)(x),
    'vmap': lambda loss, x: torch.func.vmap(loss)(torch.stack([x, x])),
    'per-sample gradients': lambda loss, x: torch.func.vmap(
        torch.func.grad(loss)
    )(torch.stack([x, x])),
    'forward mode': forward_mode,
    'double backward': double_backward,
    'functional hessian': lambda loss, x: torch.autograd.functional.hvp(
        loss, x, torch.ones_like(x)
    ),
    'compiled jvp': compiled_jvp,
}


@pytest.mark.parametrize('transform', TRANSFORMS)
@cases(REGISTERED)
def test_other_derivatives_are_refused(case, transform):
    """By an error that says where they are, never a zero."""
    tester, _, device = case
    loss, x = scalar(case, tester.make(device=device))
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        TRANSFORMS[transform](loss, x)


@pytest.mark.parametrize('name', TESTERS)
def test_reference_has_every_derivative(name):
    """Of both orders and modes, in batches, by finite differences."""
    tester = TESTERS[name]
    sizes = dict(dim=2)
    if 'norm' in name:
        sizes['tokens'] = 2
    else:
        sizes |= dict(batch=1, length=3)
    inputs = convert(tester.make(**sizes), torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def function(*given):
        named = dict(zip(inputs, given, strict=True))
        outputs = tester.function(**named, backend='reference')
        return tuple(outputs.values())

    options = dict(check_batched_grad=True)
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, **options
    )
    assert torch.autograd.gradgradcheck(
        function, leaves, check_fwd_over_rev=True, **options
    )


@pytest.mark.parametrize('name', TESTERS)
def test_reference_takes_functional_transforms(name):
    """Per-sample gradients as one by one; Hessian products both ways."""
    case = (TESTERS[name], 'reference', 'cpu')
    loss, x = scalar(case, convert(case[0].make(), torch.float64))
    samples = torch.stack([x, 2 * x, -x])
    slope = torch.func.grad(loss)
    wanted = torch.stack([slope(sample) for sample in samples])
    torch.testing.assert_close(torch.func.vmap(slope)(samples), wanted)
    _, forward = torch.func.jvp(slope, (x,), (torch.ones_like(x),))
    _, reverse = torch.autograd.functional.hvp(loss, x, torch.ones_like(x))
    torch.testing.assert_close(forward, reverse)
    third = torch.func.grad(lambda x: slope(x).square().sum())
    assert torch.func.grad(lambda x: third(x).sum())(x).isfinite().all()

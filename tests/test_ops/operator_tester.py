"""One tester for all operators: a backend against the definition in float64.

The definition is the operator's own ``reference`` backend, which the tests of
each operator hold against its formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmstabvim.ops import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_directions,
    gated_merge,
    rms_norm,
    selective_scan,
)
from mmstabvim.ops.causal_conv1d import BACKENDS as CONV_BACKENDS
from mmstabvim.ops.gated_merge import BACKENDS as MERGE_BACKENDS
from mmstabvim.ops.rms_norm.function import ADD_BACKENDS
from mmstabvim.ops.rms_norm.function import BACKENDS as NORM_BACKENDS
from mmstabvim.ops.selective_scan import BACKENDS as SCAN_BACKENDS
from mmstabvim.ops.selective_scan import ScanInputs, _scan

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HALF = (torch.bfloat16, torch.float16)

Arrays = dict[str, Tensor | None]


@dataclass(frozen=True)
class OperatorTester:
    """Runs an operator by name of inputs and outputs, and compares.

    Args:
        function (Callable): From inputs and options by name, ``backend``
            among them, to outputs by name.
        make (Callable): Inputs by name, float32, reproducible, on a device.
        backends (tuple[str, ...]): Backends of the operator.
        sums (tuple[str, ...]): Inputs whose gradients are sums over tokens,
            which may cancel.
        tolerance (float): Error of a float32 kernel, relative to an array's
            largest magnitude, beyond that of plain PyTorch.
        autocast (bool): Whether the operator follows autocast.
    """

    function: Callable[..., dict[str, Tensor]]
    make: Callable[..., Arrays]
    backends: tuple[str, ...]
    sums: tuple[str, ...] = ()
    tolerance: float = 0.0
    autocast: bool = False

    def run(
        self,
        inputs: Arrays,
        backend: str = 'reference',
        dtype: torch.dtype | None = None,
        seeds: Arrays | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Outputs, and the gradient of every input, by name.

        Args:
            inputs (dict): Inputs by name.
            backend (str): Which to run. Defaults to ``'reference'``.
            dtype (torch.dtype, optional): Convert the inputs first.
            seeds (dict, optional): Gradients of the outputs.
            **options: Of the operator.
        """
        leaves = {
            name: x.detach().requires_grad_()
            for name, x in convert(inputs, dtype).items()
            if x is not None
        }
        given = inputs | leaves
        outputs = self.function(**given, backend=backend, **options)
        if seeds is None:
            seeds = {name: make_seed(y) for name, y in outputs.items()}
        grads = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.values()),
            [seeds[name].to(y.dtype) for name, y in outputs.items()],
        )
        named = zip(leaves, grads, strict=True)
        return {
            **{name: y.detach() for name, y in outputs.items()},
            **{f'd{name}': grad for name, grad in named},
        }

    def check(
        self,
        inputs: Arrays,
        backend: str,
        tolerance: float | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Compare with float64, by what plain PyTorch loses in the dtype."""
        exact = self.run(inputs, dtype=torch.float64, **options)
        plain = self.run(inputs, **options)
        actual = self.run(inputs, backend, **options)
        self.assert_close(actual, plain, exact, tolerance)
        return actual

    def assert_close(
        self,
        actual: dict[str, Tensor],
        plain: dict[str, Tensor],
        exact: dict[str, Tensor],
        tolerance: float | None = None,
    ) -> None:
        """At most twice the error of plain PyTorch, and a rounding."""
        assert actual.keys() == exact.keys()
        slack = self.tolerance if tolerance is None else tolerance
        first = next(iter(exact.values()))
        tokens = first.numel() / first.shape[-1]
        for name, wanted in exact.items():
            assert actual[name].dtype == plain[name].dtype, name
            assert actual[name].shape == wanted.shape, name
            scale = wanted.abs().max()
            if name[1:] in self.sums:
                scale = scale.clamp(min=tokens**0.5)
            eps = torch.finfo(plain[name].dtype).eps
            error = (actual[name] - wanted).abs().max()
            bound = 2 * (plain[name] - wanted).abs().max()
            bound = bound + (2 * eps + slack) * scale
            assert error <= bound, f'{name}: {error:.2e} > {bound:.2e}'

    def calls(
        self, inputs: Arrays, backend: str = 'auto', **options: Any
    ) -> list[tuple[Any, tuple[Any, ...]]]:
        """The project's operators that a call runs, with their arguments."""
        seen = []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace == 'mmstabvim':
                    seen.append((func, args))
                return func(*args, **(kwargs or {}))

        with Record():
            self.function(**inputs, backend=backend, **options)
        return seen


def assert_equal(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same bits, by name."""
    assert actual.keys() == wanted.keys()
    for name, x in wanted.items():
        assert actual[name].dtype == x.dtype, name
        assert torch.equal(actual[name], x), name


def convert(inputs: Arrays, dtype: torch.dtype | None) -> Arrays:
    """The inputs in a real dtype and its complex counterpart."""
    if dtype is None:
        return dict(inputs)
    wide = torch.promote_types(dtype, torch.float32).to_complex()
    return {
        name: x if x is None else x.to(wide if x.is_complex() else dtype)
        for name, x in inputs.items()
    }


def make_seed(y: Tensor) -> Tensor:
    """Gradient of an output; multiples of 1/8 are exact in every dtype."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.complex64 if y.is_complex() else torch.float32
    x = torch.randn(y.shape, dtype=drawn, generator=generator)
    parts = torch.view_as_real(x) if y.is_complex() else x
    parts.mul_(8).round_().div_(8)
    return x.to(y.device, y.dtype)


def copied(x: Tensor | None) -> Tensor | None:
    """The same numbers, without the strides."""
    if x is None:
        return None
    return x.clone(memory_format=torch.contiguous_format)


def strided(x: Tensor | None, axes: tuple[int, ...]) -> Tensor | None:
    """The same numbers, every second along some axes of a larger tensor."""
    if x is None:
        return None
    axes = tuple(axis % x.dim() for axis in axes if axis < x.dim())
    larger = x.new_full(
        [2 * n if i in axes else n for i, n in enumerate(x.shape)], 9
    )
    view = larger[
        tuple(slice(None, None, 2 if i in axes else 1) for i in range(x.dim()))
    ]
    return view.copy_(x)


def _normal(seed: int, device: str) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def make_conv(
    batch: int = 2,
    length: int = 13,
    dim: int = 17,
    width: int = 4,
    directions: int | None = None,
    bias: bool = True,
    shared: bool = True,
    device: str = 'cpu',
) -> Arrays:
    """Of a convolution; x is half of a wider tensor as in use."""
    normal = _normal(1000 * length + 10 * dim + width, device)
    axis = () if directions is None else (directions,)
    x = normal(*(() if shared else axis), batch, length, 2 * dim)[..., :dim]
    weight = normal(*axis, dim, width)
    return dict(x=x, weight=weight, bias=normal(*axis, dim) if bias else None)


def make_merge(
    directions: int = 2,
    batch: int = 2,
    length: int = 7,
    dim: int = 5,
    device: str = 'cpu',
) -> Arrays:
    """Of a merge; z is half of a wider tensor as in use."""
    normal = _normal(1000 * length + dim, device)
    y = normal(directions, batch, length, dim)
    return dict(y=y, z=3 * normal(batch, length, 2 * dim)[..., dim:])


def make_norm(
    tokens: int = 9,
    dim: int = 5,
    residual: bool | None = True,
    device: str = 'cpu',
) -> Arrays:
    """Of a norm; ``residual`` None is one that takes none."""
    normal = _normal(1000 * tokens + dim, device)
    x, stream = normal(tokens, dim), normal(tokens, dim)
    if residual is None:
        return dict(x=x, weight=normal(dim))
    return dict(
        hidden=x, residual=stream if residual else None, weight=normal(dim)
    )


def make_scan(
    batch: int = 1,
    length: int = 7,
    dim: int = 5,
    state: int = 3,
    groups: int | tuple[int, int] = 1,
    directions: int = 1,
    complex_a: bool = False,
    constant: str = '',
    absent: tuple[str, ...] = (),
    softplus: bool = True,
    device: str = 'cpu',
) -> Arrays:
    """Of a scan, float32 or complex64; ``groups`` of B and of C."""
    normal = _normal(1000 * length + dim + state, device)

    def wide(*shape: int) -> Tensor:
        x = normal(directions, *shape)
        return torch.complex(x, normal(*x.shape)) if complex_a else x

    def matrix(name: str, groups: int) -> Tensor:
        if name in constant:
            return wide(dim, state)
        return wide(batch, length, groups, state)

    pair = (groups, groups) if isinstance(groups, int) else groups
    A = -2 * torch.sigmoid(normal(directions, dim, state))
    delta = normal(directions, batch, length, dim) - 1
    inputs = dict(
        u=normal(directions, batch, length, dim),
        delta=delta if softplus else delta.abs(),
        A=torch.complex(A, 3 * normal(*A.shape)) if complex_a else A,
        B=matrix('B', pair[0]),
        C=matrix('C', pair[1]),
        D=normal(directions, dim),
        delta_bias=normal(directions, dim),
    )
    return {k: None if k in absent else x for k, x in inputs.items()}


def _run_scan(
    backend: str,
    reverse: tuple[bool, ...] | None = None,
    b_disc: str = 'euler',
    delta_softplus: bool = True,
    **tensors: Any,
) -> dict[str, Tensor]:
    """All directions with their last states; backwards unless told."""
    u = tensors['u']
    reverse = (True,) * len(u) if reverse is None else reverse
    y, last = _scan(
        ScanInputs(
            **tensors,
            delta_softplus=delta_softplus,
            reverse=reverse,
            b_disc=b_disc,
        ),
        backend,
    )
    return dict(y=y.to(u.dtype), last=last)


def _run_norm(**given: Any) -> dict[str, Tensor]:
    return dict(normed=rms_norm(**given))


def _run_add_norm(**given: Any) -> dict[str, Tensor]:
    if given['hidden'].dtype == torch.float64:
        given.pop('out_dtype', None)  # exact results are not rounded
    normed, stream = add_rms_norm(**given)
    return dict(normed=normed, stream=stream)


CONV = OperatorTester(
    lambda **given: dict(y=causal_conv1d(**given)),
    make_conv,
    CONV_BACKENDS.names,
    sums=('weight', 'bias'),
    autocast=True,
)
CONV_DIRECTIONS = OperatorTester(
    lambda **given: dict(y=causal_conv1d_directions(**given)),
    lambda directions=2, **sizes: make_conv(directions=directions, **sizes),
    CONV_BACKENDS.names,
    sums=('weight', 'bias'),
    autocast=True,
)
MERGE = OperatorTester(
    lambda **given: dict(out=gated_merge(**given)),
    make_merge,
    MERGE_BACKENDS.names,
)
NORM = OperatorTester(
    _run_norm,
    lambda **sizes: make_norm(residual=None, **sizes),
    NORM_BACKENDS.names,
    sums=('x', 'weight'),
)
ADD_NORM = OperatorTester(
    _run_add_norm,
    make_norm,
    ADD_BACKENDS.names,
    sums=('hidden', 'residual', 'weight'),
)
SCAN = OperatorTester(
    lambda **given: dict(
        y=selective_scan(**given, channels_last=True, delta_softplus=True)
    ),
    lambda **sizes: {
        k: None if x is None else x[0] for k, x in make_scan(**sizes).items()
    },
    SCAN_BACKENDS.names,
    tolerance=3e-6,
)
SCAN_DIRECTIONS = OperatorTester(
    _run_scan,
    lambda directions=2, **sizes: make_scan(directions=directions, **sizes),
    SCAN_BACKENDS.names,
    tolerance=3e-6,
)

TESTERS = dict(
    selective_scan=SCAN,
    selective_scan_directions=SCAN_DIRECTIONS,
    causal_conv1d=CONV,
    causal_conv1d_directions=CONV_DIRECTIONS,
    gated_merge=MERGE,
    rms_norm=NORM,
    add_rms_norm=ADD_NORM,
)
"""One of each public function."""

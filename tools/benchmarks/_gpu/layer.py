"""Stage ``layer``: the kernels around the scan, and the whole mixer."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from _gpu import timing
from _gpu.records import Table
from _gpu.stage import KERNELS, Failures, Stage
from _gpu.timing import Budget
from mmstabvim.layers import MambaMixer
from mmstabvim.ops import (
    add_rms_norm,
    causal_conv1d_directions,
    gated_merge,
)

SHAPES = [(128, 197, 384), (128, 197, 768), (8, 4096, 384)]
QUICK_SHAPES = [(1, 3, 4)]
"""(batch, length, d_inner)."""

MIXER_SHAPES = [(128, 197, 192), (8, 4096, 192)]
QUICK_MIXER_SHAPES = [(1, 3, 4)]
"""(batch, length, d_model)."""

DTYPES = (torch.bfloat16, torch.float32)
PASSES = ('forward', 'forward + backward')
TIMERS = (timing.measure, timing.measure, timing.measure_graph)
WIDTH = 4  # of the convolution
EPS = 1e-5

LONGEST_LOOP = 1000
"""Tokens up to which the definition is timed: a launch per operation."""

MIXER_TOLERANCE = 1e-4
"""Of an array's largest magnitude, float32, between the two backends."""


@dataclasses.dataclass
class Case:
    """A kernel and the PyTorch operations that do the same.

    Args:
        kernel (str): One of ``KERNELS``.
        title (str): As in the table.
        leaves (Callable): Inputs from shape, dtype and device.
        ours (Callable): Outputs, a tuple, from the leaves.
        plain (Callable): The same; in float64 it is the measure of both.
    """

    kernel: str
    title: str
    leaves: Callable[..., list[Tensor]]
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]


def run(stage: Stage) -> None:
    """Check, then time, what has no failed tests."""
    torch.manual_seed(0)
    with Failures() as failures:
        Comparison(stage, failures).run()


class Comparison:
    """Kernels against PyTorch's operations, and the mixer's backends.

    Args:
        stage (Stage): Where to run and to report.
        failures (Failures): What must not stop the other kernels.
    """

    def __init__(self, stage: Stage, failures: Failures) -> None:
        self.stage, self.failures = stage, failures
        quick = stage.quick
        self.shapes = QUICK_SHAPES if quick else SHAPES
        self.mixer_shapes = QUICK_MIXER_SHAPES if quick else MIXER_SHAPES
        self.dtypes = DTYPES[:1] if quick else DTYPES
        self.checks, self.times = _tables(stage)
        # two versions of a kernel, three of the mixer
        rows = 2 * len(CASES) * len(self.shapes) + 3 * len(self.mixer_shapes)
        self.budget = Budget(
            stage.deadline, len(TIMERS) * len(PASSES) * len(self.dtypes) * rows
        )

    def run(self) -> None:
        """Kernels one by one, then all together."""
        for case in CASES:
            refused = self.stage.refuses(case.kernel)
            for shape in self.shapes:
                for dtype in self.dtypes:
                    planned = self.budget.count - 2 * len(TIMERS) * len(PASSES)
                    what = f'{case.title} at {shape}, {dtype}'
                    with self.failures.kept(what):
                        if not refused:
                            self.run_case(case, shape, dtype, what)
                    self.budget.drop(self.budget.count - planned)
        if self.stage.refuses(*KERNELS):
            return
        for shape in self.mixer_shapes:
            with self.failures.kept(f'mixer at {shape}'):
                self.run_mixer(shape)

    def run_case(
        self, case: Case, shape: Sequence[int], dtype: torch.dtype, what: str
    ) -> None:
        """A kernel at a shape: four rows."""
        leaves = case.leaves(shape, dtype, self.stage.device)
        leaves = [x.detach().requires_grad_() for x in leaves]
        title = dict(what=case.title, shape=list(shape), dtype=str(dtype)[6:])
        if not self.may_time(check(case, leaves), title, what):
            return
        with torch.no_grad():
            outputs = case.plain(*leaves)
        for name in PASSES:
            backward = name != PASSES[0]
            timing.free_memory()
            calls = {
                'mmstabvim': make_call(case.ours, leaves, backward),
                'PyTorch': make_call(case.plain, leaves, backward),
            }
            moved = _bytes_moved(leaves, outputs, backward)
            self.time(calls, moved, dict(**title, stage=name))

    def run_mixer(self, shape: Sequence[int]) -> None:
        """The mixer at a shape, with each backend."""
        mixer = MambaMixer(shape[-1]).to(self.stage.device)
        x = torch.randn(*shape, device=self.stage.device)
        leaves = [x.requires_grad_(), *mixer.parameters()]
        names = ['triton', 'reference', 'cpu']
        title = dict(what='mixer', shape=list(shape))
        if shape[1] > LONGEST_LOOP:
            self.budget.drop(2 * len(TIMERS) * len(PASSES) * len(self.dtypes))
            names = names[:1]
        else:
            error = _mixer_error(mixer, leaves)
            row = dict(**title, dtype='float32')
            if not self.may_time(error, row, f'mixer at {shape}'):
                return
        for dtype in self.dtypes:
            for what in PASSES:
                timing.free_memory()
                calls = {
                    f'backend {name}': make_call(
                        _mixer_function(mixer, name, dtype),
                        leaves,
                        what != PASSES[0],
                    )
                    for name in names
                }
                row = dict(**title, dtype=str(dtype)[6:], stage=what)
                self.time(calls, None, row)

    def may_time(self, error: float, row: dict[str, Any], what: str) -> bool:
        """Note a check's result; a wrong kernel is timed only by force."""
        right = error <= 1
        self.checks.add(**row, error=error, ok=right)
        if not right:
            self.failures.texts.append(f'{what} is wrong: error {error:.3g}')
        return right or self.stage.force

    def time(
        self,
        calls: dict[str, Callable[[], Any]],
        moved: int | None,
        row: dict[str, Any],
    ) -> None:
        """A row per call."""
        rounds = [
            {
                name: timer(call, self.budget.take(), self.stage.device)
                for name, call in calls.items()
            }
            for timer in TIMERS
        ]
        for name in calls:
            first, second, graph = (r[name].median for r in rounds)
            best = first if math.isnan(graph) else graph
            self.times.add(
                **row,
                version=name,
                first=first,
                second=second,
                graph=graph,
                bandwidth=moved and moved / best / 1e6,
            )


def _tables(stage: Stage) -> tuple[Table, Table]:
    stage.record.note(
        'GPU ms: of the recorded launches alone; GB/s: bytes of inputs, '
        'outputs and gradients, each once, per GPU ms.'
    )
    what = dict(what='kernel', shape='batch, length, dim', dtype='dtype')
    checks = stage.record.table(
        'Before anything is timed',
        **what,
        error='largest error / allowed',
        ok='right',
    )
    times = stage.record.table(
        'Times',
        **what,
        stage='pass',
        version='version',
        first='ms',
        second='ms, again',
        graph='GPU ms',
        bandwidth='GB/s',
    )
    return checks, times


def _conv_leaves(
    shape: Sequence[int], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """X as the mixer hands it over: half of a projection, not contiguous."""
    batch, length, dim = shape
    both = torch.randn(batch, length, 2 * dim, device=device, dtype=dtype)
    weight = torch.randn(2, dim, WIDTH, device=device, dtype=dtype) / 2
    bias = torch.randn(2, dim, device=device, dtype=dtype)
    return [both.chunk(2, dim=-1)[0], weight, bias]


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (
        causal_conv1d_directions(
            x, weight, bias, reverse=(False, True), activation='silu'
        ),
    )


def _plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """A convolution for each direction, the second with its kernel flipped."""
    x = x.transpose(1, 2)
    width, dim = weight.shape[-1], x.shape[1]
    outputs = []
    for k, padding in enumerate(((width - 1, 0), (0, width - 1))):
        kernel = weight[k].flip(1) if k else weight[k]
        y = F.conv1d(F.pad(x, padding), kernel[:, None], bias[k], groups=dim)
        outputs.append(F.silu(y).transpose(1, 2))
    return (torch.stack(outputs),)


def _merge_leaves(
    shape: Sequence[int], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """The gate is half of a projection, too."""
    batch, length, dim = shape
    y = torch.randn(2, batch, length, dim, device=device, dtype=dtype)
    both = torch.randn(batch, length, 2 * dim, device=device, dtype=dtype)
    return [y, both.chunk(2, dim=-1)[1]]


def _merge(y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return (gated_merge(y, z),)


def _plain_merge(y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return ((y[0] + y[1]) * F.silu(z) / 2,)


def _norm_leaves(
    shape: Sequence[int], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """The residual stream and the weight stay in float32."""
    hidden = torch.randn(*shape, device=device, dtype=dtype)
    residual = torch.randn(*shape, device=device)
    return [hidden, residual, torch.rand(shape[-1], device=device) + 0.5]


def _norm(
    hidden: Tensor, residual: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """Normalized to the precision of the next projection."""
    return add_rms_norm(hidden, residual, weight, EPS, hidden.dtype)


def _plain_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    residual = residual + hidden.to(residual.dtype)
    normed = F.rms_norm(residual, weight.shape, weight, EPS)
    return normed.to(hidden.dtype), residual


CASES = [
    Case(
        'conv1d', 'conv1d + SiLU, both directions', _conv_leaves, _conv,
        _plain_conv,
    ),
    Case('gated_merge', 'gated merge', _merge_leaves, _merge, _plain_merge),
    Case('rms_norm', 'add + RMSNorm', _norm_leaves, _norm, _plain_norm),
]  # fmt: skip


def check(case: Case, leaves: Sequence[Tensor]) -> float:
    """Error of all outputs and gradients, as a multiple of what is allowed.

    Allowed is twice what plain PyTorch loses in the same precision, and two
    roundings.
    """
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = _results(case.plain, wide)
    plain = _results(case.plain, leaves)
    with timing.poisoned():
        ours = _results(case.ours, leaves)
    worst = 0.0
    for a, b, c in zip(ours, plain, exact, strict=True):
        eps = torch.finfo(a.dtype).eps
        allowed = 2 * (b - c).abs().max() + 2 * eps * c.abs().max()
        error = ((a - c).abs().max() / allowed).item()
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def _results(
    function: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then gradients of all leaves."""
    outputs = function(*leaves)
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    # numbers that every precision holds, so that all multiply with the same
    weights = [
        torch.randn(y.shape, generator=generator, device=device)
        .bfloat16()
        .to(y.dtype)
        for y in outputs
    ]
    grads = torch.autograd.grad(outputs, list(leaves), weights)
    return [x.detach() for x in (*outputs, *grads)]


def make_call(
    function: Callable[..., tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    backward: bool,
) -> Callable[[], Any]:
    """A forward pass, or a forward and a backward pass."""
    if not backward:

        @torch.no_grad()
        def forward() -> None:
            function(*leaves)

        return forward
    with torch.no_grad():
        weights = [torch.randn_like(y) for y in function(*leaves)]

    def both() -> None:
        torch.autograd.grad(function(*leaves), list(leaves), weights)

    return both


def _bytes_moved(
    leaves: Sequence[Tensor], outputs: Sequence[Tensor], backward: bool
) -> int:
    inputs, results = (sum(x.nbytes for x in xs) for xs in (leaves, outputs))
    # backward: inputs again, the outputs' gradients, the inputs' gradients
    return inputs + results + backward * (2 * inputs + results)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend of everything inside."""
    before = os.environ.get('MMSTABVIM_BACKEND')
    os.environ['MMSTABVIM_BACKEND'] = name
    try:
        yield
    finally:
        del os.environ['MMSTABVIM_BACKEND']
        if before is not None:
            os.environ['MMSTABVIM_BACKEND'] = before


def _mixer_function(
    mixer: MambaMixer, name: str, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        mixed = dtype != torch.float32
        with backend(name), torch.autocast(x.device.type, dtype, mixed):
            return (mixer(x),)

    return function


def _mixer_error(mixer: MambaMixer, leaves: Sequence[Tensor]) -> float:
    """Output and every gradient, in float32, against the definition."""
    calls = (
        _mixer_function(mixer, name, torch.float32)
        for name in ('triton', 'reference')
    )
    with timing.poisoned():
        ours, wanted = (_results(call, leaves) for call in calls)
    errors = [
        ((a - b).abs().max() / b.abs().max()).item() / MIXER_TOLERANCE
        for a, b in zip(ours, wanted, strict=True)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)

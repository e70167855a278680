"""Time the selective scan's variants against each other, in one run.

Every round times each variant once, in turn, so that a change of the
machine's speed meets all of them; the table holds medians, the spread, and
the ratio to the plain recurrence under autograd. Before anything is timed the
gradients of all variants are compared.
"""

import argparse
import datetime
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmstabvim import __version__
from mmstabvim.ops import selective_scan

# name -> backend, value of MMSTABVIM_FUSED
VARIANTS = {
    'plain loop, autograd': ('reference', '0'),
    'cpu, PyTorch only': ('cpu', '0'),
    'cpu, fused C++': ('cpu', '1'),
}
SHAPES = ['32,197,384,16', '64,65,256,8']


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--shape',
        nargs='+',
        default=SHAPES,
        metavar='B,L,D,N',
        help='batch, length, channels, state size (default: %(default)s)',
    )
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument(
        '--forward', action='store_true', help='time the forward pass alone'
    )
    parser.add_argument('--json', type=Path, help='also write results here')
    return parser.parse_args()


def make_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Channels-last float32 inputs that require gradients."""
    batch, length, dim, state = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    modes = torch.arange(1.0, state + 1)
    inputs = dict(
        u=normal(batch, length, dim),
        delta=normal(batch, length, dim) - 4,
        A=-modes.repeat(dim, 1),
        B=normal(batch, length, 1, state),
        C=normal(batch, length, 1, state),
        D=normal(dim),
        delta_bias=normal(dim),
    )
    return {name: x.requires_grad_() for name, x in inputs.items()}


def make_step(
    inputs: dict[str, Tensor], variant: str, forward_only: bool
) -> Callable[[], list[Tensor]]:
    """One forward pass, or forward and backward, of a variant."""
    backend, fused = VARIANTS[variant]

    def step() -> list[Tensor]:
        os.environ['MMSTABVIM_FUSED'] = fused
        with torch.set_grad_enabled(not forward_only):
            y = selective_scan(
                **inputs,
                delta_softplus=True,
                channels_last=True,
                backend=backend,
            )
        if forward_only:
            return [y]
        return [y, *torch.autograd.grad(y.sum(), list(inputs.values()))]

    return step


def check(steps: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Refuse to time variants that disagree; also warms them up."""
    exact, *others = (step() for step in steps.values())
    for name, values in zip(list(steps)[1:], others, strict=True):
        for a, b in zip(values, exact, strict=True):
            error = (a - b).abs().max() / b.abs().max()
            if not error <= 1e-4:
                raise SystemExit(f'{name!r} is wrong: error {error:.1e}')


def time_variants(
    shape: tuple[int, ...], rounds: int, forward_only: bool
) -> dict[str, list[float]]:
    """Seconds of each round, by variant."""
    inputs = make_inputs(shape)
    steps = {name: make_step(inputs, name, forward_only) for name in VARIANTS}
    check(steps)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in track(range(rounds), description=f'{shape}', transient=True):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def peak_memory(
    shape: tuple[int, ...], variant: str, threads: int, forward_only: bool
) -> float:
    """MB that a step adds to a fresh process's peak, its results included."""
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        args = (shape, variant, threads, forward_only)
        return pool.apply(_measure_memory, args)


def _measure_memory(
    shape: tuple[int, ...], variant: str, threads: int, forward_only: bool
) -> float:
    logging.disable(logging.INFO)
    torch.set_num_threads(threads)
    small = make_inputs((1, 2, 16, shape[3]))
    make_step(small, variant, forward_only)()  # load and build everything
    step = make_step(make_inputs(shape), variant, forward_only)
    reset = Path('/proc/self/clear_refs')
    if not reset.exists():
        return math.nan
    reset.write_text('5')  # the peak starts again from what is in use
    before = _memory('VmRSS')
    step()
    return _memory('VmHWM') - before


def _memory(field: str) -> float:
    """MB of this process, from Linux's /proc."""
    status = Path('/proc/self/status').read_text()
    rows = dict(row.split(':', 1) for row in status.splitlines())
    return float(rows[field].split()[0]) / 1024


def describe_machine(threads: int) -> str:
    """Processor, threads and versions."""
    model = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        rows = (r.split(':', 1) for r in info.read_text().splitlines() if r)
        fields = {r[0].strip(): r[1].strip() for r in rows if len(r) == 2}
        model = fields.get('model name', model)
        wide = [f for f in ('avx2', 'avx512f') if f in fields['flags'].split()]
        model += f' ({", ".join(wide)})' if wide else ''
    return (
        f'{model}, {threads} threads, Python {platform.python_version()}, '
        f'torch {torch.__version__}, mmstabvim {__version__}, '
        f'{datetime.date.today()}'
    )


def summarize(
    name: str, times: dict[str, list[float]], memory: float
) -> dict[str, str | float]:
    """One row: median, spread and the ratio of rounds to the plain loop."""
    plain = times[next(iter(VARIANTS))]
    ratios = [a / b for a, b in zip(plain, times[name], strict=True)]
    return dict(
        variant=name,
        median_ms=1e3 * statistics.median(times[name]),
        min_ms=1e3 * min(times[name]),
        max_ms=1e3 * max(times[name]),
        speedup=statistics.median(ratios),
        memory_mb=memory,
    )


def main() -> None:
    """Check, time, print Markdown."""
    args = parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.threads)
    what = 'forward' if args.forward else 'forward + backward'
    console = Console(soft_wrap=True)
    console.print(f'{what}, float32, {machine}\n')
    console.print(
        '| batch, length, dim, state | variant | median ms (min to max) '
        '| times faster | extra memory MB |\n|---|---|---|---|---|'
    )
    results = []
    for text in args.shape:
        shape = tuple(int(size) for size in text.split(','))
        if len(shape) != 4 or min(shape) < 1:
            raise SystemExit(f'--shape wants B,L,D,N, got {text!r}')
        times = time_variants(shape, args.rounds, args.forward)
        for name in VARIANTS:
            memory = peak_memory(shape, name, args.threads, args.forward)
            row = summarize(name, times, memory)
            results.append(dict(shape=shape, **row))
            console.print(
                f'| {", ".join(map(str, shape))} | {name} '
                f'| {row["median_ms"]:.1f} ({row["min_ms"]:.1f} to '
                f'{row["max_ms"]:.1f}) | {row["speedup"]:.1f} '
                f'| {memory:.0f} |'
            )
    if args.json:
        report = dict(machine=machine, what=what, results=results)
        args.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()

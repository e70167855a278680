"""Time the selective scan's variants against each other, in one run.

Every round times each variant once, in turn, so that a change of the
machine's speed meets all of them; the table holds medians, the spread, and
the ratio to the plain recurrence under autograd. A second table compares both
directions of a layer in one call with two calls. With ``--slope`` the time is
measured against the length instead, and the slope fitted on a log-log scale:
1 is linear. Before anything is timed the gradients of all variants are
compared.
"""

import argparse
import datetime
import json
import logging
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmstabvim import __version__
from mmstabvim.ops import selective_scan, selective_scan_directions

# name -> backend
VARIANTS = {
    'plain loop, autograd': 'reference',
    'cpu, PyTorch only': 'cpu',
    'cpu, fused C++': 'fused',
}
SHAPES = ['32,197,384,16', '64,65,256,8']
# kind -> complex A, b_disc
KINDS = {
    'real, euler': (False, 'euler'),
    'real, zoh': (False, 'zoh'),
    'complex, euler': (True, 'euler'),
    'complex, zoh': (True, 'zoh'),
}
LENGTHS = (65, 129, 257, 513, 1025, 2049, 4097, 6084)
SLOPE_SHAPE = '8,-,384,16'
PLAIN_LOOP_BYTES = 2 << 30
"""Memory to spend on the plain loop, which keeps every token's state."""

Step = Callable[[], list[Tensor]]


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
    parser.add_argument(
        '--kind',
        nargs='+',
        default=list(KINDS),
        choices=list(KINDS),
        metavar='KIND',
        help=f'of A and b_disc: {list(KINDS)} (default: all)',
    )
    parser.add_argument(
        '--slope',
        action='store_true',
        help=f'time the lengths {LENGTHS} at shape {SLOPE_SHAPE} instead, '
        'and fit the slope',
    )
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument(
        '--forward', action='store_true', help='time the forward pass alone'
    )
    parser.add_argument('--json', type=Path, help='also write results here')
    return parser.parse_args()


def make_inputs(
    shape: tuple[int, ...], kind: str, seed: int = 0
) -> dict[str, Tensor]:
    """Channels-last float32 inputs that require gradients."""
    batch, length, dim, state = shape
    complex_a, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def wide(*size: int) -> Tensor:
        real = normal(*size)
        return torch.complex(real, normal(*size)) if complex_a else real

    modes = torch.arange(1.0, state + 1).repeat(dim, 1)
    half = torch.full_like(modes, -0.5)
    inputs = dict(
        u=normal(batch, length, dim),
        delta=normal(batch, length, dim) - 4,
        A=torch.complex(half, math.pi * modes) if complex_a else -modes,
        B=wide(batch, length, 1, state),
        C=wide(batch, length, 1, state),
        D=normal(dim),
        delta_bias=normal(dim),
    )
    return {name: x.requires_grad_() for name, x in inputs.items()}


def make_step(
    inputs: dict[str, Tensor], variant: str, kind: str, forward_only: bool
) -> Step:
    """One forward pass, or forward and backward, of a variant."""

    def scan() -> Tensor:
        return selective_scan(
            **inputs,
            delta_softplus=True,
            b_disc=KINDS[kind][1],
            channels_last=True,
            backend=VARIANTS[variant],
        )

    return lambda: _run(scan, list(inputs.values()), forward_only)


def _run(
    scan: Callable[[], Tensor], leaves: list[Tensor], forward_only: bool
) -> list[Tensor]:
    """The output, and unless ``forward_only`` the gradients."""
    with torch.set_grad_enabled(not forward_only):
        y = scan()
    if forward_only:
        return [y]
    return [y, *torch.autograd.grad(y.sum(), leaves)]


def make_direction_steps(
    shape: tuple[int, ...], forward_only: bool
) -> dict[str, Step]:
    """Both directions of a layer: in two calls, and in one."""
    kind = 'real, euler'
    parts = [make_inputs(shape, kind, seed) for seed in range(2)]
    stacked = {
        name: torch.stack([part[name].detach() for part in parts])
        for name in parts[0]
    }
    for x in stacked.values():
        x.requires_grad_()

    def two_calls() -> Tensor:
        y = [
            selective_scan(
                **part,
                delta_softplus=True,
                reverse=reverse,
                channels_last=True,
                backend='fused',
            )
            for part, reverse in zip(parts, (False, True), strict=True)
        ]
        return y[0] + y[1]

    def one_call() -> Tensor:
        y = selective_scan_directions(
            **stacked, delta_softplus=True, backend='fused'
        )
        return y[0] + y[1]

    def run_two() -> list[Tensor]:
        leaves = [x for part in parts for x in part.values()]
        y, *grads = _run(two_calls, leaves, forward_only)
        pairs = zip(grads[: len(stacked)], grads[len(stacked) :], strict=True)
        return [y, *map(torch.stack, pairs)]

    def run_one() -> list[Tensor]:
        return _run(one_call, list(stacked.values()), forward_only)

    return {'two calls': run_two, 'one call': run_one}


def check(steps: dict[str, Step]) -> None:
    """Refuse to time variants that disagree; also warms them up."""
    exact, *others = (step() for step in steps.values())
    for name, values in zip(list(steps)[1:], others, strict=True):
        for a, b in zip(values, exact, strict=True):
            error = (a - b).abs().max() / b.abs().max()
            if not error <= 1e-4:
                raise SystemExit(f'{name!r} is wrong: error {error:.1e}')


def time_steps(
    steps: dict[str, Step], rounds: int, what: str
) -> dict[str, list[float]]:
    """Seconds of each round, by variant; all are checked first."""
    check(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(
        range(rounds),
        description=what,
        transient=True,
        disable=not sys.stdout.isatty(),
    ):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def slope_shape(length: int) -> tuple[int, ...]:
    """SLOPE_SHAPE with a length."""
    text = SLOPE_SHAPE.replace('-', str(length))
    return tuple(int(size) for size in text.split(','))


def time_lengths(
    kind: str, rounds: int, forward_only: bool
) -> dict[str, dict[int, list[float]]]:
    """Seconds of each round, by variant and length.

    The plain loop is timed as far as its memory allows.
    """
    times: dict[str, dict[int, list[float]]] = {name: {} for name in VARIANTS}
    plain = next(iter(VARIANTS))
    for length in LENGTHS:
        shape = slope_shape(length)
        inputs = make_inputs(shape, kind)
        state_bytes = 4 * math.prod(shape) * (1 + KINDS[kind][0])
        steps = {
            name: make_step(inputs, name, kind, forward_only)
            for name in VARIANTS
            # under autograd about ten tensors of this size stay
            if name != plain or 10 * state_bytes <= PLAIN_LOOP_BYTES
        }
        what = f'{kind}, length {length}'
        for name, seconds in time_steps(steps, rounds, what).items():
            times[name][length] = seconds
    return times


def fit_slope(times: dict[int, list[float]]) -> float:
    """Slope of log(median time) against log(length)."""
    medians = [statistics.median(seconds) for seconds in times.values()]
    slope, _ = np.polyfit(np.log(list(times)), np.log(medians), 1)
    return float(slope)


def peak_memory(
    shape: tuple[int, ...],
    variant: str,
    kind: str,
    threads: int,
    forward_only: bool,
) -> float:
    """MB that a step adds to a fresh process's peak, its results included."""
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        args = (shape, variant, kind, threads, forward_only)
        return pool.apply(_measure_memory, args)


def _measure_memory(
    shape: tuple[int, ...],
    variant: str,
    kind: str,
    threads: int,
    forward_only: bool,
) -> float:
    logging.disable(logging.INFO)
    torch.set_num_threads(threads)
    small = make_inputs((1, 2, 16, shape[3]), kind)
    # load and build everything
    make_step(small, variant, kind, forward_only)()
    step = make_step(make_inputs(shape, kind), variant, kind, forward_only)
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
    """One row: median, spread and the ratio of rounds to the first one."""
    plain = times[next(iter(times))]
    ratios = [a / b for a, b in zip(plain, times[name], strict=True)]
    return dict(
        variant=name,
        median_ms=1e3 * statistics.median(times[name]),
        min_ms=1e3 * min(times[name]),
        max_ms=1e3 * max(times[name]),
        speedup=statistics.median(ratios),
        memory_mb=memory,
    )


def parse_shape(text: str) -> tuple[int, ...]:
    """Four positive numbers."""
    sizes = tuple(int(size) for size in text.split(','))
    if len(sizes) != 4 or min(sizes) < 1:
        raise SystemExit(f'--shape wants B,L,D,N, got {text!r}')
    return sizes


def print_variants(
    console: Console, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The table of shapes, kinds and variants."""
    console.print(
        '| batch, length, dim, state | A, b_disc | variant '
        '| median ms (min to max) | times faster | extra memory MB |\n'
        '|---|---|---|---|---|---|'
    )
    results = []
    for shape in map(parse_shape, args.shape):
        sizes = ', '.join(map(str, shape))
        for kind in args.kind:
            inputs = make_inputs(shape, kind)
            steps = {
                name: make_step(inputs, name, kind, args.forward)
                for name in VARIANTS
            }
            times = time_steps(steps, args.rounds, f'{sizes}, {kind}')
            for name in VARIANTS:
                memory = peak_memory(
                    shape, name, kind, args.threads, args.forward
                )
                row = summarize(name, times, memory)
                results.append(dict(shape=shape, kind=kind, **row))
                console.print(
                    f'| {sizes} | {kind} | {name} | {_milliseconds(row)} '
                    f'| {row["speedup"]:.1f} | {memory:.0f} |'
                )
    return results


def print_directions(
    console: Console, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The table of two directions; also for a batch of one."""
    console.print(
        '\nTwo directions, real, euler, fused C++:\n\n'
        '| batch, length, dim, state | variant | median ms (min to max) '
        '| times faster |\n|---|---|---|---|'
    )
    given = [parse_shape(text) for text in args.shape]
    shapes = dict.fromkeys(x for s in given for x in (s, (1, *s[1:])))
    results = []
    for shape in shapes:
        sizes = ', '.join(map(str, shape))
        steps = make_direction_steps(shape, args.forward)
        times = time_steps(steps, 3 * args.rounds, f'{sizes}, directions')
        for name in steps:
            row = summarize(name, times, math.nan)
            del row['memory_mb']
            results.append(dict(shape=shape, directions=2, **row))
            console.print(
                f'| {sizes} | {name} | {_milliseconds(row)} '
                f'| {row["speedup"]:.2f} |'
            )
    return results


def print_slopes(
    console: Console, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Median time by length, and the fitted slope."""
    console.print(
        f'Median ms by length, shape {SLOPE_SHAPE}:\n\n'
        f'| A, b_disc | variant | {" | ".join(map(str, LENGTHS))} | slope |\n'
        f'|---|---|{"---|" * len(LENGTHS)}---|'
    )
    results = []
    for kind in args.kind:
        times = time_lengths(kind, args.rounds, args.forward)
        for name, by_length in times.items():
            medians = {
                length: 1e3 * statistics.median(seconds)
                for length, seconds in by_length.items()
            }
            slope = fit_slope(by_length)
            results.append(
                dict(kind=kind, variant=name, median_ms=medians, slope=slope)
            )
            cells = (
                f'{medians[x]:.1f}' if x in medians else '' for x in LENGTHS
            )
            console.print(
                f'| {kind} | {name} | {" | ".join(cells)} | {slope:.2f} |'
            )
    return results


def _milliseconds(row: dict[str, str | float]) -> str:
    return (
        f'{row["median_ms"]:.1f} ({row["min_ms"]:.1f} to {row["max_ms"]:.1f})'
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
    if args.slope:
        results = print_slopes(console, args)
    else:
        results = print_variants(console, args)
        results += print_directions(console, args)
    if args.json:
        report = dict(machine=machine, what=what, results=results)
        args.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()

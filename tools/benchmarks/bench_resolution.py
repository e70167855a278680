"""Time and memory by image size: Vision Mamba beside a transformer.

Every measurement has a process of its own. A round measures both models, one
after the other, so that a change of the machine's speed meets both; tables
hold medians over the rounds, and ratios are taken within a round.

Writes PATH.csv after each round, PATH.md, PATH.png and PATH.svg after each
size. The same command goes on where it was stopped. Where a step needs more
memory or time than allowed, larger sizes of that model are left out.
"""

import argparse
import csv
import datetime
import json
import logging
import multiprocessing
import os
import re
import resource
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _gpu.machine import describe
from _gpu.model import CLASSES, MODES, PATCH, SIZES, Classifier
from _gpu.records import show, write
from bench_selective_scan import fit_slope
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils import flop_counter as flops

from mmstabvim import VisionMamba
from mmstabvim.ablation.progress import duration
from mmstabvim.reporting import style
from mmstabvim.reporting.tables import Table, to_csv, to_markdown
from mmstabvim.visualization import curve_figure
from mmstabvim.visualization.curves import Quantity

Row = dict[str, Any]
Options = argparse.Namespace
Step = Callable[[Tensor], None]

FAMILIES = ('Vim', 'DeiT')
BUILT_FOR = 224  # pixels
FITTED_SIZES = 4
"""The largest ones, from which the growth with the tokens is fitted."""

QUANTITIES = {
    'ms': Quantity('time by pixels', 'ms per image'),
    'mb': Quantity('memory by pixels', 'MB'),
    'gflop': Quantity('operations by pixels', 'GFLOP per image'),
}
MEASURED = ('status', *QUANTITIES, 'attention')
NUMBERS = ('size', 'round', 'tokens', 'batch', 'timed_seconds', *QUANTITIES)
CLOCKS: dict[str, Callable[[], float]] = {
    'processor': time.process_time,
    'wall': time.perf_counter,
}
DIFFERING = ('date', 'commit')
"""What measurements in one file need not have in common."""

PRELOADED = ['mmpretrain.models', 'mmstabvim.visualization.curves']
"""Imported once, in the process that the measurements are forked from."""

NO_MEMORY = re.compile('memory|bad_alloc', re.IGNORECASE)

# PyTorch counts every fused attention but that of the CPU
_ATTENTION = '_scaled_dot_product_flash_attention_for_cpu'
for _ending, _formula in {
    '': flops.sdpa_flop,
    '_backward': flops.sdpa_backward_flop,
}.items():
    _operator = getattr(torch.ops.aten, _ATTENTION + _ending)
    flops.flop_registry.setdefault(_operator, _formula)

PAGE = f"""\
# Time and memory by image size

`VisionMamba` and MMPretrain's `VisionTransformer` as DeiT, both {{arch}},
patch {PATCH}, {CLASSES} classes, batch {{batch}}, {{dtype}}, built for
{BUILT_FOR} pixels: both interpolate the position embedding at other sizes.

```shell
python tools/benchmarks/bench_resolution.py {{command}}
```

{{device}}; {{versions}}; {{date}}; commit {{commit}}.
[Every measurement]({{csv}}).

- A measurement is a process of its own: a step to warm up, then the median
  step of {{timed_seconds:g}} seconds, one at least. The models take turns.
- Times are {{clock}} time: the processor's for one thread on a CPU, without
  what other programs take, else the wall clock's.
- Numbers are medians over the rounds, for times with the smallest and the
  largest; a ratio is Vim / DeiT within a round.
- Memory: the peak, less what the process held with the model, the optimizer's
  state and all code loaded.
- GFLOP: multiplications and additions that PyTorch counted in the step. Up to
  the head, Vision Mamba's are proportional to the number of tokens L; a layer
  of DeiT has attention's 4 L² D (D channels, forward) besides.
- Attention ran as `{{attention}}`.
- The last row holds p, where numbers grow like the p-th power of the tokens,
  fitted to the {FITTED_SIZES} largest sizes.
- Limits: {{limits}}. Beyond them a size is marked (in the figure, the last one
  within them by a cross), larger ones are left out. Bands hold all rounds.
"""


def parse_args(argv: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--arch', default='tiny', choices=('tiny', 'small', 'base'))
    add('--sizes', type=int, nargs='+', default=SIZES, help='pixels')
    add('--batch-size', type=int, default=1, help='the same at every size')
    add('--training', action='store_true', help='time training steps too')
    add('--rounds', type=int, default=5, help='measurements of each model')
    add('--device', default='cpu', choices=('cpu', 'cuda'))
    dtypes = ('float32', 'bfloat16')
    add('--dtype', default=dtypes[0], choices=dtypes, help='of autocast')
    add('--threads', type=int, default=os.cpu_count(), help='of a CPU')
    add('--timed-seconds', type=float, default=2.0, help='of steps')
    add('--max-memory-gb', type=float, default=8.0, help='process on a CPU')
    add('--max-seconds', type=float, default=300.0, help='a measurement')
    out = Path('work_dirs/resolution')
    add('--out', type=Path, default=out, metavar='PATH', help='of results')
    args = parser.parse_args(argv)
    args.command = shlex.join(argv)
    args.sizes = sorted(set(args.sizes))
    wrong = [size for size in args.sizes if size < PATCH or size % PATCH]
    if wrong:
        parser.error(f'--sizes must be multiples of {PATCH}, got {wrong}')
    if min(args.batch_size, args.rounds, args.threads) < 1:
        parser.error('--batch-size, --rounds and --threads must be positive')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: there is no GPU')
    return args


def build(family: str, arch: str) -> nn.Module:
    """A classifier of either family."""
    if family == 'Vim':
        return Classifier(VisionMamba(arch, BUILT_FOR, PATCH))
    from mmpretrain.models import VisionTransformer

    deit = VisionTransformer(f'deit-{arch}', BUILT_FOR, patch_size=PATCH)
    return Classifier(deit)


def make_step(args: Options, family: str, mode: str) -> Step:
    """A pass over a batch: forward, or forward, backward and AdamW."""
    training, device = mode == MODES[1], args.device
    model = build(family, args.arch).to(device).train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.arange(args.batch_size, device=device) % CLASSES
    half = torch.autocast(device, torch.bfloat16, args.dtype == 'bfloat16')

    def step(image: Tensor) -> None:
        with torch.set_grad_enabled(training), half:
            logits = model(image)
        if training:
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == 'cuda':
            torch.cuda.synchronize()

    return step


def measure(args: Options, family: str, mode: str, size: int) -> Row:
    """Time, memory and operations of a step, in a process of its own."""
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = make_step(args, family, mode)
    shape = (args.batch_size, 3, 2 * PATCH, 2 * PATCH)
    # loads and builds all code, makes the optimizer's state
    count_operations(step, torch.randn(shape).to(args.device))
    held, _ = memory_bytes(args.device)
    if args.device == 'cpu':
        limit_memory(1e9 * args.max_memory_gb)
    try:
        image = torch.randn(*shape[:2], size, size).to(args.device)
        counts = count_operations(step, image)
        clock = CLOCKS[clock_name(args)]
        seconds = time_steps(step, image, args.timed_seconds, clock)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            return dict(status='does not fit')
        raise
    attention = [name for name in counts if 'dot_product' in name]
    if family == 'DeiT' and not attention:
        raise RuntimeError(
            'DeiT must run a fused scaled_dot_product_attention, got only '
            f'{sorted(counts)}'
        )
    return dict(
        status='ok',
        ms=1e3 * seconds / args.batch_size,
        mb=(memory_bytes(args.device)[1] - held) / 1e6,
        gflop=sum(counts.values()) / args.batch_size / 1e9,
        attention=attention[0] if attention else '',
    )


def count_operations(step: Step, image: Tensor) -> dict[str, int]:
    """FLOPs of a step by operator; also warms up."""
    with flops.FlopCounterMode(display=False) as counter:
        step(image)
    counts = counter.get_flop_counts()['Global']
    return {str(name).split('.')[-1]: n for name, n in counts.items()}


def clock_name(args: Options) -> str:
    """Whose time is measured; several threads work at the same time."""
    alone = args.device == 'cpu' and args.threads == 1
    return 'processor' if alone else 'wall'


def time_steps(
    step: Step, image: Tensor, total: float, clock: Callable[[], float]
) -> float:
    """Median seconds of a step."""
    times: list[float] = []
    while not times or sum(times) < total:
        start = clock()
        step(image)
        times.append(clock() - start)
    return statistics.median(times)


def memory_bytes(device: str) -> tuple[int, int]:
    """Held now, and at most so far; on a GPU by PyTorch's tensors."""
    if device == 'cuda':
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return _status('VmRSS'), _status('VmHWM')


def limit_memory(total: float) -> None:
    """Let allocations beyond it fail, as if the machine had no more."""
    limit = _status('VmData') + max(0, int(total) - _status('VmRSS'))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _status(field: str) -> int:
    """Bytes, from Linux's /proc."""
    text = Path('/proc/self/status').read_text()
    return 1024 * int(text.split(f'{field}:')[1].split()[0])


def run_alone(context: Any, args: Options, *what: Any) -> Row:
    """Call ``measure`` in a new process, which is stopped if it is slow.

    Raises:
        SystemExit: If it fails for another reason than memory or time.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, args, *what))
    process.start()
    sender.close()
    try:
        if not receiver.poll(args.max_seconds):
            return dict(status=f'longer than {args.max_seconds:g} s')
        return receiver.recv()
    except EOFError:
        process.join()
        # how Linux ends a process when memory is short
        if process.exitcode == -signal.SIGKILL:
            return dict(status='does not fit')
        raise SystemExit(
            f'{", ".join(map(str, what))}: failed with exit code '
            f'{process.exitcode}; what was measured before is kept'
        ) from None
    finally:
        process.kill()
        process.join()


def _answer(sender: Connection, *what: Any) -> None:
    sender.send(measure(*what))


def make_context(device: str) -> Any:
    """How processes start."""
    if device == 'cuda':  # its driver does not survive a fork
        return multiprocessing.get_context('spawn')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    return context


def describe_run(args: Options) -> Row:
    """What holds for every measurement."""
    found = describe()
    device = found['device']
    if args.device == 'cpu':
        device = f'{found.get("processor", device)}, threads: {args.threads}'
    packages = ('python', 'torch', 'mmpretrain', 'mmstabvim')
    return dict(
        arch=args.arch,
        batch=args.batch_size,
        dtype=args.dtype,
        timed_seconds=args.timed_seconds,
        clock=clock_name(args),
        device=device,
        versions=', '.join(f'{name} {found[name]}' for name in packages),
        limits=f'{args.max_memory_gb:g} GB, {args.max_seconds:g} s',
        date=str(datetime.date.today()),
        commit=found.get('commit', 'unknown'),
    )


def read_rows(path: Path, run: Row) -> list[Row]:
    """Earlier measurements.

    Raises:
        SystemExit: If they were made in another way.
    """
    if not path.exists():
        return []
    with path.open(newline='') as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: json.loads(row[name] or 'null') for name in NUMBERS}
        for name in run.keys() - set(DIFFERING):
            found = row.get(name)
            if found != run[name]:
                raise SystemExit(
                    f'{path} has measurements with {name} {found!r}, not '
                    f'{run[name]!r}: remove it or give another --out'
                )
    return rows


def plan(args: Options) -> list[tuple[int, str, int]]:
    """Size, mode and number of each round."""
    modes = MODES if args.training else MODES[:1]
    rounds = range(1, args.rounds + 1)
    return [(s, m, r) for s in args.sizes for m in modes for r in rounds]


def sweep(args: Options, run: Row, rows: list[Row]) -> Iterator[str]:
    """Measure what is not in ``rows`` yet, and put it there.

    Yields:
        str: A line on each round, once its numbers are saved.
    """
    context = make_context(args.device)
    for size, mode, number in plan(args):
        new = []
        # neither model is always the first
        for family in FAMILIES[:: 1 if number % 2 else -1]:
            key = dict(model=f'{family}-{args.arch}', mode=mode)
            earlier = pick(rows, **key)
            failed = [r['size'] for r in earlier if r['status'] != 'ok']
            if pick(earlier, size=size, round=number) or size in failed:
                continue
            if failed and min(failed) < size:
                found = dict(status='left out')
            else:
                found = run_alone(context, args, family, mode, size)
            key |= dict(size=size, round=number)
            key |= dict(tokens=(size // PATCH) ** 2 + 1)
            new.append(key | dict.fromkeys(MEASURED) | found | run)
        rows += new
        write(args.out.with_suffix('.csv'), to_csv(rows))
        if number == args.rounds:
            write_report(args, run, rows)
        found = (f'{r["model"]} {show(r["ms"] or r["status"])}' for r in new)
        results = ', '.join(found) or 'nothing left to measure'
        yield f'{size} pixels, {mode}, round {number}, ms: {results}'


def pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def write_report(args: Options, run: Row, rows: Sequence[Row]) -> None:
    """Replace the page and its figure."""
    models = [f'{family}-{args.arch}' for family in FAMILIES]
    said = {
        name: ', '.join(sorted({row[name] for row in rows if row[name]}))
        for name in ('attention', 'date', 'commit')
    }
    said |= dict(command=args.command, csv=args.out.with_suffix('.csv').name)
    text = PAGE.format(**run | said)
    for mode in MODES:
        if chosen := pick(rows, mode=mode):
            table = make_table(mode.capitalize(), chosen, models)
            text += f'\n## {table.title}\n\n{to_markdown(table)}\n'
    if pick(rows, status='ok'):
        draw(args.out, rows, models)
        picture = args.out.with_suffix('.svg').name
        text += f'\n![Time, memory and operations by pixels]({picture})\n'
    write(args.out.with_suffix('.md'), text)


def make_table(
    title: str, rows: Sequence[Row], models: Sequence[str]
) -> Table:
    """A row per size, the growth at the end."""
    columns, growth = ['pixels', 'tokens'], ['p', '']
    for key, quantity in QUANTITIES.items():
        columns += [f'{model}, {quantity.unit}' for model in models]
        growth += [exponent(pick(rows, model=model), key) for model in models]
        columns, growth = [*columns, 'ratio'], [*growth, '']
    lines = []
    for size, tokens in sorted({(row['size'], row['tokens']) for row in rows}):
        line = [str(size), str(tokens)]
        for key in QUANTITIES:
            pair = [pick(rows, size=size, model=model) for model in models]
            a, b = (values(chosen, key) for chosen in pair)
            for known, chosen in zip((a, b), pair, strict=True):
                failed = chosen[0]['status'] if chosen else '-'
                line.append(summary([*known.values()], key) or failed)
            quotients = [a[i] / b[i] for i in a if i in b]
            line.append(summary(quotients, key) or '-')
        lines.append(line)
    align = 'r' * len(columns)
    return Table('', title, '', columns, [*lines, growth], [], align)


def values(rows: Sequence[Row], key: str) -> dict[int, float]:
    """What was measured, by round."""
    return {row['round']: row[key] for row in rows if row[key] is not None}


def summary(numbers: Sequence[float], key: str) -> str:
    """Median, for times with the range; empty if there is nothing."""
    text = show(statistics.median(numbers)) if numbers else ''
    if key == 'ms' and len(numbers) > 1:
        text += f' ({show(min(numbers))} to {show(max(numbers))})'
    return text


def exponent(rows: Sequence[Row], key: str) -> str:
    """Power of the number of tokens that the quantity grows with."""
    points = [*grouped(rows, key, 'tokens').items()][-FITTED_SIZES:]
    return f'{fit_slope(dict(points)):.2f}' if len(points) > 1 else '-'


def grouped(rows: Sequence[Row], key: str, by: str) -> dict[int, list[float]]:
    """What was measured at each size, in increasing order."""
    groups = {n: pick(rows, **{by: n}) for n in sorted({r[by] for r in rows})}
    known = {n: [*values(some, key).values()] for n, some in groups.items()}
    return {n: numbers for n, numbers in known.items() if numbers}


def draw(out: Path, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Write the figure."""
    marks = [
        mark
        for key in QUANTITIES
        for mode in MODES
        for model in models
        for mark in curve(pick(rows, mode=mode, model=model), key)
    ]
    series = models[::-1]  # the baseline comes first
    figure = curve_figure(marks, series, 'model', [*QUANTITIES.values()])
    style.save(figure, out, ('png', 'svg'))


def curve(rows: Sequence[Row], key: str) -> Iterator[Row]:
    """Marks of one line; a cross at its end if larger sizes are missing."""
    points = grouped(rows, key, 'size')
    for size, known in points.items():
        yield dict(
            quantity=QUANTITIES[key].name,
            facet=rows[0]['mode'],
            series=rows[0]['model'],
            step=size,
            n=len(known),
            mean=statistics.median(known),
            low=min(known),
            high=max(known),
            ended=size == max(points) < max(row['size'] for row in rows),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, tell how far it is, write the report."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    run = describe_run(args)
    rows = read_rows(args.out.with_suffix('.csv'), run)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(console=console, speed_estimate_period=3600) as progress:
        work = [size**2 for size, *_ in plan(args)]
        bar = progress.add_task('sweep', total=sum(work))
        for amount, text in zip(work, sweep(args, run, rows), strict=True):
            progress.advance(bar, amount)
            left = progress.tasks[0].time_remaining
            note = '' if left is None else f'; {duration(left)} to go'
            progress.console.print(text + note, markup=False)
    console.print(f'Written: {args.out.with_suffix(".md")}')


if __name__ == '__main__':
    main()

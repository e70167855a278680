"""What the stabilizers add to a training step, in one run.

Every round measures a whole step (forward, backward, AdamW), the projections
that spectral normalization and eigenvalue clamping do after it, and the
stability loss with its backward pass; the table holds medians and the share
of the step. The parts are timed by themselves: one step varies from the next
by more than they take.
"""

import argparse
import datetime
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from mmstabvim import (
    EigenvalueClampingHook,
    SpectralNormalizationHook,
    StabilityLoss,
    VisionMamba,
    __version__,
)
from mmstabvim.engine.hooks.stabilizer_hook import project
from mmstabvim.layers.state_matrix import state_matrices

MATRICES = {
    'neg_exp': dict(type='neg_exp'),
    'signed': dict(type='signed'),
    'complex': dict(type='complex', real_part='free'),
    'full, groups=8': dict(type='full', groups=8),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--arch', default='tiny', help='default: %(default)s')
    parser.add_argument('--batch', type=int, default=64, help='images')
    parser.add_argument('--size', type=int, default=224, help='pixels')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--matrix',
        nargs='+',
        default=list(MATRICES),
        choices=list(MATRICES),
        metavar='NAME',
        help=f'of {list(MATRICES)} (default: all)',
    )
    parser.add_argument('--json', type=Path, help='write the numbers here')
    return parser.parse_args()


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    if device != 'cpu':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, matrix: str) -> dict[str, list[float]]:
    """Seconds of each part in each round."""
    torch.manual_seed(0)
    model = VisionMamba(
        args.arch, img_size=args.size, state_matrix=MATRICES[matrix]
    ).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(args.batch, 3, args.size, args.size).to(args.device)
    # with a bound that acts on every matrix in every step
    hooks = [SpectralNormalizationHook(rho_max=4.0), EigenvalueClampingHook()]
    matrices, loss = state_matrices(model), StabilityLoss(eps=-2.0)

    def step() -> None:
        optimizer.zero_grad()
        model(images)[0].square().mean().backward()
        optimizer.step()

    def penalize() -> None:
        loss(model).backward()

    parts = {
        'step': step,
        'projection': lambda: project(hooks, matrices),
        'loss': penalize,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    progress = Console(stderr=True)  # the table may go into a file
    rounds = range(args.rounds + 1)
    for i in track(rounds, matrix, transient=True, console=progress):
        for name, part in parts.items():
            seconds = timed(part, args.device)
            if i:  # the first round warms up
                times[name].append(seconds)
    return times


def main() -> None:
    """Time each parametrization, print Markdown."""
    args = parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    console = Console(soft_wrap=True)
    machine = (
        f'{args.arch}, batch {args.batch}, {args.size} pixels, {args.device}, '
        f'{args.threads} threads, torch {torch.__version__}, mmstabvim '
        f'{__version__}, {datetime.date.today()}'
    )
    console.print(
        f'{machine}\n\n| state matrix | step s | projection ms | loss ms '
        '| all three, share of the step |\n|---|---|---|---|---|'
    )
    rows = {}
    for name in args.matrix:
        times = measure(args, name)
        median = {k: statistics.median(v) for k, v in times.items()}
        share = (median['projection'] + median['loss']) / median['step']
        rows[name] = dict(**times, share=share)
        console.print(
            f'| {name} | {median["step"]:.2f} '
            f'| {1e3 * median["projection"]:.1f} '
            f'| {1e3 * median["loss"]:.1f} | {share:.2%} |'
        )
    if args.json:
        report = dict(machine=machine, results=rows)
        args.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()

"""What stabilizers and rules on weights add to a training step, in one run.

Every round measures a whole step (forward, backward, AdamW) and after it, each
by itself, what a hook does then: the projections of spectral normalization
and eigenvalue clamping and the stability loss with its backward pass for each
state matrix; the projections of spectral norms and of stable ranks, and a
step with reparametrized weights, for the published one. The tables hold
medians and shares of the step. The parts are timed by themselves as one step
varies from the next by more than they take.
"""

import argparse
import datetime
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from rich.console import Console
from rich.progress import track
from torch import nn

from mmstabvim import (
    EigenvalueClampingHook,
    SpectralNormalizationHook,
    StabilityLoss,
    StableRankHook,
    VisionMamba,
    WeightSpectralNormHook,
    __version__,
)
from mmstabvim.engine.hooks.stabilizer_hook import project
from mmstabvim.layers.state_matrix import state_matrices
from mmstabvim.stability import find_layers, parametrize_norm

MATRICES = {
    'neg_exp': dict(type='neg_exp'),
    'signed': dict(type='signed'),
    'complex': dict(type='complex', real_part='free'),
    'full, groups=8': dict(type='full', groups=8),
}
# as in configs/_base_/stabilizers/weight_sn.py, without the head
LAYERS = ['patch_embed', 'in_proj', 'conv1d', 'x_proj', 'dt_proj', 'out_proj']
PROJECTING = {
    'spectral norm': lambda: WeightSpectralNormHook(LAYERS),
    'spectral norm, exact': lambda: WeightSpectralNormHook(LAYERS, exact=True),
    'stable rank': StableRankHook,
}
REPARAM = 'spectral norm, reparam'
RULES = [*PROJECTING, REPARAM]
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}

Parts = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]


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
        '--clock',
        default='wall',
        choices=CLOCKS,
        help='cpu counts the time of this process only, for a CPU that others '
        'use too (default: %(default)s)',
    )
    for name, known in (('--matrix', list(MATRICES)), ('--rule', RULES)):
        parser.add_argument(
            name,
            nargs='*',
            default=known,
            choices=known,
            metavar='NAME',
            help=f'of {known} (default: all)',
        )
    parser.add_argument('--json', type=Path, help='write the numbers here')
    return parser.parse_args()


def timed(step: Callable[[], object], args: argparse.Namespace) -> float:
    """Seconds of one call."""
    now = CLOCKS[args.clock]
    began = now()
    step()
    if args.device != 'cpu':
        torch.cuda.synchronize()
    return now() - began


def repeat(parts: Parts, args: argparse.Namespace, title: str) -> Times:
    """Seconds of each part in each round."""
    times: Times = {name: [] for name in parts}
    progress = Console(stderr=True)  # the tables may go into a file
    rounds = range(args.rounds + 1)
    for i in track(rounds, title, transient=True, console=progress):
        for name, part in parts.items():
            seconds = timed(part, args)
            if i:  # the first round warms up
                times[name].append(seconds)
    return times


def make_model(args: argparse.Namespace, matrix: str) -> VisionMamba:
    """The same weights each time."""
    torch.manual_seed(0)
    return VisionMamba(
        args.arch, img_size=args.size, state_matrix=MATRICES[matrix]
    ).to(args.device)


def make_step(
    model: nn.Module, args: argparse.Namespace
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A step of training on random images, and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(args.batch, 3, args.size, args.size).to(args.device)

    def step() -> None:
        optimizer.zero_grad()
        model(images)[0].square().mean().backward()
        optimizer.step()

    return step, optimizer


def measure_matrix(args: argparse.Namespace, matrix: str) -> Times:
    """The stabilizers of the state matrices."""
    model = make_model(args, matrix)
    step, _ = make_step(model, args)
    # with a bound that acts on every matrix in every step
    hooks = [SpectralNormalizationHook(rho_max=4.0), EigenvalueClampingHook()]
    matrices, loss = state_matrices(model), StabilityLoss(eps=-2.0)
    parts = {
        'step': step,
        'projection': lambda: project(hooks, matrices),
        'loss': lambda: loss(model).backward(),
    }
    return repeat(parts, args, matrix)


def measure_rules(args: argparse.Namespace) -> Times:
    """Rules on weights; each after the same steps, in turn."""
    model = make_model(args, 'neg_exp')
    step, optimizer = make_step(model, args)
    parts = {'step': step}
    for name, make_hook in PROJECTING.items():
        if name in args.rule:
            parts[name] = start(make_hook(), model, optimizer).project
    if REPARAM in args.rule:
        free = make_model(args, 'neg_exp')
        for layer in find_layers(free, LAYERS).values():
            parametrize_norm(layer)
        parts[REPARAM] = make_step(free, args)[0]
    return repeat(parts, args, 'rules on weights')


def start(
    hook: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Any:
    """Let a hook project for the first time, but not after each step."""
    runner = SimpleNamespace(
        model=model,
        hooks=[hook],
        optim_wrapper=OptimWrapper(optimizer),
        _resume=False,
    )
    hook.before_train(runner)
    hook.after_train(runner)
    return hook


def matrix_line(name: str, times: Times) -> tuple[float, str]:
    """Share of the step, and a line of the first table."""
    median = {k: statistics.median(v) for k, v in times.items()}
    share = (median['projection'] + median['loss']) / median['step']
    return share, (
        f'| {name} | {median["step"]:.2f} '
        f'| {1e3 * median["projection"]:.1f} '
        f'| {1e3 * median["loss"]:.1f} | {share:.2%} |'
    )


def rule_line(name: str, times: Times) -> tuple[float, str]:
    """Share of the step, and a line of the second table."""
    step, added = (statistics.median(times[k]) for k in ('step', name))
    if name == REPARAM:  # its part is a whole step
        added -= step
    share = added / step
    return share, f'| {name} | {step:.2f} | {1e3 * added:.1f} | {share:.2%} |'


def main() -> None:
    """Time everything, print Markdown."""
    args = parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    console = Console(soft_wrap=True)
    machine = (
        f'{args.arch}, batch {args.batch}, {args.size} pixels, {args.device}, '
        f'{args.threads} threads, {args.clock} time, torch '
        f'{torch.__version__}, mmstabvim {__version__}, '
        f'{datetime.date.today()}'
    )
    console.print(machine)
    rows = {}
    if args.matrix:
        console.print(
            '\n| state matrix | step s | projection ms | loss ms '
            '| all three, share of the step |\n|---|---|---|---|---|'
        )
    for name in args.matrix:
        times = measure_matrix(args, name)
        share, line = matrix_line(name, times)
        rows[name] = dict(**times, share=share)
        console.print(line)
    if args.rule:
        console.print(
            '\n| rule on weights | step s | adds ms | share of the step |'
            '\n|---|---|---|---|'
        )
        times = measure_rules(args)
    for name in args.rule:
        share, line = rule_line(name, times)
        rows[name] = dict(step=times['step'], rule=times[name], share=share)
        console.print(line)
    if args.json:
        report = dict(machine=machine, results=rows)
        args.json.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()

"""Disturb test images with Fourier modes and see what a model makes of it.

For CONFIG and CHECKPOINT of a classifier of MMPretrain or a segmentor of
MMSegmentation: score, flip rate against the clean images and shift of the
logits for each frequency, and beside them Gaussian noise, brightness and
JPEG of the same energy. For the folder of a study of tools/ablation.py: the
same for all its checkpoints, with mean and standard deviation over seeds.
Writes tables, their data as CSV, and a figure as PNG, PDF and SVG.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from _robustness.evaluate import Measured, Options, evaluate, evaluate_study
from _robustness.report import write_report
from rich.console import Console
from rich.progress import Progress

from mmstabvim.ablation import layout, results, statistics
from mmstabvim.engine import launch
from mmstabvim.evaluation.corruptions import CORRUPTIONS, LEVELS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'config', help='path of the config, or the folder of a study'
    )
    parser.add_argument(
        'checkpoint',
        nargs='?',
        metavar='CHECKPOINT|WORK_DIR',
        help='path or URL, or the work dir of a training; none for a study',
    )
    add_sweep(parser)
    add_run(parser)
    args = parser.parse_args(argv)
    if Path(args.config).is_dir() == (args.checkpoint is not None):
        parser.error(
            'wants CONFIG CHECKPOINT, or the folder of a study alone, got '
            f'{args.config!r} and checkpoint {args.checkpoint!r}'
        )
    return args


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Add what is done to the images."""
    parser.add_argument(
        '--frequencies',
        type=int,
        metavar='N',
        help='about so many, evenly spaced from 0 to 1/2 (default: all that '
        'the patches can tell apart)',
    )
    parser.add_argument(
        '--phases',
        type=float,
        nargs='+',
        default=[0.0, 0.5],
        help='in units of pi (default: 0 0.5, cosine and sine)',
    )
    parser.add_argument(
        '--random-phases',
        type=int,
        metavar='N',
        help='draw so many for each frequency instead',
    )
    parser.add_argument(
        '--level',
        choices=LEVELS,
        default='token',
        help='where modes act: constant on each patch, along the raster of '
        'pixels, on the embedded patches (default: %(default)s)',
    )
    parser.add_argument(
        '--amplitude',
        type=float,
        default=0.1,
        help='root mean square relative to the contrast of each image '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--absolute',
        action='store_true',
        help='the amplitude is a share of the range of pixel values',
    )
    parser.add_argument(
        '--value-range',
        type=float,
        default=255.0,
        help='largest value of a pixel (default: %(default)s)',
    )
    parser.add_argument(
        '--clip', action='store_true', help='keep pixels within the range'
    )
    parser.add_argument(
        '--patch-size', type=int, help='of a backbone that does not tell it'
    )
    parser.add_argument(
        '--corruptions',
        nargs='*',
        choices=CORRUPTIONS,
        default=list(CORRUPTIONS),
        help='to compare with (default: all)',
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add what to evaluate, where and how."""
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of the results (default: robustness/ beside the '
        'checkpoint, or in the folder of the study)',
    )
    parser.add_argument(
        '--samples', type=int, help='test images, drawn (default: all)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of all that is drawn'
    )
    parser.add_argument(
        '--device', help='default: the GPU if there is one, else the CPU'
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='automatic mixed precision, fp16 on a GPU and bf16 on a CPU',
    )
    parser.add_argument(
        '--only', metavar='GLOB', help='cells of a study whose name matches'
    )
    launch.add_cfg_options(parser)


def make_options(args: argparse.Namespace) -> Options:
    """The command line as arguments of the wrapper."""
    phases = [math.pi * phase for phase in args.phases]
    return Options(
        wrapper=dict(
            frequencies=args.frequencies,
            phases=args.random_phases or phases,
            level=args.level,
            amplitude=args.amplitude,
            relative=not args.absolute,
            clip=args.clip,
            value_range=args.value_range,
            corruptions=list(args.corruptions),
            patch_size=args.patch_size,
        ),
        samples=args.samples,
        seed=args.seed,
        device=args.device,
        amp=args.amp,
        cfg_options=args.cfg_options,
    )


def measure_study(
    args: argparse.Namespace, out: Path, progress: Progress
) -> tuple[list[Measured], str]:
    """All checkpoints of a study, in its order, and what its series are."""
    folder = Path(args.config)
    found = {
        cell.name: rows
        for cell, rows in evaluate_study(
            folder, make_options(args), progress, out / 'cells', args.only
        )
    }
    study = results.read_study(folder)
    combinations = statistics.combine(study)
    shape = layout.make_layout(study, combinations)
    measured = [
        Measured(shape.facet(c), shape.name(c), cell.seed, found[cell.name])
        for c in combinations
        for cell in c.cells
        if cell.name in found
    ]
    return measured, shape.series


def describe(args: argparse.Namespace, images: int) -> str:
    """What was done, in words."""
    unit = 'of the pixel range' if args.absolute else "of the image's contrast"
    phases = ', '.join(f'{phase:g} pi' for phase in args.phases)
    if args.random_phases:
        phases = f'{args.random_phases} drawn'
    return (
        f'{images} test images; root mean square of the disturbance '
        f'{args.amplitude:g} {unit}; level {args.level}; phases {phases}; '
        f'{"" if args.clip else "not "}clipped; seed {args.seed}.'
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, draw, write."""
    args = parse_args(argv)
    console = Console(stderr=True)
    study = args.checkpoint is None
    beside = Path(args.config if study else args.checkpoint)
    out = args.out or (beside if study else beside.parent) / 'robustness'
    with Progress(console=console) as progress:
        if study:
            measured, label = measure_study(args, out, progress)
        else:
            name, options = Path(args.config).stem, make_options(args)
            rows = evaluate(args.config, args.checkpoint, options, progress)
            measured, label = [Measured('', name, None, rows)], 'model'
    words = describe(args, measured[0].rows[0]['images'])
    write_report(measured, label, words, out, print)
    print(f'Tables, data and figure are in {out}')


if __name__ == '__main__':
    main()

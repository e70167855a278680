"""Run a matrix of trainings, or report what came out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# first, to say what is missing of OpenMMLab
import mmstabvim.engine  # noqa: F401

# isort: split
from mmengine.config import DictAction

from mmstabvim.ablation import report, results

TRAIN = Path(__file__).with_name('train.py')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    add_run(commands.add_parser('run', help='train what is not finished yet'))
    add_report(commands.add_parser('report', help='write tables and figures'))
    return parser.parse_args(argv)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run``."""
    parser.add_argument('matrix', help='path of the matrix file')
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='folder of the study (default: work_dirs/ablation/ and the '
        'name of the matrix); a second run there continues the first',
    )
    parser.add_argument(
        '--only', metavar='GLOB', help='only cells whose name matches'
    )
    parser.add_argument('--seeds', nargs='+', type=int)
    parser.add_argument(
        '--precisions', nargs='+', choices=list(results.PRECISIONS)
    )
    parser.add_argument('--lrs', nargs='+', type=float)
    parser.add_argument(
        '--jobs',
        type=int,
        help='trainings at once (default: one per GPU of --gpus, else 1)',
    )
    parser.add_argument(
        '--gpus',
        default='',
        metavar='0,1',
        help='GPUs that the trainings take in turn, one each',
    )
    parser.add_argument(
        '--threads',
        type=int,
        help='threads of each training (default: cores / jobs)',
    )
    parser.add_argument(
        '--timeout',
        type=float,
        default=0,
        metavar='MINUTES',
        help='count a training that takes longer as failed',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change settings of every config',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='list the cells and stop'
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``report``."""
    parser.add_argument('work_dir', type=Path, help='folder of the study')
    parser.add_argument(
        '--out', type=Path, help='where to write (default: WORK_DIR/report)'
    )


def run_command(args: argparse.Namespace) -> int:
    """Carry out ``run``; a report needs none of what it imports."""
    from mmstabvim.ablation import job, matrix, run

    names = ('seeds', 'precisions', 'lrs', 'cfg_options')
    overrides = {name: getattr(args, name) for name in names}
    study = matrix.load_matrix(args.matrix, overrides)
    folder = args.work_dir or Path('work_dirs/ablation', _stem(args.matrix))
    if args.dry_run:
        cells = run.select(study.cells, args.only)
        print(run.describe_plan(run.plan(cells, folder)))
        return 0
    settings = job.make_settings(
        TRAIN, folder, args.jobs, args.gpus, args.threads, args.timeout * 60
    )
    return run.run_matrix(study, settings, args.only)


def _stem(path: str) -> str:
    return Path(path).stem


def main(argv: Sequence[str] | None = None) -> int:
    """Run or report."""
    args = parse_args(argv)
    if args.command == 'run':
        return run_command(args)
    out = args.out or args.work_dir / 'report'
    page = report.write_report(args.work_dir, out)
    print(f'Report: {page}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

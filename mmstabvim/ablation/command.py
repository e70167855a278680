"""Command line of ``tools/ablation.py``: run a study, report it."""

import argparse
from pathlib import Path

from mmengine.config import DictAction

from mmstabvim.ablation import report, results


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of ``tools/ablation.py``.

    Args:
        description (str, optional): Of the tool. Defaults to None.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest='command', required=True)
    _add_run(commands.add_parser('run', help='train what is not finished yet'))
    add = commands.add_parser('report', help='write tables and figures')
    add.add_argument('work_dir', type=Path, help='folder of the study')
    text = 'where to write (default: WORK_DIR/report)'
    add.add_argument('--out', type=Path, help=text)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run``."""
    add = parser.add_argument
    add('matrix', help='path of the matrix file')
    add(
        '--work-dir',
        type=Path,
        help='folder of the study (default: work_dirs/ablation/ and the '
        'name of the matrix); a second run there continues the first',
    )
    add('--only', metavar='GLOB', help='only cells whose name matches')
    add('--seeds', nargs='+', type=int)
    add('--precisions', nargs='+', choices=list(results.PRECISIONS))
    add('--lrs', nargs='+', type=float)
    text = 'trainings at once (default: one per GPU of --gpus, else 1)'
    add('--jobs', type=int, help=text)
    text = 'GPUs that the trainings take in turn, one each'
    add('--gpus', default='', metavar='0,1', help=text)
    text = 'threads of each training (default: cores / jobs)'
    add('--threads', type=int, help=text)
    text = 'count a training that takes longer as failed'
    add('--timeout', type=float, default=0, metavar='MINUTES', help=text)
    add(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change settings of every config',
    )
    add('--dry-run', action='store_true', help='list the cells and stop')


def carry_out(args: argparse.Namespace, train: Path) -> int:
    """Run the trainings of a study, or write its report.

    Args:
        args (argparse.Namespace): From :func:`make_parser`.
        train (Path): ``tools/train.py``.

    Returns:
        int: Exit code.
    """
    if args.command == 'report':
        page = report.write_report(
            args.work_dir, args.out or args.work_dir / 'report'
        )
        print(f'Report: {page}')  # noqa: T201
        return 0
    # a report needs none of what these import
    from mmstabvim.ablation import job, matrix, run

    names = ('seeds', 'precisions', 'lrs', 'cfg_options')
    overrides = {name: getattr(args, name) for name in names}
    study = matrix.load_matrix(args.matrix, overrides)
    stem = Path(args.matrix).stem
    folder = args.work_dir or Path('work_dirs/ablation', stem)
    if args.dry_run:
        cells = run.select(study.cells, args.only)
        print(run.describe_plan(run.plan(cells, folder)))  # noqa: T201
        return 0
    settings = job.make_settings(
        train, folder, args.jobs, args.gpus, args.threads, args.timeout * 60
    )
    return run.run_matrix(study, settings, args.only)

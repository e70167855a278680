"""Test and time everything that runs on a GPU, in one command.

Stages, in this order: the tests that run kernels (correctness), the scan, the
layer around it, whole models, a short real training, compute-sanitizer. Each
runs in a process of its own with a time limit; what it has found is on disk
at every moment, and the next one runs whatever happened. A report gathers
all of it: report.md, and report.json with the same numbers.
"""

import argparse
import contextlib
import datetime
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _gpu import records
from _gpu.records import COMPLETE, Record
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]

STAGES = {
    'correctness': 130,
    'scan': 110,
    'layer': 35,
    'model': 90,
    'train': 75,
    'sanitize': 40,
}
"""Shares of the time; what a stage leaves over goes to the next ones."""

TIME_LIMIT = 480.0
GRACE = 3.0
"""Seconds that a stage gets to die, and to say where it was."""

LOG_CHARACTERS = 6000
"""Of a stage's output that go into its record if it fails."""

TRAIN_CONFIG = ROOT / 'configs' / 'vim' / 'vim-nano-p4_1xb64-20e_digits.py'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs', 'gpu_suite'),
        help='folder of the report (default: %(default)s)',
    )
    parser.add_argument(
        '--stages',
        nargs='+',
        choices=STAGES,
        default=list(STAGES),
        help='run these only, in this order (default: all)',
    )
    parser.add_argument(
        '--time-limit',
        type=float,
        default=TIME_LIMIT,
        metavar='SECONDS',
        help='for all stages together (default: %(default).0f)',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='dry run on a CPU: tiny shapes, interpreted kernels, numbers '
        'without meaning',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='time kernels even if their tests failed',
    )
    parser.add_argument(
        '--train-config',
        type=Path,
        default=TRAIN_CONFIG,
        help='of the short training (default: the digits)',
    )
    parser.add_argument(
        '--build-mamba',
        nargs='?',
        const='mamba_ssm',
        metavar='REQUIREMENT',
        help='first build mamba_ssm, or this requirement or folder, with '
        'pip; not counted in the time limit',
    )
    for name in ('--child', '--device', '--seconds'):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.time_limit <= 0:
        parser.error(f'--time-limit must be positive, got {args.time_limit}')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if all of them are complete."""
    args = parse_args(argv)
    if args.child:
        return run_child(args)
    console = Console()
    environment = make_environment(args.quick)
    if args.build_mamba:
        build_mamba(args.build_mamba, environment, console)
    start = time.monotonic()
    header, device = describe_machine(args, environment)
    console.print(f'{header["device"]}: {", ".join(args.stages)}')
    results = Suite(args, environment, header, device, console, start).run()
    show_results(results, args.out, console)
    complete = all(data['status'] in COMPLETE for data in results)
    return 0 if complete else 1


def make_environment(quick: bool) -> dict[str, str]:
    """For every process: this checkout, and nothing that changes a path."""
    environment = dict(os.environ, PYTHONUNBUFFERED='1')
    for name in ('TRITON_INTERPRET', 'MMSTABVIM_BACKEND'):
        environment.pop(name, None)
    if quick:
        environment['TRITON_INTERPRET'] = '1'
        environment['CUDA_VISIBLE_DEVICES'] = ''
    paths = [str(ROOT), str(Path(__file__).parent)]
    if environment.get('PYTHONPATH'):
        paths.append(environment['PYTHONPATH'])
    environment['PYTHONPATH'] = os.pathsep.join(paths)
    return environment


def build_mamba(
    requirement: str, environment: dict[str, str], console: Console
) -> None:
    """Build it from source; the scan stage says whether it can be used."""
    command = [sys.executable, '-m', 'pip', 'install', requirement]
    command += ['--no-build-isolation', '--no-deps']
    forced = dict(environment, MAMBA_FORCE_BUILD='TRUE')
    with console.status(f'building {requirement} …'):
        done = subprocess.run(command, env=forced, check=False)
    if done.returncode:
        console.print(f'{requirement} could not be built; going on without')


def describe_machine(
    args: argparse.Namespace, environment: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """Head of the report, and the device to run on.

    Raises:
        SystemExit: If there is no GPU, and no dry run was asked for.
    """
    done = subprocess.run(
        [sys.executable, '-m', '_gpu.machine'],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f'the environment is not complete:\n{done.stderr}')
    found = json.loads(done.stdout.splitlines()[-1])
    if not found['gpu'] and not args.quick:
        raise SystemExit(
            'PyTorch finds no CUDA device here; --quick is a dry run '
            'without one'
        )
    header = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec='seconds'
        ),
        **found['header'],
    )
    return header, 'cuda' if found['gpu'] else 'cpu'


class Suite:
    """Runs stages one after the other and keeps the report.

    Args:
        args (argparse.Namespace): The command line.
        environment (dict[str, str]): For the stages' processes.
        header (dict[str, Any]): Head of the report.
        device (str): ``'cuda'`` or ``'cpu'``.
        console (Console): Where progress is shown.
        start (float): ``time.monotonic()`` from which time counts.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        environment: dict[str, str],
        header: dict[str, Any],
        device: str,
        console: Console,
        start: float,
    ) -> None:
        self.args, self.environment, self.header = args, environment, header
        self.device, self.console = device, console
        # to stop the last stage, too
        self.deadline = start + args.time_limit - GRACE
        self.folder = args.out.resolve() / 'stages'
        self.results: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Every stage's record, in order."""
        for stage in self.args.stages:
            for suffix in ('.json', '.md', '.log'):
                (self.folder / f'{stage}{suffix}').unlink(missing_ok=True)
        for i, stage in enumerate(self.args.stages):
            left = sum(STAGES[name] for name in self.args.stages[i:])
            seconds = self.deadline - time.monotonic()
            self.run_stage(stage, seconds * STAGES[stage] / left)
            self.write_report()
        return self.results

    def run_stage(self, stage: str, limit: float) -> None:
        """Run a stage in a process of its own, and note how it ended."""
        path = self.folder / f'{stage}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.with_suffix('.log')
        start = time.monotonic()
        with log.open('w') as output:
            process = subprocess.Popen(
                self.command(stage, limit),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                in_time = self.wait(process, stage, limit)
            finally:
                stop(process)
        record = Record.load(path, stage)
        if record.data['status'] == 'running':
            seconds = time.monotonic() - start
            how = f'returned {process.returncode} without a result'
            if not in_time:
                how = f'did not end within {limit:.0f} s'
            tail = log.read_text(errors='replace')[-LOG_CHARACTERS:]
            status = 'failed' if in_time else 'timeout'
            record.finish(status, seconds, f'{stage} {how}:\n{tail}')
        data = record.data
        self.results.append(data)
        self.console.print(f'{stage}: {data["status"]}, {data["seconds"]} s')

    def command(self, stage: str, limit: float) -> list[str]:
        """This file again, as the process of one stage."""
        # it should end by itself, with all that it could do
        seconds = limit - max(GRACE, 0.05 * limit)
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ['--child', stage, '--device', self.device]
        command += ['--seconds', str(seconds), '--out', str(self.folder)]
        command += ['--train-config', str(self.args.train_config)]
        command += ['--quick'] * self.args.quick
        command += ['--force'] * self.args.force
        return command

    def wait(
        self, process: subprocess.Popen, stage: str, limit: float
    ) -> bool:
        """Show the time running; False if it ran out."""
        columns = (
            SpinnerColumn(),
            TextColumn('{task.description}'),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn(f'of {limit:.0f} s'),
        )
        start = time.monotonic()
        with Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as bar:
            task = bar.add_task(f'{stage:<12}', total=limit)
            while process.poll() is None:
                spent = time.monotonic() - start
                if spent > limit:
                    return False
                bar.update(task, completed=spent)
                time.sleep(0.1)
        return True

    def write_report(self) -> None:
        """Head and all stages so far, in both forms."""
        out = self.args.out
        report = dict(header=self.header, stages=self.results)
        records.write(
            out / 'report.json', json.dumps(records.plain(report)) + '\n'
        )
        lines = ['# GPU report', '']
        if self.device == 'cpu':
            lines += [
                '**A dry run without a GPU: its times mean nothing.**',
                '',
            ]
        lines += [f'- {name}: {text}' for name, text in self.header.items()]
        sections = map(records.to_markdown, self.results)
        records.write(out / 'report.md', '\n'.join([*lines, '', *sections]))


def stop(process: subprocess.Popen) -> None:
    """End a stage and whatever it has started.

    SIGTERM first: its handler prints where every thread is.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_child(args: argparse.Namespace) -> int:
    """Be the process of one stage."""
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    start = time.monotonic()
    record = Record(args.out / f'{args.child}.json', args.child)
    status, error = 'ok', None
    try:
        _run_stage(args, record, start + float(args.seconds))
    except Exception as exception:
        status, error = _judge(exception)
    record.finish(status, time.monotonic() - start, error)
    return 0 if status in COMPLETE else 1


def _run_stage(
    args: argparse.Namespace, record: Record, deadline: float
) -> None:
    """Import late: what is missing for one stage is no loss to the others."""
    from _gpu.stage import Stage

    stage = Stage(
        record=record,
        out=args.out,
        device=args.device,
        quick=args.quick,
        force=args.force,
        deadline=deadline,
        train_config=args.train_config.resolve(),
    )
    importlib.import_module(f'_gpu.{args.child}').run(stage)


def _judge(exception: Exception) -> tuple[str, str]:
    """Status of a stage that ended in an exception, and what to say."""
    from _gpu import stage

    ends = {
        stage.SkippedError: 'skipped',
        stage.OutOfTimeError: 'partial',
        stage.StageFailedError: 'failed',
    }
    if type(exception) in ends:
        return ends[type(exception)], str(exception)
    return 'failed', traceback.format_exc()


def show_results(
    results: Sequence[dict[str, Any]], out: Path, console: Console
) -> None:
    """How each stage ended, and where to read on."""
    table = Table('stage', 'end', 's', 'last line of the error')
    for data in results:
        last = (data['error'] or '').strip().splitlines()[-1:]
        table.add_row(
            data['stage'], data['status'], f'{data["seconds"]:.0f}', *last
        )
    console.print(table)
    console.print(f'Report: {out / "report.md"}', soft_wrap=True)


if __name__ == '__main__':
    raise SystemExit(main())

"""Run the cells of a matrix: several at once, to be continued at any time."""

import collections
import fnmatch
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmstabvim.ablation import results
from mmstabvim.ablation.job import Job, RunSettings, write_skipped
from mmstabvim.ablation.matrix import Cell, Matrix
from mmstabvim.ablation.progress import Progress

_POLL = 0.5
REPLACED = 'replaced'


def select(cells: Sequence[Cell], pattern: str | None) -> list[Cell]:
    """Cells whose name matches a pattern.

    Args:
        cells (Sequence[Cell]): The whole matrix.
        pattern (str | None): For instance ``full.*.seed0``; None for all.

    Returns:
        list[Cell]: In their order.

    Raises:
        ValueError: If none matches.
    """
    if pattern is None:
        return list(cells)
    chosen = [c for c in cells if fnmatch.fnmatchcase(c.name, pattern)]
    if not chosen:
        raise ValueError(
            f'--only {pattern!r} matches no cell; the first is called '
            f'{cells[0].name!r}'
        )
    return chosen


def plan(cells: Sequence[Cell], work_dir: Path) -> dict[str, list[Cell]]:
    """Sort cells by what a run will do with them.

    Args:
        cells (Sequence[Cell]): The chosen ones.
        work_dir (Path): Folder of the study.

    Returns:
        dict[str, list[Cell]]: ``'keep'`` what is finished, ``'skip'`` what
        this machine cannot run, ``'resume'`` what was begun, ``'replace'``
        what has results of another config, and ``'start'`` the rest.
    """
    plans: dict[str, list[Cell]] = {
        name: [] for name in ('keep', 'skip', 'resume', 'replace', 'start')
    }
    for cell in cells:
        plans[_plan(cell, work_dir / results.CELLS / cell.name)].append(cell)
    return plans


def _plan(cell: Cell, folder: Path) -> str:
    """Choose the action for one cell."""
    record = results.read_json(folder / results.RECORD)
    same = record.get('config_hash') == cell.config_hash
    if same and record.get('status') in results.FINISHED:
        return 'keep'
    if cannot_run(cell):
        return 'skip' if same or not record else 'replace'
    if record and not same:
        return 'replace'
    return 'resume' if record else 'start'


def cannot_run(cell: Cell) -> str:
    """Say why this machine cannot run a cell.

    Args:
        cell (Cell): The cell.

    Returns:
        str: Empty if it can.
    """
    import torch

    if cell.precision == 'fp16' and not torch.cuda.is_available():
        return 'needs a GPU'
    return ''


def describe_plan(plans: dict[str, list[Cell]]) -> str:
    """List what a run would do, for ``--dry-run``.

    Args:
        plans (dict[str, list[Cell]]): Result of :func:`plan`.

    Returns:
        str: A line per cell and one of counts.
    """
    lines = [
        f'{action:8} {cell.name}'
        for action, cells in plans.items()
        for cell in cells
    ]
    counts = ', '.join(f'{len(cells)} {name}' for name, cells in plans.items())
    return '\n'.join([*lines, counts])


def run_matrix(
    matrix: Matrix, settings: RunSettings, only: str | None = None
) -> int:
    """Run what is not finished yet.

    A cell that fails or diverges does not stop the others. Ctrl-C, SIGTERM
    and SIGHUP end the trainings and keep what they wrote; the same call goes
    on later.

    Args:
        matrix (Matrix): Written into the folder for the report.
        settings (RunSettings): Folder and resources of the trainings.
        only (str | None): Pattern of names. Defaults to None, for all.

    Returns:
        int: Exit code: 0 if every cell has a result or cannot run here, 1
        if one failed, 130 after Ctrl-C.
    """
    cells = select(matrix.cells, only)
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    plans = plan(cells, settings.work_dir)
    command = shlex.join(['python', *sys.argv])  # without Python's path
    described = {**matrix.describe(), 'command': command}
    results.write_json(settings.work_dir / results.MATRIX, described)
    for cell in plans['replace']:
        _move_away(cell, settings.work_dir)
    kept = {cell.name for cell in plans['keep']}
    waiting = [cell for cell in cells if cell.name not in kept]
    with Progress(len(cells), len(kept), settings.jobs) as progress:
        scheduler = Scheduler(settings, progress)
        with _interrupts():
            interrupted = scheduler.run(waiting)
    counts = collections.Counter(
        results.read_result(
            settings.work_dir / results.CELLS / cell.name, cell.describe()
        ).status
        for cell in cells
    )
    progress.say(', '.join(f'{n} {status}' for status, n in counts.items()))
    if interrupted:
        return 130
    return int(counts[results.FAILED] + counts[results.KILLED] > 0)


def _move_away(cell: Cell, work_dir: Path) -> None:
    """Keep results of another config where they are in nobody's way."""
    target = work_dir / REPLACED
    target.mkdir(exist_ok=True)
    for number in itertools.count(1):
        place = target / f'{cell.name}-{number}'
        if not place.exists():
            (work_dir / results.CELLS / cell.name).rename(place)
            return


@contextmanager
def _interrupts() -> Iterator[None]:
    """Treat the signals that end a process like Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
    ]
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Scheduler:
    """Keeps as many trainings running as there are jobs.

    Args:
        settings (RunSettings): Folder and resources of the trainings.
        progress (Progress): Told what happens.
    """

    def __init__(self, settings: RunSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.running: dict[int, Job] = {}  # by slot

    def run(self, cells: Sequence[Cell]) -> bool:
        """Run cells in their order.

        Args:
            cells (Sequence[Cell]): Unfinished ones.

        Returns:
            bool: True if it was interrupted.
        """
        waiting = collections.deque(cells)
        try:
            while waiting or self.running:
                self._fill(waiting)
                self._collect()
                self.progress.update(self.running.values(), waiting)
                if self.running:
                    time.sleep(_POLL)
        except KeyboardInterrupt:
            self._end_all()
            return True
        except BaseException:
            self._end_all()
            raise
        return False

    def _fill(self, waiting: collections.deque[Cell]) -> None:
        """Start cells on the free slots."""
        for slot in range(self.settings.jobs):
            while waiting and slot not in self.running:
                job = self._begin(waiting.popleft(), slot)
                if job is not None:
                    self.running[slot] = job

    def _begin(self, cell: Cell, slot: int) -> Job | None:
        """Start a cell unless it cannot run or is at work elsewhere."""
        folder = self.settings.work_dir / results.CELLS / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        reason = cannot_run(cell)
        if reason:
            write_skipped(cell, self.settings, reason)
            self.progress.passed(cell, f'skipped: {reason}')
            return None
        lock = results.try_lock(folder)
        if lock is None:
            self.progress.passed(cell, 'left to another process')
            return None
        try:
            job = Job(cell, self.settings, slot, lock)
        except BaseException:
            os.close(lock)
            raise
        self.progress.started(job)
        return job

    def _collect(self) -> None:
        """Record the trainings that ended."""
        for slot, job in list(self.running.items()):
            if not job.running():
                del self.running[slot]
                self.progress.finished(job, job.finish())

    def _end_all(self) -> None:
        """End every training, keeping what it wrote."""
        for job in self.running.values():
            job.end(results.KILLED, 'interrupted')
        for job in self.running.values():
            job.wait()
            self.progress.finished(job, job.finish())
        self.running.clear()

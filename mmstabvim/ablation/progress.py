"""Tell how far a run is: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Collection, Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from mmstabvim.ablation.job import Job
from mmstabvim.ablation.matrix import Cell


class Progress:
    """Progress and remaining time of the whole matrix.

    Args:
        total (int): Number of cells.
        done (int): Number of those that have a result already.
        jobs (int): Trainings at once.
        console (Console | None): Defaults to None, for standard output.
    """

    def __init__(
        self, total: int, done: int, jobs: int, console: Console | None = None
    ) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.total, self.done, self.jobs = total, done, jobs
        self._seconds: dict[str, list[float]] = {}  # by config
        self._shares: dict[str, float] = {}  # done before this attempt
        self._tasks: dict[str, Any] = {}
        self._eta: float | None = None
        self._bars = Bars(
            TextColumn('{task.description}', markup=False),
            BarColumn(bar_width=None),
            TextColumn('{task.percentage:3.0f} %'),
            TextColumn('{task.fields[note]}', markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._all = self._bars.add_task(
            'matrix', total=total, completed=done, note=''
        )

    def __enter__(self) -> 'Progress':
        """Show the bars."""
        self._bars.start()
        if self.done:
            self.say(f'{self.done} of {self.total} cells have a result')
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state of the bars on the screen."""
        self._bars.stop()

    def say(self, text: str) -> None:
        """Write a line, above the bars where there are some.

        Args:
            text (str): The line.
        """
        self.console.print(text, markup=False)

    def passed(self, cell: Cell, why: str) -> None:
        """Report a cell that was not started.

        Args:
            cell (Cell): The cell.
            why (str): The reason.
        """
        self.done += 1
        self.say(f'[{self.done}/{self.total}] {cell.name}: {why}')

    def started(self, job: Job) -> None:
        """Report a training that begins.

        Args:
            job (Job): The training.
        """
        name = job.cell.name
        self._tasks[name] = self._bars.add_task(name, total=1.0, note='')
        if not self.console.is_terminal:
            self.say(f'{name}: started')

    def finished(self, job: Job, record: dict[str, Any]) -> None:
        """Report a training that ended.

        Args:
            job (Job): The training.
            record (dict[str, Any]): Content of ``cell.json``.
        """
        name = job.cell.name
        self._bars.remove_task(self._tasks.pop(name))
        self._shares.pop(name, None)
        self._seconds.setdefault(job.cell.config, []).append(record['seconds'])
        if record['status'] != 'killed':
            self.done += 1
        self._bars.update(
            self._all, completed=self.done, note=f'{self.done}/{self.total}'
        )
        self.say(
            f'[{self.done}/{self.total}] {name}: {describe(record)}'
            f'{self._remaining()}'
        )

    def update(
        self, running: Collection[Job], waiting: Collection[Cell]
    ) -> None:
        """Move the bars and estimate the remaining time.

        Args:
            running (Collection[Job]): Trainings at work.
            waiting (Collection[Cell]): Cells to come.
        """
        shares = {job.cell.name: job.progress() for job in running}
        self._eta = self._estimate(running, waiting, shares)
        for job in running:
            share = shares[job.cell.name]
            self._bars.update(self._tasks[job.cell.name], completed=share)
        self._bars.update(
            self._all,
            completed=self.done + sum(shares.values()),
            note=f'{self.done}/{self.total}{self._remaining()}',
        )

    def _estimate(
        self,
        running: Collection[Job],
        waiting: Iterable[Cell],
        shares: dict[str, float],
    ) -> float | None:
        """Seconds to go, None before anything is known."""
        known = [s for times in self._seconds.values() for s in times]
        now, left = time.time(), 0.0
        lengths = {}
        for job in running:
            share, elapsed = shares[job.cell.name], now - job.started
            before = self._shares.setdefault(job.cell.name, share)
            if share - before > 0.02:
                lengths[job.cell.name] = elapsed / (share - before)
        typical = known or list(lengths.values())
        if not typical:
            return None
        mean = sum(typical) / len(typical)
        for job in running:
            length = lengths.get(job.cell.name, mean)
            left += (1 - shares[job.cell.name]) * length
        for cell in waiting:
            times = self._seconds.get(cell.config)
            left += sum(times) / len(times) if times else mean
        return left / self.jobs

    def _remaining(self) -> str:
        """The estimate in words."""
        if self._eta is None:
            return ''
        return f', {duration(self._eta)} to go'


def describe(record: dict[str, Any]) -> str:
    """One line on a training that ended.

    Args:
        record (dict[str, Any]): Content of ``cell.json``.

    Returns:
        str: Status, metrics or reason, time.
    """
    parts = [record['status']]
    if record['status'] == 'done':
        parts += [f'{n} {v:.4g}' for n, v in record['final'].items()]
    elif record['reason']:
        parts.append(record['reason'])
    parts.append(f'in {duration(record["seconds"])}')
    return ', '.join(parts)


def duration(seconds: float) -> str:
    """Write a time for people.

    Args:
        seconds (float): Not negative.

    Returns:
        str: For instance ``'45 s'``, ``'12 min'``, ``'3 h 05 min'``.
    """
    if seconds < 90:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    if minutes < 90:
        return f'{minutes} min'
    return f'{minutes // 60} h {minutes % 60:02d} min'

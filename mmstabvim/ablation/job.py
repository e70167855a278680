"""One training as a process: start, watch, end, record."""

import contextlib
import dataclasses
import functools
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmstabvim.ablation import results
from mmstabvim.ablation.matrix import Cell, option_text

PACKAGES = ('mmstabvim', 'torch', 'triton', 'mmengine', 'mmpretrain', 'numpy')
# what children get to end by themselves before they are killed
GRACE = 10.0

_PROGRESS = re.compile(
    r'(?:Epoch\(train\)\s*\[\s*(\d+)\]|Iter\(train\)\s*)\[\s*(\d+)/(\d+)\]'
)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Folder and resources of trainings.

    Attributes:
        train (Path): ``tools/train.py``.
        work_dir (Path): Folder of the study.
        jobs (int): Trainings at once.
        gpus (Sequence[str]): ``CUDA_VISIBLE_DEVICES`` of the jobs in turn;
            empty leaves the environment as it is.
        threads (int): ``OMP_NUM_THREADS`` of each job.
        timeout (float): Longest time of a training in seconds, 0 for any.
    """

    train: Path
    work_dir: Path
    jobs: int = 1
    gpus: Sequence[str] = ()
    threads: int = 1
    timeout: float = 0.0


def make_settings(
    train: Path,
    work_dir: Path,
    jobs: int | None = None,
    gpus: str = '',
    threads: int | None = None,
    timeout: float = 0.0,
) -> RunSettings:
    """Fill in settings that the command line leaves open.

    Args:
        train (Path): ``tools/train.py``.
        work_dir (Path): Folder of the study.
        jobs (int | None): Trainings at once. Defaults to None, for one per
            GPU named, else one.
        gpus (str): Names of GPUs, separated by commas. Defaults to ''.
        threads (int | None): Threads of each training. Defaults to None, for
            ``OMP_NUM_THREADS`` or an equal share of the cores.
        timeout (float): Longest time in seconds. Defaults to 0.0, for any.

    Returns:
        RunSettings: Complete ones.

    Raises:
        ValueError: If a number is not positive.
    """
    names = [name.strip() for name in gpus.split(',') if name.strip()]
    jobs = max(len(names), 1) if jobs is None else jobs
    if threads is None:
        given = os.environ.get('OMP_NUM_THREADS', '')
        shared = max(usable_cores() // max(jobs, 1), 1)
        threads = int(given) if given.isdigit() else shared
    for name, value in (('jobs', jobs), ('threads', threads)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    if timeout < 0:
        raise ValueError(f'timeout must not be negative, got {timeout}')
    return RunSettings(train, work_dir, jobs, names, threads, timeout)


def training_command(cell: Cell, folder: Path, train: Path) -> list[str]:
    """Arguments of the training of a cell, the interpreter left out.

    Args:
        cell (Cell): The cell.
        folder (Path): Work dir of the cell.
        train (Path): ``tools/train.py``.

    Returns:
        list[str]: It resumes where there is a checkpoint already.
    """
    command = [_short(train), cell.config, '--work-dir', str(folder)]
    command += ['--resume', '--seed', str(cell.seed)]
    dtype = results.PRECISIONS[cell.precision]
    if dtype is not None:
        command += ['--amp', '--amp-dtype', dtype]
    if cell.options:
        options = cell.options.items()
        command += ['--cfg-options', *(option_text(*item) for item in options)]
    return command


def _short(path: Path) -> str:
    """Relative to the current folder if it is below it."""
    with contextlib.suppress(ValueError):
        path = path.resolve().relative_to(Path.cwd())
    return str(path)


class Job:
    """A training that runs in a process group of its own.

    Args:
        cell (Cell): The training.
        settings (RunSettings): Folder and resources.
        slot (int): Number among the jobs at once; it picks the GPU.
        lock (int): Result of ``results.try_lock``; :meth:`finish` closes it.
    """

    def __init__(
        self, cell: Cell, settings: RunSettings, slot: int, lock: int
    ) -> None:
        self.cell, self.settings, self.slot = cell, settings, slot
        self.folder = settings.work_dir / results.CELLS / cell.name
        self.started = time.time()
        self.reason = ''
        self.status: str | None = None  # once decided before the end
        self._lock = lock
        self._ends_by = math.inf
        self._memory: float | None = None
        self._read: dict[Path, int] = {}  # bytes of each file
        before = results.read_json(self.folder / results.RECORD)
        self._attempts = 1 + before.get('attempts', 0)
        self._command = training_command(cell, self.folder, settings.train)
        self._write({'status': results.RUNNING})
        self._process = self._start()

    def _start(self) -> subprocess.Popen:
        """Start the process, tied to this one, its output in the log."""
        child = str(Path(__file__).with_name('tied_child.py'))
        python = sys.executable
        command = [python, '-I', child, str(os.getpid()), python]
        with open(self.folder / results.LOG, 'ab') as log:
            shown = shlex.join(['python', *self._command])
            log.write(f'$ {shown}\n'.encode())
            log.flush()
            return subprocess.Popen(
                [*command, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """Threads and GPU of this job, the rest inherited."""
        changes = {'OMP_NUM_THREADS': str(self.settings.threads)}
        gpus = self.settings.gpus
        if gpus:
            changes['CUDA_VISIBLE_DEVICES'] = gpus[self.slot % len(gpus)]
        return {**os.environ, **changes}

    def running(self) -> bool:
        """Look after the process.

        Returns:
            bool: False once it has ended.
        """
        self._memory = _peak_memory(self._process.pid) or self._memory
        if self._process.poll() is not None:
            return False
        now, limit = time.time(), self.settings.timeout
        if self.status is not None:
            if now > self._ends_by:
                self._signal(signal.SIGKILL)
        elif 0 < limit < now - self.started:
            self.end(results.FAILED, f'took longer than {limit:g} s')
        elif not self.cell.on_divergence:
            self._end_if_diverged()
        return True

    def _end_if_diverged(self) -> None:
        """Save the time that a training without a finite loss would take.

        Only where no hook decides that.
        """
        for path in self.folder.glob('*/vis_data/scalars.json'):
            if path.stat().st_mtime < self.started:
                continue  # of an earlier attempt
            lines, self._read[path] = results.read_new_lines(
                path, self._read.get(path, 0)
            )
            step = results.first_nonfinite_step(lines)
            if step is not None:
                cause = f'loss not finite at iteration {step}'
                self.end(results.DIVERGED, cause)

    def end(self, status: str, reason: str = '') -> None:
        """Ask the training and its workers to end.

        Args:
            status (str): Recorded unless it ended well before.
            reason (str): Recorded with it. Defaults to ''.
        """
        if self.status is None:
            self.status, self.reason = status, reason
            self._ends_by = time.time() + GRACE
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        """Send a signal to the training and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def wait(self) -> None:
        """Wait for the end after :meth:`end`; at last it comes by force."""
        try:
            self._process.wait(max(self._ends_by - time.time(), 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._signal(signal.SIGKILL)
            self._process.wait()

    def progress(self) -> float:
        """Share of the training that is done, 0 to 1, from its log."""
        return read_progress(self.folder / results.LOG, self.cell.epochs)

    def finish(self) -> dict[str, Any]:
        """Record what came out, and let go of the cell.

        Returns:
            dict[str, Any]: Content of ``cell.json``.
        """
        try:
            # workers of a training that crashed may still be there
            self._signal(signal.SIGKILL)
            outcome = judge(
                self.folder,
                self._process.returncode,
                self.started,
                self.cell.on_divergence == 'rollback',
            )
            if self.status and outcome['status'] == results.FAILED:
                outcome |= {'status': self.status, 'reason': self.reason}
            return self._write({**outcome, **self._measured()})
        finally:
            os.close(self._lock)

    def _measured(self) -> dict[str, Any]:
        """Cost of the training."""
        curves = results.read_curves(self.folder)
        peak, kind = self._memory, 'resident'
        if memory := curves.series('memory')[1]:
            peak, kind = max(memory), 'GPU'
        return {
            'exit_code': self._process.returncode,
            'seconds': time.time() - self.started,
            'seconds_per_step': curves.median('time'),
            'memory_mb': peak,
            'memory_kind': kind,
            'finished': _now(),
        }

    def _write(self, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``cell.json``."""
        started = datetime.fromtimestamp(self.started, timezone.utc)
        record = {
            **self.cell.describe(),
            'command': shlex.join(['python', *self._command]),
            'attempts': self._attempts,
            'started': started.isoformat(timespec='seconds'),
            'jobs': self.settings.jobs,
            'threads': self.settings.threads,
            'versions': versions(),
            'machine': machine(),
            **outcome,
        }
        results.write_json(self.folder / results.RECORD, record)
        return record


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec='seconds')


def judge(
    folder: Path, exit_code: int | None, since: float, recovers: bool
) -> dict[str, Any]:
    """Say how a training ended.

    It diverged if a logged loss is not finite, or if it ended with an error
    and a ``DivergenceHook`` reported. A training that the hook rolled back
    and that ended well with a finite loss did not.

    Args:
        folder (Path): Work dir of the training.
        exit_code (int | None): Exit code of its process.
        since (float): Time of its start, seconds since the epoch.
        recovers (bool): True if the hook rolls it back.

    Returns:
        dict[str, Any]: Status, reason, metrics and first diverged step.
    """
    curves = results.read_curves(folder)
    reports = results.divergence_reports(folder, since)
    report = reports[-1] if reports else None
    step = curves.first_nonfinite_step()
    steps = [step, *map(results.reported_step, reports)]
    metrics = [line for line in curves.metrics() if line]
    losses = curves.series('loss')
    outcome = {
        'status': results.DONE,
        'reason': '',
        'final': metrics[-1] if metrics else {},
        'best': curves.best_metrics(),
        'final_loss': losses[1][-1] if losses[1] else None,
        'steps': int(losses[0][-1]) if losses[0] else 0,
        'first_diverged_step': min(
            (s for s in steps if s is not None), default=None
        ),
        'divergence_report': report and str(report.relative_to(folder)),
    }
    recovered = recovers and exit_code == 0 and curves.ends_finite()
    if (step is not None or (report and exit_code)) and not recovered:
        where = outcome['first_diverged_step']
        cause = 'stopped by DivergenceHook' if report else 'loss not finite'
        place = '' if where is None else f' at iteration {where}'
        outcome |= {'status': results.DIVERGED, 'reason': cause + place}
    elif exit_code:
        line = results.last_line(folder / results.LOG)
        reason = f'exit code {exit_code}: {line}'
        outcome |= {'status': results.FAILED, 'reason': reason}
    return outcome


def read_progress(log: Path, epochs: int | None) -> float:
    """Share of a training that its log reports as done.

    Args:
        log (Path): Output of the training, may be absent.
        epochs (int | None): Length of a training that counts in epochs.

    Returns:
        float: 0 to 1; 0 before the first line about an iteration.
    """
    try:
        with open(log, 'rb') as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            text = file.read().decode(errors='replace')
    except FileNotFoundError:
        return 0.0
    found = _PROGRESS.findall(text.rpartition('\n$ ')[2])
    if not found:
        return 0.0
    epoch, done, of = found[-1]
    share = int(done) / max(int(of), 1)
    if not epoch:
        return min(share, 1.0)
    return min((int(epoch) - 1 + share) / max(epochs or 1, 1), 1.0)


def _peak_memory(pid: int) -> float | None:
    """Largest resident memory of a process so far in MB (Linux)."""
    try:
        status = Path('/proc', str(pid), 'status').read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) / 1024
    return None


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what the results depend on."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@functools.cache
def machine() -> dict[str, Any]:
    """Processor, cores and GPUs; no names of hosts or users."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path('/proc/cpuinfo').read_text()
        names = re.findall(r'model name\s*:\s*(.+)', text)
        cpu = names[0] if names else cpu
    return {
        'cpu': cpu,
        'cores': usable_cores(),
        'gpus': _gpu_names(),
        'system': f'{platform.system()} {platform.machine()}',
    }


def _gpu_names() -> list[str]:
    """Names of the GPUs; PyTorch would take memory on them to tell."""
    command = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split('\n')[:-1] if done.returncode == 0 else []


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_skipped(cell: Cell, settings: RunSettings, reason: str) -> None:
    """Record that a cell cannot run on this machine.

    Args:
        cell (Cell): The cell.
        settings (RunSettings): Gives the folder of the study.
        reason (str): Written into the record.
    """
    folder = settings.work_dir / results.CELLS / cell.name
    record = {
        **cell.describe(),
        'status': results.SKIPPED,
        'reason': reason,
        'finished': _now(),
        'versions': versions(),
        'machine': machine(),
    }
    results.write_json(folder / results.RECORD, record)

"""Read what trainings left in their folders.

Everything here tolerates a training that was killed at any moment: half a
line at the end of a file, a folder without results, several attempts.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

# and the dtype that autocast computes in
PRECISIONS = {'fp32': None, 'bf16': 'bfloat16', 'fp16': 'float16'}

RECORD = 'cell.json'
LOG = 'log.txt'
LOCK = '.lock'
MATRIX = 'matrix.json'
CELLS = 'cells'
REPORTS = 'divergence_report*.md'
STABILITY = 'stability.jsonl'

# The statuses of a cell. Those of FINISHED are results.
DONE, DIVERGED, FAILED = 'done', 'diverged', 'failed'
KILLED, SKIPPED, RUNNING, MISSING = 'killed', 'skipped', 'running', 'missing'
FINISHED = (DONE, DIVERGED)

_NO_METRIC = {'step', 'time', 'data_time', 'epoch', 'iter'}
_ERROR = re.compile(r'[\w.]*(Error|Exception|Interrupt)\b')
_ITERATION = re.compile(r'\biteration\b\D{0,40}?(\d+)', re.IGNORECASE)


@dataclasses.dataclass
class Curves:
    """Scalars that a training logged.

    Attributes:
        train (list[dict]): Lines of training, by rising iteration.
        val (list[dict]): Lines of validation, by rising step.
    """

    train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    val: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Iterations and values of one scalar of training."""
        lines = [line for line in self.train if _is_number(line.get(name))]
        return [float(s['step']) for s in lines], [s[name] for s in lines]

    def first_nonfinite_step(self) -> int | None:
        """First logged iteration whose loss is not finite.

        Late by at most the interval of logging.
        """
        return first_nonfinite_step(self.train)

    def ends_finite(self) -> bool:
        """Tell that the last logged loss is finite, or that there is none."""
        losses = self.series('loss')[1]
        return not losses or math.isfinite(losses[-1])

    def median(self, name: str) -> float | None:
        """Median of the finite values of a scalar, None without one."""
        values = [v for v in self.series(name)[1] if math.isfinite(v)]
        return median(values) if values else None

    def metrics(self) -> list[dict[str, float]]:
        """Finite metrics of each validation."""
        return [
            {
                name: float(value)
                for name, value in line.items()
                if name not in _NO_METRIC
                and _is_number(value)
                and math.isfinite(value)
            }
            for line in self.val
        ]

    def best_metrics(self) -> dict[str, float]:
        """Largest value of each metric over the validations."""
        best: dict[str, float] = {}
        for line in self.metrics():
            for name, value in line.items():
                best[name] = max(value, best.get(name, value))
        return best


def first_nonfinite_step(lines: Iterable[dict[str, Any]]) -> int | None:
    """Iteration of the first line whose loss is not finite.

    Args:
        lines (Iterable[dict]): Lines of training.

    Returns:
        int | None: None if there is none.
    """
    for line in lines:
        loss: Any = line.get('loss')
        if _is_number(loss) and not math.isfinite(float(loss)):
            return int(line['step'])
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one JSON object per line.

    Args:
        path (Path): May be absent.

    Yields:
        dict: Each but those of lines that are no complete object.
    """
    with contextlib.suppress(FileNotFoundError), open(path, 'rb') as file:
        yield from _objects(file)


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        # bytes that are no text are no JSON either
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


def read_new_lines(path: Path, start: int) -> tuple[list[dict], int]:
    """Objects that were added to a file which is still being written.

    Args:
        path (Path): One JSON object per line.
        start (int): Byte from which on it is new.

    Returns:
        tuple[list[dict], int]: Objects of the whole lines since, and where
        the next one starts.
    """
    with open(path, 'rb') as file:
        file.seek(start)
        added = file.read()
    whole = added[: added.rfind(b'\n') + 1]
    return list(_objects(whole.splitlines())), start + len(whole)


def read_curves(folder: Path) -> Curves:
    """Join the scalars of all attempts of a training.

    A resumed attempt starts at its checkpoint: what an earlier one logged
    after that is dropped.

    Args:
        folder (Path): Work dir of the training.

    Returns:
        Curves: Empty where nothing was logged.
    """
    curves = Curves()
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        # hooks may write lines of their own, large ones, without times
        lines = [
            s for s in read_lines(path) if 'data_time' in s or 'iter' in s
        ]
        train = [line for line in lines if 'iter' in line]
        val = [line for line in lines if 'iter' not in line]
        curves.train = _continue(curves.train, train)
        curves.val = _continue(curves.val, val)
    return curves


def _continue(old: list[dict], new: list[dict]) -> list[dict]:
    """``new`` after those of ``old`` that come before its first step."""
    if not new:
        return old
    start = new[0]['step']
    return [line for line in old if line['step'] < start] + new


def read_stability(folder: Path) -> list[dict[str, Any]]:
    """Records of the stability monitor, by rising step.

    Args:
        folder (Path): Work dir of the training.

    Returns:
        list[dict]: One per watched step, later attempts replacing earlier
        ones; empty where no monitor was at work.
    """
    paths = [*sorted(folder.glob(f'*/{STABILITY}')), folder / STABILITY]
    by_step: dict[int, dict] = {}
    for path in paths:
        for record in read_lines(path):
            if 'step' in record:
                by_step[record['step']] = record
    return [by_step[step] for step in sorted(by_step)]


def divergence_reports(folder: Path, since: float = 0.0) -> list[Path]:
    """Reports of a ``DivergenceHook``, the newest last.

    Args:
        folder (Path): Work dir of the training.
        since (float): Leave out older ones, seconds since the epoch.
            Defaults to 0.0.

    Returns:
        list[Path]: Empty if there is none.
    """
    found = [(path.stat().st_mtime, path) for path in folder.rglob(REPORTS)]
    return [path for changed, path in sorted(found) if changed >= since]


def reported_step(report: Path) -> int | None:
    """Iteration that a divergence report names first.

    Args:
        report (Path): Written by a ``DivergenceHook``.

    Returns:
        int | None: None if it names none.
    """
    found = _ITERATION.search(report.read_text(encoding='utf-8'))
    return int(found.group(1)) if found else None


def last_line(path: Path) -> str:
    """Last line of a log that names an error, else its last line.

    Args:
        path (Path): May be absent.

    Returns:
        str: Empty if there is none; at most 300 characters.
    """
    try:
        lines = path.read_bytes()[-65536:].decode(errors='replace')
    except FileNotFoundError:
        return ''
    said = [line.strip() for line in lines.splitlines() if line.strip()]
    errors = [line for line in said[-40:] if _ERROR.match(line)]
    return (errors or said or [''])[-1][:300]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at once, so that no reader finds half of it.

    Args:
        path (Path): The file.
        content (Mapping[str, Any]): Numbers that are not finite become null.
    """
    text = json.dumps(_strict(content), indent=2, allow_nan=False)
    partial = path.with_name(f'{path.name}.{os.getpid()}')
    partial.write_text(text + '\n', encoding='utf-8')
    partial.replace(path)


def _strict(value: Any) -> Any:
    """Without what JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file, empty if there is none that can be read.

    Args:
        path (Path): May be absent.

    Returns:
        dict[str, Any]: The object in it.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def try_lock(folder: Path) -> int | None:
    """Take a cell for this process; the system frees it when that ends.

    Args:
        folder (Path): Work dir of the cell, must exist.

    Returns:
        int | None: File descriptor to close in the end, None if another
        process has the cell.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@dataclasses.dataclass(frozen=True)
class Result:
    """One cell as the report sees it.

    Attributes:
        name (str): Name of the cell.
        labels (dict[str, str]): Distinction of its config from others.
        seed (int): Random seed.
        precision (str): ``'fp32'``, ``'bf16'`` or ``'fp16'``.
        lr (float | None): Learning rate of the matrix, None for the
            config's own.
        lr_used (float | None): Learning rate that it trained with.
        folder (Path): Work dir of the training.
        record (dict[str, Any]): Content of ``cell.json``, may be empty.
        status (str): One of the statuses of this module.
    """

    name: str
    labels: dict[str, str]
    seed: int
    precision: str
    lr: float | None
    lr_used: float | None
    folder: Path
    record: dict[str, Any]
    status: str

    @functools.cached_property
    def curves(self) -> Curves:
        """Logged scalars, read when first asked for."""
        return read_curves(self.folder)

    @functools.cached_property
    def stability(self) -> list[dict[str, Any]]:
        """Records of the stability monitor."""
        return read_stability(self.folder)

    @property
    def reason(self) -> str:
        """Reason that it is not done: the log's last line if it failed."""
        return self.record.get('reason') or ''

    def final(self, metric: str) -> float | None:
        """A metric of the last validation of a training that is done."""
        if self.status != DONE:
            return None
        return (self.record.get('final') or {}).get(metric)


@dataclasses.dataclass(frozen=True)
class Study:
    """Results of a matrix.

    Attributes:
        title (str): Heading.
        metric (str): Name of the validation metric, higher is better.
        baseline (dict[str, str]): Label and value of the baseline.
        orders (dict[str, list[str]]): Values of each label in their order.
        cells (list[Result]): Every cell, also those without results.
        command (str): Command line of the latest run, may be empty.
        collapse_below (float | None): Score below which a training that is
            done has learnt nothing; None to leave that open.
        notes (Sequence[str]): Sentences for a reader.
        more_metrics (Sequence[str]): Patterns of other metrics to show.
    """

    title: str
    metric: str
    baseline: dict[str, str]
    orders: dict[str, list[str]]
    cells: list[Result]
    command: str = ''
    collapse_below: float | None = None
    notes: Sequence[str] = ()
    more_metrics: Sequence[str] = ()

    def has_collapsed(self, cell: Result) -> bool:
        """Tell that a training is done, yet has learnt nothing."""
        score = cell.final(self.metric)
        if score is None or self.collapse_below is None:
            return False
        return score < self.collapse_below


def read_study(work_dir: Path) -> Study:
    """Read a study, finished or not.

    Args:
        work_dir (Path): Folder that ``ablation.py run`` wrote.

    Returns:
        Study: The cells of the latest run, then others found in the folder.

    Raises:
        FileNotFoundError: If no run has been started there.
    """
    matrix = read_json(work_dir / MATRIX)
    if not matrix:
        raise FileNotFoundError(
            f'{work_dir / MATRIX} does not exist or is no JSON: WORK_DIR is '
            'the folder that "ablation.py run" writes to'
        )
    planned = {cell['cell']: cell for cell in matrix['cells']}
    orders = matrix['orders']
    for path in sorted((work_dir / CELLS).glob(f'*/{RECORD}')):
        record = read_json(path)
        if path.parent.name not in planned and 'labels' in record:
            planned[path.parent.name] = record
            extend_orders(orders, record['labels'])
    cells = [
        read_result(work_dir / CELLS / name, cell)
        for name, cell in planned.items()
    ]
    names = {field.name for field in dataclasses.fields(Study)}
    settings = {k: v for k, v in matrix.items() if k in names}
    return Study(**{**settings, 'orders': orders, 'cells': cells})


def extend_orders(orders: dict[str, list], labels: Mapping[str, str]) -> None:
    """Append the values that a label did not have so far.

    Args:
        orders (dict[str, list[str]]): Values by label, changed in place.
        labels (Mapping[str, str]): Labels of one cell.
    """
    for name, value in labels.items():
        values = orders.setdefault(name, [])
        if value not in values:
            values.append(value)


def read_result(folder: Path, planned: Mapping[str, Any]) -> Result:
    """Read one cell.

    Args:
        folder (Path): Work dir of the cell, may be absent.
        planned (Mapping[str, Any]): Entry of the cell in the matrix.

    Returns:
        Result: With status ``'missing'`` if it was never started.
    """
    record = read_json(folder / RECORD)
    status = record.get('status', MISSING)
    if status == RUNNING and not _is_locked(folder):
        status = KILLED
    hash_now = planned.get('config_hash')
    if status != MISSING and record.get('config_hash') != hash_now:
        record, status = {}, MISSING  # of another config
    return Result(
        name=folder.name,
        labels=dict(planned['labels']),
        seed=planned['seed'],
        precision=planned['precision'],
        lr=planned['lr'],
        lr_used=planned.get('lr_used'),
        folder=folder,
        record=record,
        status=status,
    )


def _is_locked(folder: Path) -> bool:
    """Tell that a process works on the cell now."""
    handle = try_lock(folder)
    if handle is not None:
        os.close(handle)
    return handle is None


def combinations(cells: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Group cells that differ in their seed only.

    Args:
        cells (Iterable[Result]): Any order.

    Returns:
        dict[tuple, list[Result]]: By labels, precision and learning rate,
        each sorted by seed.
    """
    groups: dict[tuple, list[Result]] = {}
    for cell in cells:
        key = (tuple(cell.labels.items()), cell.precision, cell.lr)
        groups.setdefault(key, []).append(cell)
    for group in groups.values():
        group.sort(key=lambda cell: cell.seed)
    return groups

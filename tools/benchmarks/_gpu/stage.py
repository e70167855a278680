"""What every stage is given, and the rule on kernels whose tests failed."""

import dataclasses
import json
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from _gpu.records import Record

ROOT = Path(__file__).resolve().parents[3]

KERNELS = ('scan', 'conv1d', 'gated_merge', 'rms_norm', 'mixer')
"""Parts that tests are about; the mixer needs all the others."""

RESOURCE_TEST = re.compile('regist|spill|instruction|resource|ahead_of_time')
"""Tests of a kernel's machine code, not of its values."""


class OutOfTimeError(Exception):
    """A stage's time is used up; what it has stays."""


class SkippedError(Exception):
    """A stage has nothing to do here, and why."""


class StageFailedError(Exception):
    """What went wrong in a stage, ready to be read."""


class Failures:
    """Lets a stage go on after a failure, and fails it at its end."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __enter__(self) -> 'Failures':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raise what was collected, unless something else is on its way.

        Raises:
            StageFailedError: If there were failures.
        """
        out_of_time = isinstance(error, OutOfTimeError)
        if self.texts and (error is None or out_of_time):
            if out_of_time:
                self.texts.append(str(error))
            raise StageFailedError('\n\n'.join(self.texts)) from None

    @contextmanager
    def kept(self, what: str) -> Iterator[None]:
        """Go on after this block, whatever it raises."""
        try:
            yield
        except OutOfTimeError:
            raise
        except Exception:
            self.texts.append(f'{what}\n{traceback.format_exc()}')


@dataclasses.dataclass
class Stage:
    """One stage as it runs.

    Args:
        record (Record): Where results go.
        out (Path): Folder of the stages' files.
        device (str): ``'cuda'``, or ``'cpu'`` in a dry run.
        quick (bool): Tiny shapes; the numbers mean nothing.
        force (bool): Time kernels whose tests failed.
        deadline (float): ``time.monotonic()`` at which to be done.
        train_config (Path): Config of the short training.
    """

    record: Record
    out: Path
    device: str
    quick: bool
    force: bool
    deadline: float
    train_config: Path

    def seconds_left(self) -> float:
        """Until the deadline, at least one."""
        return max(1.0, self.deadline - time.monotonic())

    def refuses(self, *kernels: str) -> bool:
        """Whether to leave these kernels untimed; says why in the record."""
        failed = failed_tests(self.out / 'correctness.json')
        if failed is None:
            self.record.note(
                'The correctness stage has no results here: the only check '
                "before these timings was the stage's own."
            )
            return False
        wrong = {k: failed[k] for k in kernels if k in failed}
        for kernel, names in wrong.items():
            verdict = 'timed all the same' if self.force else 'not timed'
            self.record.note(
                f'{kernel}: {len(names)} failed tests, {verdict} '
                f'({names[0]} …)'
            )
        return bool(wrong) and not self.force


def kernel_of(test: str) -> str | None:
    """The kernel that a test is about.

    Args:
        test (str): Node id of pytest.

    Returns:
        str | None: One of ``KERNELS``; None if no value depends on it.
    """
    path, _, name = test.partition('::')
    if RESOURCE_TEST.search(name):
        return None
    file = Path(path).stem
    for kernel in ('conv1d', 'gated_merge', 'rms_norm'):
        if kernel in file:
            return kernel
    if 'test_ops' in path:
        return 'scan'
    inside = {'test_layers', 'test_models'} & set(Path(path).parts)
    # a file that cannot be imported tells nothing about the kernels
    return 'mixer' if inside and name else None


def failed_tests(path: Path) -> dict[str, list[str]] | None:
    """Failed tests by kernel, None without results of the tests."""
    if not path.exists():
        return None
    tables = json.loads(path.read_text())['tables']
    rows = next((t['rows'] for t in tables if t['title'] == 'Failures'), None)
    if rows is None:
        return None
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row['kernel']:
            failed.setdefault(row['kernel'], []).append(row['test'])
    return failed

"""Stage ``correctness``: the tests that run kernels on the GPU."""

import collections
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _gpu import stage as stages
from _gpu.stage import ROOT, Stage, StageFailedError

LONGEST_TEXT = 400
"""Characters of a failure's report that are kept: its end says what."""


def run(stage: Stage) -> None:
    """Run pytest, count, name the failures.

    Raises:
        StageFailedError: If a test failed or the tests did not end in time.
    """
    results = stage.out / 'correctness.jsonl'
    results.unlink(missing_ok=True)
    summary = stage.record.table(
        'Counts',
        file='test file',
        passed='passed',
        failed='failed',
        skipped='skipped',
        seconds='s',
    )
    ended = _run_pytest(stage, results)
    found = _read(results)
    failures = stage.record.table(
        'Failures', test='test', kernel='kernel', text='report'
    )
    for row in found:
        if row['outcome'] == 'failed':
            failures.add(
                test=row['test'],
                kernel=stages.kernel_of(row['test']),
                text=row['text'][-LONGEST_TEXT:],
            )
    stage.record.save()
    for file, rows in _by_file(found).items():
        counts = collections.Counter(row['outcome'] for row in rows)
        summary.add(
            file=file,
            passed=counts['passed'],
            failed=counts['failed'],
            skipped=counts['skipped'],
            seconds=sum(row['seconds'] for row in rows),
        )
    results.unlink(missing_ok=True)
    if ended != 0 or failures.rows or not found:
        raise StageFailedError(
            f'{len(failures.rows)} of {len(found)} tests failed; pytest '
            + ('ran out of time' if ended is None else f'returned {ended}')
        )


def _run_pytest(stage: Stage, results: Path) -> int | None:
    """Exit code, or None if it was stopped."""
    files = _files()
    if stage.quick:  # one whose tests are not skipped without a GPU
        files = [f for f in files if '/test_triton_' in f][:1]
    command = [sys.executable, '-m', 'pytest', '-q', '--tb=short']
    command += ['-p', '_gpu.collect_results', '-p', 'no:cacheprovider']
    command += ['--continue-on-collection-errors']
    workers = _workers(stage)
    if workers:
        command += ['-n', str(workers)]
    environment = dict(os.environ, GPU_SUITE_RESULTS=str(results))
    # of a pytest around this one; its workers set their own
    environment.pop('PYTEST_XDIST_WORKER', None)
    if stage.quick:
        environment['GPU_SUITE_MAX_TESTS'] = '2'
    try:
        return subprocess.run(
            [*command, *files],
            cwd=ROOT,
            env=environment,
            timeout=stage.seconds_left(),
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def _files() -> list[str]:
    """Test files that may have tests for a GPU; importing all takes long."""
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / 'tests').rglob('test_*.py')
        if path.name.startswith('test_triton_')
        or 'mark.gpu' in path.read_text(encoding='utf-8')
    )


def _workers(stage: Stage) -> int:
    """Processes that compile side by side; the GPU is hardly busy."""
    if stage.quick or importlib.util.find_spec('xdist') is None:
        return 0
    return min(8, os.cpu_count() or 1)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _by_file(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    files: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        files.setdefault(row['test'].partition('::')[0], []).append(row)
    return dict(sorted(files.items()))

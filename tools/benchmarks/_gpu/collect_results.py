"""Pytest plugin: the tests for a GPU only, each result on disk at once.

A run that is killed has then told what it knew. Load it with
``-p _gpu.collect_results`` and name the file in GPU_SUITE_RESULTS.
"""

import json
import os
from pathlib import Path

import pytest

TRITON_FILES = 'test_triton_'
"""Files whose tests compile kernels where there is a GPU, marked or not."""


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Keep what runs on a GPU; a dry run keeps the first few of it."""
    wanted = [
        item
        for item in items
        if item.path.name.startswith(TRITON_FILES)
        or item.get_closest_marker('gpu')
    ]
    limit = os.environ.get('GPU_SUITE_MAX_TESTS')
    wanted = wanted[: int(limit) if limit else None]
    kept = set(wanted)
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = wanted


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported has failed."""
    if report.failed:
        _append(report.nodeid, 'failed', 0.0, report.longreprtext)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line per test: its call, or why there was none."""
    if report.when == 'call' or report.outcome != 'passed':
        text = report.longreprtext if report.failed else ''
        _append(report.nodeid, report.outcome, report.duration, text)


def _append(test: str, outcome: str, seconds: float, text: str) -> None:
    """Written by one process only: under xdist the workers are silent."""
    if 'PYTEST_XDIST_WORKER' in os.environ:
        return
    line = json.dumps(
        dict(test=test, outcome=outcome, seconds=seconds, text=text)
    )
    with Path(os.environ['GPU_SUITE_RESULTS']).open('a') as file:
        file.write(line + '\n')

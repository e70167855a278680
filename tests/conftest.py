"""Fixtures and settings shared by every test."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

# before anything imports triton
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

GOLDENS = Path(__file__).parent / 'data' / 'goldens'


@pytest.fixture(autouse=True, scope='session')
def _unformatted_configs():
    from small_runs import unformatted_configs

    with unformatted_configs():
        yield


@pytest.fixture(autouse=True)
def _logging():
    """Tools turn it down for the whole process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` yields NaN, so an unwritten element fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def golden():
    """Open one archive of golden values."""
    return lambda name: np.load(GOLDENS / name, allow_pickle=False)


def pytest_terminal_summary(terminalreporter):
    """Print what tests record."""
    for report in terminalreporter.getreports('passed'):
        for name, value in report.user_properties:
            terminalreporter.write_line(f'{name}: {value}')

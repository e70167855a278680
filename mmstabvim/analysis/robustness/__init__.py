"""Robustness to Fourier modes and corruptions: sweep, condense, write."""

from mmstabvim.analysis.robustness.evaluate import (
    Sweep,
    evaluate,
    evaluate_study,
)
from mmstabvim.analysis.robustness.options import (
    SweepOptions,
    add_options,
    make_options,
)
from mmstabvim.analysis.robustness.report import write

__all__ = [
    'Sweep',
    'SweepOptions',
    'add_options',
    'evaluate',
    'evaluate_study',
    'make_options',
    'write',
]

"""Stability report of a trained Vision Mamba: measure, compare, write."""

from mmstabvim.analysis.stability_report.findings import find
from mmstabvim.analysis.stability_report.measure import (
    StabilityReport,
    stability_report,
)
from mmstabvim.analysis.stability_report.sections import write
from mmstabvim.analysis.stability_report.source import Source, find_source

__all__ = [
    'Source',
    'StabilityReport',
    'find',
    'find_source',
    'stability_report',
    'write',
]

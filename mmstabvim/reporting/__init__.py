"""Tables, style of figures and pages of the analyses."""

from mmstabvim.reporting.page import Picture, Section, render, write_report
from mmstabvim.reporting.tables import (
    Table,
    make_table,
    number,
    percent,
    to_csv,
    to_latex,
    to_markdown,
)
from mmstabvim.reporting.writing import add_formats, markdown, save, to_json

__all__ = [
    'Picture',
    'Section',
    'Table',
    'add_formats',
    'make_table',
    'markdown',
    'number',
    'percent',
    'render',
    'save',
    'to_csv',
    'to_json',
    'to_latex',
    'to_markdown',
    'write_report',
]

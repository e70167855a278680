"""Write the results of an analysis: page, numbers, figure."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmstabvim.reporting import style
from mmstabvim.reporting.tables import (
    Row,
    make_table,
    number,
    to_csv,
    to_markdown,
)

__all__ = ['add_formats', 'markdown', 'number', 'plain', 'save', 'to_json']


def add_formats(parser: argparse.ArgumentParser) -> None:
    """Add ``--formats``, of figures besides PNG.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
    """
    parser.add_argument(
        '--formats',
        nargs='*',
        choices=style.FORMATS[1:],
        default=[],
        help='of figures besides PNG (default: none)',
    )


def markdown(rows: Sequence[Row], heads: Mapping[str, str]) -> str:
    """Write columns of rows as a Markdown table.

    Args:
        rows (Sequence[dict[str, Any]]): Words and numbers.
        heads (Mapping[str, str]): Key in the rows to head.

    Returns:
        str: The table.

    Example:
        >>> print(markdown([dict(x='a', y=0.12345)], dict(x='x', y='y')))
        | x | y |
        | --- | --: |
        | a | 0.123 |
    """
    return to_markdown(make_table('', '', '', heads, rows))


def save(
    folder: Path,
    name: str,
    page: str,
    rows: Sequence[Row],
    facts: Row,
    figure: Figure,
    formats: Sequence[str] = (),
) -> None:
    """Write NAME.md, .csv, .json and .png.

    Args:
        folder (Path): Created where it is missing.
        name (str): File name without ending.
        page (str): Markdown.
        rows (Sequence[dict[str, Any]]): Numbers, unrounded.
        facts (dict[str, Any]): Further entries of the JSON file.
        figure (Figure): The figure.
        formats (Sequence[str]): Of the figure besides PNG. Defaults to none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.with_suffix('.md').write_text(page, encoding='utf-8')
    path.with_suffix('.csv').write_text(to_csv(rows), encoding='utf-8')
    text = to_json(dict(facts, rows=list(rows)))
    path.with_suffix('.json').write_text(text, encoding='utf-8')
    style.save(figure, path, ('png', *formats))


def to_json(data: Any) -> str:
    """Write numbers as strict JSON.

    Args:
        data (Any): Dicts, lists, words and numbers.

    Returns:
        str: Values that are not finite are words.

    Example:
        >>> print(to_json(dict(bound=float('nan'))), end='')
        {
         "bound": "nan"
        }
    """
    return json.dumps(plain(data), indent=1, allow_nan=False) + '\n'


def plain(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by words.

    Args:
        value (Any): Dicts, lists, tuples, words and numbers.

    Returns:
        Any: The same with ``'nan'``, ``'inf'`` and ``'-inf'``.

    Example:
        >>> plain(dict(bound=float('inf')))
        {'bound': 'inf'}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

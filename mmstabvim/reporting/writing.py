"""Write the results of an analysis: page, numbers, figure."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmstabvim.reporting.tables import Table, to_csv, to_markdown
from mmstabvim.visualization import style

Row = dict[str, Any]


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; empty for none."""
    if value is None:
        return ''
    if math.isinf(value):
        return '∞' if value > 0 else '-∞'
    return f'{value:.{digits}g}'


def markdown(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """Rows as a Markdown table.

    Args:
        rows (Sequence[Row]): Words and numbers.
        columns (dict[str, str]): Head of each column.

    Returns:
        str: The table.
    """
    cells = [
        [
            row[key] if isinstance(row[key], str) else number(row[key])
            for key in columns
        ]
        for row in rows
    ]
    words = [any(isinstance(row[key], str) for row in rows) for key in columns]
    align = ''.join('l' if word else 'r' for word in words)
    table = Table('', '', '', [*columns.values()], cells, rows, align)
    return to_markdown(table)


def save(
    folder: Path,
    name: str,
    page: str,
    rows: Sequence[Row],
    facts: Row,
    figure: Figure,
) -> None:
    """Write NAME.md, .csv, .json, .png, .pdf and .svg.

    Args:
        folder (Path): An existing one.
        name (str): File name without ending.
        page (str): Markdown.
        rows (Sequence[Row]): Numbers, unrounded.
        facts (Row): What else goes into the JSON file.
        figure (Figure): The figure.
    """
    path = folder / name
    path.with_suffix('.md').write_text(page)
    path.with_suffix('.csv').write_text(to_csv(rows))
    data = plain(dict(facts, rows=list(rows)))
    path.with_suffix('.json').write_text(
        json.dumps(data, indent=1, allow_nan=False) + '\n'
    )
    style.save(figure, path)


def plain(value: Any) -> Any:
    """What JSON can hold: words for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

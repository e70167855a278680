"""Tables of a report, and their Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

_LATEX = {
    '\\': r'\textbackslash{}',
    '&': r'\&',
    '%': r'\%',
    '$': r'\$',
    '#': r'\#',
    '_': r'\_',
    '{': r'\{',
    '}': r'\}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '<': r'$<$',
    '>': r'$>$',
    '±': r'$\pm$',
    '≥': r'$\geq$',
    '\N{MINUS SIGN}': r'$-$',
    '\N{MULTIPLICATION SIGN}': r'$\times$',
    '\N{EN DASH}': '--',
    '—': '---',
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Text for readers beside the unrounded numbers.

    Attributes:
        name (str): File name without ending.
        title (str): A few words.
        caption (str): Meaning and origin of the columns.
        columns (Sequence[str]): Heads.
        rows (Sequence[Sequence[str]]): Text of each cell.
        data (Sequence[dict[str, Any]]): One dict per row, unrounded.
        align (str): ``l`` for a column of words, ``r`` for numbers.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Sequence[Row]
    align: str

    def starts_group(self, i: int) -> bool:
        """Compare the first column of a row with the row before.

        Args:
            i (int): Number of the row, from 0.

        Returns:
            bool: True where it changes; False for the first row, and if it
            changes everywhere.
        """
        changes = [a[0] != b[0] for a, b in itertools.pairwise(self.rows)]
        return i > 0 and changes[i - 1] and not all(changes)


def number(value: float | None, digits: int = 3) -> str:
    """Round a number for readers.

    Args:
        value (float | None): None gives empty text.
        digits (int): Significant ones. Defaults to 3.

    Returns:
        str: ``'∞'`` for infinity.

    Example:
        >>> number(0.123456), number(float('inf')), number(None)
        ('0.123', '∞', '')
    """
    if value is None:
        return ''
    if math.isinf(value):
        return '∞' if value > 0 else '-∞'
    return f'{value:.{digits}g}'


def percent(share: float | None) -> str:
    """Write a share in percent, never as 0 or 100 where it is not.

    Args:
        share (float | None): From 0 to 1; None gives empty text.

    Returns:
        str: With its unit.

    Example:
        >>> percent(0.0123), percent(0.00001), percent(0.99999)
        ('1.2 %', 'less than 0.1 %', 'more than 99.9 %')
    """
    if share is None:
        return ''
    if 0 < share < 0.001:
        return 'less than 0.1 %'
    if 0.999 < share < 1:
        return 'more than 99.9 %'
    return f'{100 * share:.2g} %' if share < 0.1 else f'{100 * share:.0f} %'


def make_table(
    name: str,
    title: str,
    caption: str,
    heads: Mapping[str, str],
    rows: Sequence[Row],
    formats: Mapping[str, str | Callable[[Any], str]] | None = None,
    words: int | None = None,
    data: Sequence[Row] | None = None,
) -> Table:
    """Choose and format columns of rows.

    Args:
        name (str): File name without ending.
        title (str): A few words.
        caption (str): Meaning and origin of the columns.
        heads (Mapping[str, str]): Key in the rows to head, in order.
        rows (Sequence[dict[str, Any]]): Words and numbers; a missing key is
            an empty cell.
        formats (Mapping, optional): By key a format such as ``'.2f'`` or a
            function. Defaults to None: words as they are, numbers with three
            digits.
        words (int, optional): Count of columns, from the left, that are
            words. Defaults to None: columns that hold a string.
        data (Sequence[dict[str, Any]], optional): Numbers of the CSV file.
            Defaults to None, for the rows with all of their columns.

    Returns:
        Table: Title, text and numbers.

    Example:
        >>> rows = [dict(layer=0, gain=1.23456), dict(layer=1, gain=None)]
        >>> table = make_table('t', '', '', dict(gain='gain'), rows)
        >>> table.rows
        [['1.23'], ['']]
    """
    formats = formats or {}
    cells = [
        [_text(row.get(k), formats.get(k)) for k in heads] for row in rows
    ]
    if words is None:
        align = ''.join(
            'l' if any(isinstance(row.get(k), str) for row in rows) else 'r'
            for k in heads
        )
    else:
        align = 'l' * words + 'r' * (len(heads) - words)
    columns = [*heads.values()]
    data = rows if data is None else data
    return Table(name, title, caption, columns, cells, data, align)


def _text(value: Any, kind: str | Callable[[Any], str] | None) -> str:
    if value is None or (kind is None and isinstance(value, str)):
        return value or ''
    if kind is None:
        return number(value)
    return kind(value) if callable(kind) else format(value, kind)


def to_markdown(table: Table) -> str:
    """Write a table as Markdown, for a page or a terminal.

    Args:
        table (Table): The table.

    Returns:
        str: Without title and caption.
    """
    rules = ['---' if side == 'l' else '--:' for side in table.align]
    escaped = [
        [cell.replace('|', r'\|') for cell in row] for row in table.rows
    ]
    rows = [table.columns, rules, *escaped]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def to_csv(data: Sequence[dict[str, Any]]) -> str:
    """Write numbers as CSV, unrounded.

    Args:
        data (Sequence[dict[str, Any]]): Rows; the first ones to have a name
            decide the order of the columns.

    Returns:
        str: With a line of names; None becomes an empty field.
    """
    names = list(dict.fromkeys(name for row in data for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator='\n')
    writer.writeheader()
    writer.writerows(data)
    return out.getvalue()


def to_latex(table: Table) -> str:
    """Write a table for LaTeX with the package booktabs.

    Args:
        table (Table): The table.

    Returns:
        str: A ``table`` environment with caption and label.
    """
    lines = [
        r'\begin{table}',
        r'  \centering',
        rf'  \caption{{{latex_text(table.title)}. '
        rf'{latex_text(table.caption)}}}',
        rf'  \label{{tab:{table.name}}}',
        rf'  \begin{{tabular}}{{{table.align}}}',
        r'    \toprule',
        _latex_row(table.columns),
        r'    \midrule',
        *_latex_rows(table),
        r'    \bottomrule',
        r'  \end{tabular}',
        r'\end{table}',
    ]
    return '\n'.join(lines) + '\n'


def _latex_rows(table: Table) -> Iterator[str]:
    for i, row in enumerate(table.rows):
        if table.starts_group(i):
            yield r'    \addlinespace'
        yield _latex_row(row)


def _latex_row(cells: Sequence[str]) -> str:
    return f'    {" & ".join(latex_text(cell) for cell in cells)} \\\\'


def latex_text(text: str) -> str:
    r"""Escape the characters that LaTeX would read as commands.

    Args:
        text (str): Any text.

    Returns:
        str: LaTeX that prints the text.

    Example:
        >>> latex_text('5 %')
        '5 \\%'
    """
    return ''.join(_LATEX.get(char, char) for char in text)

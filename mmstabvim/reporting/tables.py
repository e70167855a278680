"""Tables of a report and how they are written."""

import csv
import dataclasses
import html
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

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
    """A table as people read it, and its numbers.

    Attributes:
        name (str): File name without ending.
        title (str): A few words.
        caption (str): What the columns are and how they came about.
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
    data: Sequence[dict[str, Any]]
    align: str


def to_markdown(table: Table) -> str:
    """Write a table as Markdown.

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
        *_latex_rows(table.rows),
        r'    \bottomrule',
        r'  \end{tabular}',
        r'\end{table}',
    ]
    return '\n'.join(lines) + '\n'


def _starts_group(rows: Sequence[Sequence[str]], i: int) -> bool:
    """Whether the first column changes; never if it always does."""
    changes = [a[0] != b[0] for a, b in itertools.pairwise(rows)]
    return i > 0 and changes[i - 1] and not all(changes)


def _latex_rows(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for i, row in enumerate(rows):
        if _starts_group(rows, i):
            yield r'    \addlinespace'
        yield _latex_row(row)


def _latex_row(cells: Sequence[str]) -> str:
    return f'    {" & ".join(latex_text(cell) for cell in cells)} \\\\'


def latex_text(text: str) -> str:
    """Escape what LaTeX would read as a command.

    Args:
        text (str): Any text.

    Returns:
        str: What prints as that text.
    """
    return ''.join(_LATEX.get(char, char) for char in text)


def to_html(table: Table) -> str:
    """Write a table for a page.

    Args:
        table (Table): The table.

    Returns:
        str: In a box of its own that scrolls if it is too wide.
    """

    def cell(tag: str, i: int, text: str) -> str:
        kind = '' if table.align[i] == 'l' else ' class="number"'
        return f'<{tag}{kind}>{html.escape(text)}</{tag}>'

    def row(tag: str, cells: Sequence[str], kind: str = '') -> str:
        inner = ''.join(cell(tag, i, text) for i, text in enumerate(cells))
        return f'<tr{kind}>{inner}</tr>'

    starts = [_starts_group(table.rows, i) for i in range(len(table.rows))]
    body = '\n'.join(
        row('td', cells, ' class="group"' if start else '')
        for cells, start in zip(table.rows, starts, strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{html.escape(table.title)}"><table>\n'
        f'<thead>{row("th", table.columns)}</thead>\n'
        f'<tbody>\n{body}\n</tbody></table></div>'
    )

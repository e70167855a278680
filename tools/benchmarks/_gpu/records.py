"""What a stage found: JSON, Markdown beside it, rewritten at every row."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMPLETE = ('ok', 'skipped')
"""Ends of a stage that are no failure."""


class Table:
    """Rows of one kind.

    Args:
        record (Record): Where the table belongs; saved at every row.
        title (str): Heading.
        columns (Mapping[str, str]): Heading of each key of a row.
    """

    def __init__(
        self, record: 'Record', title: str, columns: Mapping[str, str]
    ) -> None:
        self._record, self._columns = record, columns
        self.rows: list[dict[str, Any]] = []
        record.data['tables'].append(
            dict(title=title, columns=dict(columns), rows=self.rows)
        )

    def add(self, **row: Any) -> None:
        """Append a row and write the stage's files."""
        unknown = row.keys() - self._columns.keys()
        if unknown:
            raise KeyError(f'no column for {sorted(unknown)}')
        self.rows.append({key: row.get(key) for key in self._columns})
        self._record.save()


class Record:
    """Everything that a stage reports, on disk at every moment.

    Args:
        path (Path): Of the JSON file; Markdown goes beside it.
        stage (str): Name of the stage.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.data: dict[str, Any] = dict(
            stage=stage,
            status='running',
            seconds=None,
            notes=[],
            tables=[],
            error=None,
        )
        self.save()

    @classmethod
    def load(cls, path: Path, stage: str) -> 'Record':
        """Continue what another process has left, if it has left anything."""
        record = cls.__new__(cls)
        record.path = path
        try:
            record.data = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return cls(path, stage)
        return record

    def note(self, text: str) -> None:
        """Add a sentence that a reader of the numbers must know."""
        if text not in self.data['notes']:
            self.data['notes'].append(text)
        self.save()

    def table(self, title: str, **columns: str) -> Table:
        """Start a table."""
        return Table(self, title, columns)

    def finish(
        self, status: str, seconds: float, error: str | None = None
    ) -> None:
        """Write the end: ``ok``, ``skipped``, ``partial``, ``failed``."""
        self.data.update(status=status, seconds=round(seconds, 1), error=error)
        self.save()

    def save(self) -> None:
        """Replace both files."""
        write(self.path, json.dumps(plain(self.data), indent=1) + '\n')
        write(self.path.with_suffix('.md'), to_markdown(self.data))


def write(path: Path, text: str) -> None:
    """Replace a file at once: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    part.write_text(text)
    os.replace(part, path)


def plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def to_markdown(data: Mapping[str, Any]) -> str:
    """A stage as a section."""
    seconds = data['seconds']
    spent = '' if seconds is None else f', {seconds:.0f} s'
    lines = [f'## {data["stage"]}: {data["status"]}{spent}', '']
    lines += [f'- {note}' for note in data['notes']]
    lines += [''] * bool(data['notes'])
    for table in data['tables']:
        lines += [f'### {table["title"]}', '', *_rows(table), '']
    if data['error']:
        lines += ['```text', data['error'].rstrip(), '```', '']
    return '\n'.join(lines)


def _rows(table: Mapping[str, Any]) -> list[str]:
    columns = table['columns']
    lines = [_line(columns.values()), '|' + '---|' * len(columns)]
    for row in table['rows']:
        lines.append(_line(show(row[key]) for key in columns))
    return lines


def _line(cells: Any) -> str:
    return '| ' + ' | '.join(cells) + ' |'


def show(value: Any) -> str:
    """A cell of a table: four digits of a float, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, float):
        return f'{value:.0f}' if abs(value) >= 1e4 else f'{value:.4g}'
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ', '.join(show(item) for item in value)
    # a newline or a bar would end the row or the cell
    return str(value).replace('\n', ' ').replace('|', '\\|')

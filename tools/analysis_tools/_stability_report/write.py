"""Write the report's files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _stability_report import page
from _stability_report.findings import Finding
from _stability_report.page import Section
from mmstabvim.reporting.tables import to_csv
from mmstabvim.reporting.writing import plain
from mmstabvim.visualization import style

NAME = 'stability_report'
FORMATS = ('pdf', 'svg')
ENDINGS = ('png', 'csv', *FORMATS)
DPI = 150  # the page holds all figures


def write_files(
    folder: Path,
    title: str,
    facts: dict[str, str],
    sections: Sequence[Section],
    findings: Sequence[Finding],
    numbers: dict[str, Any],
    formats: Sequence[str] = (),
) -> None:
    """Write page, Markdown, JSON, figures and tables.

    Args:
        folder (Path): An existing one; files of an earlier report are
            replaced.
        title (str): Heading.
        facts (dict[str, str]): Name and text.
        sections (Sequence[Section]): In their order.
        findings (Sequence[Finding]): Of the model.
        numbers (dict[str, Any]): For the JSON file.
        formats (Sequence[str]): Of figures besides PNG. Defaults to none.
    """
    clear(folder)
    for section in sections:
        for picture in section.pictures:
            place = folder / 'figures' / picture.name
            style.save(picture.figure, place, ('png', *formats), DPI)
            place.with_suffix('.csv').write_text(to_csv(picture.rows))
        for table in section.tables:
            place = folder / 'tables' / f'{section.name}_{table.name}.csv'
            place.write_text(to_csv(table.data))
    text = json.dumps(plain(numbers), indent=1, allow_nan=False) + '\n'
    place = folder / NAME
    place.with_suffix('.json').write_text(text, encoding='utf-8')
    text = page.to_markdown(title, facts, sections)
    place.with_suffix('.md').write_text(text, encoding='utf-8')
    text = page.to_html(title, facts, sections, findings, folder)
    place.with_suffix('.html').write_text(text, encoding='utf-8')


def clear(folder: Path) -> None:
    """Make the folders; remove what an earlier report left in them."""
    for name in ('figures', 'tables'):
        inner = folder / name
        inner.mkdir(parents=True, exist_ok=True)
        for ending in ENDINGS:
            for path in inner.glob(f'*.{ending}'):
                path.unlink()

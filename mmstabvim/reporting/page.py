"""Pages of a report, by Jinja2 templates: one HTML file, or Markdown."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from mmstabvim.reporting import style
from mmstabvim.reporting.tables import Row, Table, to_csv, to_markdown
from mmstabvim.version import __version__

_PIXELS = 133  # of an inch: a figure of a full line fills the page
_DPI = 150  # an HTML page holds all of its figures


@dataclass(frozen=True)
class Picture:
    """A figure, its data and its words.

    Attributes:
        name (str): File name without ending.
        title (str): A few words.
        caption (str): Content of the figure, and its origin.
        figure (Figure): The figure.
        rows (list[dict]): Everything that is drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    rows: list[Row]

    @property
    def width(self) -> int:
        """Width on a page in pixels: equal letters, small figures small."""
        return round(_PIXELS * self.figure.get_figwidth())


@dataclass
class Section:
    """A part of a page.

    Attributes:
        name (str): Anchor of the section, and beginning of its tables' files.
        title (str): Heading.
        guide (str): How to read it, a sentence. Defaults to none.
        notes (list[str]): Sentences.
        listed (Table, optional): Severity and text, a list in HTML.
        pictures (list[Picture]): Figures.
        tables (list[Table]): Tables; below the figures.
        folded (list[Table]): Tables behind their titles.
        tables_first (bool): Put the tables above the figures.
    """

    name: str
    title: str
    guide: str = ''
    notes: list[str] = field(default_factory=list)
    listed: Table | None = None
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    tables_first: bool = False

    @property
    def all_tables(self) -> list[Table]:
        """Tables in the order of the page."""
        listed = [self.listed] if self.listed else []
        return [*listed, *self.tables, *self.folded]


def render(name: str, **values: Any) -> str:
    """Fill a template of ``mmstabvim/reporting/templates``.

    Args:
        name (str): File name without ``.jinja``; text is escaped where it
            ends in ``.html``.
        **values (Any): What the template names.

    Returns:
        str: The text, which ends with a line break.

    Raises:
        jinja2.UndefinedError: If a value is missing.
    """
    environment = Environment(
        loader=PackageLoader('mmstabvim.reporting'),
        autoescape=name.endswith('.html'),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters['markdown'] = to_markdown
    return environment.get_template(f'{name}.jinja').render(**values)


def to_html(
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    folder: Path,
) -> str:
    """Put a report into one HTML page: no other file, no script, no network.

    Args:
        title (str): Heading.
        facts (Mapping[str, str]): Name and text.
        sections (Sequence[Section]): In their order.
        folder (Path): With ``figures/NAME.png`` of each picture.

    Returns:
        str: The page.
    """

    def data_of(picture: Picture) -> str:
        path = folder / 'figures' / f'{picture.name}.png'
        return base64.b64encode(path.read_bytes()).decode()

    return render(
        'page.html',
        title=title,
        facts=facts,
        sections=sections,
        data_of=data_of,
        version=__version__,
    )


def write_report(
    folder: Path,
    name: str,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    formats: Sequence[str] = (),
) -> None:
    """Write NAME.html, NAME.md, ``figures/`` and ``tables/``.

    Args:
        folder (Path): Created where it is missing; figures and tables of an
            earlier report are removed.
        name (str): File name without ending.
        title (str): Heading.
        facts (Mapping[str, str]): Name and text.
        sections (Sequence[Section]): In their order.
        formats (Sequence[str]): Of figures besides PNG. Defaults to none.
    """
    for part in ('figures', 'tables'):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for path in (folder / part).iterdir():
            if path.suffix[1:] in (*style.FORMATS, 'csv'):
                path.unlink()
    for section in sections:
        for picture in section.pictures:
            place = folder / 'figures' / picture.name
            style.save(picture.figure, place, ('png', *formats), _DPI)
            place.with_suffix('.csv').write_text(to_csv(picture.rows))
        for table in section.all_tables:
            place = folder / 'tables' / f'{section.name}_{table.name}.csv'
            place.write_text(to_csv(table.data), encoding='utf-8')
    about: Any = dict(title=title, facts=facts, sections=sections)
    pages = {
        'md': render('page.md', **about),
        'html': to_html(folder=folder, **about),
    }
    for ending, text in pages.items():
        (folder / f'{name}.{ending}').write_text(text, encoding='utf-8')

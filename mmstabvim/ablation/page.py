"""One page that holds a report: no other files, no script, no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmstabvim.reporting.page import Picture, Section, to_html
from mmstabvim.reporting.tables import Table


def write_page(
    title: str,
    facts: Mapping[str, str],
    found: Sequence[Table],
    pictures: Sequence[Picture],
    folder: Path,
) -> str:
    """Put a report into one HTML page, a section per table and figure.

    Args:
        title (str): Heading.
        facts (Mapping[str, str]): Name and text.
        found (Sequence[Table]): The tables.
        pictures (Sequence[Picture]): The figures.
        folder (Path): With ``figures/NAME.png`` of each.

    Returns:
        str: The page.
    """
    sections = [Section(t.name, t.title, tables=[t]) for t in found]
    sections += [Section(p.name, p.title, pictures=[p]) for p in pictures]
    return to_html(title, facts, sections, folder)

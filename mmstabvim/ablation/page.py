"""One page that holds a report: no other files, no script, no network."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmstabvim.ablation.layout import Picture
from mmstabvim.reporting import tables
from mmstabvim.reporting.tables import Table
from mmstabvim.version import __version__

_PIXELS = 133  # of an inch: a figure of a full line fills the page

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: #1a1a1a; background: #fff; overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .4rem; }
a { color: #0b57a4; }
nav ul { padding-left: 1.2rem; margin: .3rem 0; columns: 2 20rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: .2rem 1rem; margin: 0 0 1rem; }
dt { color: #595959; }
dd { margin: 0; }
code { font: .85em/1.4 ui-monospace, Menlo, Consolas, monospace; }
p.caption { color: #404040; font-size: .9rem; margin: .2rem 0 .7rem;
  max-width: 48rem; }
.scroll { overflow-x: auto; border: 1px solid #ddd; border-radius: 4px; }
table { border-collapse: collapse; font-size: .87rem; min-width: 100%; }
th, td { padding: .28rem .7rem; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #888; background: #f5f5f5; }
td { border-bottom: 1px solid #eee; }
tr.group td { border-top: 2px solid #bbb; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
footer { margin-top: 3rem; color: #595959; font-size: .85rem; }
@media (max-width: 32rem) {
  dl { grid-template-columns: minmax(0, 1fr); }
  dd { margin-bottom: .4rem; }
}
@media print { .scroll { overflow: visible; border: 0; } }
"""


def write_page(
    title: str,
    facts: Mapping[str, str],
    found: Sequence[Table],
    pictures: Sequence[Picture],
    folder: Path,
) -> str:
    """Put a report into one HTML page.

    Args:
        title (str): Heading.
        facts (Mapping[str, str]): Name and text.
        found (Sequence[Table]): The tables.
        pictures (Sequence[Picture]): The figures.
        folder (Path): With ``figures/NAME.png`` of each.

    Returns:
        str: The page.
    """
    sections = [_table(table) for table in found]
    sections += [_picture(picture, folder) for picture in pictures]
    contents = [(table.name, table.title) for table in found]
    contents += [(picture.name, picture.title) for picture in pictures]
    return make_page(title, facts, contents, ''.join(sections))


def make_page(
    title: str,
    facts: Mapping[str, str],
    contents: Sequence[tuple[str, str]],
    body: str,
    style: str = '',
) -> str:
    """Put a body into one HTML page.

    Args:
        title (str): Heading.
        facts (Mapping[str, str]): Name and text.
        contents (Sequence[tuple[str, str]]): ``id`` and title of each section.
        body (str): The sections, as HTML.
        style (str): More CSS. Defaults to none.

    Returns:
        str: The page.
    """
    heading = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
{_facts(facts)}
</header>
{_contents(contents)}
<main>
{body}</main>
<footer>Written by mmstabvim {__version__}; the numbers are in the CSV files
beside this page.</footer>
</body>
</html>
"""


def _facts(facts: Mapping[str, str]) -> str:
    lines = []
    for name, text in facts.items():
        shown = html.escape(text)
        if name == 'Command':
            shown = f'<code>{shown}</code>'
        lines.append(f'<dt>{html.escape(name)}</dt><dd>{shown}</dd>')
    return f'<dl>{"".join(lines)}</dl>'


def _contents(sections: Sequence[tuple[str, str]]) -> str:
    items = [
        f'<li><a href="#{name}">{html.escape(title)}</a></li>'
        for name, title in sections
    ]
    return f'<nav aria-label="Contents"><ul>{"".join(items)}</ul></nav>'


def _table(table: Table) -> str:
    return (
        f'<section id="{table.name}"><h2>{html.escape(table.title)}</h2>\n'
        f'<p class="caption">{html.escape(table.caption)}</p>\n'
        f'{tables.to_html(table)}</section>\n'
    )


def _picture(picture: Picture, folder: Path) -> str:
    return (
        f'<section id="{picture.name}"><h2>{html.escape(picture.title)}</h2>\n'
        f'{figure_html(picture, folder)}</section>\n'
    )


def figure_html(picture: Picture, folder: Path) -> str:
    """A figure with its caption, the image inside.

    Args:
        picture (Picture): The figure.
        folder (Path): With ``figures/NAME.png``.

    Returns:
        str: A ``figure`` element.
    """
    image = (folder / 'figures' / f'{picture.name}.png').read_bytes()
    data = base64.b64encode(image).decode()
    title = html.escape(picture.title)
    # so that letters have one size, and small figures stay small
    width = round(_PIXELS * picture.figure.get_figwidth())
    return (
        f'<figure><img alt="{title}" style="max-width: {width}px" '
        f'src="data:image/png;base64,{data}">\n'
        f'<figcaption><p class="caption">{html.escape(picture.caption)}</p>'
        '</figcaption></figure>'
    )

"""Settings of the documentation's site; ``make docs`` builds it.

The pages are Markdown that reads well on GitHub too. Their links to files
outside of ``docs/`` become links to the repository. The pages of the API are
written to ``docs/api/`` before each build: one for each room of the package,
one for each public name.
"""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import public_names  # noqa: E402  (found through the path above)

from mmstabvim.version import __version__  # noqa: E402

HOME = 'https://github.com/mmstabvim/mmstabvim'
logger = logging.getLogger(__name__)

project = 'mmstabvim'
author = 'The mmstabvim authors'
copyright = author  # the name that Sphinx reads
version = release = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
# tables that other pages show
TABLES = [
    'ablation/*/tables/*',
    'sensitivity/*.md',
    'sensitivity/*/*.md',
    'spectra/ptd/*.md',
]
exclude_patterns = ['_build', *TABLES]

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
suppress_warnings = [
    'myst.header',  # reports begin at the second level
    'ref.python',  # shapes such as (directions, batch) are read as types
]

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings have the types
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = 'furo'
html_title = f'mmstabvim {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {
    'source_repository': HOME,
    'source_branch': 'main',
    'source_directory': 'docs/',
}
copybutton_exclude = '.linenos, .gp, .go'

FENCE = re.compile(r'^( *)```.*?^\1```$', re.M | re.S)
LINK = re.compile(r'(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))')


def link_to_repository(path: Path) -> str:
    """Address of a file or folder in the repository."""
    kind = 'tree' if path.is_dir() else 'blob'
    return f'{HOME}/{kind}/main/{path.relative_to(ROOT)}'


def adapt_links(text: str, page: Path) -> str:
    """Point the links that leave the site to the repository.

    Args:
        text (str): Markdown of a page.
        page (Path): The page; links are relative to it.

    Returns:
        str: The same text, blocks of code unchanged.
    """

    def adapt(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match[1]))
        inside = target.is_relative_to(DOCS) and not target.is_dir()
        if inside and target.suffix == '.md':
            return match[0] if is_page(target) else link_to_repository(target)
        if inside or not target.exists():
            return match[0]
        return link_to_repository(target) + (match[2] or '')

    def outside(text: str) -> str:
        return LINK.sub(adapt, text)

    parts, end = [], 0
    for block in FENCE.finditer(text):
        parts += [outside(text[end : block.start()]), block[0]]
        end = block.end()
    return ''.join([*parts, outside(text[end:])])


def is_page(path: Path) -> bool:
    """Say if a Markdown file of ``docs/`` is a page of the site."""
    place = path.relative_to(DOCS)
    return not any(place.match(pattern) for pattern in TABLES)


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adapt the links of a page that was read."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == '.md':
        source[0] = adapt_links(source[0], page)


def escape_stars(lines: list[str]) -> list[str]:
    """Take stars and bars in prose for what they are, not for markup."""
    escaped, literal = [], False
    for line in lines:
        if line and not line.startswith(' ' * 4):
            literal = False
        if literal or line.lstrip().startswith(('>>>', '...')):
            escaped.append(line)
        else:
            parts = re.split(r'(``.*?``)', line)
            parts[::2] = [re.sub(r'[*|]', r'\\\g<0>', x) for x in parts[::2]]
            escaped.append(''.join(parts))
        literal = literal or line.endswith('::')
    return escaped


def read_docstring(
    app: Sphinx,
    what: str,
    name: str,
    thing: object,
    options: object,
    lines: list[str],
) -> None:
    """Escape the docstring of a name that was read."""
    lines[:] = escape_stars(lines)


def check_names(app: Sphinx, env: object) -> None:
    """Warn of each public name that has no page."""
    documented = app.env.get_domain('py').objects
    for name in public_names.missing(set(documented)):
        logger.warning('%s has no page', name)


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    public_names.write_pages(DOCS / 'api')
    app.connect('source-read', read_source)
    # before napoleon, which itself writes markup
    app.connect('autodoc-process-docstring', read_docstring, priority=100)
    app.connect('env-check-consistency', check_names)

"""The public names of the package, and the pages that show them.

A name is public if it is in the ``__all__`` of a module. An object that has
several names gets one page, under the shortest of them.
"""

import pkgutil
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from types import ModuleType

from sphinx.pycode import ModuleAnalyzer

import mmstabvim

INDEX = """API
===

Which names are public? Those on the pages below: each module lists them in
its ``__all__``, and each has a page with its arguments, shapes, units and
errors. Names under ``mmstabvim`` itself are the ones to import; they load on
first use. A name that is not here may change in any version.

.. toctree::
   :maxdepth: 1

   {pages}
"""
PAGE = """{module}
{rule}

.. currentmodule:: {module}

.. automodule:: {module}
   :no-members:
   :no-index:
"""
LIST = """
.. autosummary::
   :toctree: names
   :nosignatures:

   {names}
"""
CONSTANT = """
.. py:data:: {name}
   :type: {kind}

{text}
"""


def public_modules() -> list[ModuleType]:
    """Find the modules that list their public names, the package first."""
    found = [mmstabvim]
    for info in pkgutil.walk_packages(mmstabvim.__path__, 'mmstabvim.'):
        # the others need not be importable without Triton
        if lists_names(info.name) and not is_private(info.name):
            found.append(import_module(info.name))
    return sorted(found, key=lambda m: (m.__name__.count('.'), m.__name__))


def lists_names(name: str) -> bool:
    """Say if a module lists its public names, without importing it."""
    source = find_spec(name).origin
    return '\n__all__ = ' in Path(source).read_text(encoding='utf-8')


def is_private(name: str) -> bool:
    """Say if a part of a dotted name begins with an underscore."""
    return any(part.startswith('_') for part in name.split('.'))


def identity(module: ModuleType, name: str) -> object:
    """Return a value that all names of one object share."""
    found = getattr(module, name)
    if hasattr(found, '__qualname__'):
        return found.__module__, found.__qualname__
    return id(found)


def pages() -> dict[str, list[str]]:
    """Assign each public object to one module.

    Returns:
        dict[str, list[str]]: Name of a module to the names on its page.
    """
    seen: set[object] = set()
    found: dict[str, list[str]] = {}
    for module in public_modules():
        for name in module.__all__:
            if name.startswith('__'):
                continue
            what = identity(module, name)
            if what not in seen:
                seen.add(what)
                found.setdefault(module.__name__, []).append(name)
    return found


def is_constant(module: str, name: str) -> bool:
    """Say if a public name is neither a class nor a function."""
    return not hasattr(getattr(sys.modules[module], name), '__qualname__')


def page(module: str, names: list[str]) -> Iterator[str]:
    """Write the page of a module, in parts."""
    yield PAGE.format(module=module, rule='=' * len(module))
    constants = [name for name in sorted(names) if is_constant(module, name)]
    others = sorted({*names} - {*constants})
    if others:
        yield LIST.format(names='\n   '.join(others))
    for name in constants:
        value = getattr(sys.modules[module], name)
        text = indent(constant_docstring(name, value), '   ')
        kind = type(value).__name__
        yield CONSTANT.format(name=name, kind=kind, text=text)


def constant_docstring(name: str, value: object) -> str:
    """Read the docstring below the assignment of a constant."""
    for module in [*sys.modules]:
        if not module.startswith('mmstabvim'):
            continue
        if vars(sys.modules[module]).get(name) is value:
            found = ModuleAnalyzer.for_module(module).find_attr_docs()
            if ('', name) in found:
                return '\n'.join(found['', name])
    return ''


def write_pages(folder: Path) -> None:
    """Write a page for each module, which lists its names, and an index.

    Args:
        folder (Path): Of the pages; those of names that are gone go.
    """
    found = pages()
    texts = {
        module: ''.join(page(module, names)) for module, names in found.items()
    }
    texts['index'] = INDEX.format(pages='\n   '.join(found))
    (folder / 'names').mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        place = folder / f'{name}.rst'
        # a page that is written again is read again
        if not place.exists() or place.read_text() != text:
            place.write_text(text)
    names = {
        f'{module}.{name}'
        for module, names in found.items()
        for name in names
        if not is_constant(module, name)
    }
    for place in [*folder.glob('*.rst'), *folder.glob('names/*.rst')]:
        known = texts if place.parent == folder else names
        if place.stem not in known:
            place.unlink()


def missing(documented: Iterable[str]) -> list[str]:
    """List the public names that have no page.

    Args:
        documented (Iterable[str]): Full names that the site has.

    Returns:
        list[str]: Full names, sorted.
    """
    wanted = {f'{m}.{name}' for m, names in pages().items() for name in names}
    return sorted(wanted - set(documented))

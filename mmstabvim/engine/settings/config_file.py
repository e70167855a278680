"""Read a config file and its bases; say where a mistake in them is."""

import ast
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmengine
from mmengine.config import Config

from mmstabvim.engine.mistakes import Mistake, SettingError
from mmstabvim.engine.work_dir import check_file

SUFFIXES = ('.py', '.yaml', '.yml', '.json')

_FROM_BASE = re.compile(r'\{\{\s*_base_\.(\w+)')


@dataclass
class ConfigFile:
    """One file of a config: names in it, and the files it builds on.

    Attributes:
        path (str): Path of the file.
        names (set[str]): Top-level settings and variables that it sets.
        used (set[str]): Names whose values it uses, its own or a base's.
        bases (list[ConfigFile]): Files that it inherits from.
        foreign (bool): Part of an installed package other than this one.
    """

    path: str
    names: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    bases: list['ConfigFile'] = field(default_factory=list)
    foreign: bool = False

    def walk(self) -> Iterator['ConfigFile']:
        """Yield the file and all that it inherits from."""
        yield self
        for base in self.bases:
            yield from base.walk()

    def inherited(self) -> set[str]:
        """Collect the names that the files below set."""
        files = (file for base in self.bases for file in base.walk())
        return {name for file in files for name in file.names}


def read_config(path: str) -> tuple[Config, ConfigFile]:
    """Read a config.

    Args:
        path (str): The config file.

    Returns:
        tuple[Config, ConfigFile]: Merged settings, and the files they come
        from.

    Raises:
        FileNotFoundError: If the file, or one that it inherits from, does
            not exist.
        ValueError: If one of them is empty, of another kind or broken; with
            its name and line.
    """
    check_file(path, 'config file')
    file = parse(path)
    try:
        cfg = Config.fromfile(path)
    except ImportError:
        raise  # of the environment, not of the config
    except Exception as error:
        raise SettingError(_locate(file, error)) from error
    if not cfg:
        raise SettingError(f'config file {path!r} is empty: it sets nothing')
    return cfg, file


def parse(path: str, foreign: bool = False) -> ConfigFile:
    """Find what a config file sets and inherits from, without running it.

    Args:
        path (str): An existing file.
        foreign (bool): Part of another package. Defaults to False.

    Returns:
        ConfigFile: The file with its bases.

    Raises:
        FileNotFoundError: If a base does not exist.
        ValueError: If the syntax is broken.
    """
    if Path(path).suffix not in SUFFIXES:
        raise SettingError(
            f'config file wants a suffix in {SUFFIXES}, got {path!r}'
        )
    text = Path(path).read_text(encoding='utf-8')
    file = ConfigFile(path, used=set(_FROM_BASE.findall(text)))
    file.foreign = foreign
    bases: Any
    if path.endswith('.py'):
        tree = _syntax_tree(path, text)
        file.names, used = _names_in(tree)
        file.used |= used
        bases = [*_lazy_bases(path, tree), *_bases(path)]
    else:
        file.names = set(_load_plain(path)) - {'_base_'}
        bases = _bases(path)
    for base, of_package in bases:
        check_file(base, f'{path}: its base')
        file.bases.append(parse(base, foreign or of_package))
    return file


def _syntax_tree(path: str, text: str) -> ast.Module:
    """Parse Python; an error names the file and the line."""
    try:
        return ast.parse(text, path)
    except SyntaxError as error:
        line = (error.text or '').strip()
        raise SettingError(
            f'{path}, line {error.lineno}: {error.msg}: {line}'
        ) from error


def _load_plain(path: str) -> dict[str, Any]:
    """Load YAML or JSON."""
    try:
        loaded = mmengine.load(path)
    except Exception as error:
        raise SettingError(f'{path}: {error}') from error
    if loaded is not None and not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise SettingError(f'{path}: wanted settings by name, got a {kind}')
    if not loaded:
        raise SettingError(f'config file {path!r} is empty: it sets nothing')
    return loaded


def _names_in(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Collect the names that Python code sets and those that it uses."""
    names, used = set(), set()
    for statement in tree.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            names |= {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Store)
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        if isinstance(node, ast.Attribute) and (
            isinstance(node.value, ast.Name) and node.value.id == '_base_'
        ):
            used.add(node.attr)
    return names - {'_base_'}, used


def _bases(path: str) -> Iterator[tuple[str, bool]]:
    """Find the files under ``_base_``, and tell those of other packages."""
    try:
        for base in Config._get_base_files(path):
            package = base.partition('::')[0] if '::' in base else 'mmstabvim'
            yield Config._get_cfg_path(base, path)[0], package != 'mmstabvim'
    except Exception as error:
        raise SettingError(f'{path}: its _base_: {error}') from error


def _lazy_bases(path: str, tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Find the files under ``with read_base()`` that lie beside this one."""
    for block in tree.body:
        for node in block.body if isinstance(block, ast.With) else ():
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = Path(path).resolve().parents[node.level - 1]
                parts = (node.module or '').split('.')
                base = folder.joinpath(*parts).with_suffix('.py')
                yield str(base), False


def _locate(file: ConfigFile, error: Exception) -> str:
    """Name the file and the line where a config went wrong."""
    if isinstance(error, Mistake):
        return str(error)
    paths = {str(Path(part.path).resolve()) for part in file.walk()}
    place = file.path
    for frame in traceback.extract_tb(error.__traceback__):
        if str(Path(frame.filename).resolve()) in paths:
            place = f'{frame.filename}, line {frame.lineno}'
    return f'{place}: {type(error).__name__}: {error}'

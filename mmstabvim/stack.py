"""Find the installed OpenMMLab; refuse it where it cannot work.

The original packages and the maintained fork (``onedl-...``) install the
same folders, so do ``mmcv`` and ``mmcv-lite``. Only metadata and constants
are read here; nothing of OpenMMLab is imported.
"""

import ast
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version

DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
}
"""Names in an index of what installs an import package."""

NEEDS = {
    'mmengine': ('mmengine',),
    'mmcv': ('mmcv', 'mmengine'),
    'mmpretrain': ('mmpretrain', 'mmcv', 'mmengine'),
    'mmseg': ('mmseg', 'mmcv', 'mmengine'),
}
"""Import packages that one needs, itself included."""

_BOUNDS = (
    ('{}_MIN', '{}_MAX'),
    ('{}_MINIMUM_VERSION', '{}_MAXIMUM_VERSION'),
)
"""Constants in which a toolkit names the versions it accepts."""


def installed(package: str) -> dict[str, str]:
    """Find the distributions that install an import package.

    Args:
        package (str): One of :data:`DISTRIBUTIONS`.

    Returns:
        dict[str, str]: Version by name of the distribution; more than one
        entry means that they overwrote each other.
    """
    found = {}
    for name in DISTRIBUTIONS[package]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def find_problem(package: str) -> str | None:
    """Say what keeps an import package from working, and the cure.

    Args:
        package (str): One of :data:`NEEDS`.

    Returns:
        str | None: Sentences for an error message; None if it can work.
    """
    for needed in NEEDS[package]:
        found = installed(needed)
        if len(found) > 1:
            return (
                f'{" and ".join(found)} are both installed and overwrite '
                f'each other (folder {needed!r}). Cure: pip uninstall -y '
                f'{" ".join(_doubtful())}; {install_command()}'
            )
        if not found and _find_spec(needed) is None:
            return f'{needed} is not installed. Cure: {install_command()}'
    if package not in ('mmpretrain', 'mmseg'):
        return None
    problems = (_find_bad_version(package, n) for n in ('mmcv', 'mmengine'))
    return next(filter(None, problems), None)


def check(package: str) -> None:
    """Raise where an import package cannot work.

    Args:
        package (str): One of :data:`NEEDS`.

    Raises:
        ImportError: With the command that cures it; ModuleNotFoundError if
            the package is not installed.

    Example:
        >>> from mmstabvim import stack
        >>> stack.check('mmengine')
    """
    problem = find_problem(package)
    if problem is None:
        return
    there = _find_spec(package) is not None
    error = ImportError if there else ModuleNotFoundError
    raise error(f'{package} cannot be used: {problem}', name=package)


def accepted_versions(package: str, needed: str) -> tuple[str, str] | None:
    """Read from a toolkit's source which versions it accepts.

    Args:
        package (str): ``'mmpretrain'`` or ``'mmseg'``.
        needed (str): ``'mmcv'`` or ``'mmengine'``.

    Returns:
        tuple[str, str] | None: Lower bound, and upper bound that is itself
        refused; None where the source does not tell.
    """
    spec = _find_spec(package)
    if spec is None or not spec.origin:
        return None
    tree = ast.parse(Path(spec.origin).read_text(encoding='utf-8'))
    constants = {
        target.id.upper(): node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for names in _BOUNDS:
        low, high = (name.format(needed.upper()) for name in names)
        if low in constants and high in constants:
            return str(constants[low]), str(constants[high])
    return None


def install_command() -> str:
    """Name the command that installs OpenMMLab, of the form that is there.

    Returns:
        str: For an error message.
    """
    fork = any(map(_is_fork, (n for p in NEEDS for n in installed(p))))
    return f"pip install 'mmstabvim[{'onedl' if fork else 'lite'}]'"


def ops_command() -> str:
    """Name the commands that install mmcv with its compiled operators.

    Returns:
        str: For an error message; they take ten minutes or more.
    """
    if 'onedl-mmcv' in installed('mmcv'):
        return (
            'pip install --no-build-isolation --no-cache-dir --no-deps '
            '--force-reinstall onedl-mmcv'
        )
    return (
        'pip uninstall -y mmcv-lite; pip install --no-build-isolation '
        "'mmcv>=2.0.0,<2.2.0'"
    )


def _find_bad_version(package: str, needed: str) -> str | None:
    """Compare a version with what the toolkit asserts."""
    bounds = accepted_versions(package, needed)
    found = installed(needed)
    if bounds is None or not found:
        return None
    ((name, have),) = found.items()
    low, high = bounds
    if Version(low) <= Version(have) < Version(high):
        return None
    return (
        f'{package} wants {needed} >= {low}, < {high}, got {name} {have}. '
        f"Cure: pip install '{name}>={low},<{high}'"
    )


def _doubtful() -> list[str]:
    """List the distributions of which no file can be relied on.

    All, where the original and the fork are mixed: reinstalling one package
    of either would bring in the next pair.
    """
    found = [list(installed(package)) for package in DISTRIBUTIONS]
    names = [name for names in found for name in names]
    if len({_is_fork(name) for name in names}) > 1:
        return names
    return [name for names in found if len(names) > 1 for name in names]


def _is_fork(distribution: str) -> bool:
    """Tell OneDL's distributions from the original ones."""
    return distribution.startswith('onedl-')


# --- imports of other packages ----------------------------------------------


class _Watcher(MetaPathFinder):
    """Finder that calls functions before or after a module is imported.

    Before: as the module is executed, not as it is found, since finding is
    how others ask whether it is installed.
    """

    def __init__(self) -> None:
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> ModuleSpec | None:
        """Find nothing but modules at whose import something happens."""
        if fullname not in self.before and fullname not in self.after:
            return None
        spec = _find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _WithCalls(spec.loader)
        return spec


class _WithCalls(Loader):
    """Loader that calls functions before and after it executes a module."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        """Answer other questions as the real loader does."""
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the real loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Call, execute the module with its own loader back, call."""
        name = module.__name__
        if name in _watcher.before:
            _watcher.before[name]()
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for function in _watcher.after.pop(name, []):
            function(module)


_watcher = _Watcher()


def _find_spec(
    name: str, path: Any = None, target: Any = None
) -> ModuleSpec | None:
    """Find a module as Python does, an editable install too."""
    finders = (f for f in sys.meta_path if f is not _watcher)
    specs = (finder.find_spec(name, path, target) for finder in finders)
    return next(filter(None, specs), None)


def before_import(module: str, function: Callable[[], None]) -> None:
    """Call a function before a module is imported.

    Args:
        module (str): Name; nothing happens if it is imported already.
        function (Callable): May raise ImportError, then is called again at
            the next try.
    """
    if module not in sys.modules:
        _watcher.before[module] = function
        _watch()


def after_import(module: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module, now or after its first import.

    Args:
        module (str): Name.
        function (Callable): Takes the module.
    """
    if module in sys.modules:
        function(sys.modules[module])
    else:
        _watcher.after.setdefault(module, []).append(function)
        _watch()


def _watch() -> None:
    """Put the watcher in front of Python's finders, once."""
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)

"""OpenMMLab as it is installed: found, and refused where it cannot work.

The original packages and the maintained fork (``onedl-...``) install the
same folders, so do ``mmcv`` and ``mmcv-lite``. Only metadata and constants
are read here; nothing of OpenMMLab is imported.
"""

import ast
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
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
            names = ' and '.join(found)
            return (
                f'{names} are both installed and overwrite each other '
                f'(folder {needed!r}). Cure: pip uninstall -y '
                f'{" ".join(found)}; {_install_command()}'
            )
        if not found and PathFinder.find_spec(needed) is None:
            return f'{needed} is not installed. Cure: {_install_command()}'
    if package not in ('mmpretrain', 'mmseg'):
        return None
    problems = (_find_bad_version(package, n) for n in ('mmcv', 'mmengine'))
    return next(filter(None, problems), None)


def check(package: str) -> None:
    """Raise where an import package cannot work.

    Args:
        package (str): One of :data:`NEEDS`.

    Raises:
        ImportError: With the command that cures it.

    Example:
        >>> from mmstabvim import stack
        >>> stack.check('mmengine')
    """
    problem = find_problem(package)
    if problem is not None:
        raise ImportError(f'{package} cannot be used: {problem}')


def accepted_versions(package: str, needed: str) -> tuple[str, str] | None:
    """Read from a toolkit's source which versions it accepts.

    Args:
        package (str): ``'mmpretrain'`` or ``'mmseg'``.
        needed (str): ``'mmcv'`` or ``'mmengine'``.

    Returns:
        tuple[str, str] | None: Lower bound, and upper bound that is itself
        refused; None where the source does not tell.
    """
    spec = PathFinder.find_spec(package)
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
            return constants[low], constants[high]
    return None


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


def _install_command() -> str:
    """Name the command that installs OpenMMLab, of the form that is there."""
    form = 'lite'
    if any(n.startswith('onedl') for p in NEEDS for n in installed(p)):
        form = 'onedl'
    return f"pip install 'mmstabvim[{form}]'"


# --- imports of other packages ----------------------------------------------


class _Watcher(MetaPathFinder):
    """Calls functions before or after a module is imported."""

    def __init__(self) -> None:
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> ModuleSpec | None:
        """Find nothing but modules after whose import something happens."""
        before = self.before.pop(fullname, None)
        if before is not None:
            try:
                before()
            except ImportError:
                self.before[fullname] = before
                raise
        after = self.after.pop(fullname, None)
        if after is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenCall(spec.loader, after)
        return spec


class _ThenCall(Loader):
    """A loader that calls a function with the module it has executed."""

    def __init__(
        self, loader: Loader, after: Callable[[ModuleType], None]
    ) -> None:
        self._loader, self._after = loader, after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the real loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, put its own loader back, call the function."""
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._after(module)


_watcher = _Watcher()


def before_import(module: str, function: Callable[[], None]) -> None:
    """Call a function once, before a module is first imported.

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
        _watcher.after[module] = function
        _watch()


def _watch() -> None:
    """Put the watcher in front of Python's finders, once."""
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)

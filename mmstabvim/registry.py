"""Child registries of mmengine's root registries, scope ``mmstabvim``.

A config of any OpenMMLab toolkit reaches them through the scope:
``type='mmstabvim.VisionMamba'``. Their packages are imported when
a registry is first searched, so importing ``mmstabvim`` stays cheap.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import mmengine.registry as roots
from mmengine.registry import Registry

from mmstabvim import stack


class LazyRegistry(Registry):
    """Registry that imports some of its classes when they are looked up.

    Classes that derive from MMSegmentation's need it and take seconds to
    import, and users of MMPretrain need not have it.

    Args:
        parent (Registry): Registry of mmengine.
        *locations (str): Packages imported when the registry is first
            searched.
    """

    def __init__(self, parent: Registry, *locations: str) -> None:
        super().__init__(
            parent.name,
            parent=parent,
            scope='mmstabvim',
            locations=list(locations),
        )
        self.deferred: dict[str, str] = {}

    def defer(self, **modules: str) -> None:
        """Import classes of these names when they are asked for.

        Args:
            **modules (str): Module of each class, which registers it.
        """
        self.deferred.update(modules)

    def get(self, key: str) -> type | None:
        """Find a class, importing it if it is deferred.

        Args:
            key (str): Name with or without scope.

        Returns:
            type | None: None without such a class, as in mmengine.

        Raises:
            ImportError: If its toolkit is missing, with the command that
                installs it.
        """
        self.import_from_location()
        scope, name = self.split_scope_key(key)
        if scope in (None, self.scope) and name in self.deferred:
            import_of_mmseg(self.deferred[name], name)
        return super().get(key)


MODELS = LazyRegistry(roots.MODELS, 'mmstabvim.models', 'mmstabvim.evaluation')
HOOKS = LazyRegistry(roots.HOOKS, 'mmstabvim.engine.hooks')
OPTIM_WRAPPER_CONSTRUCTORS = LazyRegistry(
    roots.OPTIM_WRAPPER_CONSTRUCTORS, 'mmstabvim.engine.optimizers'
)
DATASETS = LazyRegistry(roots.DATASETS, 'mmstabvim.datasets')
TRANSFORMS = LazyRegistry(roots.TRANSFORMS, 'mmstabvim.datasets')
METRICS = LazyRegistry(roots.METRICS, 'mmstabvim.evaluation')
VISUALIZERS = LazyRegistry(
    roots.VISUALIZERS, 'mmstabvim.visualization.seg_overlay'
)


def import_of_mmseg(module: str, name: str) -> type:
    """Import a class; where its toolkit is missing, say what to install.

    Args:
        module (str): Module of the class.
        name (str): Name of the class.

    Raises:
        ImportError: If MMSegmentation or mmcv is missing.
    """
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] not in ('mmcv', 'mmseg'):
            raise
        raise ImportError(
            f'mmstabvim.{name} needs MMSegmentation: '
            f'{stack.install_command()} ({error})'
        ) from error


def defer_to_mmseg(
    package: str, registries: dict[Registry, dict[str, str]]
) -> Callable[[str], Any]:
    """Register a package's classes of MMSegmentation's kind for later.

    Args:
        package (str): Name of the package that exports the classes.
        registries (dict): Module of each class by its name, by registry.

    Returns:
        Callable: ``__getattr__`` of the package, which imports a class on
        first use.
    """
    modules: dict[str, str] = {}
    for registry, classes in registries.items():
        registry.defer(**classes)
        modules.update(classes)

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(
                f'module {package!r} has no attribute {name!r}'
            )
        return import_of_mmseg(modules[name], name)

    return load


def suggest_types(error: KeyError) -> str | None:
    """Find registered names near an unknown one.

    Args:
        error (KeyError): Raised by ``Registry.build`` for an unknown
            ``type``.

    Returns:
        str | None: ``'near names: ...'``, as they are written in the scope
        where the type was looked up; None where the error is another one or
        no name is near.
    """
    match = re.search(
        r'(\S+) is not in the (?:(\S+?)::)?(.+?) registry', str(error)
    )
    if match is None:
        return None
    wanted, scope, registry_name = match.groups()
    names = _registered_names(registry_name, scope)
    near = _near_names(wanted.strip('\'"'), names)
    return f'near names: {", ".join(near)}' if near else None


def _registered_names(registry_name: str, scope: str | None) -> list[str]:
    """List a registry's names in all scopes, as written in ``scope``."""
    names = []
    for root in vars(roots).values():
        if not isinstance(root, Registry):
            continue
        # a child's name may differ from its root's
        called = {root.name, *(r.name for r in root.children.values())}
        if registry_name not in called:
            continue
        for registry in _with_children(root):
            bare = registry.scope in (scope, root.scope)
            prefix = '' if bare else f'{registry.scope}.'
            deferred = getattr(registry, 'deferred', {})
            known = dict.fromkeys([*registry.module_dict, *deferred])
            names += [prefix + name for name in known]
    return names


def _with_children(registry: Registry) -> Iterator[Registry]:
    """Walk a registry tree; each node's modules are imported first."""
    # A toolkit that does not import has no names to suggest.
    with suppress(Exception):
        registry.import_from_location()
    yield registry
    for child in registry.children.values():
        yield from _with_children(child)


def _near_names(wanted: str, names: list[str]) -> list[str]:
    """Pick the names near ``wanted``, ignoring case and perhaps scope."""
    near: list[str] = []
    for shorten in (str.lower, lambda name: name.lower().split('.')[-1]):
        by_key: dict[str, list[str]] = {}
        for name in names:
            by_key.setdefault(shorten(name), []).append(name)
        for key in get_close_matches(shorten(wanted), by_key, cutoff=0.8):
            near += [name for name in by_key[key] if name not in near]
    return near[:3]

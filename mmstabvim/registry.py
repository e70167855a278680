"""Child registries of mmengine's root registries, scope ``mmstabvim``.

A config of any OpenMMLab toolkit reaches them through the scope:
``type='mmstabvim.VisionMamba'``. ``locations`` name the packages that are
imported when a registry is first searched, so importing ``mmstabvim`` stays
cheap.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import mmengine.registry
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import VISUALIZERS as MMENGINE_VISUALIZERS
from mmengine.registry import Registry

from mmstabvim import stack

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmstabvim',
    locations=['mmstabvim.models', 'mmstabvim.evaluation'],
)
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmstabvim',
    locations=['mmstabvim.engine'],
)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmstabvim',
    locations=['mmstabvim.engine'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmstabvim',
    locations=['mmstabvim.engine'],
)
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='mmstabvim',
    locations=['mmstabvim.datasets'],
)
TRANSFORMS = Registry(
    'transform',
    parent=MMENGINE_TRANSFORMS,
    scope='mmstabvim',
    locations=['mmstabvim.datasets'],
)
METRICS = Registry(
    'metric',
    parent=MMENGINE_METRICS,
    scope='mmstabvim',
    locations=['mmstabvim.evaluation'],
)
VISUALIZERS = Registry(
    'visualizer',
    parent=MMENGINE_VISUALIZERS,
    scope='mmstabvim',
    locations=['mmstabvim.visualization.seg_overlay'],  # needs mmseg
)


def register_of_mmseg(
    package: str, classes: dict[str, tuple[str, Registry]]
) -> Callable[[str], Any]:
    """Register classes of MMSegmentation's kind without importing it.

    Users of MMPretrain need not have it, and importing it takes seconds. So
    each name is entered with a function that imports the class and calls it.

    Args:
        package (str): Name of the package that exports the classes.
        classes (dict): Name of a class to its module and its registry.

    Returns:
        Callable: ``__getattr__`` of the package, which imports a class on
        first use.
    """

    def load(name: str) -> Any:
        if name not in classes:
            raise AttributeError(
                f'module {package!r} has no attribute {name!r}'
            )
        return _load_of_mmseg(name, classes[name][0])

    for name, (_, registry) in classes.items():
        registry.register_module(name=name, module=_builder(load, name))
    return load


def _load_of_mmseg(name: str, module: str) -> Any:
    """Import a class; where its toolkit is missing, say what to install."""
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] not in ('mmcv', 'mmseg'):
            raise
        raise ImportError(
            f'mmstabvim.{name} needs MMSegmentation: '
            f'{stack.install_command()} ({error})'
        ) from error


def _builder(load: Callable[[str], Any], name: str) -> Callable[..., Any]:
    """A function that stands for the class ``name`` in a registry."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return load(name)(*args, **kwargs)

    return build


def suggest_types(error: KeyError) -> str | None:
    """Find registered names near the one that mmengine did not find.

    Args:
        error (KeyError): As raised by ``Registry.build`` for an unknown
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
    for root in vars(mmengine.registry).values():
        if not isinstance(root, Registry):
            continue
        # a child's name may differ from its root's
        called = {root.name, *(r.name for r in root.children.values())}
        if registry_name not in called:
            continue
        for registry in _with_children(root):
            bare = registry.scope in (scope, root.scope)
            prefix = '' if bare else f'{registry.scope}.'
            names += [prefix + name for name in registry.module_dict]
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

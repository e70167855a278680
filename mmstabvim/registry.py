"""Child registries of mmengine's root registries, scope ``mmstabvim``.

A config of any OpenMMLab toolkit reaches them through the scope:
``type='mmstabvim.VisionMamba'``. ``locations`` name the packages that are
imported when a registry is first searched, so importing ``mmstabvim`` stays
cheap.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches

import mmengine.registry
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmstabvim',
    locations=['mmstabvim.models'],
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
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='mmstabvim',
    locations=['mmstabvim.datasets'],
)


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

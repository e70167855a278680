"""Settings that a name without effect was probably meant for."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from mmstabvim.engine.settings.readers import get_path, names_read
from mmstabvim.engine.settings.signatures import parameters_of

_OLD_NAMES = {
    'batch': 'batch_size',
    'epochs': 'max_epochs',
    'iters': 'max_iters',
    'learning_rate': 'lr',
    'resume_from': 'load_from',
    'samples_per_gpu': 'batch_size',
    'total_epochs': 'max_epochs',
    'workers': 'num_workers',
    'workers_per_gpu': 'num_workers',
}
"""Names of MMCV 1.x and of other tools."""

_MAX_NEAR = 6


def suggest(cfg: Config, name: str, old_value: Any = None) -> str:
    """Find the settings that a name without effect was meant for.

    Args:
        cfg (Config): The whole config.
        name (str): Dotted path or variable.
        old_value (Any): Value of the variable in the config: it went where
            the same value is now. Defaults to None.

    Returns:
        str: ``'; near names: ...'``, empty without any.
    """
    read = names_read(cfg)
    paths = [
        path
        for path in dict.fromkeys(_all_paths(cfg, '', cfg))
        if path.partition('.')[0] in read and not path.endswith('._scope_')
    ]
    last = name.rpartition('.')[2]
    near = _ending_in(paths, _OLD_NAMES.get(last, last), name)
    if not near and isinstance(old_value, (str, list, tuple, dict)):
        near = [path for path in paths if get_path(cfg, path) == old_value]
    if not near:
        near = difflib.get_close_matches(name, paths, _MAX_NEAR)
    if not near:
        ends = sorted({path.rpartition('.')[2] for path in paths})
        for end in difflib.get_close_matches(last, ends, 1, 0.75):
            near = _ending_in(paths, end, name)
    return f'; near names: {", ".join(near[:_MAX_NEAR])}' if near else ''


def _ending_in(paths: list[str], last: str, name: str) -> list[str]:
    """List the paths that end in a name, the most similar ones first."""
    found = [path for path in paths if path.rpartition('.')[2] == last]
    match = difflib.SequenceMatcher(b=name)

    def distance(path: str) -> tuple[bool, bool, float]:
        match.set_seq1(path)
        suffix = path == name or path.endswith(f'.{name}')
        return not suffix, any(map(str.isdigit, path)), -match.ratio()

    return sorted(found, key=distance)


def _all_paths(cfg: Config, path: str, node: Any) -> Iterator[str]:
    """Walk all settings, then those that a class would also accept."""
    if isinstance(node, Mapping) or node is cfg:
        for key in node:
            below = f'{path}.{key}' if path else str(key)
            yield below
            yield from _all_paths(cfg, below, node[key])
        if path and isinstance(node, Mapping):
            yield from (
                f'{path}.{n}' for n in parameters_of(cfg, path, node) or ()
            )
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _all_paths(cfg, f'{path}.{i}', child)

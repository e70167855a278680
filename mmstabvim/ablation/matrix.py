"""The matrix of trainings that an ablation consists of, and its cells."""

import argparse
import copy
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from mmstabvim.ablation.results import PRECISIONS, extend_orders
from mmstabvim.engine import launch

_AXES = ('seeds', 'precisions', 'lrs')
_DEFAULTS: dict[str, Any] = dict(
    title='Ablation',
    notes=[],
    metric='accuracy/top1',
    more_metrics=[],
    baseline={},
    collapse_below=None,
    seeds=[0],
    precisions=['fp32'],
    lrs=[None],
    cfg_options={},
    groups=[],
)
_REPORTED = set(_DEFAULTS) - {*_AXES, 'cfg_options', 'groups'}
_GROUP_KEYS = {'configs', 'labels', 'cfg_options', *_AXES}
_LR = 'optim_wrapper.optimizer.lr'


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: a config with its seed, precision and learning rate.

    Attributes:
        labels (dict[str, str]): Distinction of the config from others.
        config (str): Path of the config file.
        seed (int): Random seed.
        precision (str): ``'fp32'``, ``'bf16'`` or ``'fp16'``.
        lr (float | None): Learning rate, None for the config's own.
        lr_used (float | None): The learning rate that it trains with.
        options (dict[str, Any]): Changes to the config (``--cfg-options``),
            the learning rate among them.
        config_hash (str): Hash of the resolved config, seed and precision.
        on_divergence (str): Action of its ``DivergenceHook``, empty if it
            has none.
        epochs (int | None): Length, None if it counts iterations.
    """

    labels: dict[str, str]
    config: str
    seed: int
    precision: str
    lr: float | None
    lr_used: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_hash: str = ''
    on_divergence: str = ''
    epochs: int | None = None

    @property
    def name(self) -> str:
        """Name of its folder, for instance ``full.sn_ec.bf16.seed0``."""
        parts = [*self.labels.values(), self.precision]
        if self.lr is not None:
            parts.append(f'lr{short_number(self.lr)}')
        parts.append(f'seed{self.seed}')
        return '.'.join(re.sub(r'[^\w+-]+', '-', part) for part in parts)

    def describe(self) -> dict[str, Any]:
        """Collect the facts that a report needs, ready for JSON."""
        described = dataclasses.asdict(self)
        return {'cell': self.name, **described}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Cells of a study and settings of its report.

    Attributes:
        title (str): Heading of the report.
        notes (list[str]): Sentences for a reader of the report.
        metric (str): Name of the validation metric, higher is better.
        more_metrics (list[str]): Others for a table of their own, ``*``
            stands for anything.
        baseline (dict[str, str]): Label and value of what the others are
            compared with.
        collapse_below (float | None): Score below which a training has
            learnt nothing, though its loss stayed finite.
        orders (dict[str, list[str]]): Values of each label in their order.
        cells (list[Cell]): Every training, seed by seed: so an unfinished
            study has about as many seeds of each combination.
    """

    title: str
    notes: list[str]
    metric: str
    more_metrics: list[str]
    baseline: dict[str, str]
    collapse_below: float | None
    orders: dict[str, list[str]]
    cells: list[Cell]

    def describe(self) -> dict[str, Any]:
        """Collect all fields, ready for JSON."""
        cells = [cell.describe() for cell in self.cells]
        return {**vars(self), 'cells': cells}


def short_number(value: float) -> str:
    """Write a number without needless digits: ``2e-3``, ``0.5`` as ``5e-1``.

    Args:
        value (float): A finite number.

    Returns:
        str: In scientific notation, without a dot where possible.
    """
    mantissa, _, exponent = f'{value:e}'.partition('e')
    mantissa = mantissa.rstrip('0').rstrip('.')
    return f'{mantissa}e{int(exponent)}'


def load_matrix(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> Matrix:
    """Read a matrix file and work out its cells.

    The file is a config with ``title``, ``notes`` (a list of sentences for
    the report), ``metric``, ``more_metrics``, ``baseline``,
    ``collapse_below``, ``seeds``, ``precisions``, ``lrs``, ``cfg_options``
    and ``groups``. A group has
    ``configs``, a path or glob (or a list of them) relative to the file,
    and may have ``labels``, ``cfg_options`` and axes of its own. A label is

    - one value, which all configs of the group share;
    - a list of values: the configs' path names it in braces, as in
      ``'digits_{stabilizer}.py'``, and each value has its file;
    - a dict from value to changes of the config: a dict of ``cfg_options``,
      the path of a config fragment relative to the file (as of
      ``_base_/stabilizers/``), or a list of such, later ones winning.

    Args:
        path (str | Path): The matrix file.
        overrides (Mapping[str, Any] | None): Values of ``seeds``,
            ``precisions`` and ``lrs`` that replace those of the file and its
            groups, and ``cfg_options`` for every cell. Defaults to None.

    Returns:
        Matrix: With at least one cell.

    Raises:
        FileNotFoundError: If the file or a config that it names is absent.
        ValueError: If a setting has an unknown name or a wrong value.
    """
    launch.check_file(str(path), 'matrix file')
    loaded = Config.fromfile(path, import_custom_modules=False).to_dict()
    settings = _settings(loaded, dict(overrides or {}))
    folder = Path(path).parent
    cells: list[Cell] = []
    orders: dict[str, list[str]] = {}
    for group in settings['groups']:
        for labels, config, options in _configs(group, folder):
            extend_orders(orders, labels)
            cells += _cells(labels, config, options, group)
    _check_cells(cells, settings['baseline'], orders)
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    cells.sort(key=lambda cell: seeds.index(cell.seed))
    shared = {name: settings[name] for name in _REPORTED}
    return Matrix(**shared, orders=orders, cells=cells)


def _settings(loaded: dict, overrides: dict) -> dict[str, Any]:
    """Fill in defaults and overrides; every group gets its axes."""
    _check_keys(loaded, set(_DEFAULTS), 'matrix')
    settings = {**copy.deepcopy(_DEFAULTS), **loaded}
    settings['baseline'] = _as_text(settings['baseline'])
    common = settings['cfg_options']
    last = overrides.pop('cfg_options', None) or {}
    given = {name: v for name, v in overrides.items() if v is not None}
    groups = []
    for group in settings['groups']:
        _check_keys(group, _GROUP_KEYS, 'group')
        axes = {name: settings[name] for name in _AXES}
        options = (common, group.get('cfg_options', {}), last)
        groups.append({**axes, **group, **given, 'cfg_options': options})
    return {**settings, 'groups': groups}


def _check_keys(found: Mapping, known: set[str], what: str) -> None:
    """Refuse a misspelt setting; names with ``_`` in front are free."""
    for name in found:
        if name not in known and not name.startswith('_'):
            raise ValueError(
                f'the {what} has an unknown setting {name!r}; '
                f'known are {", ".join(sorted(known))}'
            )


def _as_text(labels: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in labels.items()}


def _configs(
    group: dict, folder: Path
) -> Iterator[tuple[dict[str, str], str, dict[str, Any]]]:
    """Labels, path and changes of each config of a group."""
    patterns = group.get('configs')
    if not patterns:
        raise ValueError(f'a group wants configs, got {patterns!r}')
    if isinstance(patterns, str):
        patterns = [patterns]
    common, own, last = group['cfg_options']
    for pattern in patterns:
        for values in _choices(pattern, group.get('labels', {}), folder):
            chosen = {name: str(v) for name, (v, _) in values.items()}
            paths = _find(folder, pattern.format(**chosen))
            options = {**common, **own}
            for _, changes in values.values():
                options.update(changes)
            for path in paths:
                several = len(paths) > 1 or not chosen
                more = {'config': Path(path).stem} if several else {}
                yield {**chosen, **more}, path, {**options, **last}


def _choices(
    pattern: str, labels: Mapping[str, Any], folder: Path
) -> Iterator[dict[str, tuple[Any, dict[str, Any]]]]:
    """Combine the labels: each to one value and the changes it brings."""
    parsed = string.Formatter().parse(pattern)
    places = {name for _, name, _, _ in parsed if name is not None}
    if places - set(labels):
        raise ValueError(
            f'configs {pattern!r} names {sorted(places - set(labels))}, '
            f'and the labels are {sorted(labels)}'
        )
    axes = []
    for name, value in labels.items():
        if isinstance(value, Mapping):
            axes.append([(v, _changes(c, folder)) for v, c in value.items()])
            continue
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if several and name not in places:
            raise ValueError(
                f'label {name!r} has several values, so configs wants '
                f'{{{name}}} in its path, got {pattern!r}'
            )
        axes.append([(v, {}) for v in (value if several else [value])])
    for values in itertools.product(*axes):
        yield dict(zip(labels, values, strict=True))


def _changes(given: Any, folder: Path) -> dict[str, Any]:
    """Write changes of a config as ``cfg_options``."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str):
        path = str(folder / given)
        launch.check_file(path, 'config fragment')
        fragment = Config.fromfile(path, import_custom_modules=False)
        return dict(_flatten(fragment.to_dict()))
    parts = [_changes(part, folder) for part in given or ()]
    return {name: value for part in parts for name, value in part.items()}


def _flatten(settings: Mapping, path: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of each setting that is no dict."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f'{path}{name}.')
        else:
            yield f'{path}{name}', value


def _find(folder: Path, pattern: str) -> list[str]:
    """Files that a pattern names, at least one."""
    path = str(folder / pattern)
    paths = sorted(glob.glob(path))
    if not paths:
        launch.check_file(path, 'config')
    return [_relative(p) for p in paths or [path]]


def _relative(path: str) -> str:
    """Below the current folder relative to it, as a record should say."""
    relative = os.path.relpath(path)
    outside = relative.startswith(os.pardir)
    return os.path.normpath(path) if outside else relative


def _cells(
    labels: dict[str, str], config: str, options: dict, group: dict
) -> Iterator[Cell]:
    """Cells of one config."""
    for axis in _AXES:
        if not isinstance(group[axis], (list, tuple)) or not group[axis]:
            raise ValueError(f'{axis} wants a list, got {group[axis]!r}')
    for precision, lr in itertools.product(group['precisions'], group['lrs']):
        if precision not in PRECISIONS:
            raise ValueError(
                f'precision wants one of {", ".join(PRECISIONS)}, '
                f'got {precision!r}'
            )
        changed = dict(options)
        if lr is not None:
            lr = changed[_LR] = float(lr)
        cfg = _load(config, changed)
        _check_optimizer(cfg, config, precision, lr)
        for seed in group['seeds']:
            yield Cell(
                labels=labels,
                config=config,
                seed=int(seed),
                precision=precision,
                lr=lr,
                lr_used=_get(cfg, _LR),
                options=changed,
                config_hash=_hash(cfg, int(seed), precision),
                on_divergence=_on_divergence(cfg),
                epochs=_get(cfg, 'train_cfg.max_epochs'),
            )


def _load(config: str, options: dict[str, Any]) -> Config:
    """The config as ``tools/train.py`` will see it."""
    for name, value in options.items():
        option_text(name, value)
    args = argparse.Namespace(
        config=config,
        cfg_options=copy.deepcopy(options),
        work_dir=None,
        launcher='none',
        local_rank=0,
    )
    return launch.load_config(args)


def option_text(name: str, value: Any) -> str:
    """One ``--cfg-options`` argument.

    Args:
        name (str): Dotted name of the setting.
        value (Any): A number, string, bool, None or nested list of them.

    Returns:
        str: ``'name=value'``.

    Raises:
        ValueError: If the command line cannot carry the value.
    """
    text = str(value).replace("'", '').replace('"', '')
    try:
        read = DictAction._parse_iterable(text)
    except AssertionError:  # unbalanced brackets
        read = text, value
    if read != value or type(read) is not type(value):
        raise ValueError(
            f'cfg_options {name}={value!r} does not go through a command '
            'line: put it into a config file and list that'
        )
    return f'{name}={text}'


def _get(cfg: Config, dotted: str) -> Any:
    """A nested setting, None where it is absent."""
    found: Any = cfg
    for name in dotted.split('.'):
        if not isinstance(found, Mapping) and found is not cfg:
            return None
        found = found.get(name)
        if found is None:
            return None
    return found


def _check_optimizer(
    cfg: Config, config: str, precision: str, lr: float | None
) -> None:
    """Refuse what the chosen precision or learning rate cannot change."""
    wrapper = cfg.get('optim_wrapper') or {}
    if lr is not None and 'optimizer' not in wrapper:
        raise ValueError(
            f'lrs wants {_LR} in {config!r}, got optim_wrapper={wrapper!r}'
        )
    kind = launch.type_name(wrapper)
    if precision == 'fp32' and kind == 'AmpOptimWrapper':
        raise ValueError(
            f"precision 'fp32' wants an OptimWrapper in {config!r}, got {kind}"
        )


def _on_divergence(cfg: Config) -> str:
    """Find the action of the config's ``DivergenceHook``."""
    default = (cfg.get('default_hooks') or {}).values()
    for hook in (*(cfg.get('custom_hooks') or []), *default):
        if hook and launch.type_name(hook) == 'DivergenceHook':
            return hook.get('action', 'stop')
    return ''


def _hash(cfg: Config, seed: int, precision: str) -> str:
    """Hash all that the results depend on; not the work dir."""
    content = cfg.to_dict()
    content.pop('work_dir', None)
    text = json.dumps([content, seed, precision], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_cells(
    cells: list[Cell], baseline: dict[str, str], orders: dict[str, list[str]]
) -> None:
    """Refuse an empty matrix, two cells of one name, an absent baseline."""
    if not cells:
        raise ValueError('the matrix has no cells: groups wants configs')
    names: dict[str, Cell] = {}
    for cell in cells:
        if cell.name in names:
            raise ValueError(
                f'two cells are called {cell.name!r}: {cell.config} and '
                f'{names[cell.name].config}; give them different labels'
            )
        names[cell.name] = cell
    for label, value in baseline.items():
        if value not in orders.get(label, []):
            raise ValueError(
                f'baseline wants one of {orders.get(label, [])} as '
                f'{label!r}, got {value!r}'
            )

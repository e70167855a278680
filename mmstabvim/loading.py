"""One way for weights into a model: find, rename, load, count.

:func:`install` puts it into mmengine's loading, so ``load_from``,
``init_cfg``, the toolkits' own tools and their inferencers use it too. A file
of which nothing, or less than half of the backbone, fits is an error; what
else does not fit is in one summary.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from mmstabvim.checkpoint import load_checkpoint_tensors

__all__ = ['LoadReport', 'find_weights', 'install', 'load_weights']

SOURCE = 'mmstabvim.source'
"""Entry of a state dict's metadata that names its file."""

_WEIGHT_KEYS = (
    'state_dict',
    'model',
    'model_state_dict',
    'module',
    'net',
    'model_ema',
    'state_dict_ema',
    'ema_state_dict',
    'ema',
)
"""Keys under which training tools keep weights, in order of preference."""

_COMPILED = '_orig_mod.'
_MAX_NAMES = 6
_last_said: ContextVar[str] = ContextVar('last_said', default='')


@dataclass
class LoadReport:
    """Outcome of loading weights into a model.

    Args:
        model (str): Class of the model.
        source (str): File the weights come from.
        notes (list[str]): Facts about the file, one sentence each.
        loaded (list[str]): Names in the model that came from the file.
        total (int): Number of names in the model.
        missing (list[str]): Names in the model that the file does not have.
        reshaped (list[str]): Names of another shape in the file, with both.
        resized (list[str]): Names that were resized, with both shapes.
        unused (list[str]): Names in the file that the model does not have.
    """

    model: str
    source: str = 'the state dict'
    notes: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    total: int = 0
    missing: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Tell whether every weight of file and model found the other."""
        return not (self.missing or self.reshaped or self.unused)

    def __str__(self) -> str:
        """Summarize in a few lines."""
        lines = [
            f'{self.source}: {len(self.loaded)} of {self.total} weights of '
            f'{self.model} loaded',
            *self.notes,
        ]
        for what, names in (
            ('resized', self.resized),
            ('of another shape, left as initialized', self.reshaped),
            ('not in the file, left as initialized', self.missing),
            ('in the file, not used', self.unused),
        ):
            if names:
                lines.append(f'{what}: {_shorten(names)}')
        return '\n  '.join(lines)


def load_weights(
    model: nn.Module,
    file: Any,
    prefix: str | None = None,
    strict: bool = False,
) -> LoadReport:
    """Load a checkpoint file into a model, whatever tool has written it.

    Names may carry ``module.``, ``_orig_mod.``, ``model.``, ``backbone.`` or
    another common prefix, or lack it; a model whose class knows the names of
    another project (:class:`mmstabvim.VisionMamba` those of the official
    Vim) gets them converted in memory. Only tensors are read.

    Args:
        model (nn.Module): Changed in place; may be wrapped.
        file (str | os.PathLike | BinaryIO): Written by ``torch.save``, or
            safetensors.
        prefix (str, optional): Part of the file to load, such as
            ``'backbone.'`` or a key such as ``'model_ema'``. Defaults to
            None: all of it.
        strict (bool): Refuse anything that does not fit. Defaults to False.

    Returns:
        LoadReport: Outcome, readable as text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or if nothing or less than
            half of the backbone is in it.
        RuntimeError: With ``strict``, if anything does not fit.

    Example:
        >>> from mmstabvim import VisionMamba, load_weights
        >>> backbone = VisionMamba('tiny')
        >>> load_weights(backbone, 'vim_t_midclstok.pth')  # doctest: +SKIP
    """
    checkpoint = _name_source(load_checkpoint_tensors(file), file)
    if prefix is not None:
        checkpoint = _select(checkpoint, prefix)
    return _load(model, checkpoint, strict)


def find_weights(
    checkpoint: Mapping[str, Any],
) -> tuple[Mapping[str, Any], list[str]]:
    """Find the weights in what a checkpoint file holds.

    Args:
        checkpoint (Mapping): Weights by name, or a dict with such a dict
            under a key.

    Returns:
        tuple[Mapping, list[str]]: The weights, and notes on the choice.

    Raises:
        ValueError: If there are none, or several under unknown keys.
    """
    if any(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint, []
    found = [key for key, value in checkpoint.items() if _holds_weights(value)]
    known = [key for key in _WEIGHT_KEYS if key in found]
    if not found or (not known and len(found) > 1):
        raise ValueError(
            'wanted weights by name, or one dict of them under a key such as '
            f'{", ".join(map(repr, _WEIGHT_KEYS[:3]))}, got the keys '
            f'{_shorten(map(repr, checkpoint))}'
            + (f' with weights under {found}' if found else '')
        )
    key = (known or found)[0]
    rest = [name for name in found if name != key]
    notes = []
    if key != 'state_dict':
        notes.append(f'weights taken from {key!r}')
    if rest:
        also = ', '.join(map(repr, rest))
        notes.append(f'weights under {also} not used; those of {key!r} are')
    inner, more = find_weights(checkpoint[key])
    return inner, notes + more


def _holds_weights(value: Any) -> bool:
    """Tell a dict of weights from the other dicts of a checkpoint."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and '.' in name and isinstance(weight, Tensor)
        for name, weight in value.items()
    )


# --- loading ----------------------------------------------------------------


def _load(
    model: nn.Module, checkpoint: Mapping[str, Any], strict: bool
) -> LoadReport:
    """Find, rename and load weights, then count what came of it."""
    target = _unwrap(model)
    own = _weights_of(target)
    report = LoadReport(type(target).__name__, total=len(own))
    _take_source(report, _metadata_of(checkpoint))
    try:
        weights, notes = find_weights(checkpoint)
        report.notes += notes
        metadata = _metadata_of(weights)
        if weights is not checkpoint:
            _take_source(report, metadata)
        metadata.pop(SOURCE, None)
        state = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
        state, metadata = _without_compiled(state, metadata, report)
        state = _from_elsewhere(target, state, report)
        state, metadata = _fit_prefix(target, state, metadata, report)
        before = dict(state)
        errors = _fill(target, state, metadata)
    except ValueError as error:
        raise ValueError(f'{report.source}: {error}') from error
    _count(report, own, before, state)
    _check(report, target, own, before)
    if strict and not (report.complete and not errors):
        raise RuntimeError(f'strict loading: {report}')
    return report


def _metadata_of(state: Any) -> dict[str, Any]:
    """Copy the metadata of a state dict; empty where there are none."""
    return dict(getattr(state, '_metadata', None) or {})


def _take_source(report: LoadReport, metadata: dict[str, Any]) -> None:
    """Note the file that the metadata name."""
    source = metadata.get(SOURCE)
    if source:
        report.source = source['path']
        report.notes += source['notes']


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of distributed, TTA and compiling wrappers."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    return getattr(inner, '_orig_mod', inner)


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect parameters and persistent buffers but BN's counters."""
    return {
        name: value
        for name, value in _state(model)
        if 'num_batches_tracked' not in name and isinstance(value, Tensor)
    }


def _state(model: nn.Module, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Walk a model's state past hooks that leave out part of it."""
    hidden = model._non_persistent_buffers_set
    for name, value in (*model._parameters.items(), *model._buffers.items()):
        if value is not None and name not in hidden:
            yield prefix + name, value
    for name, child in model._modules.items():
        if child is not None:
            yield from _state(_unwrap(child), f'{prefix}{name}.')


def _without_compiled(
    state: dict[str, Tensor], metadata: dict[str, Any], report: LoadReport
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take ``torch.compile``'s part out of the names."""
    if not any(_COMPILED in name for name in state):
        return state, metadata
    report.notes.append(f'{_COMPILED!r} taken out of the names')
    return (
        {k.replace(_COMPILED, ''): v for k, v in state.items()},
        {f'{k}.'.replace(_COMPILED, '')[:-1]: v for k, v in metadata.items()},
    )


def _from_elsewhere(
    target: nn.Module, state: dict[str, Tensor], report: LoadReport
) -> dict[str, Tensor]:
    """Convert names of another project, where a part of the model can."""
    for module in target.modules():
        convert = getattr(module, 'convert_foreign_state', None)
        converted = convert(state) if convert else None
        if converted is not None:
            renamed, unused, notes = converted
            report.notes += notes
            report.unused += unused
            return dict(renamed)
    return state


def _fit_prefix(
    target: nn.Module,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    report: LoadReport,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take off and put on the prefixes with which most names fit."""
    own = {name for name, _ in _state(target)}
    children = sorted(
        (f'{name}.' for name, _ in target.named_children()),
        key=lambda name: name != 'backbone.',
    )
    old, new = _best_prefixes(own, state, ['', *children])
    if (old, new) == ('', ''):
        return state, metadata
    off = f'{old!r} taken off' if old else ''
    on = f'{new!r} put in front of' if new else ''
    report.notes.append(f'{" and ".join(filter(None, (off, on)))} the names')
    rest = [name for name in state if not name.startswith(old)]
    report.unused += rest
    renamed = {
        new + name.removeprefix(old): value
        for name, value in state.items()
        if name.startswith(old)
    }
    return renamed, _move_metadata(metadata, old, new)


def _move_metadata(
    metadata: Mapping[str, Any], old: str, new: str
) -> dict[str, Any]:
    """Rename the modules of a state dict's metadata, the root is ``''``."""
    paths = {f'{name}.' if name else '': v for name, v in metadata.items()}
    return {
        (new + path.removeprefix(old))[:-1]: value
        for path, value in paths.items()
        if path.startswith(old)
    }


def _best_prefixes(
    own: set[str], state: Mapping[str, Tensor], parts_of_model: list[str]
) -> tuple[str, str]:
    """Find what to take off and put on so that most names are the model's.

    Args:
        own (set[str]): Names in the model.
        state (Mapping): Names in the file.
        parts_of_model (list[str]): What may be put on, best first.

    Returns:
        tuple[str, str]: Both empty where the names fit best as they are.

    Raises:
        ValueError: If two parts of the file fit equally well.
    """
    fits: Counter[tuple[str, str]] = Counter()
    for name in state:
        parts = name.split('.')
        for depth in range(len(parts)):
            old = ''.join(f'{part}.' for part in parts[:depth])
            for new in parts_of_model:
                fits[old, new] += new + '.'.join(parts[depth:]) in own
    best = max(fits.values(), default=0)
    if not best or fits['', ''] == best:
        return '', ''
    equal = [pair for pair, count in fits.items() if count == best]
    if len({old for old, _ in equal}) > 1:
        both = ' and '.join(repr(old) for old, _ in equal)
        raise ValueError(
            f'the names under {both} fit equally well: choose one with '
            "init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)"
        )
    return equal[0]


def _fill(
    target: nn.Module, state: dict[str, Tensor], metadata: dict[str, Any]
) -> list[str]:
    """Copy the weights; modules may change ``state`` to their liking.

    Returns:
        list[str]: PyTorch's messages about weights of another shape.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []

    def load(module: nn.Module, local: dict[str, Tensor], prefix: str) -> None:
        module = _unwrap(module)
        module._load_from_state_dict(
            local,
            prefix,
            metadata.get(prefix[:-1], {}),
            True,
            missing,
            unexpected,
            errors,
        )
        for name, child in module._modules.items():
            if child is not None:
                start = f'{prefix}{name}.'
                below = {k: v for k, v in local.items() if k.startswith(start)}
                given = set(below)
                load(child, below, start)
                for dropped in given - below.keys():
                    del local[dropped]
                local.update(below)
        keys = nn.modules.module._IncompatibleKeys(missing, unexpected)
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, keys)

    load(target, state, '')
    return errors


# --- counting ---------------------------------------------------------------


def _count(
    report: LoadReport,
    own: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    """Compare the names and shapes of the file and of the model.

    Modules may have resized, renamed or dropped entries of ``before``.
    """
    for name, value in own.items():
        if name not in state:
            report.missing.append(name)
        elif state[name].shape != value.shape:
            shapes = f'{tuple(state[name].shape)}, here {tuple(value.shape)}'
            report.reshaped.append(f'{name} {shapes}')
        else:
            report.loaded.append(name)
            old = before.get(name, value).shape
            if old != value.shape:
                shapes = f'{tuple(old)} -> {tuple(value.shape)}'
                report.resized.append(f'{name} {shapes}')
    kept = {value.data_ptr() for value in state.values()}
    # a module that takes an entry and adds others has converted it
    added = [name for name in state if name not in before]
    report.unused += [
        name
        for name, value in {**before, **state}.items()
        if name not in own
        and 'num_batches_tracked' not in name
        and (name in state or value.data_ptr() not in kept)
        and not (name not in state and _has_below(added, name))
    ]


def _has_below(names: Iterable[str], name: str) -> bool:
    """Look for a name in the module that a weight belongs to."""
    module = name.rpartition('.')[0]
    return any(other.startswith(f'{module}.') for other in names if module)


def _check(
    report: LoadReport,
    target: nn.Module,
    own: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> None:
    """Raise ValueError where the model would start from random weights."""
    loaded = set(report.loaded)
    backbone = {k: v for k, v in own.items() if k.startswith('backbone.')}
    part = 'the backbone' if backbone else report.model
    backbone = backbone or dict(own)
    if not backbone or _is_adapter(target, loaded, report):
        return
    share = _size(backbone, loaded) / max(_size(backbone, set(backbone)), 1)
    if loaded and share >= 0.5:
        return
    got = f'{share:.0%} of {part}' if loaded else 'nothing'
    raise ValueError(
        f'{report.source}: {got} fits {report.model}, which would start from '
        f'random weights. The file has {len(before)} weights named '
        f'{_shorten(before)}; the model has {len(own)} named '
        f'{_shorten(own)}. {_cure(report)}'
    )


def _cure(report: LoadReport) -> str:
    """Advise what to do about a file that does not fit."""
    if report.reshaped:
        return (
            f'Of another shape: {_shorten(report.reshaped)}. Choose the arch '
            'and the options of the checkpoint.'
        )
    return (
        'Choose a checkpoint of this model, or the arch of the checkpoint; '
        'where only a part of the file is meant, name it: '
        "init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)."
    )


def _is_adapter(
    target: nn.Module, loaded: set[str], report: LoadReport
) -> bool:
    """Tell a file of adapters: all that learns came from it, and fits."""
    learns = {k for k, v in target.named_parameters() if v.requires_grad}
    frozen = {k for k, v in target.named_parameters() if not v.requires_grad}
    return bool(learns and frozen) and learns <= loaded and not report.unused


def _size(weights: Mapping[str, Tensor], names: set[str]) -> int:
    """Count the values of some weights."""
    return sum(v.numel() for k, v in weights.items() if k in names)


def _shorten(names: Any) -> str:
    """List the first names, and how many more there are."""
    names = [str(name) for name in names]
    more = len(names) - _MAX_NAMES
    shown = ', '.join(names[:_MAX_NAMES])
    return f'{shown} and {more} more' if more > 0 else shown or 'none'


# --- mmengine ---------------------------------------------------------------


class _Checkpoint(OrderedDict):
    """Content of a file without the key ``state_dict``.

    mmengine's EMA hook and MMSegmentation ask for ``state_dict`` and ``meta``
    by name; converters of the toolkits look whether they are there.
    """

    def __missing__(self, key: str) -> Any:
        """Give the weights in the file, or empty metadata."""
        if key == 'state_dict':
            weights, notes = find_weights(self)
            source = dict(_metadata_of(self)[SOURCE])
            source['notes'] = source['notes'] + notes
            return _with_metadata(weights, _metadata_of(weights), source)
        if key == 'meta':
            return {}
        raise KeyError(key)


def _with_metadata(
    weights: Mapping[str, Any], metadata: Mapping, source: dict
) -> OrderedDict:
    """Copy a dict, with metadata that name its file."""
    copy = OrderedDict(weights)
    copy._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    copy._metadata[SOURCE] = source  # type: ignore[attr-defined]
    return copy


def _name_source(checkpoint: Any, file: Any) -> Any:
    """Note where a checkpoint comes from, in its weights' metadata."""
    if not isinstance(checkpoint, dict):
        return checkpoint
    source = {'path': str(getattr(file, 'name', file)), 'notes': []}
    state = checkpoint.get('state_dict')
    if isinstance(state, dict):
        metadata = _metadata_of(state)
        checkpoint['state_dict'] = _with_metadata(state, metadata, source)
        checkpoint.setdefault('meta', {})
        return checkpoint
    named = _Checkpoint(checkpoint)
    named._metadata = OrderedDict(_metadata_of(checkpoint))  # type: ignore[attr-defined]
    named._metadata[SOURCE] = source  # type: ignore[attr-defined]
    return named


def _select(checkpoint: Mapping[str, Any], prefix: str) -> OrderedDict:
    """Take the part of a checkpoint that a prefix or a key names.

    Where neither is in the file, all of it: a bare backbone has no prefix.
    """
    key = prefix.removesuffix('.')
    state = checkpoint['state_dict']
    if _holds_weights(checkpoint.get(key)):
        source = dict(_metadata_of(state)[SOURCE])
        source['notes'] = [f'weights taken from {key!r}']
        inner = _metadata_of(checkpoint[key])
        return _with_metadata(checkpoint[key], inner, source)
    inside = {
        name.removeprefix(f'{key}.'): value
        for name, value in state.items()
        if name.startswith(f'{key}.')
    }
    metadata = _metadata_of(state)
    source = dict(metadata.pop(SOURCE))
    if not inside:
        source['notes'] = [
            *source['notes'],
            f'no name begins with the prefix {prefix!r}: all were considered',
        ]
        return _with_metadata(state, metadata, source)
    below = _move_metadata(metadata, f'{key}.', '')
    return _with_metadata(inside, below, source)


def install() -> None:
    """Put :func:`load_weights` into mmengine; more than once does no harm."""
    loader = mmengine_checkpoint.CheckpointLoader
    if hasattr(loader.load_checkpoint, '__wrapped__'):
        return
    read = loader.load_checkpoint

    @wraps(read)
    def load_checkpoint(filename: str, *args: Any, **kwargs: Any) -> Any:
        return _name_source(read(filename, *args, **kwargs), filename)

    loader.load_checkpoint = staticmethod(load_checkpoint)
    mmengine_checkpoint.load_state_dict = _load_state_dict
    mmengine_checkpoint._load_checkpoint_with_prefix = _load_with_prefix


def _load_state_dict(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = False,
    logger: Any = None,
) -> None:
    """Stand for mmengine's function of that name."""
    report = _load(module, state_dict, strict)
    if str(report) == _last_said.get():
        return  # the EMA hook loads the same once more
    _last_said.set(str(report))
    level = logging.INFO if report.complete else logging.WARNING
    print_log(str(report), logger=logger or 'current', level=level)


def _load_with_prefix(
    prefix: str, filename: str, map_location: Any = None
) -> OrderedDict:
    """Stand for mmengine's function of that name."""
    checkpoint = mmengine_checkpoint._load_checkpoint(filename, map_location)
    return _select(checkpoint, prefix)

"""Names of weights: another project's, with a prefix, or the model's own."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmstabvim.loading.module import model_state
from mmstabvim.loading.report import LoadReport

_COMPILED = '_orig_mod.'


def without_compiled(
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


def from_elsewhere(
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


def fit_prefix(
    target: nn.Module,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    report: LoadReport,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take off and put on the prefixes with which most names fit."""
    own = {name for name, _ in model_state(target)}
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
    return renamed, move_metadata(metadata, old, new)


def move_metadata(
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
    """Find the prefixes to take off and put on so that most names fit.

    Args:
        own (set[str]): Names in the model.
        state (Mapping): Names in the file.
        parts_of_model (list[str]): Prefixes that may be put on, best first.

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

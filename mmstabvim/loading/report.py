"""Report of loading, and the refusal of a file that does not fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_MAX_NAMES = 6


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
        """Tell if every weight of file and model found the other."""
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
                lines.append(f'{what}: {shorten(names)}')
        return '\n  '.join(lines)


def shorten(names: Any) -> str:
    """List the first names, and how many more there are."""
    names = [str(name) for name in names]
    more = len(names) - _MAX_NAMES
    shown = ', '.join(names[:_MAX_NAMES])
    return f'{shown} and {more} more' if more > 0 else shown or 'none'


def compare(
    report: LoadReport,
    own: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    """Compare the names and shapes of the file and of the model.

    Modules may have resized, renamed or dropped entries of ``before``.

    Args:
        report (LoadReport): Changed in place.
        own (Mapping[str, Tensor]): Weights of the model.
        before (Mapping[str, Tensor]): Weights of the file.
        state (Mapping[str, Tensor]): Weights that the modules made of them.
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


def refuse_misfit(
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
        f'{shorten(before)}; the model has {len(own)} named '
        f'{shorten(own)}. {_cure(report)}'
    )


def _cure(report: LoadReport) -> str:
    """Advise what to do about a file that does not fit."""
    if report.reshaped:
        return (
            f'Of another shape: {shorten(report.reshaped)}. Choose the arch '
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

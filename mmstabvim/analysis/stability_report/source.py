"""Source of a report's model: a checkpoint, or a work dir."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmstabvim.ablation import results
from mmstabvim.ablation.results import Curves
from mmstabvim.engine import launch

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Training:
    """Records that a run wrote while it trained.

    Attributes:
        curves (Curves): Of the log.
        stability (list[dict]): Records of the stability monitor.
    """

    curves: Curves = field(default_factory=Curves)
    stability: Rows = field(default_factory=list)

    def __bool__(self) -> bool:
        """Tell that there are any."""
        return bool(self.curves.train or self.curves.val or self.stability)


@dataclass(frozen=True)
class Source:
    """Origin of a model.

    Attributes:
        config (str): Path of its config.
        checkpoint (str): Path or URL of its weights.
        name (str): Short, for legends.
        training (Training): Empty unless a work dir was given.
    """

    config: str = 'given'
    checkpoint: str = 'given weights'
    name: str = 'model'
    training: Training = field(default_factory=Training)


def find_source(config: str, place: str) -> Source:
    """Find the weights, and the curves of a work dir.

    Args:
        config (str): Path of the config.
        place (str): A checkpoint, or the work dir of a training, whose last
            checkpoint is taken.

    Returns:
        Source: Of the model.

    Raises:
        FileNotFoundError: If there is no such file or folder, or the folder
            has no checkpoint.
    """
    folder, checkpoint = Path(place), launch.find_checkpoint(place)
    if not folder.is_dir():
        return Source(config, checkpoint, folder.stem)
    training = Training(
        results.read_curves(folder), results.read_stability(folder)
    )
    return Source(config, checkpoint, folder.resolve().name, training)


# ------------------------------------------------------------- its curves

LOGGED = ('loss', 'grad_norm')
WATCHED: dict[str, Any] = {
    'spectral_abscissa': max,
    'spectral_radius': max,
    'decay_max': max,
    'delta_max': max,
    'horizon': max,
    'stability_penalty': sum,
    'condition': max,
    'projected_share': max,
}
"""Records of the monitor, and how all layers' become one number."""


def curve_rows(training: Training) -> Rows:
    """Scalars over training, finite ones only: quantity, step, value."""
    found = [
        (name, step, value)
        for name in LOGGED
        for step, value in zip(*training.curves.series(name), strict=True)
    ]
    found += _validations(training)
    found += [
        (name, float(record['step']), float(combine(values)))
        for name, combine in WATCHED.items()
        for record in training.stability
        if (values := finite(record.get(name)))
    ]
    return [
        dict(quantity=name, step=step, value=value)
        for name, step, value in found
        if math.isfinite(value)
    ]


def _validations(training: Training) -> list[tuple[str, float, float]]:
    """Metrics of each validation, on the steps of the training."""
    last = max((s['step'] for s in training.curves.train), default=0)
    steps = [line['step'] for line in training.curves.val]
    # a training by epochs counts validations by epochs
    by_epoch = bool(steps) and steps[-1] < last
    scale = last / steps[-1] if by_epoch and steps[-1] else 1.0
    return [
        (name, step * scale, value)
        for step, line in zip(steps, training.curves.metrics(), strict=True)
        for name, value in line.items()
    ]


def finite(values: Any) -> list[float]:
    """Leave out missing values, and those that are not finite."""
    return [v for v in values or [] if v is not None and math.isfinite(v)]


def decay_rows(training: Training, name: str) -> Rows:
    """Largest ``|exp(delta A)|`` of each layer, direction and record."""
    return [
        dict(series=name, layer=short_name(layer), step=r['step'], value=value)
        for r in training.stability
        for layer, value in zip(
            r['layers'], r.get('decay_max') or [], strict=False
        )
        if value is not None
    ]


def short_name(name: str) -> str:
    """Number and direction of a layer.

    Example:
        >>> short_name('backbone.layers.3.mixer.ssm.0')
        '3 fwd'
    """
    parts: Sequence[str] = name.split('.')
    # records up to version 0.1 have "directions"
    if parts[-2:-1] not in (['ssm'], ['directions']) or 'layers' not in parts:
        return name
    layer = parts[parts.index('layers') + 1]
    way = ('fwd', 'bwd')[int(parts[-1])]
    return f'{layer} {way}'

"""Where a report's model comes from: a checkpoint or a work dir."""

import argparse
import copy
import math
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
    """What a run wrote while it trained.

    Attributes:
        curves (Curves): Of the log.
        stability (Rows): Records of the stability monitor.
    """

    curves: Curves = field(default_factory=Curves)
    stability: Rows = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.curves.train or self.curves.val or self.stability)


@dataclass(frozen=True)
class Source:
    """A model to look at.

    Attributes:
        config (str): Path of its config.
        checkpoint (str): Path or URL of its weights.
        name (str): Short, for legends.
        training (Training): Empty unless a work dir was given.
    """

    config: str
    checkpoint: str
    name: str
    training: Training

    def arguments(self, args: argparse.Namespace) -> argparse.Namespace:
        """The command line with this model in the place of the first."""
        new = copy.copy(args)
        new.config, new.checkpoint = self.config, self.checkpoint
        return new


def find_source(config: str, place: str) -> Source:
    """Find the weights, and the curves of a work dir.

    Args:
        config (str): Path of the config.
        place (str): A checkpoint, or the work dir of a training, whose last
            checkpoint is taken.

    Raises:
        FileNotFoundError: If there is no such file or folder, or the folder
            has no checkpoint.
    """
    folder, checkpoint = Path(place), launch.find_checkpoint(place)
    if not folder.is_dir():
        return Source(config, checkpoint, folder.stem, Training())
    training = Training(
        results.read_curves(folder), results.read_stability(folder)
    )
    return Source(config, checkpoint, folder.resolve().name, training)


# ------------------------------------------------------------- its curves

LOGGED = ('loss', 'grad_norm')
WATCHED = {
    'spectral_abscissa': max,
    'spectral_radius': max,
    'decay_max': max,
    'delta_max': max,
    'horizon': max,
    'stability_penalty': sum,
    'condition': max,
    'projected_share': max,
}
"""What the monitor records of each layer, and how it becomes one number."""


def curve_rows(training: Training) -> Rows:
    """Scalars over training, finite ones only: quantity, step, value."""
    rows = []
    for name in LOGGED:
        pairs = zip(*training.curves.series(name), strict=True)
        rows += [dict(quantity=name, step=s, value=v) for s, v in pairs]
    rows += validation_rows(training)
    for name, combine in WATCHED.items():
        for record in training.stability:
            values = finite(record.get(name))
            if values:
                value = float(combine(values))
                step = float(record['step'])
                rows.append(dict(quantity=name, step=step, value=value))
    return [row for row in rows if math.isfinite(row['value'])]


def validation_rows(training: Training) -> Rows:
    """Metrics of each validation, on the steps of the training."""
    last = max((s['step'] for s in training.curves.train), default=0)
    steps = [line['step'] for line in training.curves.val]
    # a training by epochs counts validations by epochs
    by_epoch = bool(steps) and steps[-1] < last
    scale = last / steps[-1] if by_epoch and steps[-1] else 1.0
    return [
        dict(quantity=name, step=step * scale, value=value)
        for step, line in zip(steps, training.curves.metrics(), strict=True)
        for name, value in line.items()
    ]


def finite(values: Any) -> list[float]:
    """Without what is missing or not finite."""
    return [v for v in values or [] if v is not None and math.isfinite(v)]


def decay_rows(training: Training, name: str) -> Rows:
    """Largest ``|exp(delta A)|`` of each layer, direction and record."""
    rows = []
    for record in training.stability:
        values = record.get('decay_max') or []
        for layer, value in zip(record['layers'], values, strict=False):
            if value is not None:
                rows.append(
                    dict(
                        series=name,
                        layer=short_name(layer),
                        step=record['step'],
                        value=value,
                    )
                )
    return rows


def short_name(name: str) -> str:
    """'3 fwd' of 'backbone.layers.3.mixer.directions.0'."""
    parts = name.split('.')
    if 'directions' not in parts or 'layers' not in parts:
        return name
    layer = parts[parts.index('layers') + 1]
    way = ('fwd', 'bwd')[int(parts[parts.index('directions') + 1])]
    return f'{layer} {way}'

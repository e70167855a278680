"""Decide from losses, gradients and activations that training diverged."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor

CAUSES = {
    'loss': 'the loss is not finite',
    'activation': 'an activation is not finite',
    'gradient': 'a gradient is not finite',
    'spike': 'the loss has jumped',
    'skipped': 'float16 training has skipped too many steps in a row',
}
_COLUMNS = ('loss', 'gradient', 'activation')
_BY_ORIGIN = ('activation', 'loss', 'gradient')
"""In an iteration the first of them is nearest to the origin."""


class Alarm(NamedTuple):
    """Reason to examine an iteration.

    Attributes:
        cause (str): One of ``CAUSES``.
        detail (str): Numbers that belong to the cause.
        iteration (int): Number of the iteration, from 1.
        here (bool): True on the ranks that saw it themselves.
    """

    cause: str
    detail: str
    iteration: int
    here: bool


class StepValues(NamedTuple):
    """Largest values of one optimizer step, on the host.

    Attributes:
        iteration (int): Number of the iteration, from 1.
        here (list[float]): Loss, gradient and activation on this rank.
        mean_loss (float): Mean of the loss over the ranks.
        nonfinite (list[bool]): For each value, True where it is not finite on
            some rank.
    """

    iteration: int
    here: list[float]
    mean_loss: float
    nonfinite: list[bool]


def read_rows(rows: list[tuple[int, Tensor]]) -> Iterable[StepValues]:
    """Bring steps to the host, joined over the ranks, with one wait.

    Args:
        rows (list[tuple[int, Tensor]]): Iteration and values (3,) of each
            step, see :class:`.StepWatch`. Not empty.
    """
    values = torch.stack([row for _, row in rows])
    bad = (~torch.isfinite(values)).float()
    shared = torch.cat([values[:, :1], bad], dim=1)
    if get_world_size() > 1:
        all_reduce(shared, 'mean')
    together = torch.cat([values, shared], dim=1).tolist()
    for (iteration, _), row in zip(rows, together, strict=True):
        nonfinite = [share > 0 for share in row[4:]]
        yield StepValues(iteration, row[:3], row[3], nonfinite)


@dataclass(frozen=True)
class SpikeRule:
    """Definition of a jump of the loss.

    Attributes:
        factor (float, optional): A loss above this many times the median of
            the last ones is a jump; None for never.
        floor (float): No loss up to here is a jump.
        window (int): Number of losses in the median.
        warmup (int): Iterations before the first that can be a jump.
    """

    factor: float | None = 10.0
    floor: float = 1.0
    window: int = 100
    warmup: int = 100

    def __post_init__(self) -> None:
        """Check the factor."""
        if self.factor is not None and not self.factor > 1:
            raise ValueError(
                f'spike_factor must be above 1 or None, got {self.factor}'
            )


@dataclass
class LossHistory:
    """Last losses of a training, and its number of divergences.

    Attributes:
        losses (deque[tuple[int, float]]): Iterations and finite losses.
        num_losses (int): Number of all losses so far.
        num_divergences (int): Number of divergences so far.
        num_rollbacks (int): Number of rollbacks so far.
    """

    losses: deque[tuple[int, float]] = field(default_factory=deque)
    num_losses: int = 0
    num_divergences: int = 0
    num_rollbacks: int = 0

    @classmethod
    def load(cls, saved: Mapping[str, Any], window: int) -> 'LossHistory':
        """Go on with what :meth:`save` returned; start anew without it.

        Args:
            saved (Mapping[str, Any]): Entry of a checkpoint, or empty.
            window (int): Number of losses to keep.
        """
        known = dict(saved)
        losses = deque(map(tuple, known.pop('losses', [])), maxlen=window)
        return cls(losses, **known)

    def save(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return dict(vars(self), losses=[list(item) for item in self.losses])

    def forget_after(self, iteration: int) -> None:
        """Drop the losses of later iterations."""
        while self.losses and self.losses[-1][0] > iteration:
            self.losses.pop()

    def judge(self, values: StepValues, spikes: SpikeRule) -> Alarm | None:
        """Find the cause for alarm in a step, if any, and note its loss.

        Args:
            values (StepValues): Values of the step.
            spikes (SpikeRule): Definition of a jump.
        """
        for cause in _BY_ORIGIN:
            column = _COLUMNS.index(cause)
            if values.nonfinite[column]:
                value = values.here[column]
                here = not math.isfinite(value)
                detail = f'{value}' if here else 'on another rank'
                return Alarm(cause, detail, values.iteration, here)
        alarm = self._spike(values, spikes)
        self.losses.append((values.iteration, values.mean_loss))
        self.num_losses += 1
        return alarm

    def _spike(self, values: StepValues, spikes: SpikeRule) -> Alarm | None:
        """Find a finite loss that is far above the last ones."""
        loss = values.mean_loss
        if spikes.factor is None or not self.losses:
            return None
        if self.num_losses < spikes.warmup or loss <= spikes.floor:
            return None
        median = statistics.median(value for _, value in self.losses)
        if not 0 < spikes.factor * median < loss:
            return None
        detail = f'{loss:.6g}, after a median of {median:.6g}'
        return Alarm('spike', detail, values.iteration, True)

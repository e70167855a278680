"""Floors under the time of a scan, from shape and machine: a model.

Nothing here is measured. The bytes that must cross the memory, and the
exponentials that must go through the special function units, are counted and
divided by what one GPU can do of each; a kernel that reached the larger of
both would be perfect.
"""

import dataclasses
from typing import NamedTuple


class Machine(NamedTuple):
    """Ceilings of a GPU; the defaults are an H200's."""

    bandwidth: float = 4.3e12
    """Bytes per second, read and written, that a large copy reaches."""
    clock: float = 1.98e9  # Hz
    processors: int = 132
    exps_per_clock: int = 16  # of each multiprocessor

    @property
    def exps(self) -> float:
        """Exponentials (or logarithms, reciprocals) per second."""
        return self.clock * self.processors * self.exps_per_clock


class Shape(NamedTuple):
    """Of one direction of a scan."""

    batch: int
    length: int
    dim: int
    state: int

    def __str__(self) -> str:
        return ', '.join(map(str, self))


@dataclasses.dataclass(frozen=True)
class Floor:
    """Least milliseconds, by what limits."""

    memory_ms: float
    exp_ms: float

    @property
    def ms(self) -> float:
        """The larger one: what a perfect kernel would take."""
        return max(self.memory_ms, self.exp_ms)


VIM_SHAPES = {
    'Vim-T 224': Shape(128, 197, 384, 16),
    'Vim-S 224': Shape(128, 197, 768, 16),
    'Vim-B 224': Shape(128, 197, 1536, 16),
    'Vim-T 512': Shape(16, 1024, 384, 16),
    'Vim-T 1024': Shape(8, 4096, 384, 16),
    'Vim-T 1248': Shape(8, 6084, 384, 16),
}
"""Of the published models, at the named image sizes (class token left out
above 224)."""


def forward_floor(
    shape: Shape,
    itemsize: int = 2,
    gate: bool = True,
    directions: int = 1,
    machine: Machine | None = None,
) -> Floor:
    """Floor of the forward pass.

    Args:
        shape (Shape): Of one direction.
        itemsize (int): Bytes of a number in memory. Defaults to 2: bfloat16.
        gate (bool): The scan also reads the gate z. Defaults to True.
        directions (int): Scans in one call. Defaults to 1.
        machine (Machine, optional): An H200 by default.

    Returns:
        Floor: Milliseconds. Memory: u, delta, y, B, C and the gate cross it
        once. Exponentials: one per state, and softplus and silu of the gate
        with two each.
    """
    machine = machine or Machine()
    batch, length, dim, state = shape
    tokens = directions * batch * length
    moved = tokens * itemsize * ((3 + gate) * dim + 2 * state)
    exps = tokens * dim * (state + (4 if gate else 2))
    return Floor(1e3 * moved / machine.bandwidth, 1e3 * exps / machine.exps)


def backward_floor(
    shape: Shape,
    itemsize: int = 2,
    gate: bool = True,
    directions: int = 1,
    machine: Machine | None = None,
) -> Floor:
    """Floor of the backward pass; arguments as of :func:`forward_floor`.

    Memory: u, delta, dy, du, ddelta, B, C, and z and dz, once; dB and dC in
    float32. Exponentials: the forward pass's twice, because the states are
    recomputed instead of read.
    """
    machine = machine or Machine()
    batch, length, dim, state = shape
    tokens = directions * batch * length
    numbers = (5 + 2 * gate) * dim + 2 * state
    moved = tokens * (itemsize * numbers + 4 * 2 * state)
    exps = tokens * dim * 2 * (state + (4 if gate else 2))
    return Floor(1e3 * moved / machine.bandwidth, 1e3 * exps / machine.exps)


def markdown_table() -> str:
    """Floors of the published models' scans, bfloat16 with gate."""
    lines = [
        '| scan | batch, length, dim, state | forward ms: memory / exp '
        '| backward ms: memory / exp |',
        '|---|---|---|---|',
    ]
    for name, shape in VIM_SHAPES.items():
        forward, backward = forward_floor(shape), backward_floor(shape)
        lines.append(
            f'| {name} | {shape} '
            f'| {forward.memory_ms:.3f} / {forward.exp_ms:.3f} '
            f'| {backward.memory_ms:.3f} / {backward.exp_ms:.3f} |'
        )
    return '\n'.join(lines)

"""Fourier modes: periodic patterns along the sequence of patches.

A mode of frequency f (cycles per token) and phase p has the value
``cos(2 pi f t + p)`` at place t of the sequence; on an image t counts the
patches row by row. Such noise singles out the frequencies to which a
state-space layer responds strongly (arXiv:2310.01698).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

Frequency = float | tuple[float, float]
"""Cycles per token along the raster, or per column and per row."""

_SILENT = 1e-6
"""Root mean square below which a mode is nothing but rounding."""


class Grid(NamedTuple):
    """Grid of cells in an image; a mode is constant within a cell.

    Attributes:
        rows (int): Number of rows of cells.
        columns (int): Number of columns of cells.
        cell (tuple[int, int]): Height and width of a cell, pixels.
    """

    rows: int
    columns: int
    cell: tuple[int, int] = (1, 1)

    @property
    def length(self) -> int:
        """Number of cells."""
        return self.rows * self.columns


def mode_frequencies(length: int, count: int | None = None) -> list[float]:
    """List the frequencies ``k / length`` from 0 to one half.

    Args:
        length (int): Length of the sequence.
        count (int, optional): Take about so many of them, evenly spaced, the
            first and the last one included. Defaults to None, for all.

    Returns:
        list[float]: Ascending, cycles per place.

    Raises:
        ValueError: If ``length`` or ``count`` is not positive.

    Example:
        >>> from mmstabvim.evaluation.fourier_modes import mode_frequencies
        >>> mode_frequencies(8)
        [0.0, 0.125, 0.25, 0.375, 0.5]
    """
    for name, value in (('length', length), ('count', count)):
        if value is not None and value < 1:
            raise ValueError(f'{name} must be positive, got {value}')
    last = length // 2
    if count is None or count > last:
        return [k / length for k in range(last + 1)]
    steps = max(count - 1, 1)
    chosen = sorted({round(last * i / steps) for i in range(count)})
    return [k / length for k in chosen]


def plane_wave(frequency: float, columns: int) -> tuple[float, float]:
    """Return the frequencies of the plane wave that a mode is on a grid.

    At the cell in row i and column j a mode of the sequence is
    ``cos(2 pi (x j + y i) + p)``, exactly.

    Args:
        frequency (float): Cycles per token.
        columns (int): Columns of the grid.

    Returns:
        tuple[float, float]: x in cycles per column, y in cycles per row, the
        latter in [0, 1).

    Example:
        >>> from mmstabvim.evaluation.fourier_modes import plane_wave
        >>> plane_wave(0.25, columns=14)  # 3.5 periods in a row
        (0.25, 0.5)
    """
    return frequency, frequency * columns % 1.0


def token_frequency(omega: float, delta: float) -> float:
    """Return the frequency of the mode at a peak of a state matrix.

    Args:
        omega (float): Imaginary part of an eigenvalue, radians per unit of
            time.
        delta (float): Step size, time per token.

    Returns:
        float: Cycles per token, 0 to 1/2; faster ones look like these.

    Example:
        >>> from mmstabvim.evaluation.fourier_modes import token_frequency
        >>> round(token_frequency(omega=100.0, delta=0.01), 4)
        0.1592
    """
    turns = abs(delta * omega) / (2 * math.pi) % 1.0
    return min(turns, 1.0 - turns)


def fourier_mode(
    grid: Grid,
    frequency: Frequency,
    phase: float = 0.0,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Make a mode as an image of root mean square 1.

    Args:
        grid (Grid): Grid of the network's input.
        frequency (Frequency): A number counts along the raster, a pair is a
            plane wave (cycles per column, cycles per row).
        phase (float): Radians. Defaults to 0.0.
        size (tuple[int, int], optional): Height and width of an image at the
            top left of the input, pixels. Defaults to None, for the whole
            grid with one value per cell.

    Returns:
        Tensor: (height, width) or (rows, columns), float64. The mean of the
        squares is 1, so all modes have the same energy.

    Raises:
        ValueError: If the mode is zero everywhere, as a sine of frequency 0
            or 1/2 is.

    Example:
        >>> from mmstabvim.evaluation.fourier_modes import Grid, fourier_mode
        >>> fourier_mode(Grid(rows=1, columns=4), frequency=0.5)
        tensor([[ 1., -1.,  1., -1.]], dtype=torch.float64)
    """
    height, width = size or (grid.rows, grid.columns)
    tall, wide = grid.cell if size else (1, 1)
    # pixels beyond the last patch belong to it
    i = (torch.arange(height) // tall).clamp(max=grid.rows - 1)[:, None]
    j = (torch.arange(width) // wide).clamp(max=grid.columns - 1)
    turns = _turns(i.double(), j.double(), grid.columns, frequency)
    mode = torch.cos(2 * math.pi * turns + phase)
    rms = mode.square().mean().sqrt()
    if rms < _SILENT:
        raise ValueError(
            f'a mode must not be zero, got frequency {frequency}, phase '
            f'{phase:.4g}, whose root mean square is {float(rms):.1e}'
        )
    return mode / rms


def _turns(i: Tensor, j: Tensor, columns: int, frequency: Frequency) -> Tensor:
    """Compute phases in turns, modulo 1: whole turns would cost digits."""
    if isinstance(frequency, tuple):
        across, down = frequency
        return (across * j) % 1.0 + (down * i) % 1.0
    return (frequency * (i * columns + j)) % 1.0


def is_silent(grid: Grid, frequency: Frequency, phase: float) -> bool:
    """Tell if a mode is zero everywhere.

    Args:
        grid (Grid): Grid of the network's input.
        frequency (Frequency): See :func:`fourier_mode`.
        phase (float): Radians.

    Returns:
        bool: True where :func:`fourier_mode` would refuse.
    """
    try:
        fourier_mode(grid, frequency, phase)
    except ValueError:
        return True
    return False


def rms_contrast(image: Tensor) -> Tensor:
    """Root mean square contrast, the distance of pixels from their mean.

    Args:
        image (Tensor): (..., channels, height, width); the mean of each
            channel is taken off, so a plain colour has no contrast.

    Returns:
        Tensor: (...,), float32 or wider, in units of the image.

    Example:
        >>> import torch
        >>> from mmstabvim.evaluation.fourier_modes import rms_contrast
        >>> rms_contrast(torch.tensor([[[0.0, 2.0]]]))
        tensor(1.)
    """
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    return wide.var(dim=(-2, -1), correction=0).mean(-1).sqrt()

"""Modes on the patch grid: what they are, and their energy."""

import math

import numpy as np
import pytest
import torch

from mmstabvim.evaluation.fourier_modes import (
    Grid,
    fourier_mode,
    is_silent,
    mode_frequencies,
    plane_wave,
    rms_contrast,
    token_frequency,
)
from mmstabvim.ops import selective_scan

GRIDS = [Grid(14, 14), Grid(1, 1), Grid(3, 7), Grid(5, 1), Grid(1, 8)]


# ------------------------------------------------------------- a frozen layer


def answer(mode, eigenvalues, input_matrix, output_matrix, skip, delta=0.1):
    """Output of the scan whose B, C and step are constants."""
    length, states = len(mode), len(eigenvalues)

    def constant(values):
        values = torch.tensor(values, dtype=torch.float64)
        return values.reshape(1, states, 1).expand(1, states, length)

    return selective_scan(
        mode.reshape(1, 1, length),
        torch.full((1, 1, length), delta, dtype=torch.float64),
        torch.tensor([eigenvalues], dtype=torch.float64),
        constant(input_matrix),
        constant(output_matrix),
        D=torch.tensor([skip], dtype=torch.float64),
        backend='reference',
    ).flatten()


def gain(frequency, layer):
    """Complex ratio of output to input over whole periods at the end."""
    mode = fourier_mode(Grid(1, 600), frequency).flatten()
    out = answer(mode, *layer)
    turns = frequency * torch.arange(600, dtype=torch.float64)
    wave = torch.exp(-2j * math.pi * turns)
    late = slice(400, None)
    return complex((out * wave)[late].sum() / (mode * wave)[late].sum())


PAIR = ((-1.0, -2.0), (1.0, 1.0), (1.0, -0.5), 0.5)
# a state that keeps 0.9 of itself and takes 0.1 of the input
SCALAR = ((math.log(0.9) / 0.1,), (1.0,), (1.0,), 0.0)


@pytest.mark.parametrize(
    ('frequency', 'expected'),
    [
        (0.0, 1.2750004162),
        (0.05, 0.5721466026),
        (0.25, 0.5256554678),
        (0.5, 0.5250062189),
    ],
)
def test_gain_of_two_states(frequency, expected):
    """Euler's B: the oracle values of a layer with frozen parameters."""
    assert abs(gain(frequency, PAIR)) == pytest.approx(expected, abs=2e-10)


def test_phase_of_two_states():
    found = gain(0.05, PAIR)
    assert math.atan2(found.imag, found.real) == pytest.approx(
        -0.3098534767, abs=2e-10
    )


@pytest.mark.parametrize(
    ('frequency', 'expected'),
    [(0.0, 1.0), (0.25, 0.0743294146), (0.5, 0.0526315789)],
)
def test_gain_of_one_state(frequency, expected):
    assert abs(gain(frequency, SCALAR)) == pytest.approx(expected, abs=2e-10)


# --------------------------------------------------------------------- modes


def test_frequencies():
    assert mode_frequencies(5) == [0.0, 0.2, 0.4]
    assert mode_frequencies(4) == [0.0, 0.25, 0.5]
    assert mode_frequencies(1) == [0.0]


@pytest.mark.parametrize('count', [1, 2, 7, 33, 99, 200])
def test_a_count_spans_all_frequencies(count):
    found = mode_frequencies(196, count)
    assert len(found) == min(count, 99)
    assert set(found) <= set(mode_frequencies(196))
    assert found[0] == 0.0
    assert found[-1] == (0.5 if count > 1 else 0.0)


@pytest.mark.parametrize('kwargs', [{'length': 0}, {'length': 4, 'count': 0}])
def test_frequencies_refuse(kwargs):
    with pytest.raises(ValueError, match='must be positive, got 0'):
        mode_frequencies(**kwargs)


def test_plane_wave_of_a_mode():
    """20 of 196 on 14 x 14 patches."""
    assert plane_wave(20 / 196, 14) == pytest.approx(
        (0.1020408163, 0.4285714286), abs=1e-10
    )


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('phase', [0.0, 0.4, math.pi / 2])
def test_a_mode_is_its_plane_wave(grid, phase):
    for frequency in mode_frequencies(grid.length):
        if is_silent(grid, frequency, phase):
            continue
        mode = fourier_mode(grid, frequency, phase)
        wave = plane_wave(frequency, grid.columns)
        torch.testing.assert_close(fourier_mode(grid, wave, phase), mode)


@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_all_modes_have_the_same_energy(grid):
    for frequency in mode_frequencies(grid.length):
        mode = fourier_mode(grid, frequency, 0.3)
        assert mode.shape == (grid.rows, grid.columns)
        assert float(mode.square().mean()) == pytest.approx(1, abs=1e-12)


def test_a_mode_runs_along_the_rows():
    """On a 2 x 3 grid the fourth token is below the first."""
    mode = fourier_mode(Grid(2, 3), 0.3, 0.2).flatten()
    expected = torch.cos(2 * math.pi * 0.3 * torch.arange(6).double() + 0.2)
    expected /= expected.square().mean().sqrt()
    torch.testing.assert_close(mode, expected)


@pytest.mark.parametrize('frequency', [0.0, 0.5])
def test_a_silent_sine_is_refused(frequency):
    grid = Grid(14, 14)
    assert is_silent(grid, frequency, math.pi / 2)
    assert not is_silent(grid, 0.25, math.pi / 2)
    with pytest.raises(ValueError, match=r'must not be zero, got frequency'):
        fourier_mode(grid, frequency, math.pi / 2)


def test_constant_on_each_patch():
    """Patches of 4 x 2 pixels; the image does not fill the last ones."""
    grid = Grid(3, 5, (4, 2))
    tokens = fourier_mode(grid, 4 / 15, 0.5)
    image = fourier_mode(grid, 4 / 15, 0.5, (10, 9))
    assert image.shape == (10, 9)
    assert float(image.square().mean()) == pytest.approx(1, abs=1e-12)
    ratio = image[0, 0] / tokens[0, 0]
    spread = tokens.repeat_interleave(4, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(image, ratio * spread[:10, :9])


def test_overlapping_patches_end_with_the_last_cell():
    """2 x 3 cells of 2 x 2 pixels, and what is left belongs to the last."""
    image = fourier_mode(Grid(2, 3, (2, 2)), 1 / 6, 0.1, (8, 10))
    assert len(torch.unique(image)) <= 6
    assert torch.equal(image[2:, 4:], image[2, 4].expand(6, 6))
    assert image[0, 0] != image[0, 2]
    assert image[0, 0] != image[2, 0]


def test_frequency_of_a_loud_mode():
    """A continuous-time peak, met by steps of 0.1."""
    found = token_frequency(80.966, 0.1)
    # the peak is known to five digits
    assert found == pytest.approx(0.288615, abs=1e-5)
    # above one half the mode is heard as its mirror image
    assert token_frequency(2 * math.pi * 0.7, 1.0) == pytest.approx(0.3)


# ------------------------------------------------------------------ contrast


def test_contrast_is_the_deviation_from_each_colour():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 6, 5)).astype(np.uint8)
    expected = np.sqrt(np.mean(image.astype(float).var(axis=(1, 2))))
    found = float(rms_contrast(torch.from_numpy(image)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_plain_colour_has_no_contrast():
    image = torch.tensor([10.0, 200.0, 30.0])[:, None, None].expand(3, 4, 4)
    assert float(rms_contrast(image)) == 0

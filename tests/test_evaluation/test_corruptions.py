"""Size and effect of the image corruptions."""

import math

import numpy as np
import pytest
import torch

from mmstabvim.evaluation.corruptions import (
    CORRUPTIONS,
    Brightness,
    FourierNoise,
    GaussianNoise,
    Jpeg,
    Size,
    make_corruption,
)
from mmstabvim.evaluation.fourier_modes import (
    Grid,
    fourier_mode,
    rms_contrast,
)

GRID = Grid(4, 6, (4, 4))


@pytest.fixture
def image():
    """Smooth colours and some noise, 16 x 24 pixels."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(40, 200, 24)[None, None] * np.ones((3, 16, 1))
    ramp += 20 * np.arange(3)[:, None, None]
    return torch.from_numpy(ramp + rng.normal(0, 8, ramp.shape)).float()


def rms(new, old):
    return float((new - old).double().square().mean().sqrt())


EXACT = {
    'cosine': lambda size: FourierNoise(size, 5 / 24),
    'sine': lambda size: FourierNoise(size, 5 / 24, math.pi / 2),
    'plane': lambda size: FourierNoise(size, (0.2, 0.4), 1.0),
    'brighter': Brightness,
    'darker': lambda size: Brightness(size, darker=True),
}


@pytest.mark.parametrize('amplitude', [0.1, 0.5])
@pytest.mark.parametrize('name', EXACT)
def test_size_relative_to_the_contrast(name, amplitude, image):
    changed = EXACT[name](Size(amplitude))(image, GRID)
    expected = amplitude * float(rms_contrast(image))
    assert rms(changed, image) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('name', EXACT)
def test_absolute_size(name, image):
    """A share of the range of pixel values, whatever the contrast."""
    size = Size(0.04, relative=False, value_range=200.0)
    changed = EXACT[name](size)(image, GRID)
    assert rms(changed, image) == pytest.approx(8.0, rel=1e-4)


def test_a_mode_is_gray_and_constant_on_patches(image):
    size = Size(0.2)
    noise = FourierNoise(size, 7 / 24, 0.3)(image, GRID) - image
    tokens = fourier_mode(GRID, 7 / 24, 0.3) * float(size.of(image))
    spread = tokens.repeat_interleave(4, 0).repeat_interleave(4, 1)
    for colour in noise:
        torch.testing.assert_close(colour, spread.float(), rtol=0, atol=1e-4)


def test_frequency_zero_is_brightness(image):
    mode = FourierNoise(Size(0.3), 0.0)(image, GRID)
    torch.testing.assert_close(mode, Brightness(Size(0.3))(image, GRID))


def test_a_plain_image_stays(image):
    plain = torch.full((3, 16, 24), 128.0)
    for name in ('gaussian', 'brighter', 'darker'):
        changed = make_corruption(name, Size(0.5))(plain, GRID)
        torch.testing.assert_close(changed, plain)


def test_no_clipping_unless_asked_for(image):
    free = FourierNoise(Size(3.0), 0.25)(image, GRID)
    assert free.min() < 0
    assert free.max() > 255
    clipped = FourierNoise(Size(3.0, clip=True), 0.25)(image, GRID)
    torch.testing.assert_close(clipped, free.clamp(0, 255))


def test_gaussian_noise_is_seeded_and_changes(image):
    first, again = (GaussianNoise(Size(0.1), seed=3) for _ in range(2))
    one, two = (first(image, GRID) for _ in range(2))
    assert torch.equal(again(image, GRID), one)
    assert not torch.equal(one, two)
    other = GaussianNoise(Size(0.1), seed=4)(image, GRID)
    assert not torch.equal(one, other)


def test_gaussian_noise_has_the_size_on_average(image):
    noise = GaussianNoise(Size(0.1))
    sizes = [rms(noise(image, GRID), image) for _ in range(50)]
    # 50 * 1152 values: the mean is within one percent
    expected = 0.1 * float(rms_contrast(image))
    assert np.mean(sizes) == pytest.approx(expected, rel=0.01)


# ---------------------------------------------------------------------- JPEG


@pytest.mark.parametrize('amplitude', [0.05, 0.1, 0.2])
def test_jpeg_takes_the_lowest_quality_within_the_size(amplitude, image):
    """No error above it; the next lower quality has one."""
    from mmstabvim.evaluation import corruptions

    size = Size(amplitude)
    error = rms(Jpeg(size)(image, GRID), image)
    allowed = float(size.of(image))
    pixels = image.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    errors = [
        rms(corruptions._compress(pixels, quality, corruptions._FULL), image)
        for quality in range(1, 101)
    ]
    chosen = int(np.argmin(np.abs(np.array(errors) - error)))
    assert error == pytest.approx(errors[chosen], abs=1e-6)
    assert error <= allowed
    assert chosen == 0 or errors[chosen - 1] > allowed


def test_jpeg_with_a_quality(image):
    """A low one loses more than a high one, and is in the name."""
    coarse, fine = (rms(Jpeg(Size(), q)(image, GRID), image) for q in (5, 95))
    assert fine < 0.5 * coarse
    assert Jpeg(Size(), 5).describe()['kind'] == 'jpeg5'


def test_jpeg_scales_the_range(image):
    size, unit = Size(0.1), Size(0.1, value_range=1.0)
    of_bytes = Jpeg(size)(image, GRID)
    of_unit = Jpeg(unit)(image / 255, GRID)
    torch.testing.assert_close(255 * of_unit, of_bytes, rtol=0, atol=1e-3)


def test_jpeg_of_one_channel(image):
    changed = Jpeg(Size(0.1))(image[:1], GRID)
    assert changed.shape == (1, 16, 24)
    assert rms(changed, image[:1]) > 0


# --------------------------------------------------------------------- tokens


def test_on_tokens_along_one_direction():
    """Rank one, one mode, and the size relative to the spread."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 24, 5, generator=generator, dtype=torch.float32)
    tokens[1] *= 7
    noise = FourierNoise(Size(0.3), 3 / 24, 0.5, 'embed', seed=1)
    changed, ratio = noise.add_to_tokens(tokens, (4, 6))
    torch.testing.assert_close(ratio, torch.tensor([0.3, 0.3]))
    mode = fourier_mode(Grid(4, 6), 3 / 24, 0.5).flatten().float()
    for old, new in zip(tokens, changed, strict=True):
        added = new - old
        values = torch.linalg.svdvals(added)
        assert values[1] < 1e-5 * values[0]
        line = added @ added[0] / added[0].norm()
        expected = mode * (line[0] / mode[0])
        torch.testing.assert_close(line, expected, rtol=1e-3, atol=1e-4)
        spread = (old - old.mean(0)).square().sum(1).mean().sqrt()
        size = added.square().sum(1).mean().sqrt()
        assert float(size / spread) == pytest.approx(0.3, rel=1e-4)


def test_on_tokens_absolute_and_in_their_dtype():
    tokens = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    noise = FourierNoise(Size(2.0, relative=False), 0.5, level='embed')
    changed, _ = noise.add_to_tokens(tokens, (2, 3))
    size = (changed - tokens).square().sum(-1).mean().sqrt()
    assert float(size) == pytest.approx(2.0, rel=1e-5)
    low, _ = noise.add_to_tokens(tokens.bfloat16(), (2, 3))
    assert low.dtype == torch.bfloat16


def test_embedded_modes_leave_the_image(image):
    noise = FourierNoise(Size(0.3), 0.25, level='embed')
    assert torch.equal(noise(image, GRID), image)


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Size(0.0), 'amplitude must be positive, got 0.0'),
        (lambda: Size(value_range=-1.0), 'value_range must be positive'),
        (lambda: FourierNoise(Size(), 0.1, level='patch'), 'level must be'),
        (lambda: Jpeg(Size(), 101), 'quality must be 1 to 100, got 101'),
        (lambda: make_corruption('fog', Size()), "must be one of .*'fog'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_jpeg_refuses_other_images():
    with pytest.raises(ValueError, match='1 or 3 channels, got 4'):
        Jpeg(Size())(torch.zeros(4, 8, 8), GRID)


def test_names_in_tables():
    found = [make_corruption(name, Size()).describe() for name in CORRUPTIONS]
    assert [row['kind'] for row in found] == list(CORRUPTIONS)
    mode = FourierNoise(Size(), 0.25, 0.5).describe()
    assert mode == {'kind': 'fourier', 'frequency': 0.25, 'phase': 0.5}

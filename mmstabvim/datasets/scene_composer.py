"""Segmentation scenes composed from the embedded digits."""

import functools
from typing import NamedTuple

import cv2
import numpy as np

from mmstabvim.datasets.digits import MAX_VALUE, SPLITS, split_indices

MAX_DIGITS = 4
MIN_DIGITS = 2
SIDES = (0.4, 0.7)  # of a digit, in parts of the scene's
MAX_ANGLE = 15  # degrees
MAX_OVERLAP = 0.1  # of the smallest digit's ink
PLACEMENTS = 10  # tried before a digit is left out
MIN_CONTRAST = 80  # of a digit's brightness and that of what it covers
BRIGHTEST = 128  # channel of the background's colours
INK = 0.5  # opacity from which on a pixel belongs to the digit
NOISE_SCALES = ((2, 1.0), (6, 0.6), (16, 0.35))  # cells per side, weight
GRAIN = 14  # largest change of a pixel


class Scene(NamedTuple):
    """An image and the class of each of its pixels."""

    image: np.ndarray  # (size, size, 3), uint8
    labels: np.ndarray  # (size, size), uint8, 0 or digit + 1


@functools.lru_cache(maxsize=64)  # an image and its labels are read in turn
def compose_scene(
    split: str, index: int, size: int = 64, seed: int = 0
) -> Scene:
    """Compose one scene, as :class:`.DigitScenes` describes it.

    Args:
        split (str): ``'train'`` or ``'test'``, whose digits are used.
        index (int): Number of the scene, at least 0.
        size (int): Height and width, pixels. Defaults to 64.
        seed (int): Seed of the scene. Defaults to 0.

    Returns:
        Scene: Shared for equal arguments, not to be written to.

    Example:
        >>> from mmstabvim.datasets.scene_composer import compose_scene
        >>> compose_scene('test', 0).image.shape
        (64, 64, 3)
    """
    # the legacy generator, whose numbers NumPy promises never to change
    rng = np.random.RandomState([seed, SPLITS.index(split), index])
    image = _texture(rng, size)
    labels = np.zeros((size, size), np.uint8)
    smallest = size * size
    for _ in range(rng.randint(MIN_DIGITS, MAX_DIGITS + 1)):
        digit, opacity = _draw_digit(rng, split, size)
        ink = opacity >= INK
        smallest = min(smallest, ink.sum())
        place = _find_place(rng, ink, labels, MAX_OVERLAP * smallest)
        if place is not None:
            colour = _contrasting_colour(rng, image[place][ink])
            image[place] += opacity[..., None] * (colour - image[place])
            labels[place][ink] = digit + 1
    grain = rng.randint(-GRAIN, GRAIN + 1, image.shape, np.int8)
    pixels = (image + grain).clip(0, 255).astype(np.uint8)
    for array in (pixels, labels):
        array.flags.writeable = False
    return Scene(pixels, labels)


@functools.lru_cache
def _digits_by_class(split: str) -> list[np.ndarray]:
    """Load the images of each digit, (count, 8, 8), values 0 .. 1."""
    # here, because scikit-learn is slow to import
    from sklearn.datasets import load_digits

    digits = load_digits()
    indices = split_indices(digits.target, split)
    images = (digits.images[indices] / MAX_VALUE).astype(np.float32)
    return [images[digits.target[indices] == digit] for digit in range(10)]


def _texture(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Draw smooth noise and stripes of two colours, (size, size, 3)."""
    field = _stripes(rng, size)
    for cells, weight in NOISE_SCALES:
        coarse = rng.uniform(-weight, weight, (cells, cells))
        field += cv2.resize(
            coarse.astype(np.float32),
            (size, size),
            interpolation=cv2.INTER_CUBIC,
        )
    mix = 1 / (1 + np.exp(-2 * field))
    low, high = rng.uniform(0, BRIGHTEST, (2, 3)).astype(np.float32)
    return low + mix[..., None] * (high - low)


def _stripes(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Draw a plane wave of 2 to 8 periods per side, (size, size)."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    periods = rng.uniform(2, 8)
    pixels = np.arange(size, dtype=np.float32) * (2 * np.pi * periods / size)
    along = np.cos(angle) * pixels + np.sin(angle) * pixels[:, None]
    return 0.5 * np.sin(along + phase).astype(np.float32)


def _draw_digit(
    rng: np.random.RandomState, split: str, size: int
) -> tuple[int, np.ndarray]:
    """Draw a digit and its opacity, (side, side), 0 .. 1."""
    digit = rng.randint(10)
    images = _digits_by_class(split)[digit]
    return digit, _enlarge(rng, images[rng.randint(len(images))], size)


def _find_place(
    rng: np.random.RandomState,
    ink: np.ndarray,
    labels: np.ndarray,
    max_overlap: float,
) -> tuple[slice, slice] | None:
    """Find a place that covers few pixels of other digits, None if none."""
    side = len(ink)
    most = len(labels) - side
    for y, x in rng.randint(0, most + 1, (PLACEMENTS, 2)):
        place = slice(y, y + side), slice(x, x + side)
        if (labels[place][ink] > 0).sum() <= max_overlap:
            return place
    return None


def _enlarge(
    rng: np.random.RandomState, small: np.ndarray, size: int
) -> np.ndarray:
    """Enlarge and turn an image of a digit to (side, side), 0 .. 1."""
    side = round(size * rng.uniform(*SIDES))
    scale = side / len(small)
    # pixel centres: the middle of the small image is at 3.5, not at 4
    middle = (len(small) - 1) / 2
    shift = (side - 1) / 2 - middle
    turn = cv2.getRotationMatrix2D(
        (middle, middle), rng.uniform(-MAX_ANGLE, MAX_ANGLE), scale
    ) + np.array([[0, 0, shift], [0, 0, shift]])
    large = cv2.warpAffine(small, turn, (side, side), flags=cv2.INTER_CUBIC)
    return large.clip(0, 1)


def _contrasting_colour(
    rng: np.random.RandomState, covered: np.ndarray
) -> np.ndarray:
    """Draw a colour, (3,), brighter than the (n, 3) pixels under it."""
    lowest = min(covered.mean() + MIN_CONTRAST, 255)
    target = rng.uniform(lowest, 255)
    tint = rng.uniform(-50, 50, 3)
    return (target + tint - tint.mean()).clip(0, 255)

"""Image corruptions, all with the same energy.

The size of a corruption is its root mean square over pixels and channels,
either relative to the contrast of the image or absolute, as a share of the
range of pixel values. Images come as the network's data preprocessor takes
them, before normalization, and are not clipped unless asked for, as
clipping adds harmonics.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mmstabvim.evaluation.fourier_modes import (
    Frequency,
    Grid,
    fourier_mode,
    rms_contrast,
)
from mmstabvim.stability.inputs import check_choice

LEVELS = ('token', 'pixel', 'embed')

_HALF = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
_FULL = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a corruption.

    Attributes:
        amplitude (float): Root mean square of the corruption.
        relative (bool): Relative to the contrast of each image; otherwise to
            the range of pixel values.
        value_range (float): Largest pixel value, the smallest being 0.
        clip (bool): Keep the corrupted image within the range.
    """

    amplitude: float = 0.1
    relative: bool = True
    value_range: float = 255.0
    clip: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ('amplitude', 'value_range'):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f'{name} must be positive, got {value}')

    def of(self, image: Tensor) -> Tensor:
        """Return the root mean square for one image (channels, ...)."""
        unit = rms_contrast(image) if self.relative else self.value_range
        return torch.as_tensor(self.amplitude * unit, device=image.device)


class Corruption(ABC):
    """Base class of the image corruptions.

    Args:
        size (Size): Size of the corruption.
        name (str): Name in tables.
    """

    def __init__(self, size: Size, name: str) -> None:
        self.size, self.name = size, name

    def describe(self) -> dict[str, Any]:
        """Return kind, frequency and phase, the first columns of a table."""
        return dict(kind=self.name, frequency=None, phase=None)

    def __call__(self, image: Tensor, grid: Grid) -> Tensor:
        """Corrupt an image.

        Args:
            image (Tensor): (channels, height, width), floating, not
                normalized.
            grid (Grid): Grid of the network's input.

        Returns:
            Tensor: New image of the same shape, dtype and device.
        """
        changed = self.change(image, grid)
        if self.size.clip:
            changed = changed.clamp(0, self.size.value_range)
        return changed

    @abstractmethod
    def change(self, image: Tensor, grid: Grid) -> Tensor:
        """Corrupt an image without clipping it."""


class FourierNoise(Corruption):
    """One Fourier mode, the same for all colours.

    Args:
        size (Size): Size of the mode; in the level ``'embed'`` relative to
            the spread of the tokens, or absolute in their units.
        frequency (Frequency): Cycles per token, or per column and row.
        phase (float): Radians. Defaults to 0.0.
        level (str): ``'token'``: constant within each patch; ``'pixel'``:
            the raster counts pixels; ``'embed'``: added to the tokens after
            the patch embedding, along one direction. Defaults to
            ``'token'``.
        seed (int): Seed of that direction. Defaults to 0.

    Example:
        >>> import torch
        >>> from mmstabvim.evaluation.corruptions import FourierNoise, Size
        >>> from mmstabvim.evaluation.fourier_modes import Grid
        >>> noise = FourierNoise(Size(1.0, relative=False, value_range=1), 0.5)
        >>> noise(torch.zeros(1, 1, 4), Grid(1, 4))
        tensor([[[ 1., -1.,  1., -1.]]])
    """

    def __init__(
        self,
        size: Size,
        frequency: Frequency,
        phase: float = 0.0,
        level: str = 'token',
        seed: int = 0,
    ) -> None:
        super().__init__(size, 'fourier')
        check_choice('level', level, LEVELS)
        self.frequency, self.phase = frequency, phase
        self.level, self.seed = level, seed

    def describe(self) -> dict[str, Any]:
        """Return kind, frequency and phase."""
        return dict(kind=self.name, frequency=self.frequency, phase=self.phase)

    def change(self, image: Tensor, grid: Grid) -> Tensor:
        """Add the mode; in the level ``'embed'`` the image stays."""
        if self.level == 'embed':
            return image
        height, width = image.shape[-2:]
        mode = fourier_mode(grid, self.frequency, self.phase, (height, width))
        return image + self.size.of(image) * mode.to(image)

    def add_to_tokens(
        self, tokens: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Add the mode to embedded tokens.

        Args:
            tokens (Tensor): (batch, length, channels), patches row by row.
            grid (tuple[int, int]): Rows and columns.

        Returns:
            tuple[Tensor, Tensor]: The tokens, in their dtype, and the root
            mean square of what was added over the spread of the tokens,
            (batch,). The spread is the root mean square distance of the
            tokens of an image from their mean.
        """
        mode = fourier_mode(Grid(*grid), self.frequency, self.phase)
        mode = mode.flatten().to(tokens.device, torch.float32)
        wide = tokens.float()
        spread = wide.var(dim=1, correction=0).sum(-1).sqrt()
        unit = spread if self.size.relative else torch.ones_like(spread)
        amplitude = self.size.amplitude * unit
        axis = self._direction(tokens.shape[-1]).to(wide)
        noise = amplitude[:, None, None] * mode[:, None] * axis
        return (wide + noise).to(tokens.dtype), amplitude / spread

    def _direction(self, channels: int) -> Tensor:
        """Draw a random unit vector, the same for each seed."""
        generator = torch.Generator().manual_seed(self.seed)
        vector = torch.randn(channels, generator=generator)
        return vector / vector.norm()


class GaussianNoise(Corruption):
    """White noise, independent for all pixels and colours.

    Args:
        size (Size): Size of the noise, on average over images.
        seed (int): Seed of the noise. Images that follow one another get
            different noise, the same in each run. Defaults to 0.
    """

    def __init__(self, size: Size, seed: int = 0) -> None:
        super().__init__(size, 'gaussian')
        self._generator = torch.Generator().manual_seed(seed)

    def change(self, image: Tensor, grid: Grid) -> Tensor:
        """Add noise."""
        noise = torch.randn(image.shape, generator=self._generator)
        return image + self.size.of(image) * noise.to(image)


class Brightness(Corruption):
    """Constant added to every pixel, which is the mode of frequency 0.

    Args:
        size (Size): Size of the constant.
        darker (bool): Subtract it instead. Defaults to False.
    """

    def __init__(self, size: Size, darker: bool = False) -> None:
        super().__init__(size, 'darker' if darker else 'brighter')
        self._sign = -1 if darker else 1

    def change(self, image: Tensor, grid: Grid) -> Tensor:
        """Add a constant."""
        return image + self._sign * self.size.of(image)


class Jpeg(Corruption):
    """JPEG compression of images in OpenCV's order of channels, BGR.

    Args:
        size (Size): Largest error. For each image the lowest quality is taken
            whose error is not larger, with colours at full resolution. Where
            the best quality is not good enough, it is taken.
        quality (int, optional): One quality for all images instead, 1 to 100,
            with colours at half the resolution as usual. Defaults to None.
    """

    def __init__(self, size: Size, quality: int | None = None) -> None:
        super().__init__(size, f'jpeg{quality or ""}')
        if quality is not None and not 1 <= quality <= 100:
            raise ValueError(f'quality must be 1 to 100, got {quality}')
        self.quality = quality

    def change(self, image: Tensor, grid: Grid) -> Tensor:
        """Compress and expand."""
        if image.shape[0] not in (1, 3):
            raise ValueError(
                f'JPEG needs an image of 1 or 3 channels, got {image.shape[0]}'
            )
        scaled = image.cpu() * (255 / self.size.value_range)
        pixels = scaled.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
        pixels = np.ascontiguousarray(pixels)
        if self.quality is not None:
            found = _compress(pixels, self.quality)
        else:
            allowed = float(self.size.of(image)) * 255 / self.size.value_range
            found = _compress_within(pixels, scaled, allowed)
        return found.to(image) * (self.size.value_range / 255)


def _compress(
    pixels: np.ndarray, quality: int, sampling: int = _HALF
) -> Tensor:
    """Compress and expand (height, width, channels); channels come first."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    _, code = cv2.imencode('.jpg', pixels, options)
    found: Any = cv2.imdecode(code, cv2.IMREAD_UNCHANGED)
    return torch.from_numpy(found.reshape(pixels.shape)).permute(2, 0, 1)


def _compress_within(
    pixels: np.ndarray, image: Tensor, allowed: float
) -> Tensor:
    """Bisect for the lowest quality with an error of at most ``allowed``."""
    low, high = 0, 100
    best = _compress(pixels, high, _FULL)
    while high - low > 1:
        middle = (low + high) // 2
        found = _compress(pixels, middle, _FULL)
        if (found - image).square().mean().sqrt() <= allowed:
            high, best = middle, found
        else:
            low = middle
    return best


CORRUPTIONS = ('gaussian', 'brighter', 'darker', 'jpeg')
"""Names of the corruptions that Fourier modes are compared with."""


def make_corruption(
    name: str, size: Size, seed: int = 0, **options: Any
) -> Corruption:
    """Build a corruption by its name.

    Args:
        name (str): One of ``CORRUPTIONS``.
        size (Size): Size of the corruption.
        seed (int): Seed of random noise. Defaults to 0.
        options (Any): Further arguments of its class: ``quality`` of
            ``'jpeg'``.

    Returns:
        Corruption: The corruption.

    Raises:
        TypeError: If the class does not know an option.
        ValueError: If the name is unknown.

    Example:
        >>> import torch
        >>> from mmstabvim.evaluation.corruptions import Size, make_corruption
        >>> from mmstabvim.evaluation.fourier_modes import Grid
        >>> brighter = make_corruption('brighter', Size(0.1, relative=False))
        >>> brighter(torch.zeros(1, 1, 2), Grid(1, 2))
        tensor([[[25.5000, 25.5000]]])
    """
    check_choice('corruption', name, CORRUPTIONS)
    if name == 'gaussian':
        return GaussianNoise(size, seed, **options)
    if name == 'jpeg':
        return Jpeg(size, **options)
    return Brightness(size, name == 'darker', **options)

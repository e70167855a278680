"""Tokens of a Vision Mamba: places in the sequence and on the image."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn

from mmstabvim.apis import trained
from mmstabvim.layers.position_embedding import (
    cls_token_positions,
    split_tokens,
)
from mmstabvim.models import VisionMamba
from mmstabvim.visualization.overlay import Patches


class Layout(NamedTuple):
    """Places of the tokens for one image size."""

    place: str | None
    """Place of the class token, as the backbone declares it."""
    rows: int
    columns: int
    patches: Patches

    @property
    def cls_tokens(self) -> list[int]:
        """Positions of the class tokens in the sequence."""
        return cls_token_positions(self.place, self.rows * self.columns)

    @property
    def length(self) -> int:
        """Tokens, class tokens included."""
        return self.rows * self.columns + len(self.cls_tokens)

    def on_grid(self, values: Tensor) -> Tensor:
        """Lay values of the tokens on the grid, without class tokens.

        Args:
            values (Tensor): (length, ...).

        Returns:
            Tensor: (rows, columns, ...).
        """
        _, patches = split_tokens(values.flatten(1)[None], self.place)
        grid = patches[0].unflatten(0, (self.rows, self.columns))
        return grid.reshape(self.rows, self.columns, *values.shape[1:])

    def position(self, row: int, column: int) -> int:
        """Return the index of a patch in the sequence."""
        indices = torch.arange(self.length)[:, None]
        return int(self.on_grid(indices)[row, column])


def find_backbone(model: nn.Module) -> tuple[str, VisionMamba]:
    """Find the Vision Mamba of a model.

    Args:
        model (nn.Module): With one.

    Returns:
        tuple[str, VisionMamba]: Its name in the model, and the backbone.

    Raises:
        ValueError: If there is none, or more than one.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, VisionMamba)
    }
    if len(found) != 1:
        raise ValueError(
            'the model must have one VisionMamba, which knows where its '
            f'tokens are, got {type(model).__name__} with '
            f'{sorted(found) or "none"}'
        )
    return next(iter(found.items()))


def layout_of(backbone: VisionMamba, image: Tensor) -> Layout:
    """Lay out the tokens of an image.

    Args:
        backbone (VisionMamba): The backbone.
        image (Tensor): (1, channels, height, width).

    Returns:
        Layout: Places of its tokens.
    """
    grid = backbone.patch_embed.grid_size(*image.shape[-2:])
    return Layout(backbone.cls_token_place, *grid, patches_of(backbone))


def patches_of(backbone: VisionMamba) -> Patches:
    """Return size and distance of a backbone's patches, pixels."""
    conv: Any = backbone.patch_embed.projection
    return Patches(conv.kernel_size[0], conv.stride[0])


def picture_of(model: Any, image: Tensor) -> np.ndarray:
    """Undo the normalization of an image, to draw it.

    Args:
        model (nn.Module): With a data preprocessor.
        image (Tensor): (1, channels, height, width), normalized.

    Returns:
        ndarray: (height, width, 3), 0 to 1: the channels as red, green and
        blue in the order in which the model reads them.
    """
    pixels = image[0].detach().cpu().float()
    mean = getattr(model.data_preprocessor, 'mean', None)
    if mean is None:  # not normalized: of unknown range
        low, high = pixels.amin(), pixels.amax()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    else:
        std = model.data_preprocessor.std.cpu()
        pixels = ((pixels * std + mean.cpu()) / 255).clamp(0, 1)
    if len(pixels) != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def class_name(model: Any, number: int) -> str:
    """Name of a class for people, its number where the model knows no word.

    Args:
        model (nn.Module): Of :func:`mmstabvim.apis.get_model`.
        number (int): The class.

    Returns:
        str: The first of its names, or ``'class 3'``.
    """
    names = (model.dataset_meta or {}).get('classes') or ()
    name = str(names[number]) if number < len(names) else ''
    if not name or name.isdigit():
        return f'class {name or number}'
    return name.split(',')[0]


class Sample(NamedTuple):
    """Image with its name and class."""

    name: str
    """Name of its file, or number in the test set."""
    image: Tensor
    """(1, channels, height, width), as the model reads it."""
    label: int | None
    """Its class, where the test set tells."""


def named_images(
    args: argparse.Namespace, cfg: Config, model: Any
) -> Iterator[Sample]:
    """Yield the images of :func:`.trained.load_images` by name and class."""
    find = (
        trained.test_samples if args.images is None else trained.file_samples
    )
    for sample in find(args, cfg):
        data = model.data_preprocessor(pseudo_collate([sample]), False)
        known = sample['data_samples']
        path, label = known.get('img_path'), known.get('gt_label')
        single = label is not None and label.numel() == 1
        yield Sample(
            Path(path).name if path else f'{known.get("sample_idx", "")}',
            data['inputs'],
            int(label) if single else None,
        )

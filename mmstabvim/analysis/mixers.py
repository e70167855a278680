"""Mixers of a model: find them, watch them run, name their parts."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from mmstabvim.apis.trained import find_blocks
from mmstabvim.layers import VisionMambaBlock

WAYS = ('forward', 'backward')
_DIRECTION = re.compile(
    r'\.(?:conv1d|ssm|x_proj|dt_proj|state_matrix)\.([01])(?:\.|$)'
)
"""Directions of a mixer, in the order of its modules."""

Blocks = Mapping[str, VisionMambaBlock]


def no_progress() -> Progress:
    """Progress without bars."""
    return Progress(disable=True)


def find_mixer_blocks(model: torch.nn.Module) -> Blocks:
    """Find the blocks of a Vision Mamba.

    Args:
        model (nn.Module): The model.

    Returns:
        Mapping[str, VisionMambaBlock]: By name, in the model's order.

    Raises:
        ValueError: If there is none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            'the model must have blocks of a Vision Mamba, got '
            f'{type(model).__name__} without one'
        )
    return blocks


@contextmanager
def watch_mixers(
    blocks: Blocks, look: Callable[[str, Any, Tensor], None]
) -> Iterator[None]:
    """Call a function before each mixer runs.

    Args:
        blocks (Mapping[str, VisionMambaBlock]): Of :func:`find_mixer_blocks`.
        look (Callable): Gets the block's name, its mixer and the mixer's
            tokens (batch, length, channels).
    """
    handles = [
        block.mixer.register_forward_pre_hook(
            lambda mixer, inputs, name=name: look(name, mixer, inputs[0])
        )
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_to_mixers(
    model: Any, blocks: Blocks, image: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model, and keep the tokens that its mixers read.

    Args:
        model (nn.Module): Of MMPretrain or MMSegmentation.
        blocks (Mapping[str, VisionMambaBlock]): Its blocks.
        image (Tensor): (1, channels, height, width), normalized.

    Returns:
        tuple[Tensor, dict[str, Tensor]]: The last output, and by name of the
        block (1, length, channels).
    """
    tokens: dict[str, Tensor] = {}
    with watch_mixers(blocks, lambda name, _, x: tokens.update({name: x})):
        output = last_output(model(image, mode='tensor'))
    return output, tokens


def last_output(output: Any) -> Tensor:
    """Logits, or the last of several features."""
    while isinstance(output, (tuple, list)):
        output = output[-1]
    return output


def layer_of(name: str, blocks: Sequence[str]) -> int | None:
    """Number of the block that a parameter or module belongs to.

    Args:
        name (str): Of the parameter or module.
        blocks (Sequence[str]): Names of the blocks.

    Returns:
        int | None: From 0; None outside of the blocks.

    Example:
        >>> layer_of('layers.1.norm.weight', ['layers.0', 'layers.1'])
        1
    """
    for number, block in enumerate(blocks):
        if name.startswith(f'{block}.'):
            return number
    return None


def way_of(name: str) -> str:
    """Find the direction of a weight, empty for none.

    Example:
        >>> way_of('layers.0.mixer.ssm.x_proj.1')
        'backward'
    """
    match = _DIRECTION.search(name)
    return WAYS[int(match[1])] if match else ''

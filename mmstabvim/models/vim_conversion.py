"""Shared parts of the tools that convert Vim checkpoints.

It is here because an installed tool can import only from the package.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmstabvim.models.vim_checkpoint import official_part


def add_shared_arguments(
    parser: argparse.ArgumentParser, toolkit: str
) -> None:
    """Add the arguments that both converters have.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
        toolkit (str): Whose names ``--reverse`` starts from.
    """
    parser.add_argument('src', type=Path, help='checkpoint to convert')
    parser.add_argument('dst', type=Path, help='file to write')
    parser.add_argument(
        '--ema',
        action='store_true',
        help="take the averaged weights ('model_ema') of an official file",
    )
    parser.add_argument(
        '--reverse',
        action='store_true',
        help=f"from {toolkit}'s names to the official ones",
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an existing DST'
    )


def parse_shared(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Read the command line; stop where DST exists or options contradict."""
    args = parser.parse_args(argv)
    if args.ema and args.reverse:
        parser.error('--ema reads an official file, --reverse writes one')
    if args.dst.exists() and not args.overwrite:
        parser.error(f'{args.dst} exists: pass --overwrite to replace it')
    return args


def pick_weights(checkpoint: dict[str, Any], key: str) -> dict[str, Tensor]:
    """Find a state dict under a key; a bare one is taken as it is.

    Raises:
        ValueError: If there is none, or if it holds no tensors.
    """
    if key not in checkpoint and all(
        isinstance(value, Tensor) for value in checkpoint.values()
    ):
        return official_part(checkpoint) or checkpoint
    state = checkpoint.get(key)
    if not isinstance(state, dict):
        raise ValueError(f'must hold {key!r}, got the keys {[*checkpoint]}')
    strangers = [
        name for name, value in state.items() if not isinstance(value, Tensor)
    ]
    if strangers:
        raise ValueError(f'{strangers[:3]} in {key!r} are no tensors')
    return official_part(state) or state


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Stop with the file's name where it cannot be converted."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f'{path}: {error}') from error


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save, in a new folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def summarize(
    args: argparse.Namespace,
    converted: Mapping[str, Tensor],
    sizes: Mapping[str, Any],
    unused: Sequence[str],
) -> str:
    """Summarize a conversion, in lines."""
    lines = [f'{args.src} -> {args.dst}: {len(converted)} weights']
    lines.append(', '.join(f'{name}={size}' for name, size in sizes.items()))
    lines += [f'not used: {name}' for name in unused]
    return '\n'.join(lines if unused else [*lines, 'every weight was used'])

"""Convert an official Vim checkpoint for MMPretrain, or back.

The result loads strictly into an ``ImageClassifier`` with
``mmstabvim.VisionMamba`` and a ``LinearClsHead``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.models.vim_checkpoint import (
    describe,
    from_official,
    to_official,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
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
        help="from MMPretrain's names to the official ones",
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an existing DST'
    )
    args = parser.parse_args(argv)
    if args.ema and args.reverse:
        parser.error('--ema reads an official file, --reverse writes one')
    if args.dst.exists() and not args.overwrite:
        parser.error(f'{args.dst} exists: pass --overwrite to replace it')
    return args


def pick(checkpoint: dict, key: str) -> dict:
    """State dict under a key; a bare state dict is taken as it is."""
    if key not in checkpoint and all(
        isinstance(value, torch.Tensor) for value in checkpoint.values()
    ):
        return checkpoint
    state = checkpoint.get(key)
    if not isinstance(state, dict):
        raise ValueError(f'must hold {key!r}, got the keys {[*checkpoint]}')
    strangers = [
        name
        for name, value in state.items()
        if not isinstance(value, torch.Tensor)
    ]
    if strangers:
        raise ValueError(f'{strangers[:3]} in {key!r} are no tensors')
    return state


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, write, report."""
    args = parse_args(argv)
    try:
        checkpoint = load_checkpoint_tensors(args.src)
        if args.reverse:
            state = pick(checkpoint, 'state_dict')
            converted, unused = to_official(state)
            sizes = describe(state)
            result = {'model': converted}
        else:
            key = 'model_ema' if args.ema else 'model'
            state = pick(checkpoint, key)
            converted, unused = from_official(state)
            sizes = describe(converted)
            result = {'state_dict': converted, 'meta': {}}
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f'{args.src}: {error}') from error
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    torch.save(result, args.dst)
    print(f'{args.src} -> {args.dst}: {len(converted)} weights')
    print(', '.join(f'{name}={size}' for name, size in sizes.items()))
    for name in unused:
        print(f'not used: {name}')
    if not unused:
        print('every weight was used')


if __name__ == '__main__':
    main()

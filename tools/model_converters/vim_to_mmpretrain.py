"""Convert an official Vim checkpoint for MMPretrain, or back.

The result loads strictly into an ``ImageClassifier`` with
``mmstabvim.VisionMamba`` and a ``LinearClsHead``.
"""

import argparse
from collections.abc import Sequence

from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.models.vim_checkpoint import (
    describe,
    from_official,
    to_official,
)
from mmstabvim.models.vim_conversion import (
    add_shared_arguments,
    blame,
    parse_shared,
    pick_weights,
    summarize,
    write_checkpoint,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared_arguments(parser, 'MMPretrain')
    return parse_shared(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, write, report."""
    args = parse_args(argv)
    with blame(args.src):
        checkpoint = load_checkpoint_tensors(args.src)
        if args.reverse:
            state = pick_weights(checkpoint, 'state_dict')
            converted, unused = to_official(state)
            sizes = describe(state)
            result = {'model': converted}
        else:
            key = 'model_ema' if args.ema else 'model'
            converted, unused = from_official(pick_weights(checkpoint, key))
            sizes = describe(converted)
            result = {'state_dict': converted, 'meta': {}}
    write_checkpoint(args.dst, result)
    print(summarize(args, converted, sizes, unused))


if __name__ == '__main__':
    main()

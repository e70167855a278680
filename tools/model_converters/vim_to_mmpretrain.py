"""Convert an official Vim checkpoint for MMPretrain, or back.

The result loads strictly into an ``ImageClassifier`` with
``mmstabvim.VisionMamba`` and a ``LinearClsHead``.
"""

import argparse
from collections.abc import Sequence

from mmstabvim.apis import convert
from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.models import vim_conversion as shared


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, write, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    shared.add_shared_arguments(parser, 'MMPretrain')
    args = shared.parse_shared(parser, argv)
    with shared.blame(args.src):
        checkpoint = load_checkpoint_tensors(args.src)
        if args.reverse:
            done = convert.to_official(checkpoint)
        else:
            done = convert.to_mmpretrain(checkpoint, args.ema)
    shared.write_checkpoint(args.dst, done.checkpoint)
    print(shared.summarize(args, *done[1:4]))


if __name__ == '__main__':
    main()

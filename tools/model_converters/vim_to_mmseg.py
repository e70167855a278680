"""Convert an official Vim checkpoint for MMSegmentation, or back.

Of an official classifier the backbone alone is kept, for ``init_cfg=dict(
type='Pretrained', checkpoint=DST, prefix='backbone.')``. An official segmentor
loads strictly into an ``EncoderDecoder`` with ``mmstabvim.VisionMamba``,
``mmstabvim.SimpleFeaturePyramid`` and the same heads.
"""

import argparse
from collections.abc import Sequence

from mmstabvim.apis import console, convert
from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.models import vim_conversion as shared

FORWARD = 'cls_token', 'keep_cls_token', 'img_size', 'patch_stride', 'grid'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    shared.add_shared_arguments(parser, 'MMSegmentation')
    add, number = parser.add_argument, dict(type=console.positive)
    text = 'place of the class token, where there is one (default: middle)'
    add('--cls-token', choices=('middle', 'head'), help=text)
    add('--keep-cls-token', action='store_true', help='do not take it out')
    text = 'pixels, height and width, to resize the position embedding to'
    add('--img-size', nargs='+', **number, metavar='PIXELS', help=text)
    text = 'distance of two patches for --img-size (default: their size)'
    add('--patch-stride', **number, help=text)
    text = "SRC's patches, rows and columns, where they are no square"
    add('--grid', nargs=2, **number, metavar='N', help=text)
    args = shared.parse_shared(parser, argv)
    for name in FORWARD:
        if args.reverse and getattr(args, name):
            option = name.replace('_', '-')
            parser.error(f'--{option} does not go with --reverse')
    if args.img_size and len(args.img_size) > 2:
        parser.error(f'--img-size wants one or two, got {args.img_size}')
    if args.patch_stride and not args.img_size:
        parser.error('--patch-stride is for --img-size')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, write, report."""
    args = parse_args(argv)
    with shared.blame(args.src):
        checkpoint = load_checkpoint_tensors(args.src)
        if args.reverse:
            done = convert.to_official(checkpoint)
        else:
            options = {name: getattr(args, name) for name in FORWARD}
            done = convert.to_mmseg(checkpoint, args.ema, **options)
    shared.write_checkpoint(args.dst, done.checkpoint)
    print(*done.notes, shared.summarize(args, *done[1:4]), sep='\n')


if __name__ == '__main__':
    main()

"""Convert an official Vim checkpoint for MMSegmentation, or back.

SRC is one of two kinds, told apart by the names in it:

- an official classifier: the backbone alone is kept, for ``init_cfg=dict(
  type='Pretrained', checkpoint=DST, prefix='backbone.')``. Its class token
  goes, with its vector of the position embedding, which is in the middle of
  the sequence in the published ``midclstok`` models. (A checkpoint that
  ``vim_to_mmpretrain.py`` has written does for ``init_cfg`` too, as it is.)
- an official segmentor: the result loads strictly into an ``EncoderDecoder``
  with ``mmstabvim.VisionMamba``, ``mmstabvim.SimpleFeaturePyramid`` and the
  same heads.
"""

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.models.vim_checkpoint import (
    cls_token_place,
    describe,
    from_official,
    from_official_segmentor,
    is_converted,
    is_official_segmentor,
    make_dense,
    patch_grid,
    resize_patch_grid,
    to_official,
    to_official_segmentor,
)
from mmstabvim.models.vim_conversion import (
    add_shared_arguments,
    blame,
    parse_shared,
    pick_weights,
    summarize,
    write_checkpoint,
)

FORWARD_ONLY = (
    'cls_token',
    'keep_cls_token',
    'img_size',
    'patch_stride',
    'grid',
)
State = OrderedDict[str, Tensor]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shared_arguments(parser, 'MMSegmentation')
    parser.add_argument(
        '--cls-token',
        choices=('middle', 'head'),
        help='place of the class token, which SRC does not tell where there '
        'is one (default: middle)',
    )
    parser.add_argument(
        '--keep-cls-token',
        action='store_true',
        help='leave the class token in the sequence',
    )
    parser.add_argument(
        '--img-size',
        type=int,
        nargs='+',
        metavar='PIXELS',
        help='one or two sizes, height and width, to which the position '
        'embedding is resized; without it, loading resizes',
    )
    parser.add_argument(
        '--patch-stride',
        type=int,
        help='distance of two patches for --img-size (default: their size)',
    )
    parser.add_argument(
        '--grid',
        type=int,
        nargs=2,
        metavar=('ROWS', 'COLUMNS'),
        help="SRC's patches, where they are no square",
    )
    args = parse_shared(parser, argv)
    check_options(parser, args)
    return args


def check_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> None:
    """Stop where an option is out of range or has no meaning."""
    given = [name for name in FORWARD_ONLY if getattr(args, name)]
    if args.reverse and given:
        option = given[0].replace('_', '-')
        parser.error(f'--{option} does not go with --reverse')
    if args.img_size and len(args.img_size) > 2:
        parser.error(f'--img-size wants one or two, got {args.img_size}')
    if args.patch_stride and not args.img_size:
        parser.error('--patch-stride is for --img-size')
    for name in ('img_size', 'grid', 'patch_stride'):
        value = getattr(args, name)
        numbers = value if isinstance(value, list) else [value]
        if any(n is not None and n < 1 for n in numbers):
            option = name.replace('_', '-')
            parser.error(f'--{option} must be positive, got {value}')


def read(checkpoint: dict[str, Any], ema: bool) -> tuple[State, bool]:
    """Find the weights, and whether they are those of a segmentor."""
    inside = checkpoint.get('state_dict', checkpoint)
    if is_converted(inside):
        raise ValueError(
            'must have the official names, got those of this project: give '
            "the file to init_cfg, with the prefix 'backbone.'"
        )
    segmentor = is_official_segmentor(inside)
    if segmentor and ema:
        raise ValueError("an official segmentor has no 'model_ema': no --ema")
    key = 'model_ema' if ema else 'model'
    state = pick_weights(checkpoint, 'state_dict' if segmentor else key)
    return OrderedDict(state), segmentor


def from_vim(
    checkpoint: dict[str, Any], args: argparse.Namespace
) -> tuple[State, dict[str, Any], list[str]]:
    """Convert an official file.

    Returns:
        tuple: The weights, their description, and the names not used.
    """
    state, segmentor = read(checkpoint, args.ema)
    convert = from_official_segmentor if segmentor else from_official
    renamed, unused = convert(state)
    left_out = ('head.',) if args.keep_cls_token else ('head.', 'cls_token')
    unused += [name for name in state if name.startswith(left_out)]
    place = cls_token_place(renamed, args.cls_token or 'middle')
    if args.cls_token and place != args.cls_token:
        count = 0 if place is None else 2
        raise ValueError(
            f'--cls-token {args.cls_token} wants one class token, got {count}'
        )
    if args.cls_token is None and place == 'middle':
        print(
            'class token taken to be in the middle, as in the published '
            "midclstok models; '--cls-token head' if it is in front"
        )
    converted, place, grid = fit(renamed, place, args)
    # what a dense model would otherwise have to assume
    layout = {'version': 1, 'cls_token': place, 'grid': grid or (0, 0)}
    metadata = OrderedDict(backbone=layout)
    converted._metadata = metadata  # type: ignore[attr-defined]
    sizes = describe(converted) | {'cls_token': place, 'grid': grid}
    return converted, sizes, unused


def fit(
    renamed: State, place: str | None, args: argparse.Namespace
) -> tuple[State, str | None, tuple[int, int] | None]:
    """Take the class token out, resize the patches.

    Returns:
        tuple: The weights, the place of the class token and the grid in them.
    """
    old = None if args.grid is None else (args.grid[0], args.grid[1])
    grid = patch_grid(renamed, place, old)
    converted = make_dense(renamed, place, args.keep_cls_token)
    if not args.keep_cls_token:
        place = None
    if args.img_size:
        if grid is None:
            raise ValueError('--img-size: there is no position embedding')
        size = (args.img_size[0], args.img_size[-1])
        grid = resize_patch_grid(
            converted, place, grid, size, args.patch_stride
        )
    return converted, place, grid


def to_vim(
    checkpoint: dict[str, Any],
) -> tuple[str, State, dict[str, Any], list[str]]:
    """Convert back; a backbone alone becomes an official classifier's.

    Returns:
        tuple: The official key, and the same as :func:`from_vim`.
    """
    state = pick_weights(checkpoint, 'state_dict')
    if any(name.startswith('decode_head.') for name in state):
        converted, unused = to_official_segmentor(state)
        return 'state_dict', converted, describe(state), unused
    converted, unused = to_official(state)
    return 'model', converted, describe(state), unused


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, write, report."""
    args = parse_args(argv)
    with blame(args.src):
        checkpoint = load_checkpoint_tensors(args.src)
        if args.reverse:
            key, converted, sizes, unused = to_vim(checkpoint)
        else:
            key = 'state_dict'
            converted, sizes, unused = from_vim(checkpoint, args)
    write_checkpoint(args.dst, {key: converted, 'meta': {}})
    print(summarize(args, converted, sizes, unused))


if __name__ == '__main__':
    main()

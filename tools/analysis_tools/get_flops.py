"""Count the floating-point operations of a classifier or segmentor.

One multiply-add is two operations. Prints a table by parts of the model,
layers of one kind together; with --out writes flops.md and flops.csv.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mmstabvim.analysis import flops
from mmstabvim.apis import console, get_model
from mmstabvim.engine import launch
from mmstabvim.reporting.tables import to_csv


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='path of the config')
    text = "height and width, or one number for both (default: the config's)"
    positive = console.positive
    add('--shape', type=positive, nargs='+', metavar='N', help=text)
    text = 'add up parts whose names agree in their first N words'
    add('--depth', type=positive, metavar='N', help=text)
    add('--device', default='cpu', help='where the model runs')
    add('--out', type=Path, metavar='DIR', help='folder for the results')
    launch.add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.shape and len(args.shape) > 2:
        parser.error(f'--shape wants one or two numbers, got {args.shape}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print, write."""
    args = parse_args(argv)
    with console.quiet(), launch.clear_errors():
        model = get_model(args.config, None, args.cfg_options, args.device)
        shape = args.shape or flops.image_shape(model.cfg)
        image = torch.zeros(1, 3, shape[0], shape[-1], device=args.device)
        counts = flops.count_flops(model, image)
    rows = flops.flops_rows(model, counts, args.depth)
    page = flops.make_page(args.config, (shape[0], shape[-1]), rows)
    print(page)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'flops.md').write_text(page)
        (args.out / 'flops.csv').write_text(to_csv(rows))


if __name__ == '__main__':
    sys.exit(launch.run_tool(main))

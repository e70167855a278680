"""Prove ranges of a trained Vision Mamba, and whether half can overflow.

For every layer and direction: how large step size, drive, state and output
can become, and every tensor that autocast keeps in half precision, whatever
the image is and however many tokens it has. Beside it the largest values on
images of the test set or of a folder. docs/ranges.md has the proofs.

Writes ranges.md, .csv, .json and .png.
"""

import sys
from collections.abc import Sequence

from mmstabvim.analysis import command_line, ranges
from mmstabvim.apis import console, trained


def main(argv: Sequence[str] | None = None) -> None:
    """Prove, look, compare, write."""
    parser = command_line.make_parser(__doc__, samples=16)
    first = ranges.DTYPES[0]
    text = 'of autocast (default: %(default)s)'
    parser.add_argument(
        '--dtype', choices=ranges.DTYPES, default=first, help=text
    )
    args = parser.parse_args(argv)
    command_line.check_least(parser, args, samples=0)
    with console.working() as progress:
        cfg, model = trained.load_model(args)
        images = trained.load_images(args, cfg, model) if args.samples else ()
        facts = command_line.page_facts(args)
        report = ranges.certified_ranges(
            model, images, args.dtype, progress, **facts
        )
    folder = trained.out_folder(args, 'ranges')
    print(ranges.write(report, folder, args.formats))
    print(f'Written: {folder / "ranges.md"}')


if __name__ == '__main__':
    main(sys.argv[1:])

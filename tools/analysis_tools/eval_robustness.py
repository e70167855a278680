"""Perturb test images with Fourier modes, and measure a model's response.

For CONFIG and CHECKPOINT of a classifier or a segmentor: score, flip rate
and shift of the logits for each frequency, and beside them corruptions of the
same energy. For the folder of a study: the same for all its checkpoints.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmstabvim.analysis import robustness
from mmstabvim.apis import console
from mmstabvim.reporting import add_formats


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', help='path of the config, or the folder of a study')
    add('checkpoint', nargs='?', help='path, URL, work dir; none for a study')
    robustness.add_options(parser)
    add('--out', type=Path, help='default: robustness/ beside the checkpoint')
    add('--only', default='*', help='pattern of names of cells of a study')
    add_formats(parser)
    args = parser.parse_args(argv)
    if Path(args.config).is_dir() == (args.checkpoint is not None):
        parser.error(
            'wants CONFIG CHECKPOINT, or the folder of a study alone, got '
            f'{args.config!r} and checkpoint {args.checkpoint!r}'
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, draw, write."""
    args = parse_args(argv)
    options, place = robustness.make_options(args), Path(args.config)
    beside = Path(args.checkpoint).parent if args.checkpoint else place
    out = args.out or beside / 'robustness'
    with console.working() as progress:
        if args.checkpoint:
            given = args.config, args.checkpoint, options, progress
            rows, label = robustness.evaluate(*given), 'model'
            sweeps = [robustness.Sweep('', place.stem, None, rows)]
        else:
            study = place, options, progress, out / 'cells', args.only
            sweeps, label = robustness.evaluate_study(*study)
    words = options.describe(sweeps[0].rows[0]['images'])
    print(robustness.write(sweeps, out, label, words, args.formats))
    print(f'Tables, data and figure are in {out}')


if __name__ == '__main__':
    main()

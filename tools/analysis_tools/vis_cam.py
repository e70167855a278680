"""Show which patches speak for a class of a Vision Mamba classifier.

Grad-CAM over the grid of patches, wherever the class token is. Writes cam.md,
.csv, .json, .png, .pdf and .svg; docs/attribution.md says what the maps mean.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from mmstabvim.analysis import cam
from mmstabvim.apis import console, tokens, trained
from mmstabvim.engine import launch


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    trained.add_options(parser, samples=6)
    add = parser.add_argument
    text = 'number of a class (default: the predicted one of each image)'
    add('--target', type=int, metavar='CLASS', help=text)
    text = (
        'module whose output are the tokens, for instance '
        'backbone.layers.1.norm (default: that before the last mixer, or '
        'the final norm where the head reads patches)'
    )
    add('--layer', metavar='NAME', help=text)
    text = 'gradient averaged over patches, or of each patch its own'
    add('--method', choices=cam.METHODS, default='gradcam', help=text)
    args = parser.parse_args(argv)
    trained.check_samples(parser, args, 1)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Look at images, write."""
    args = parse_args(argv)
    with console.working() as progress:
        cfg, model = trained.load_model(args)
        folder = trained.out_folder(args, 'cam')
        source = 'the test set' if args.images is None else str(args.images)
        bar = progress.add_task('maps', total=args.samples)
        table = cam.write_maps(
            model,
            tokens.named_images(args, cfg, model),
            folder,
            dict(
                config=args.config, checkpoint=args.checkpoint, source=source
            ),
            *(args.target, args.layer, args.method),
            tick=partial(progress.advance, bar),
        )
    print(f'{table}\nWritten: {folder / "cam.md"}')


if __name__ == '__main__':
    sys.exit(launch.run_tool(main))

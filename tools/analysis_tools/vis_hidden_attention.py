"""Show the hidden attention of a Vision Mamba: what tokens take from others.

Writes for each image image_0.md, .csv, .json, .png, .pdf, .svg, and the
matrices as .npz; docs/attribution.md says what the maps mean.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from mmstabvim.analysis.hidden_attention import HiddenAttention
from mmstabvim.apis import console, tokens, trained
from mmstabvim.engine import launch
from mmstabvim.stability.ranges.hidden_attention import AGGREGATIONS


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    trained.add_options(parser, samples=1)
    text = "whose row: 'cls', 'mean' of all patches, or ROW,COLUMN of a patch"
    add('--token', help=f'{text} (default: cls if there is one, else mean)')
    add('--how', choices=AGGREGATIONS, default='abs', help='over channels')
    add('--layers', type=int, nargs='+', help='to draw (default: all)')
    add('--with-skip', action='store_true', help='add D to the diagonal')
    add('--rollout', action='store_true', help='also over all layers')
    add('--no-matrices', action='store_true', help='do not write .npz files')
    args = parser.parse_args(argv)
    trained.check_samples(parser, args, 1)
    if args.rollout and args.how == 'mean':
        parser.error('--rollout needs values >= 0: --how abs or norm')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Look at images, write."""
    args, tables = parse_args(argv), []
    with console.working() as progress:
        cfg, model = trained.load_model(args)
        choice = args.token, args.how, args.with_skip, args.layers
        report = HiddenAttention(
            model, *choice, args.rollout, not args.no_matrices
        )
        folder = trained.out_folder(args, 'hidden_attention')
        facts = dict(config=args.config, checkpoint=args.checkpoint)
        count = args.samples * tokens.find_backbone(model)[1].num_layers
        tick = partial(
            progress.advance, progress.add_task('layers', total=count)
        )
        for i, sample in enumerate(tokens.named_images(args, cfg, model)):
            path = folder / f'image_{i}'
            tables.append(report.write(sample, path, facts, tick))
            tables.append(f'Written: {path}.md\n')
    print('\n'.join(tables))


if __name__ == '__main__':
    sys.exit(launch.run_tool(main))

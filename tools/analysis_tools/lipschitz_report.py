"""Report how much a trained Vision Mamba can enlarge small changes.

For every layer the largest singular value of its weight and its stable rank;
Lipschitz bounds where they exist (single layers, and products up to the
scan's input, step size, B and C) and where they do not; and, on images, the
largest singular value of the Jacobian of each mixer and of the whole model.

Writes lipschitz.md, .csv, .json and .png.
"""

import sys
from collections.abc import Sequence

from mmstabvim.analysis import command_line, lipschitz
from mmstabvim.apis import console, trained
from mmstabvim.stability.weights.lipschitz import JACOBIANS


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, draw, write."""
    parser = command_line.make_parser(__doc__, samples=4)
    add = parser.add_argument
    add('--steps', type=int, default=20, help='of power iteration')
    text = 'products with the Jacobian: exact ones need the slow scan'
    add('--method', choices=JACOBIANS, default='difference', help=text)
    args = parser.parse_args(argv)
    command_line.check_least(parser, args, samples=1, steps=1)
    with console.working() as progress:
        cfg, model = trained.load_model(args)
        report = lipschitz.lipschitz_report(
            model,
            trained.load_images(args, cfg, model),
            args.steps,
            args.method,
            progress,
            **command_line.page_facts(args),
        )
    folder = trained.out_folder(args, 'lipschitz')
    lipschitz.write(report, folder, args.formats)
    print(f'{len(report.blocks)} mixers: not globally Lipschitz')
    print(f'local Jacobian norm on {report.facts["images"]}: {report.local}')
    print(f'Written: {folder / "lipschitz.md"}')


if __name__ == '__main__':
    main(sys.argv[1:])

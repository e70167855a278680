"""Write a page about the stability of a trained Vision Mamba.

For CONFIG and a checkpoint or the work dir of a training: spectra, memory,
step sizes, gradient flow, ranges, sensitivity, training curves, and findings
in plain words. Writes one page, the same as Markdown and JSON, figures/ and
tables/. docs/stability_report.md explains every section.
"""

import sys
from collections.abc import Sequence

from mmstabvim.analysis import command_line, stability_report
from mmstabvim.apis import console, tokens, trained


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, find, draw, write."""
    parser = command_line.make_parser(__doc__, samples=4)
    add = parser.add_argument
    add('--against', metavar='OTHER', help='checkpoint or work dir to compare')
    add('--against-config', metavar='CONFIG', help='its config, if another')
    add('--profile-samples', type=int, default=2, help='for the sensitivity')
    add('--classes', type=int, help='largest logits with a Jacobian')
    add('--steps', type=int, default=4, help="of Lanczos' method")
    args = parser.parse_args(argv)
    least = dict(samples=1, profile_samples=0, classes=1, steps=1)
    command_line.check_least(parser, args, **least)
    if args.against_config and not args.against:
        parser.error('--against-config wants --against, too')
    folder = trained.out_folder(args, 'stability')
    other = args.against_config or args.config, args.against
    reports = []
    with console.working() as progress:
        for config, place in ((args.config, args.checkpoint), other):
            if place:
                source = stability_report.find_source(config, place)
                args.config, args.checkpoint = config, source.checkpoint
                cfg, model = trained.load_model(args)
                samples = list(tokens.named_images(args, cfg, model))
                report = stability_report.stability_report(
                    model,
                    [sample.image for sample in samples],
                    [sample.label for sample in samples],
                    **{name: getattr(args, name) for name in [*least][1:]},
                    seed=args.seed,
                    source=source,
                    origin=str(args.images or 'the test set'),
                    progress=progress,
                )
                reports.append(report)
        options = dict(folder=folder, formats=args.formats)
        print('\n'.join(stability_report.write(*reports, **options)))
    print(f'Written: {folder / "stability_report.html"}')


if __name__ == '__main__':
    main(sys.argv[1:])

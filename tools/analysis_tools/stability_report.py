"""Write a page about the stability of a trained Vision Mamba.

For CONFIG and a checkpoint or the work dir of a training: eigenvalues and
decay of every layer and direction, memory, step sizes, gradient flow from
token to token, ranges of activations against float16 and bfloat16, singular
values, certified ranges, sensitivity, training curves, and findings in plain
words. With --against the same in comparison with another model.

Writes stability_report.html, one page that needs nothing else, the same as
Markdown, all numbers as stability_report.json, figures/ and tables/.
docs/stability_report.md explains every section.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _stability_report import page
from _stability_report.compare import changed_findings, summarize
from _stability_report.findings import condense, find
from _stability_report.measure import Measured, measure
from _stability_report.source import curve_rows, find_source
from _stability_report.write import FORMATS, write_files
from rich.console import Console
from rich.progress import Progress

from mmstabvim.apis import trained
from mmstabvim.engine import launch


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained.add_options(parser, samples=4)
    add = parser.add_argument
    add(
        '--against',
        metavar='OTHER',
        help='checkpoint or work dir of a model to compare with',
    )
    add(
        '--against-config',
        metavar='CONFIG',
        help='config of that model (default: the same)',
    )
    add(
        '--profile-samples',
        type=int,
        default=2,
        help='images for the sensitivity, 0 to leave it out '
        '(default: %(default)s)',
    )
    add(
        '--classes',
        type=int,
        help='largest logits whose Jacobians are formed (default: all of 10 '
        'or fewer, else 5)',
    )
    add(
        '--steps',
        type=int,
        default=4,
        help="of Lanczos' method on the loss's Hessian (default: %(default)s)",
    )
    add(
        '--formats',
        nargs='*',
        choices=FORMATS,
        default=[],
        help='of figures besides PNG (default: none)',
    )
    args = parser.parse_args(argv)
    trained.check_samples(parser, args, 1)
    for name, least in (('profile_samples', 0), ('classes', 1), ('steps', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace('_', '-')
            parser.error(f'--{option} must be at least {least}, got {value}')
    if args.against_config and not args.against:
        parser.error('--against-config wants --against, too')
    return args


def measure_all(
    args: argparse.Namespace, progress: Progress
) -> list[Measured]:
    """The model, and the one to compare with."""
    sources = [find_source(args.config, args.checkpoint)]
    if args.against:
        config = args.against_config or args.config
        sources.append(find_source(config, args.against))
    return [measure(source, args, progress) for source in sources]


def facts_of(found: Sequence[Measured]) -> dict[str, str]:
    """What a reader must know to judge the numbers."""
    facts = found[0].facts
    words = {
        'Config': facts['config'],
        'Checkpoint': facts['checkpoint'],
        'Model': f'{facts["model"]}, {facts["parameters"]:,} parameters',
        'Layers': f'{facts["layers"]} of two directions, '
        f'{facts["channels"]} channels of {facts["modes"]} modes, state '
        f'matrix {facts["state_matrix"]}',
        'Images': facts['images'],
    }
    if len(found) == 2:
        other = found[1].facts
        words['Against'] = f'{other["checkpoint"]} ({other["config"]})'
    return words


def numbers_of(measured: Measured, findings: Sequence[Any]) -> dict[str, Any]:
    """Everything for the JSON file."""
    return dict(
        facts=measured.facts,
        findings=[finding.row() for finding in findings],
        summary=summarize(measured),
        directions=measured.directions,
        eigenvalues=measured.eigenvalues,
        decay=measured.decays,
        delta=measured.deltas,
        token_gradients=measured.gradients,
        tensors=measured.tensors,
        weights=measured.weights,
        sensitivity=measured.sensitivity,
        sensitivity_images=measured.images,
        without_sensitivity=measured.without_sensitivity,
        nonfinite_weights=measured.broken,
        first_nonfinite=measured.first_nonfinite,
        training=curve_rows(measured.source.training),
    )


def report(
    found: Sequence[Measured], folder: Path, args: argparse.Namespace
) -> list[str]:
    """Write everything; the findings in words."""
    findings = [find(measured) for measured in found]
    numbers = numbers_of(found[0], findings[0])
    if len(found) == 2:
        numbers['against'] = numbers_of(found[1], findings[1])
        numbers['changed_findings'] = changed_findings(*findings)
    sections = list(page.make_sections(found, findings))
    write_files(
        folder,
        f'Stability of {found[0].source.name}',
        {**facts_of(found), 'Result': page.headline(findings[0])},
        sections,
        findings[0],
        numbers,
        args.formats,
    )
    return [
        page.headline(findings[0]),
        *(f'{r["severity"]:>7}  {r["text"]}' for r in condense(findings[0])),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, find, draw, write."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    started = time.monotonic()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with launch.explain_errors(), Progress(console=console) as progress:
        found = measure_all(args, progress)
        bar = progress.add_task('page and figures', total=1)
        folder = trained.out_folder(args, 'stability')
        lines = report(found, folder, args)
        progress.advance(bar)
    print('\n'.join(lines))
    place = folder / 'stability_report.html'
    print(f'Written in {time.monotonic() - started:.0f} s: {place}')


if __name__ == '__main__':
    main(sys.argv[1:])

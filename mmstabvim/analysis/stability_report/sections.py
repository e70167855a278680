"""Sections of the report's page, and its files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmstabvim.analysis.stability_report import figures, tables
from mmstabvim.analysis.stability_report.compare import (
    changed_findings,
    changed_table,
    compared_pictures,
    summary_numbers,
    summary_table,
)
from mmstabvim.analysis.stability_report.findings import (
    NOTHING,
    StabilityFinding,
    condense,
    find,
    headline,
)
from mmstabvim.analysis.stability_report.measure import StabilityReport
from mmstabvim.analysis.stability_report.source import curve_rows
from mmstabvim.reporting import Picture, Section, Table, to_json, write_report

NAME = 'stability_report'
FOLDED = 14
"""Lines above which a table is folded."""

GUIDES = {
    'findings': (
        'Findings',
        'What deserves a look, the worst first; it is computed from the '
        'numbers below by the thresholds listed here.',
    ),
    'numbers': (
        'In numbers',
        'One number for each question, the worst over all layers where '
        'nothing else is said.',
    ),
    'eigenvalues': (
        'Eigenvalues',
        'Left of the dashed line (Re λ < 0) a mode forgets, the faster '
        'the further left; on its right it grows without end.',
    ),
    'decay': (
        'Decay per token, |exp(ΔA)|',
        'By this factor one token shrinks what a mode remembers: near 1 '
        'it keeps everything, near 0 it forgets at once, above 1 (dashed) '
        'it grows.',
    ),
    'memory': (
        'Memory horizon',
        'After so many tokens a mode has forgotten all but 1/e of what it '
        'saw: far below the length of the sequence it is local, far above '
        'it only adds up.',
    ),
    'delta': (
        'Step size Δ',
        'The step size says how much a token counts: near 0 it is '
        'skipped, a large one overwrites the state.',
    ),
    'gradients': (
        'Gradient flow from token to token',
        'Where the share that vanished is high, the last token cannot '
        'teach the first one through the state; anything that explodes '
        'makes training unstable.',
    ),
    'activations': (
        'Activation ranges',
        'The closer to the limit, the nearer is an overflow in half '
        'precision; bfloat16 has the range of float32 and fewer digits.',
    ),
    'weights': (
        'Singular values and stable ranks',
        'A large norm amplifies, and a stable rank near 1 says that a '
        'weight acts in one direction only.',
    ),
    'ranges': (
        'Certified ranges',
        'No image, of any size, can exceed a bound under autocast; a '
        'bound above the limit only means that an overflow is not '
        'excluded.',
    ),
    'sensitivity': (
        'Sensitivity',
        'How strongly logits and loss answer to small changes of the '
        'image and of the parameters: compare the same images and numbers '
        'of images only.',
    ),
    'training': (
        'Training curves',
        'A largest Re λ that rises to 0, or jumps of loss and gradient, '
        'announce a divergence.',
    ),
    'comparison': (
        'Comparison',
        'The first model against the other one, on the same images: what '
        'changed in numbers, in findings and in pictures.',
    ),
}
"""Title of each section, and how to read it, in one sentence."""


def section(
    name: str,
    pictures: Sequence[Picture] = (),
    found: Sequence[Table] = (),
    notes: Sequence[str] = (),
    **options: Any,
) -> Section:
    """Make a section; long tables are folded."""
    title, guide = GUIDES[name]
    long = [t for t in found if len(t.rows) > FOLDED and t.name != 'summary']
    short = [t for t in found if t not in long]
    return Section(
        name,
        title,
        guide,
        list(notes),
        pictures=list(pictures),
        tables=short,
        folded=long,
        **options,
    )


def with_data(
    name: str,
    pictures: Sequence[Picture],
    found: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> Section:
    """Leave out figures and tables without data; say so if none is left."""
    drawn = [p for p in pictures if p.rows]
    notes = [*notes, *([] if drawn else ['There is nothing to draw here.'])]
    return section(name, drawn, [t for t in found if t.rows], notes)


def make_sections(
    found: Sequence[StabilityReport],
    findings: Sequence[Sequence[StabilityFinding]],
) -> Iterator[Section]:
    """Make all sections of one model, or of one against another.

    Args:
        found (Sequence[StabilityReport]): The model, and the other one.
        findings (Sequence[Sequence[StabilityFinding]]): Of each.

    Yields:
        Section: In the order of the page.
    """
    title, guide = GUIDES['findings']
    yield Section(
        'findings',
        title,
        guide,
        [] if findings[0] else [NOTHING],
        listed=tables.finding_table(findings[0]),
        folded=[tables.threshold_table()],
    )
    summary = summary_table(found)
    if len(found) == 2:
        rows = changed_findings(*findings)
        yield section(
            'comparison',
            compared_pictures(found),
            [summary, *([changed_table(rows)] if rows else [])],
            [] if rows else ['Both have the same findings.'],
            tables_first=True,
        )
    else:
        yield section('numbers', found=[summary])
    yield from model_sections(found[0])


def model_sections(report: StabilityReport) -> Iterator[Section]:
    """Make the sections about one model."""
    missing = missing_note(report)

    def table(name: str) -> list[Table]:
        return [tables.direction_table(name, report)]

    shown = [figures.eigenvalue_picture(report)]
    yield with_data('eigenvalues', shown, table('eigenvalues'), missing)
    yield with_data('decay', [figures.decay_picture(report)], (), missing)
    shown = [figures.horizon_picture([report])]
    yield with_data('memory', shown, table('memory'))
    yield with_data('delta', [figures.delta_picture(report)], table('delta'))
    shown = [figures.flow_picture(report), figures.token_picture(report)]
    yield with_data('gradients', shown, table('gradient_flow'))
    shown = [figures.range_picture(report)]
    yield with_data('activations', shown, [tables.range_table(report)])
    shown = [figures.weight_picture(report), figures.spectrum_picture(report)]
    yield with_data('weights', shown, [tables.weight_table(report)])
    yield with_data(
        'ranges',
        [figures.bound_picture(report)],
        [tables.certified_table(report)],
        [tables.certified(report)],
    )
    yield sensitivity(report)
    yield training(report)


def missing_note(report: StabilityReport) -> list[str]:
    """Name the layers without numbers, and why."""
    gone = sorted(
        {r['layer'] for r in report.directions if 'delta_q50' not in r}
    )
    if not gone or not report.facts['samples']:
        return []
    note = (
        f'Layers of which a direction has no numbers on images: '
        f'{", ".join(map(str, gone))}; tensors there are not finite.'
    )
    if report.stopped:
        note += f' The model stopped: {report.stopped}.'
    return [note]


def sensitivity(report: StabilityReport) -> Section:
    """Show numbers, or say why there are none."""
    if not report.sensitivity:
        return section('sensitivity', notes=[report.without_sensitivity])
    found = [tables.sensitivity_table(report), tables.image_table(report)]
    return section('sensitivity', found=found)


def training(report: StabilityReport) -> Section:
    """Show curves, or say why there are none."""
    pictures = list(figures.training_pictures([report]))
    note = (
        'The work dir has no curves of more than one step.'
        if report.source.training
        else 'No curves: a checkpoint was given, or a work dir without logs. '
        'Name the work dir of a training to see them.'
    )
    return section('training', pictures, notes=[] if pictures else [note])


# ---------------------------------------------------------------- writing


def facts_of(found: Sequence[StabilityReport]) -> dict[str, str]:
    """List what a reader must know to judge the numbers."""
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


def numbers_of(
    report: StabilityReport, findings: Sequence[StabilityFinding]
) -> dict[str, Any]:
    """Collect everything for the JSON file."""
    return dict(
        facts=report.facts,
        findings=[finding.row() for finding in findings],
        summary=summary_numbers(report),
        directions=report.directions,
        eigenvalues=report.eigenvalues,
        decay=report.decays,
        delta=report.deltas,
        token_gradients=report.gradients,
        tensors=report.tensors,
        weights=report.weights,
        sensitivity=report.sensitivity,
        sensitivity_images=report.images,
        without_sensitivity=report.without_sensitivity,
        nonfinite_weights=report.broken,
        first_nonfinite=report.first_nonfinite,
        training=curve_rows(report.source.training),
    )


def write(
    report: StabilityReport,
    *against: StabilityReport,
    folder: Path,
    formats: Sequence[str] = (),
) -> list[str]:
    """Write stability_report.html, .md and .json, figures and tables.

    Args:
        report (StabilityReport): Of :func:`stability_report`.
        *against (StabilityReport): At most one model to compare with.
        folder (Path): Created where it is missing; files of an earlier report
            are replaced.
        formats (Sequence[str]): Of figures besides PNG. Defaults to none.

    Returns:
        list[str]: The findings in words, for a terminal.
    """
    found = [report, *against]
    findings = [find(one) for one in found]
    result = headline(findings[0])
    write_report(
        folder,
        NAME,
        f'Stability of {report.source.name}',
        {**facts_of(found), 'Result': result},
        list(make_sections(found, findings)),
        formats,
    )
    numbers = numbers_of(report, findings[0])
    if against:
        numbers['against'] = numbers_of(against[0], findings[1])
        numbers['changed_findings'] = changed_findings(*findings)
    text = to_json(numbers)
    (folder / f'{NAME}.json').write_text(text, encoding='utf-8')
    lines = condense(findings[0])
    return [result, *(f'{r["severity"]:>7}  {r["text"]}' for r in lines)]

"""The sections of the report, as one page and as Markdown."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _stability_report import figures, tables
from _stability_report.compare import (
    changed_findings,
    changed_table,
    compared_pictures,
    summary_table,
)
from _stability_report.findings import Finding, condense
from _stability_report.measure import Measured
from _stability_report.thresholds import WORDS
from mmstabvim.ablation.layout import Picture
from mmstabvim.ablation.page import figure_html, make_page
from mmstabvim.reporting import tables as writers
from mmstabvim.reporting.tables import Table

STYLE = """
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p.read { max-width: 48rem; margin: .3rem 0 .8rem; }
.wide { overflow-x: auto; }
.wide img { min-width: 42rem; }
#findings td:last-child, #comparison td:last-child { white-space: normal;
  min-width: 9rem; }
#numbers td:first-child, #comparison td:first-child,
  #sensitivity td:nth-child(2) { white-space: normal; min-width: 8rem; }
.broken, .high { color: #a30000; font-weight: 600; }
.medium { color: #8a4b00; font-weight: 600; }
.low { color: #404040; }
ul.findings { padding-left: 0; list-style: none; }
ul.findings li { margin: .35rem 0; padding-left: 5.2rem; position: relative; }
ul.findings span { position: absolute; left: 0; }
@media (max-width: 44rem) {
  .wide::before { content: "scroll sideways →"; color: #595959;
    font-size: .8rem; }
  ul.findings li { padding-left: 0; }
  ul.findings span { position: static; }
}
details { margin: .8rem 0; }
summary { cursor: pointer; color: #0b57a4; }
"""

TITLES = {
    'findings': 'Findings',
    'numbers': 'In numbers',
    'eigenvalues': 'Eigenvalues',
    'decay': 'Decay per token, |exp(ΔA)|',
    'memory': 'Memory horizon',
    'delta': 'Step size Δ',
    'gradients': 'Gradient flow from token to token',
    'activations': 'Activation ranges',
    'weights': 'Singular values and stable ranks',
    'ranges': 'Certified ranges',
    'sensitivity': 'Sensitivity',
    'training': 'Training curves',
    'comparison': 'Comparison',
}

READ = {
    'findings': 'What deserves a look, the worst first; it is computed from '
    'the numbers below by the thresholds listed here.',
    'numbers': 'One number for each question, the worst over all layers '
    'where nothing else is said.',
    'eigenvalues': 'Left of the dashed line (Re λ < 0) a mode forgets, the '
    'faster the further left; on its right it grows without end.',
    'decay': 'By this factor one token shrinks what a mode remembers: near 1 '
    'it keeps everything, near 0 it forgets at once, above 1 (dashed) it '
    'grows.',
    'memory': 'After so many tokens a mode has forgotten all but 1/e of what '
    'it saw: far below the length of the sequence it is local, far above it '
    'only adds up.',
    'delta': 'The step size says how much a token counts: near 0 it is '
    'skipped, a large one overwrites the state.',
    'gradients': 'Where the share that vanished is high, the last token '
    'cannot teach the first one through the state; anything that explodes '
    'makes training unstable.',
    'activations': 'The closer to the limit, the nearer is an overflow in '
    'half precision; bfloat16 has the range of float32 and fewer digits.',
    'weights': 'A large norm amplifies, and a stable rank near 1 says that a '
    'weight acts in one direction only.',
    'ranges': 'No image, of any size, can exceed a bound under autocast; a '
    'bound above the limit only means that an overflow is not excluded.',
    'sensitivity': 'How strongly logits and loss answer to small changes of '
    'the image and of the parameters: compare the same images and numbers '
    'of images only.',
    'training': 'A largest Re λ that rises to 0, or jumps of loss and '
    'gradient, announce a divergence.',
    'comparison': 'The first model against the other one, on the same '
    'images: what changed in numbers, in findings and in pictures.',
}
"""How to read each section, in one sentence."""

NOTHING = 'Nothing to remark: no number is beyond a threshold.'


@dataclass
class Section:
    """A part of the page.

    Attributes:
        name (str): Key of ``TITLES``.
        pictures (list[Picture]): Figures.
        tables (list[Table]): Tables; long ones are folded.
        notes (list[str]): Sentences.
    """

    name: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_sections(
    found: Sequence[Measured], findings: Sequence[Sequence[Finding]]
) -> Iterator[Section]:
    """All sections of one model, or of one against another.

    Args:
        found (Sequence[Measured]): The model, and the other one.
        findings (Sequence[Sequence[Finding]]): Of each.

    Yields:
        Section: In the order of the page.
    """
    measured = found[0]
    listed = tables.finding_table(findings[0])
    yield Section(
        'findings',
        tables=[listed, tables.threshold_table()],
        notes=[] if findings[0] else [NOTHING],
    )
    if len(found) == 2:
        yield comparison(found, findings)
    else:
        yield Section('numbers', tables=[summary_table(found)])
    yield from model_sections(measured)


def model_sections(measured: Measured) -> Iterator[Section]:
    """Everything about one model."""
    missing = missing_note(measured)
    yield with_data(
        Section(
            'eigenvalues',
            [figures.eigenvalue_picture(measured)],
            [tables.eigenvalue_table(measured)],
            missing,
        )
    )
    yield with_data(
        Section('decay', [figures.decay_picture(measured)], notes=missing)
    )
    yield with_data(
        Section(
            'memory',
            [figures.horizon_picture([measured])],
            [tables.memory_table(measured)],
        )
    )
    yield with_data(
        Section(
            'delta',
            [figures.delta_picture(measured)],
            [tables.delta_table(measured)],
        )
    )
    yield with_data(
        Section(
            'gradients',
            [figures.flow_picture(measured), figures.token_picture(measured)],
            [tables.flow_table(measured)],
        )
    )
    yield with_data(
        Section(
            'activations',
            [figures.range_picture(measured)],
            [tables.range_table(measured)],
        )
    )
    yield with_data(
        Section(
            'weights',
            [
                figures.weight_picture(measured),
                figures.spectrum_picture(measured),
            ],
            [tables.weight_table(measured)],
        )
    )
    yield with_data(
        Section(
            'ranges',
            [figures.bound_picture(measured)],
            [tables.bound_table(measured)],
            [tables.certified(measured)],
        )
    )
    yield sensitivity(measured)
    yield training(measured)


def missing_note(measured: Measured) -> list[str]:
    """Which layers have no numbers, and why."""
    gone = sorted(
        {r['layer'] for r in measured.directions if 'delta_q50' not in r}
    )
    if not gone or not measured.facts['samples']:
        return []
    note = (
        f'Layers of which a direction has no numbers on images: '
        f'{", ".join(map(str, gone))}; tensors there are not finite.'
    )
    if measured.stopped:
        note += f' The model stopped: {measured.stopped}.'
    return [note]


def with_data(section: Section) -> Section:
    """Leave out figures without data, and say so if none is left."""
    section.pictures = [p for p in section.pictures if p.rows]
    section.tables = [t for t in section.tables if t.rows]
    if not section.pictures:
        section.notes.append('There is nothing to draw here.')
    return section


def sensitivity(measured: Measured) -> Section:
    """Numbers, or why there are none."""
    if not measured.sensitivity:
        return Section('sensitivity', notes=[measured.without_sensitivity])
    return Section(
        'sensitivity',
        tables=[
            tables.sensitivity_table(measured),
            tables.image_table(measured),
        ],
    )


def training(measured: Measured) -> Section:
    """Curves, or why there are none."""
    pictures = list(figures.training_pictures([measured]))
    note = (
        'The work dir has no curves of more than one step.'
        if measured.source.training
        else 'No curves: a checkpoint was given, or a work dir without logs. '
        'Name the work dir of a training to see them.'
    )
    return Section('training', pictures, notes=[] if pictures else [note])


def comparison(
    found: Sequence[Measured], findings: Sequence[Sequence[Finding]]
) -> Section:
    """One model against another."""
    rows = changed_findings(*findings)
    changed = [changed_table(rows)] if rows else []
    notes = [] if rows else ['Both have the same findings.']
    return Section(
        'comparison',
        compared_pictures(found),
        [summary_table(found), *changed],
        notes,
    )


# ---------------------------------------------------------------- writing

FOLDED = 14
"""Lines above which a table is folded."""


def to_html(
    title: str,
    facts: dict[str, str],
    sections: Sequence[Section],
    findings: Sequence[Finding],
    folder: Path,
) -> str:
    """The page: no other files, no script, no network.

    Args:
        title (str): Heading.
        facts (dict[str, str]): Name and text.
        sections (Sequence[Section]): In their order.
        findings (Sequence[Finding]): Of the model.
        folder (Path): With ``figures/NAME.png``.
    """
    contents = [(s.name, TITLES[s.name]) for s in sections]
    body = ''.join(section_html(s, findings, folder) for s in sections)
    return make_page(title, facts, contents, body, STYLE)


def section_html(
    section: Section, findings: Sequence[Finding], folder: Path
) -> str:
    """One section."""
    parts = [
        f'<section id="{section.name}"><h2>{TITLES[section.name]}</h2>',
        f'<p class="read">{html.escape(READ[section.name])}</p>',
    ]
    parts += [f'<p>{html.escape(note)}</p>' for note in section.notes]
    if section.name == 'findings':
        parts.append(finding_html(findings))
        parts += [folded(table) for table in section.tables[1:]]
    else:
        shown = [table_html(t, section) for t in short(section.tables)]
        drawn = [picture_html(p, section, folder) for p in section.pictures]
        first = section.name == 'comparison'
        parts += shown + drawn if first else drawn + shown
        parts += [folded(t) for t in section.tables if is_long(t)]
    return '\n'.join(parts) + '</section>\n'


def is_long(table: Table) -> bool:
    """Whether a table is folded."""
    return len(table.rows) > FOLDED and table.name != 'summary'


def short(found: Sequence[Table]) -> list[Table]:
    """Tables that are not."""
    return [table for table in found if not is_long(table)]


def finding_html(findings: Sequence[Finding]) -> str:
    """The findings as a list."""
    items = [
        f'<li><span class="{row["severity"]}">{row["severity"]}</span> '
        f'{html.escape(row["text"])}</li>'
        for row in condense(findings)
    ]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ''


def heading(title: str, section: Section) -> str:
    """Of a part, unless it says what the section's says."""
    if title == TITLES[section.name]:
        return ''
    return f'<h3>{html.escape(title)}</h3>'


def caption(text: str) -> str:
    """A paragraph, of nothing none."""
    return f'<p class="caption">{html.escape(text)}</p>' if text else ''


def picture_html(picture: Picture, section: Section, folder: Path) -> str:
    """A figure in a box that scrolls where it would become too small."""
    return (
        f'{heading(picture.title, section)}'
        '<div class="wide" tabindex="0" role="region" '
        f'aria-label="{html.escape(picture.title)}">'
        f'{figure_html(picture, folder)}</div>'
    )


def table_html(table: Table, section: Section) -> str:
    """A table with its title and caption."""
    return (
        f'{heading(table.title, section)}{caption(table.caption)}'
        f'{writers.to_html(table)}'
    )


def folded(table: Table) -> str:
    """A table behind its title."""
    return (
        f'<details><summary>{html.escape(table.title)} '
        f'({len(table.rows)} lines)</summary>'
        f'{caption(table.caption)}{writers.to_html(table)}</details>'
    )


def to_markdown(
    title: str, facts: dict[str, str], sections: Sequence[Section]
) -> str:
    """The same as text, for those without a browser."""
    lines = [f'# {title}', '']
    lines += [f'- {name}: {text}' for name, text in facts.items()]
    for section in sections:
        lines += ['', f'## {TITLES[section.name]}', '', READ[section.name]]
        for note in section.notes:
            lines += ['', note]
        for picture in section.pictures:
            link = f'![{picture.title}](figures/{picture.name}.png)'
            lines += ['', link, '', picture.caption]
        for table in section.tables:
            if table.rows:
                lines += ['', f'### {table.title}', '', table.caption]
                lines += ['', writers.to_markdown(table)]
    return '\n'.join(lines) + '\n'


def headline(findings: Sequence[Finding]) -> str:
    """How many findings of which severity."""
    if not findings:
        return NOTHING
    counts = [
        f'{count} {word}'
        for severity, word in WORDS.items()
        if (count := sum(f.severity == severity for f in findings))
    ]
    return f'{len(findings)} findings: {", ".join(counts)}'

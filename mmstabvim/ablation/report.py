"""Write what came out of a study: tables, figures, one page."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmstabvim.ablation import figures, page, results, statistics
from mmstabvim.ablation.report_tables import make_tables
from mmstabvim.ablation.results import Study
from mmstabvim.reporting import Picture, style, tables
from mmstabvim.reporting.tables import Table

_NAMES = (
    'sn: spectral normalization, ec: eigenvalue clamping, '
    'sp: stability penalty; all: the three together'
)


def write_report(work_dir: Path, out: Path) -> Path:
    """Write the report of a study, finished or not.

    Args:
        work_dir (Path): Folder that ``ablation.py run`` wrote.
        out (Path): Folder for ``report.md``, ``report.html``, ``tables/`` and
            ``figures/``; files of an earlier report there are replaced.

    Returns:
        Path: The page.

    Raises:
        FileNotFoundError: If no run has been started in ``work_dir``.
    """
    study = results.read_study(work_dir)
    combinations = statistics.combine(study)
    found = make_tables(study, combinations)
    _clear(out)
    for table in found:
        base = out / 'tables' / table.name
        base.with_suffix('.md').write_text(tables.to_markdown(table) + '\n')
        base.with_suffix('.csv').write_text(tables.to_csv(table.data))
        base.with_suffix('.tex').write_text(tables.to_latex(table))
    pictures = []
    for picture in figures.make_pictures(study, combinations):
        base = out / 'figures' / picture.name
        style.save(picture.figure, base, style.FORMATS)
        csv = base.with_name(f'{base.name}.csv')
        csv.write_text(tables.to_csv(picture.rows))
        pictures.append(picture)
    facts = describe_study(study)
    text = to_markdown(study, facts, found, pictures)
    (out / 'report.md').write_text(text, encoding='utf-8')
    place = out / 'report.html'
    place.write_text(
        page.write_page(study.title, facts, found, pictures, out),
        encoding='utf-8',
    )
    return place


def _clear(out: Path) -> None:
    """Make the folders; remove what an earlier report left in them."""
    for name in ('tables', 'figures'):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ('*.md', '*.csv', '*.tex', '*.png', '*.pdf', '*.svg'):
            for path in folder.glob(pattern):
                path.unlink()


def describe_study(study: Study) -> dict[str, str]:
    """Collect facts that a reader needs to judge the numbers.

    Args:
        study (Study): Finished or not.

    Returns:
        dict[str, str]: Heading and text.
    """
    records = [cell.record for cell in study.cells if cell.record]
    counts: dict[str, int] = {}
    for cell in study.cells:
        counts[cell.status] = counts.get(cell.status, 0) + 1
    facts = {
        'Cells': f'{len(study.cells)}: '
        + ', '.join(f'{n} {status}' for status, n in counts.items()),
        'Score': f'{study.metric} of the last validation',
        'Names': _NAMES if _names_stabilizers(study) else '',
        'Notes': ' '.join(study.notes),
        'Command': study.command,
        'Machine': _all_of(records, _machine),
        'Versions': _all_of(records, _versions),
        'Trained': _dates(records),
    }
    return {name: text for name, text in facts.items() if text}


def _names_stabilizers(study: Study) -> bool:
    values = {v for found in study.orders.values() for v in found}
    parts = {part for v in values for part in re.split(r'[-_]', v)}
    return 'none' in values and bool(parts & {'sn', 'ec', 'sp', 'all'})


def _all_of(records: Sequence[dict], describe: Any) -> str:
    """Join the different descriptions, the most frequent first."""
    texts = [describe(record) for record in records]
    kinds = sorted(set(texts) - {''}, key=lambda t: -texts.count(t))
    return '; '.join(kinds)


def _machine(record: dict[str, Any]) -> str:
    machine = record.get('machine') or {}
    parts = [', '.join(machine.get('gpus') or []), machine.get('cpu')]
    if machine.get('cores'):
        parts.append(f'{machine["cores"]} cores')
    if record.get('jobs'):
        parts.append(
            f'{record["jobs"]} training(s) at once with '
            f'{record["threads"]} thread(s) each'
        )
    return ', '.join(part for part in parts if part)


def _versions(record: dict[str, Any]) -> str:
    versions = record.get('versions') or {}
    return ', '.join(f'{name} {v}' for name, v in versions.items())


def _dates(records: Sequence[dict]) -> str:
    days = sorted(r['started'][:10] for r in records if 'started' in r)
    if not days:
        return ''
    return days[0] if days[0] == days[-1] else f'{days[0]} to {days[-1]}'


def to_markdown(
    study: Study,
    facts: dict[str, str],
    found: Sequence[Table],
    pictures: Sequence[Picture],
) -> str:
    """Write the report as Markdown, figures as links.

    Args:
        study (Study): Gives the title.
        facts (dict[str, str]): Result of :func:`describe_study`.
        found (Sequence[Table]): The tables.
        pictures (Sequence[Picture]): The figures.

    Returns:
        str: The text of ``report.md``.
    """
    lines = [f'# {study.title}', '']
    for name, text in facts.items():
        shown = f'`{text}`' if name == 'Command' else text
        lines.append(f'- {name}: {shown}')
    for table in found:
        text = tables.to_markdown(table)
        lines += ['', f'## {table.title}', '', table.caption, '', text]
    for picture in pictures:
        link = f'![{picture.title}](figures/{picture.name}.png)'
        lines += ['', f'## {picture.title}', '', link, '', picture.caption]
    return '\n'.join(lines) + '\n'

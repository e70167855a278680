"""Perturb-then-diagonalize on HiPPO-LegS: tables and figures.

Prints condition numbers of eigenbases and distances of transfer functions
(arXiv:2310.01698, Sec. 3 and 4) as Markdown, and writes them with the data
of every figure as CSV. Nothing is trained.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _ptd.measurements import (
    DEVIATION,
    NORM,
    SEARCHES,
    Rows,
    Settings,
    condition_rows,
    frequencies,
    medians,
    random_rows,
    response_rows,
    search_rows,
    size_names,
    start_rows,
)
from rich.console import Console
from rich.progress import Progress

from mmstabvim.reporting.tables import Table, to_csv, to_markdown
from mmstabvim.visualization import line_figure, style
from mmstabvim.visualization.curves import Quantity

SHOWN = (8, 16, 64)  # states of the transfer functions, if computed


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/ptd'),
        help='folder of the results (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of the random perturbations'
    )
    parser.add_argument(
        '--device',
        default='cpu',
        help='where the transfer functions are computed; eigenvalues are '
        'always found on the CPU (default: %(default)s)',
    )
    parser.add_argument(
        '--sizes',
        type=int,
        nargs='+',
        default=[4, 8, 16, 32, 64],
        metavar='N',
        help='states, even numbers (default: 4 to 64)',
    )
    parser.add_argument(
        '--draws',
        type=int,
        default=5,
        help='random perturbations of each size; tables hold medians '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--search-size',
        type=int,
        default=16,
        metavar='N',
        help='states of the optimized perturbations (default: %(default)s)',
    )
    parser.add_argument(
        '--steps',
        type=int,
        default=300,
        help='of the optimization (default: %(default)s)',
    )
    parser.add_argument(
        '--points',
        type=int,
        default=600,
        help='frequencies from 0.01 to 10000 (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if any(size < 2 or size % 2 for size in [*args.sizes, args.search_size]):
        parser.error('--sizes and --search-size must be even and positive')
    if min(args.draws, args.steps, args.points) < 1:
        parser.error('--draws, --steps and --points must be positive')
    return args


# ------------------------------------------------------------------- tables

COLUMNS = {
    'condition': ('κ', '.3g'),
    'norm': ('‖E‖', '.2f'),
    'relative': ('‖E‖/‖A‖', '.4f'),
    'abscissa': ('max Re λ', '+.2f'),
    'radius': ('largest modulus', '.1f'),
    DEVIATION: ('deviation', '.2g'),
    'last_abscissa': ('last max Re λ', '+.2f'),
    'exact': ('exact', '.7e'),
    'lapack': ('LAPACK, float64', '.1e'),
    'E': ('size of E', ''),
    'objective': ('minimized', ''),
    'ptd_optimize': ('ptd_optimize', ''),
    'omega': ('ω', '.3f'),
    'HiPPO': ('HiPPO', '.5f'),
    'S4D-LegS': ('S4D-LegS', '.5f'),
    'PTD': ('PTD', '.5f'),
    'times': ('times', '.0f'),
    'N': ('N', 'd'),
}
"""Heads and formats of the columns."""


def make_table(name: str, title: str, caption: str, rows: Rows) -> Table:
    """All columns of the rows, in their order."""
    keys = list(rows[0])
    text = [
        [
            format(row[k], COLUMNS[k][1]) if COLUMNS[k][1] else str(row[k])
            for k in keys
        ]
        for row in rows
    ]
    align = ''.join('r' if COLUMNS[k][1] else 'l' for k in keys)
    heads = [COLUMNS[k][0] for k in keys]
    return Table(name, title, caption, heads, text, rows, align)


def make_tables(
    args: argparse.Namespace, conditions: Rows, result: dict[str, Any]
) -> list[Table]:
    """What is printed."""
    return [
        make_table(
            'conditions',
            'Condition numbers of HiPPO-LegS',
            'Of the eigenvectors with unit columns. Beyond 1e15 what float64 '
            'finds is noise.',
            conditions,
        ),
        make_table(
            'random',
            'Random perturbations',
            f'Medians of {args.draws} draws: condition number of the '
            'eigenvectors of A + E, largest real part of its eigenvalues, '
            f'and largest distance, at 0 and {args.points} frequencies, of '
            'the states that a Fourier mode drives from those of HiPPO '
            '(whose largest norm is 1). With ‖E‖ < 1/2 every draw is '
            'stable.',
            medians(result['draws']),
        ),
        make_table(
            'starts',
            "The initialization 'ptd'",
            'The best of 20 random E, and that one optimized, with the '
            'largest modulus of an eigenvalue. Every E with ‖E‖ < 1/2 is '
            'stable.',
            result['starts'],
        ),
        make_table(
            'optimized',
            f'Optimized perturbations, N = {args.search_size}',
            f'{args.steps} steps of Adam from one random E of 0.01 ‖A‖, with '
            f'the bound of norm {NORM}; the best iterate with real parts of '
            'at most -0.01 is kept. The last column is after the last step: '
            'an objective in which κ outweighs E may leave the stable '
            'region.',
            result['found'],
        ),
        make_table(
            'spikes',
            'The loudest Fourier mode',
            "Norm of the states at the frequency of S4D-LegS's fastest mode, "
            'and how many times louder than HiPPO S4D-LegS is there.',
            result['spikes'],
        ),
    ]


# ------------------------------------------------------------------ figures


def long_rows(
    rows: Rows, series: str, x: str, quantities: Sequence[str], facet: str = ''
) -> Rows:
    """One row per quantity, as figures take them."""
    return [
        dict(
            quantity=name,
            facet=facet,
            series=row[series],
            x=row[x],
            value=float(f'{row[name]:.6g}'),
        )
        for name in quantities
        for row in rows
        if name in row
    ]


def draw_sizes(random: Rows, conditions: Rows) -> tuple[Rows, Any]:
    """Condition, stability and deviation over the number of states.

    HiPPO's condition number leaves the axis where float64 loses it too.
    """
    quantities = [
        Quantity('condition', 'κ'),
        Quantity('abscissa', 'max Re λ (1/step)', 0.0),
        Quantity(DEVIATION, 'deviation', 1.0),
    ]
    names = [quantity.name for quantity in quantities]
    exact = [
        dict(E='HiPPO', N=row['N'], condition=row['exact'], abscissa=-1.0)
        for row in conditions
    ]
    rows = long_rows([*exact, *random], 'E', 'N', names)
    figure = line_figure(
        rows,
        style.unique(rows, 'series'),
        '',
        quantities,
        'number of states N',
        log_x=True,
        across=True,
        limits={'condition': (1.0, 1e16)},
    )
    return rows, figure


def draw_search(steps: Rows, size: int) -> tuple[Rows, Any]:
    """The way of the optimization."""
    quantities = [
        Quantity('condition', 'κ'),
        Quantity('norm', '‖E‖ (1/step)', 0.5),
        Quantity('abscissa', 'max Re λ (1/step)', 0.0),
    ]
    names = [quantity.name for quantity in quantities]
    some = [row for row in steps if row['step'] % 5 == 0]
    rows = long_rows(some, 'objective', 'step', names, f'N = {size}')
    figure = line_figure(
        rows,
        style.unique(rows, 'series'),
        'minimized',
        quantities,
        'step of Adam',
        across=True,
    )
    return rows, figure


def draw_responses(rows: Rows) -> Any:
    """Responses and distances over the frequency."""
    quantities = [
        Quantity('response', '‖(iω \N{MINUS SIGN} A)⁻¹B‖'),
        Quantity('distance', 'distance to HiPPO'),
    ]
    return line_figure(
        rows,
        style.unique(rows, 'series'),
        '',
        quantities,
        'frequency ω (rad/step)',
        log_x=True,
    )


# --------------------------------------------------------------------- main


def write(out: Path, name: str, data: Rows, figure: Any = None) -> None:
    """CSV, and the figure in its formats."""
    (out / f'{name}.csv').write_text(to_csv(data), encoding='utf-8')
    if figure is not None:
        style.save(figure, out / name)


def compute(settings: Settings, console: Console) -> dict[str, Any]:
    """Everything that takes time, with a bar."""
    grid = frequencies(settings)
    shown = [n for n in settings.sizes if n in SHOWN] or settings.sizes[:3]
    with Progress(console=console, transient=True) as bar:
        total = len(settings.sizes) * len(size_names())
        random = bar.add_task('random perturbations', total=total)
        first = bar.add_task('initializations', total=2 * len(settings.sizes))
        search = bar.add_task(
            'optimization', total=len(SEARCHES) * (settings.steps + 1)
        )
        curves = bar.add_task('transfer functions', total=len(shown))
        draws = random_rows(settings, grid, lambda: bar.advance(random))
        starts = start_rows(settings, grid, lambda: bar.advance(first))
        found, steps = search_rows(settings, grid, lambda: bar.advance(search))
        responses: Rows = []
        spikes: Rows = []
        for size in shown:
            rows, spike = response_rows(size, grid[::3], settings.seed)
            responses += rows
            spikes.append(spike)
            bar.advance(curves)
    return dict(
        draws=draws,
        starts=starts,
        found=found,
        steps=steps,
        responses=responses,
        spikes=spikes,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, write tables and figures."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(**{k: getattr(args, k) for k in Settings._fields})
    result = compute(settings, Console(stderr=True))
    conditions = condition_rows(args.sizes)
    tables = make_tables(args, conditions, result)
    text = '\n\n'.join(
        f'## {table.title}\n\n{table.caption}\n\n{to_markdown(table)}'
        for table in tables
    )
    print(text)
    (args.out / 'tables.md').write_text(text + '\n', encoding='utf-8')
    for table in tables:
        write(args.out, f'table_{table.name}', list(table.data))
    write(args.out, 'sizes', *draw_sizes(medians(result['draws']), conditions))
    write(
        args.out,
        'optimization',
        *draw_search(result['steps'], args.search_size),
    )
    responses = result['responses']
    write(args.out, 'responses', responses, draw_responses(responses))
    print(f'\nFigures and their data: {args.out}')


if __name__ == '__main__':
    main()

"""Perturb-then-diagonalize on HiPPO-LegS: tables and figures.

Prints condition numbers of eigenbases and distances of transfer functions
(arXiv:2310.01698, Sec. 3 and 4) as Markdown, and writes them with the data
of every figure as CSV. Nothing is trained.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mmstabvim.analysis.perturbation import (
    DEVIATION,
    NORM,
    SEARCHES,
    PtdOptions,
    Rows,
    condition_rows,
    frequencies,
    medians,
    random_rows,
    response_rows,
    search_rows,
    size_names,
    start_rows,
)
from mmstabvim.reporting import (
    Table,
    add_formats,
    make_table,
    style,
    to_csv,
    to_markdown,
)
from mmstabvim.visualization import Quantity, line_figure

SHOWN = (8, 16, 64)  # states of the transfer functions, if computed


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, out = parser.add_argument, Path('work_dirs/ptd')
    sizes = [4, 8, 16, 32, 64]
    add('--out', type=Path, default=out, help='folder of the results')
    add('--seed', type=int, default=0, help='of the random perturbations')
    add('--device', default='cpu', help='of the transfer functions')
    add('--sizes', type=int, nargs='+', default=sizes, help='states, even')
    add('--draws', type=int, default=5, help='random E of each size')
    add('--search-size', type=int, default=16, help='states of optimized E')
    add('--steps', type=int, default=300, help='of the optimization')
    add('--points', type=int, default=600, help='frequencies, 0.01 to 10000')
    add_formats(parser)
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


def tabulate(name: str, title: str, caption: str, rows: Rows) -> Table:
    """Tabulate all columns of the rows, in their order."""
    heads = {key: COLUMNS[key][0] for key in rows[0]}
    formats = {key: COLUMNS[key][1] or str for key in rows[0]}
    align = ''.join('r' if COLUMNS[key][1] else 'l' for key in heads)
    table = make_table(name, title, caption, heads, rows, formats)
    return Table(**{**vars(table), 'align': align})


def make_tables(
    args: argparse.Namespace, conditions: Rows, result: dict[str, Any]
) -> list[Table]:
    """Tabulate everything."""
    return [
        tabulate(
            'conditions',
            'Condition numbers of HiPPO-LegS',
            'Of the eigenvectors with unit columns. Beyond 1e15 what float64 '
            'finds is noise.',
            conditions,
        ),
        tabulate(
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
        tabulate(
            'starts',
            "The initialization 'ptd'",
            'The best of 20 random E, and that one optimized, with the '
            'largest modulus of an eigenvalue. Every E with ‖E‖ < 1/2 is '
            'stable.',
            result['starts'],
        ),
        tabulate(
            'optimized',
            f'Optimized perturbations, N = {args.search_size}',
            f'{args.steps} steps of Adam from one random E of 0.01 ‖A‖, with '
            f'the bound of norm {NORM}; the best iterate with real parts of '
            'at most -0.01 is kept. The last column is after the last step: '
            'an objective in which κ outweighs E may leave the stable '
            'region.',
            result['found'],
        ),
        tabulate(
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
    """Make one row per quantity, as figures take them."""
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
    """Draw condition, stability and deviation over the number of states.

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
    """Draw the course of the optimization."""
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
    """Draw responses and distances over the frequency."""
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


def write(
    args: argparse.Namespace, name: str, data: Rows, figure: Any = None
) -> None:
    """Write CSV, and the figure in its formats."""
    (args.out / f'{name}.csv').write_text(to_csv(data), encoding='utf-8')
    if figure is not None:
        style.save(figure, args.out / name, ('png', *args.formats))


def compute(options: PtdOptions, console: Console) -> dict[str, Any]:
    """Compute everything that takes time, with a bar."""
    grid = frequencies(options)
    shown = [n for n in options.sizes if n in SHOWN] or options.sizes[:3]
    with Progress(console=console, transient=True) as bar:
        total = len(options.sizes) * len(size_names())
        random = bar.add_task('random perturbations', total=total)
        first = bar.add_task('initializations', total=2 * len(options.sizes))
        search = bar.add_task(
            'optimization', total=len(SEARCHES) * (options.steps + 1)
        )
        curves = bar.add_task('transfer functions', total=len(shown))
        draws = random_rows(options, grid, lambda: bar.advance(random))
        starts = start_rows(options, grid, lambda: bar.advance(first))
        found, steps = search_rows(options, grid, lambda: bar.advance(search))
        responses: Rows = []
        spikes: Rows = []
        for size in shown:
            rows, spike = response_rows(size, grid[::3], options.seed)
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
    options = PtdOptions(*(getattr(args, k) for k in PtdOptions._fields))
    result = compute(options, Console(stderr=True))
    conditions = condition_rows(args.sizes)
    tables = make_tables(args, conditions, result)
    text = '\n\n'.join(
        f'## {table.title}\n\n{table.caption}\n\n{to_markdown(table)}'
        for table in tables
    )
    print(text)
    (args.out / 'tables.md').write_text(text + '\n', encoding='utf-8')
    for table in tables:
        write(args, f'table_{table.name}', list(table.data))
    write(args, 'sizes', *draw_sizes(medians(result['draws']), conditions))
    write(
        args,
        'optimization',
        *draw_search(result['steps'], args.search_size),
    )
    responses = result['responses']
    write(args, 'responses', responses, draw_responses(responses))
    print(f'\nFigures and their data: {args.out}')


if __name__ == '__main__':
    main()

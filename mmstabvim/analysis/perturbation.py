"""Perturb-then-diagonalize on HiPPO-LegS, as rows of tables.

Source: arXiv:2310.01698, Sec. 3 and 4.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability import (
    Perturbation,
    hippo_condition,
    hippo_legs,
    hippo_response,
    legs_normal_form,
    perturb_then_diagonalize,
    random_perturbations,
    state_response,
)
from mmstabvim.stability.state.eigenbasis import condition_number

Rows = list[dict[str, Any]]
Advance = Callable[[], None]

NORM = 0.4
RELATIVE = (1e-1, 1e-2, 1e-3, 1e-4)
SEARCHES: dict[str, dict[str, Any]] = {
    'ln κ + ‖E‖': dict(gamma=1.0),
    'ln κ + 5 ‖E‖': dict(gamma=5.0),
    'κ + ‖E‖': dict(gamma=1.0, objective='plain'),
    'ln κ + ‖E‖, ‖E‖ ≤ 0.49': dict(gamma=1.0, relative=None, norm=NORM),
}
DEVIATION = 'deviation'


class PtdOptions(NamedTuple):
    """Options that decide numbers."""

    sizes: Sequence[int]
    search_size: int
    draws: int
    steps: int
    points: int
    seed: int
    device: str


def frequencies(options: PtdOptions) -> Tensor:
    """Make 0 and a logarithmic grid, rad/step."""
    grid = torch.logspace(-2, 4, options.points, dtype=torch.float64)
    return torch.cat([grid.new_zeros(1), grid]).to(options.device)


def norms(response: Tensor) -> Tensor:
    """Take 2-norms over the states."""
    return torch.linalg.vector_norm(response, dim=-1)


def deviation(A: Tensor, B: Tensor, E: Tensor, omega: Tensor) -> float:
    """Largest distance of the responses of A + E and HiPPO's A."""
    moved = state_response((A + E).to(omega.device), B.to(omega.device), omega)
    return norms(moved - hippo_response(len(A), omega)).amax().item()


# ------------------------------------------------------- condition numbers


def condition_rows(sizes: Sequence[int]) -> Rows:
    """Condition HiPPO's eigenvectors, exactly and by LAPACK."""
    rows = []
    for size in sizes:
        vectors = torch.linalg.eig(hippo_legs(size)[0])[1]
        rows.append(
            dict(
                N=size,
                exact=hippo_condition(size),
                lapack=condition_number(vectors).item(),
            )
        )
    return rows


# ---------------------------------------------------- random perturbations


def size_names() -> dict[str, float]:
    """Name the sizes of E; the first is a norm, the others relative."""
    relative = {f'‖E‖ = {x:g} ‖A‖': x for x in RELATIVE}
    return {f'‖E‖ = {NORM}': NORM, **relative}


def random_rows(options: PtdOptions, omega: Tensor, advance: Advance) -> Rows:
    """Draw random perturbations of every size of state and of E."""
    rows = []
    for size in options.sizes:
        A, B = hippo_legs(size)
        draws = random_perturbations(size, options.draws, options.seed)
        for number, (name, length) in enumerate(size_names().items()):
            scale = torch.linalg.matrix_norm(A, 2) if number else 1.0
            for i, draw in enumerate(draws):
                E = length * scale * draw
                values, vectors = torch.linalg.eig(A + E)
                rows.append(
                    dict(
                        N=size,
                        E=name,
                        draw=i,
                        condition=condition_number(vectors).item(),
                        abscissa=values.real.amax().item(),
                        deviation=deviation(A, B, E, omega),
                    )
                )
            advance()
    return rows


def medians(rows: Rows) -> Rows:
    """Condense draws to one row per N and size of E."""
    groups: dict[tuple[int, str], Rows] = {}
    for row in rows:
        groups.setdefault((row['N'], row['E']), []).append(row)
    columns = ('condition', 'abscissa', DEVIATION)
    return [
        dict(N=size, E=name)
        | {key: statistics.median(r[key] for r in group) for key in columns}
        for (size, name), group in groups.items()
    ]


# ------------------------------------------------- optimized perturbations


def search_rows(
    options: PtdOptions, omega: Tensor, advance: Advance
) -> tuple[Rows, Rows]:
    """Optimize each objective: results, and the steps on the way."""
    A, B = hippo_legs(options.search_size)
    results, steps = [], []
    for name, chosen in SEARCHES.items():
        way: Rows = []

        def follow(step: int, *values: float, way: Rows = way) -> None:
            keys = ('condition', 'norm', 'abscissa')
            way.append(dict(step=step) | dict(zip(keys, values, strict=True)))
            advance()

        chosen = dict(relative=1e-2, draws=1, seed=options.seed) | chosen
        search = Perturbation(optimize=True, steps=options.steps, **chosen)
        basis = perturb_then_diagonalize(A, search, follow=follow)
        E = basis.perturbation
        size = torch.linalg.matrix_norm(A, 2).item()
        results.append(
            dict(
                objective=name,
                condition=basis.condition,
                norm=basis.norm,
                relative=basis.norm / size,
                abscissa=basis.abscissa,
                deviation=deviation(A, B, E, omega),
                last_abscissa=way[-1]['abscissa'],
            )
        )
        steps += [dict(objective=name) | row for row in way]
    return results, steps


# ------------------------------------------- what the layers start with


def start_rows(options: PtdOptions, omega: Tensor, advance: Advance) -> Rows:
    """``init='ptd'`` as it is by default, and optimized."""
    rows = []
    for size in options.sizes:
        A, B = hippo_legs(size)
        for optimize in (False, True):
            chosen = Perturbation(
                NORM,
                optimize=optimize,
                steps=options.steps,
                seed=options.seed,
            )
            basis = perturb_then_diagonalize(A, chosen)
            rows.append(
                dict(
                    N=size,
                    ptd_optimize=optimize,
                    condition=basis.condition,
                    norm=basis.norm,
                    abscissa=basis.abscissa,
                    radius=basis.eigenvalues.abs().amax().item(),
                    deviation=deviation(A, B, basis.perturbation, omega),
                )
            )
            advance()
    return rows


# ------------------------------------------------------ transfer functions


def systems(size: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Matrices A and B of the compared systems, in HiPPO's coordinates."""
    A, B = hippo_legs(size)
    random = perturb_then_diagonalize(A, Perturbation(NORM, seed=seed))
    return {
        'HiPPO': (A, B),
        'S4D-LegS': (A + torch.outer(B, B) / 2, B / 2),
        'PTD': (A + random.perturbation, B),
    }


def spike_frequencies(size: int, grid: Tensor) -> Tensor:
    """The grid and the neighbourhoods of S4D-LegS's frequencies."""
    near = torch.tensor([-1.5, -0.5, 0, 0.5, 1.5])
    spikes = legs_normal_form(size).frequencies[:, None] + near
    spikes = spikes[spikes > grid[1].item()].to(grid)
    return torch.cat([grid[1:], spikes]).sort().values


def response_rows(
    size: int, grid: Tensor, seed: int, digits: int = 5
) -> tuple[Rows, dict[str, Any]]:
    """Norms over frequency, and those at S4D-LegS's highest spike."""
    omega = spike_frequencies(size, grid)
    spike = legs_normal_form(size).frequencies[:1].to(grid)
    exact = hippo_response(size, omega)
    at_spike: dict[str, Any] = dict(N=size)
    at_spike['omega'] = spike.item()
    rows: Rows = []
    for name, (A, B) in systems(size, seed).items():
        A, B = A.to(grid), B.to(grid)
        response = state_response(A, B, omega)
        at_spike[name] = norms(state_response(A, B, spike)).item()
        curves = {'response': norms(response)}
        if name != 'HiPPO':
            curves['distance'] = norms(response - exact)
        rows += [
            dict(
                quantity=quantity,
                facet=f'N = {size}',
                series=name,
                x=float(f'{x:.{digits + 2}g}'),
                value=float(f'{value:.{digits}g}'),
            )
            for quantity, curve in curves.items()
            for x, value in zip(omega.tolist(), curve.tolist(), strict=True)
        ]
    at_spike['times'] = at_spike['S4D-LegS'] / at_spike['HiPPO']
    return rows, at_spike

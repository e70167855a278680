"""Remake the figures of the analysis of stable rank normalization.

Figures 1 to 3 of Zheng et al., Analysis of the Stable Rank Normalization for
Convolutional Kernels, and the failure of SRN-C that its Section 2.2 reports;
beside them what the exact solver does. Every figure is written as PNG with
its data as CSV.

The paper does not say for which stable rank its Figures 2 and 3 are; 32, half
of the length, is taken here.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from mmstabvim.apis import console
from mmstabvim.reporting import add_formats, markdown, style, to_csv
from mmstabvim.stability import (
    frequency_planes,
    kernel_stable_rank,
    normalize_kernel_stable_rank,
    rank_one_kernel,
    sphere_descent,
    squared_gains,
    srn_c,
)
from mmstabvim.visualization import (
    Quantity,
    line_figure,
    sphere_figure,
    target_figure,
)

LENGTH, KERNEL = 64, (1.0, 0.0, 0.0)
IMAGE = (8, 8)
BLUR = ((1, 2, 1), (2, 4, 2), (1, 2, 1))
RECORDS = 400
Rows = list[dict[str, Any]]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, out = parser.add_argument, Path('work_dirs/srn_analysis')
    add('--out', type=Path, default=out, help='folder for figures and data')
    add('--seed', type=int, default=0, help='of the random start and kernel')
    add('--device', default='cpu')
    add('--rank', type=float, default=32.0, help='stable rank of the descent')
    add(
        '--alpha',
        type=float,
        nargs='+',
        default=[10.0, 200.0],
        help="sharpness of the log-sum-exp; the paper's is 10, the first one "
        'is shown on the sphere (default: %(default)s)',
    )
    add('--penalty', type=float, default=0.1, help='default: %(default)s')
    add('--step', type=float, default=1e-5, help='default: %(default)s')
    add('--steps', type=int, default=60_000, help='iterates of each descent')
    add_formats(parser)
    return parser.parse_args(argv)


def write(
    args: argparse.Namespace, name: str, rows: Rows, figure: Any = None
) -> None:
    """Write rows as CSV, numbers with six digits, and their figure."""
    short = [
        {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    (args.out / f'{name}.csv').write_text(to_csv(short), encoding='utf-8')
    if figure is not None:
        style.save(figure, args.out / name, ('png', *args.formats))


# ------------------------------------------------------------------ figure 1


def form_eigenvalues(taps: int, length: int) -> Rows:
    """Find the two largest eigenvalues of the gain's form by frequency."""
    planes = frequency_planes((taps,), (length,))
    return [
        dict(
            frequency=k,
            largest=planes.largest[min(k, length - k)].item(),
            second=planes.second[min(k, length - k)].item(),
        )
        for k in range(length)
    ]


def draw_eigenvalues(rows: Rows, count: int) -> Any:
    """Draw both eigenvalues over frequency; they are bounded by the taps."""
    names = {'largest': 'largest', 'second': 'second largest'}
    marks = [
        dict(
            quantity='',
            facet='',
            series=name,
            x=row['frequency'],
            value=row[k],
        )
        for k, name in names.items()
        for row in rows
    ]
    quantity = Quantity('', 'eigenvalue of $B_k$', count)
    series = [*names.values()]
    return line_figure(
        marks, series, '', [quantity], 'frequency k', border='taps'
    )


# ------------------------------------------------------------ figures 2 and 3


def descend(
    args: argparse.Namespace, alpha: float, progress: Progress
) -> tuple[Rows, Tensor, Any]:
    """Descend once: course, points (records, 3) and end."""
    kernel = torch.tensor(KERNEL, dtype=torch.float64, device=args.device)
    every = max(1, args.steps // RECORDS)
    course: list[tuple[int, Tensor, Tensor]] = []
    task = progress.add_task(f'descent, alpha {alpha:g}', total=args.steps)

    def record(number: int, value: Tensor, point: Tensor) -> None:
        if number % every == 0 or number == args.steps:
            course.append((number, value[0], point[0]))
            progress.update(task, completed=number)

    end = sphere_descent(
        kernel,
        LENGTH,
        args.rank,
        alpha=alpha,
        penalty=args.penalty,
        step=args.step,
        steps=args.steps,
        seed=args.seed,
        callback=record,
    )
    points = torch.stack([point for _, _, point in course])
    ranks = kernel_stable_rank(points, LENGTH).tolist()
    rows = [
        dict(
            series=f'alpha = {alpha:g}',
            step=number,
            objective=value.item(),
            stable_rank=rank,
        )
        for (number, value, _), rank in zip(course, ranks, strict=True)
    ]
    return rows, points.cpu(), end


def draw_descents(rows: Rows, series: list[str], target: float) -> Any:
    """Draw objective and stable rank along the descents."""
    quantities = [
        Quantity('objective', 'objective h'),
        Quantity('stable_rank', 'stable rank', target),
    ]
    marks = [
        dict(
            quantity=quantity.name,
            facet='',
            series=row['series'],
            x=row['step'],
            value=row[quantity.name],
        )
        for quantity in quantities
        for row in rows
    ]
    return line_figure(
        marks,
        series,
        '',
        quantities,
        'iterate',
        across=True,
        border=f'asked for: {target:g}',
    )


def line_of_sight(center: Tensor) -> Tensor:
    """Rows: to the right, upwards, and towards the eye, orthonormal."""
    depth = center / center.norm()
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    if depth[2].abs() > 0.9:
        up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    up = up - (up @ depth) * depth
    up = up / up.norm()
    return torch.stack([torch.linalg.cross(up, depth), up, depth])


def seen(
    facet: str, points: Tensor, view: Tensor, half: float
) -> Iterable[dict[str, Any]]:
    """Project points (count, 3); NaN outside the frame."""
    for x, y, depth in (points @ view.mT).tolist():
        inside = max(abs(x), abs(y)) <= half
        yield dict(
            facet=facet,
            x=x if inside else math.nan,
            y=y if inside else math.nan,
            depth=depth,
        )


def lattice(facet: str, view: Tensor, x: Tensor, y: Tensor) -> Rows:
    """Stable rank of the front of the sphere on a lattice (rows, columns)."""
    depth = (1 - x.square() - y.square()).clamp(min=0).sqrt()
    ranks = kernel_stable_rank(torch.stack([x, y, depth], -1) @ view, LENGTH)
    return [
        dict(
            facet=facet,
            row=i,
            column=j,
            x=x[i, j].item(),
            y=y[i, j].item(),
            stable_rank=ranks[i, j].item(),
        )
        for i in range(x.shape[0])
        for j in range(x.shape[1])
    ]


def disc() -> tuple[Tensor, Tensor]:
    """Lattice of rings, the outermost is the outline of the sphere."""
    height = torch.linspace(0, math.pi / 2, 31, dtype=torch.float64)
    turn = torch.linspace(0, 2 * math.pi, 85, dtype=torch.float64)
    radius = height.sin()[:, None]
    return radius * turn.cos(), radius * turn.sin()


def square(half: float) -> tuple[Tensor, Tensor]:
    """Lattice of a square around the middle."""
    line = torch.linspace(-half, half, 41, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing='xy')
    return x, y


def sphere_rows(points: Tensor, exact: Tensor) -> tuple[Rows, Rows, Rows]:
    """Surface, path and marks of the trajectory's figure."""
    given = torch.tensor(KERNEL, dtype=torch.float64)
    exact = exact / exact.norm()
    marks = {
        'start': points[0],
        'end of the descent': points[-1],
        'given kernel': given,
        'exact solution': exact,
    }
    whole = points[0] + points[-1] + given
    near = points[-1] + exact
    frames = [
        ('unit sphere', line_of_sight(whole), 1.0, disc()),
        ('detail', line_of_sight(near), 0.35, square(0.35)),
    ]
    surface: Rows = []
    path: Rows = []
    named: Rows = []
    for facet, view, half, (x, y) in frames:
        surface += lattice(facet, view, x, y)
        path += seen(facet, points, view, half)
        for name, point in marks.items():
            (row,) = seen(facet, point[None], view, half)
            named.append({**row, 'name': name})
    return surface, path, named


# --------------------------------------------------------------------- SRN-C


def images(seed: int) -> dict[str, Tensor]:
    """Kernels on which SRN-C is tried, of spectral norm 1."""
    generator = torch.Generator().manual_seed(seed)
    kernels = {
        'blur': torch.tensor(BLUR, dtype=torch.float64),
        'random': torch.randn(3, 3, dtype=torch.float64, generator=generator),
    }
    return {
        name: kernel / squared_gains(kernel, IMAGE).max().sqrt()
        for name, kernel in kernels.items()
    }


def srn_c_rows(kernels: dict[str, Tensor]) -> tuple[Rows, Rows]:
    """Run SRN-C and the exact solver; spectra of C(a_1)."""
    rows, spectra = [], []
    for facet, kernel in kernels.items():
        high = kernel_stable_rank(kernel, IMAGE).item()
        least = math.prod(IMAGE) / kernel.numel()
        for target in torch.linspace(1, high, 101).tolist():
            found = {'SRN-C': srn_c(kernel, IMAGE, target)}
            if least <= target:
                found['exact'] = normalize_kernel_stable_rank(
                    kernel, IMAGE, target
                )
            for series, new in found.items():
                rows.append(
                    dict(
                        facet=facet,
                        series=series,
                        target=target,
                        stable_rank=kernel_stable_rank(new, IMAGE).item(),
                        gain=squared_gains(new, IMAGE).max().sqrt().item(),
                    )
                )
        first = rank_one_kernel(kernel, IMAGE)
        values = torch.fft.fft2(first, IMAGE).abs().flatten()
        values = values.sort(descending=True).values.tolist()
        spectra += [
            dict(facet=facet, index=i + 1, value=value)
            for i, value in enumerate(values)
        ]
    return rows, spectra


# ------------------------------------------------------------------- summary


def digits(kernel: Tensor) -> str:
    """Taps with five digits."""
    return ' '.join(f'{x:.5f}' for x in kernel.tolist())


def summary(
    args: argparse.Namespace, ends: dict[str, Any], exact: Tensor
) -> Rows:
    """List the result of each solver on the kernel of Figures 2 and 3.

    ``gain`` is the largest singular value over the given one before the
    kernel is scaled to have the same; ``distance`` is measured after it.
    """
    given = torch.tensor(KERNEL, dtype=torch.float64)
    rows = [
        dict(
            solver='exact',
            stable_rank=kernel_stable_rank(exact, LENGTH).item(),
            gain=1.0,
            distance=(exact - given).norm().item(),
            kernel=digits(exact),
        )
    ]
    for name, end in ends.items():
        kernel = end.kernels.cpu()
        rows.append(
            dict(
                solver=f'descent, {name}',
                stable_rank=end.stable_rank.item(),
                gain=end.gain_ratio.item(),
                distance=(kernel - given).norm().item(),
                kernel=digits(kernel),
            )
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Compute, draw, write."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = form_eigenvalues(len(KERNEL), LENGTH)
    write(args, 'eigenvalues', rows, draw_eigenvalues(rows, len(KERNEL)))

    given = torch.tensor(KERNEL, dtype=torch.float64)
    exact = normalize_kernel_stable_rank(given, LENGTH, args.rank)
    course: Rows = []
    ends, ways = {}, []
    with console.working() as progress:
        for alpha in args.alpha:
            rows, points, end = descend(args, alpha, progress)
            course += rows
            ends[rows[0]['series']] = end
            ways.append(points)
    write(args, 'descent', course, draw_descents(course, [*ends], args.rank))

    surface, path, marks = sphere_rows(ways[0], exact)
    write(args, 'trajectory_surface', surface)
    write(args, 'trajectory_marks', marks)
    figure = sphere_figure(surface, path, marks, args.rank)
    write(args, 'trajectory', path, figure)

    rows, spectra = srn_c_rows(images(args.seed))
    write(args, 'srn_c_spectra', spectra)
    figure = target_figure(rows, spectra, ['SRN-C', 'exact'])
    write(args, 'srn_c', rows, figure)

    rows = summary(args, ends, exact)
    write(args, 'summary', rows)
    print(f'stable rank {args.rank:g} asked for, length {LENGTH}')
    print(markdown(rows, {key: key for key in rows[0]}))
    print(f'figures and data are in {args.out}')


if __name__ == '__main__':
    main()

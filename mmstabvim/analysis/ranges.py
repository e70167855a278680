"""Ranges of a Vision Mamba's tensors: proven, and seen on images.

docs/ranges.md has the proofs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from mmstabvim.analysis.mixers import (
    WAYS,
    Blocks,
    find_mixer_blocks,
    no_progress,
    watch_mixers,
)
from mmstabvim.layers.mixer_ranges import (
    DIRECTED,
    FLOAT32,
    SHARED,
    MixerRanges,
    certify_mixer,
    largest_values,
    trace_mixer,
)
from mmstabvim.reporting import (
    Table,
    make_table,
    number,
    render,
    save,
    to_markdown,
)
from mmstabvim.visualization import Quantity, line_figure

Row = dict[str, Any]
Rows = list[Row]
Values = list[dict[str, float]]

DTYPES = ('float16', 'bfloat16', 'float32')
MAIN = {'delta': 'Δ', 'drive': 'B̄u', 'state': 'h', 'y': 'y'}
LABELS = {
    'delta': r'step size, $\Delta$',
    'drive': r'drive, $\bar{B} u$',
    'state': 'state, $h$',
    'y': 'output of scan, $y$',
}
PARTS = ('shared', *WAYS)
ORDER = (
    ('shared', SHARED[:3]),
    *((way, DIRECTED) for way in WAYS),
    ('shared', SHARED[3:]),
)
"""Tensors in the order in which a mixer computes them."""

LIMITS = {name: torch.finfo(getattr(torch, name)).max for name in DTYPES}
SMALLEST = torch.finfo(torch.float16).tiny
"""Below it a float16 loses digits."""


class Observed:
    """Largest values of a mixer's tensors, and the first not finite one."""

    def __init__(self) -> None:
        self.largest: Values = []
        self.small: Values = []
        self.images = 0
        self.nonfinite: tuple[str, str, int] | None = None

    @torch.no_grad()
    def add(self, traced: MixerRanges) -> None:
        """Take the tensors of an image."""
        parts = [traced.shared, *traced.directions]
        largest = largest_values(traced)
        values = [value for part in largest for value in part.values()]
        # most often there is none, and nothing to search for
        if self.nonfinite is None and not all(map(math.isfinite, values)):
            self.nonfinite = _first_nonfinite(parts)
        self.largest = _merge(self.largest, largest, worse)
        small = [
            {n: small_share(t) for n, t in part.items() if n not in FLOAT32}
            for part in parts
        ]
        self.small = _merge(self.small, small, lambda a, b: a + b)
        self.images += 1


def worse(a: float, b: float) -> float:
    """The larger number, NaN being the largest.

    Example:
        >>> worse(1.0, 2.0), worse(float('nan'), 2.0)
        (2.0, nan)
    """
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _merge(old: Values, new: Values, combine: Callable) -> Values:
    """Join two lists of numbers by name."""
    if not old:
        return new
    return [
        {k: combine(a[k], v) if k in a else v for k, v in b.items()}
        for a, b in zip(old, new, strict=True)
    ]


def small_share(tensor: Tensor) -> float:
    """Share of the elements that a float16 would hold with fewer digits.

    Example:
        >>> small_share(torch.tensor([0.0, 1e-5, 1.0, 2.0]))
        0.25
    """
    size = tensor.abs()
    return float(((size > 0) & (size < SMALLEST)).float().mean())


def _first_nonfinite(
    parts: Sequence[Mapping[str, Tensor]],
) -> tuple[str, str, int] | None:
    """Direction, name and count of the first tensor with a NaN."""
    given = dict(zip(PARTS, parts, strict=True))
    for part, names in ORDER:
        for name in names:
            if name in given[part]:
                count = int((~torch.isfinite(given[part][name])).sum())
                if count:
                    return part, name, count
    return None


def watch_ranges(blocks: Blocks, observed: Mapping[str, Observed]) -> Any:
    """Record each mixer's tensors while the model runs.

    Args:
        blocks (Mapping[str, VisionMambaBlock]): By name.
        observed (Mapping[str, Observed]): By the same names.

    Returns:
        AbstractContextManager: Records as long as it is open.
    """

    def look(name: str, mixer: Any, tokens: Tensor) -> None:
        observed[name].add(trace_mixer(mixer, tokens))

    return watch_mixers(blocks, look)


def certified_bounds(
    blocks: Blocks,
    dtype: torch.dtype,
    progress: Progress,
    strict: bool = True,
) -> dict[str, Values]:
    """Bound the tensors of every block.

    Args:
        blocks (Mapping[str, VisionMambaBlock]): By name.
        dtype (torch.dtype): Of autocast.
        progress (Progress): Gets a bar.
        strict (bool): Refuse weights that are not finite. Defaults to True.

    Returns:
        dict[str, list[dict[str, float]]]: By block: what its directions
        share, and each direction; NaN for one that is not finite.

    Raises:
        ValueError: If a weight is not finite, and ``strict``.
    """
    bar = progress.add_task('bounds', total=len(blocks))
    found = {}
    for name, block in blocks.items():
        try:
            ranges = certify_mixer(block.mixer, block.norm, dtype)
            found[name] = largest_values(ranges)
        except ValueError:
            if strict:
                raise
            parts = (SHARED, *(DIRECTED for _ in WAYS))
            found[name] = [dict.fromkeys(names, math.nan) for names in parts]
        progress.advance(bar)
    return found


def tensor_rows(
    bounds: Mapping[str, Values],
    observed: Mapping[str, Observed],
    dtype: torch.dtype,
) -> Rows:
    """Join bounds, largest values and limits.

    Args:
        bounds (Mapping): Of :func:`certified_bounds`.
        observed (Mapping[str, Observed]): By block; may lack some.
        dtype (torch.dtype): Of autocast.

    Returns:
        list[dict]: A row for every tensor, in the order of computation.
    """
    rows = []
    for layer, (name, parts) in enumerate(bounds.items()):
        seen = observed.get(name) or Observed()
        for part, tensors in ORDER:
            place = PARTS.index(part)
            largest = seen.largest[place] if seen.images else {}
            small = seen.small[place] if seen.images else {}
            for tensor in tensors:
                bound = parts[place][tensor]
                kept = torch.float32 if tensor in FLOAT32 else dtype
                limit = torch.finfo(kept).max
                rows.append(
                    dict(
                        layer=layer,
                        name=name,
                        direction=part,
                        tensor=tensor,
                        kept_in=str(kept).removeprefix('torch.'),
                        bound=bound,
                        observed=largest.get(tensor),
                        limit=limit,
                        # not so for NaN
                        can_overflow=not bound <= limit,
                        small=small[tensor] / seen.images
                        if tensor in small
                        else None,
                    )
                )
    return rows


def check(rows: Sequence[Row]) -> None:
    """Compare the values on images with the bounds.

    Args:
        rows (Sequence[dict]): Of :func:`tensor_rows`.

    Raises:
        RuntimeError: If a value exceeds its bound, or is NaN.
    """
    for row in rows:
        seen = row['observed']
        # float32 against exact arithmetic
        if seen is not None and not seen <= row['bound'] * (1 + 1e-5):
            raise RuntimeError(
                f'{row["name"]}, {row["direction"]}, {row["tensor"]}: seen '
                f'{seen:.6g}, which must not exceed {row["bound"]:.6g}'
            )


def overflows(rows: Rows, dtype: str) -> list[int]:
    """Layers that this proof does not exclude from overflowing.

    Args:
        rows (list[dict]): Of :func:`tensor_rows`.
        dtype (str): Of ``DTYPES``.

    Returns:
        list[int]: In increasing order.
    """

    def limit(row: Row) -> float:
        return LIMITS['float32' if row['tensor'] in FLOAT32 else dtype]

    risky = {row['layer'] for row in rows if not row['bound'] <= limit(row)}
    return sorted(risky)


def layer_rows(rows: Rows) -> Rows:
    """Summarize the rows of each layer and direction for readers.

    Args:
        rows (list[dict]): Of :func:`tensor_rows`.

    Returns:
        list[dict]: ``layer, direction``, the tensors of ``MAIN``, ``worst``
        and ``overflow``, words all.
    """
    found = []
    for layer in sorted({row['layer'] for row in rows}):
        for way in WAYS:
            own = [
                row
                for row in rows
                if row['layer'] == layer
                and row['direction'] in (way, 'shared')
            ]
            bounds = {row['tensor']: row for row in own}
            worst = max(own, key=lambda row: row['bound'] / row['limit'])
            share = number(worst['bound'] / worst['limit'])
            risky = any(row['can_overflow'] for row in own)
            line: Row = dict(layer=str(layer), direction=way)
            line |= {tensor: _cell(bounds[tensor]) for tensor in MAIN}
            line['worst'] = f'{worst["tensor"]}, {share}'
            line['overflow'] = 'may' if risky else 'cannot'
            found.append(line)
    return found


def _cell(row: Row) -> str:
    """Bound, and the largest value seen."""
    text, seen = number(row['bound']), row['observed']
    return text if seen is None else f'{text} ({number(seen)})'


def bound_table(rows: Rows, overflow: str = 'overflow') -> Table:
    """Tabulate bounds and largest values by layer and direction.

    Args:
        rows (list[dict]): Of :func:`tensor_rows`.
        overflow (str): Head of the last column. Defaults to ``'overflow'``.

    Returns:
        Table: Its data are all rows.
    """
    heads = dict(layer='layer', direction='direction', **MAIN)
    heads |= dict(worst='worst, of its limit', overflow=overflow)
    return make_table(
        'bounds',
        'Certified ranges',
        'Bound, and in parentheses the largest value on the images. Worst: '
        'the tensor whose bound comes closest to the largest number of its '
        'dtype, or exceeds it.',
        heads,
        layer_rows(rows),
        data=rows,
    )


def bound_marks(rows: Rows) -> Rows:
    """Bounds and largest values as marks of :func:`bound_figure`."""
    return [
        dict(
            quantity=row['tensor'],
            facet=row['direction'],
            series=kind,
            x=row['layer'],
            value=row[key],
        )
        for row in rows
        if row['tensor'] in MAIN
        for kind, key in (('bound', 'bound'), ('seen', 'observed'))
        if row[key] is not None and 0 < row[key] < math.inf
    ]


def bound_figure(marks: Rows, dtype: str = 'float16') -> Figure:
    """Draw bounds and largest values over the layers.

    Args:
        marks (list[dict]): Of :func:`bound_marks`.
        dtype (str): Of autocast. Defaults to ``'float16'``, whose limit is
            drawn for the output of the scan.

    Returns:
        Figure: A line of panels per tensor, a column per direction.
    """
    border = LIMITS[dtype] if dtype == 'float16' else None
    quantities = [
        Quantity(tensor, label, border if tensor == 'y' else None)
        for tensor, label in LABELS.items()
    ]
    name = 'largest float16' if border else ''
    series = ('bound', 'seen')
    return line_figure(marks, series, '', quantities, 'layer', border=name)


@dataclass
class RangeReport:
    """Proven and observed ranges of a model.

    Attributes:
        rows (list[dict]): A row for every tensor.
        dtype (str): Of autocast.
        facts (dict): Of the page: ``config, checkpoint, images``.
    """

    rows: Rows
    dtype: str
    facts: Row = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Answer in words: can the dtype overflow?"""
        count = len({row['layer'] for row in self.rows})
        risky = [row for row in self.rows if row['can_overflow']]
        if not risky:
            return (
                f'**{self.dtype} cannot overflow** in any of the {count} '
                'layers: every bound is below the largest number.'
            )
        layers = {row['layer'] for row in risky}
        first = risky[0]
        return (
            f'**{self.dtype} is not certified** in {len(layers)} of {count} '
            'layers. The first that may overflow is layer '
            f'{first["layer"]} (`{first["name"]}`): `{first["tensor"]}`, '
            f'{first["direction"]}, kept in {first["kept_in"]} (largest '
            f'number {first["limit"]:.6g}), is bounded by '
            f'{number(first["bound"], 4)} only.'
        )


@torch.no_grad()
def certified_ranges(
    model: Any,
    images: Iterable[Tensor] = (),
    dtype: str = 'float16',
    progress: Progress | None = None,
    **facts: str,
) -> RangeReport:
    """Prove ranges for any image, and observe those of some.

    Args:
        model (nn.Module): With blocks of a Vision Mamba, in evaluation mode.
        images (Iterable[Tensor]): (1, channels, height, width) each, as the
            model reads them. Defaults to none.
        dtype (str): Of autocast, of ``DTYPES``. Defaults to ``'float16'``.
        progress (Progress, optional): Gets bars. Defaults to None.
        **facts (str): Of the page: ``config, checkpoint, origin`` of the
            images.

    Returns:
        RangeReport: For :func:`write`.

    Raises:
        ValueError: If the model has no block, or a weight is not finite.
        RuntimeError: If a value on an image exceeds its bound.

    Example:
        >>> report = certified_ranges(model, images)  # doctest: +SKIP
        >>> write(report, Path('ranges'))  # doctest: +SKIP
    """
    progress = progress or no_progress()
    blocks = find_mixer_blocks(model)
    kept = getattr(torch, dtype)
    bounds = certified_bounds(blocks, kept, progress)
    observed = {name: Observed() for name in blocks}
    with watch_ranges(blocks, observed):
        for image in progress.track(images, description='images'):
            model(image, mode='tensor')
    count = max(seen.images for seen in observed.values())
    rows = tensor_rows(bounds, observed, kept)
    check(rows)
    about = dict(config=type(model).__name__, checkpoint='given weights')
    origin = facts.pop('origin', 'the caller')
    about |= facts | dict(dtype=dtype, images=f'{count} images of {origin}')
    return RangeReport(rows, dtype, about)


def write(
    report: RangeReport, folder: Path, formats: Sequence[str] = ()
) -> str:
    """Write ranges.md, .csv, .json and .png.

    Args:
        report (RangeReport): Of :func:`certified_ranges`.
        folder (Path): Created where it is missing.
        formats (Sequence[str]): Of the figure besides PNG. Defaults to none.

    Returns:
        str: Table and verdict, for a terminal.
    """
    table = bound_table(report.rows)
    facts = dict(report.facts, verdict=report.verdict)
    page = render('ranges.md', table=table, **facts)
    figure = bound_figure(bound_marks(report.rows), report.dtype)
    save(folder, 'ranges', page, report.rows, facts, figure, formats)
    return f'{to_markdown(table)}\n{report.verdict.replace("**", "")}'

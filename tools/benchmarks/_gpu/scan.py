"""Stage ``scan``: the selective scan against others, and against the floor."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from _gpu import scan_versions as versions
from _gpu import timing
from _gpu.records import Table, show
from _gpu.roofline import VIM_SHAPES, Shape, backward_floor, forward_floor
from _gpu.scan_versions import Call, Version
from _gpu.stage import Failures, SkippedError, Stage
from _gpu.timing import Budget, Timing

SHAPES = [
    *VIM_SHAPES.values(),
    Shape(128, 65, 384, 16),
    Shape(128, 196, 384, 16),
    Shape(16, 1025, 384, 16),
    Shape(8, 4097, 384, 16),
    Shape(1, 197, 384, 16),
    Shape(1, 4096, 384, 16),
    Shape(128, 197, 384, 8),
]
QUICK_SHAPES = [Shape(1, 3, 4, 2)]
DTYPES = (torch.bfloat16, torch.float32)
PASSES = ('forward', 'forward + backward')
TIMERS = (timing.measure, timing.measure, timing.measure_graph)


def run(stage: Stage) -> None:
    """Check and time every version at every shape, in both precisions.

    Raises:
        SkippedError: If the scan's tests failed.
    """
    if stage.refuses('scan'):
        raise SkippedError('Not timed: tests failed.')
    torch.manual_seed(0)
    with Failures() as failures:
        Comparison(stage, failures).run()


class Comparison:
    """All versions at all shapes, most wanted first.

    Args:
        stage (Stage): Where to run and to report.
        failures (Failures): What must not stop the other shapes.
    """

    def __init__(self, stage: Stage, failures: Failures) -> None:
        self.stage, self.failures = stage, failures
        self.shapes = QUICK_SHAPES if stage.quick else SHAPES
        self.dtypes = DTYPES[:1] if stage.quick else DTYPES
        self.versions = versions.make_versions(versions.find_mamba(stage))
        self.checks = stage.record.table(
            'Against float64, before anything is timed',
            shape='batch, length, dim, state',
            dtype='dtype',
            version='version',
            error='largest error / allowed',
            ok='right',
        )
        self.times = _times_table(stage)
        # each version and the copy
        self.per_pass = len(TIMERS) * (len(self.versions) + 1)
        self.budget = Budget(
            stage.deadline,
            len(self.dtypes) * len(PASSES) * len(self.shapes) * self.per_pass,
        )

    def run(self) -> None:
        """Every shape in bfloat16, then in float32."""
        try:
            for dtype in self.dtypes:
                for shape in self.shapes:
                    planned = self.budget.count - len(PASSES) * self.per_pass
                    with self.failures.kept(f'{shape}, {name_of(dtype)}'):
                        self.run_shape(shape, dtype)
                    self.budget.drop(self.budget.count - planned)
        finally:
            add_aims(self.stage, self.times.rows)

    def run_shape(self, shape: Shape, dtype: torch.dtype) -> None:
        """Check the versions, then time those that are right."""
        prepared = self.check_versions(shape, dtype)
        for what in PASSES:
            timing.free_memory()
            self.time_pass(shape, dtype, what, prepared)

    def check_versions(
        self, shape: Shape, dtype: torch.dtype
    ) -> list[tuple[Version, list[Tensor]]]:
        """Versions that may be timed, with their leaves."""
        inputs = versions.make_inputs(shape, dtype, self.stage.device)
        weights = versions.subset_weights(inputs['u'])
        exact = versions.exact_results(inputs, weights)
        right = []
        for version in self.versions:
            leaves = version.leaves(inputs)
            what = f'{version.name} at {shape}, {name_of(dtype)}'
            error = self.error(version, leaves, weights, exact, what)
            self.checks.add(
                shape=str(shape),
                dtype=name_of(dtype),
                version=version.name,
                error=error,
                ok=error <= 1,
            )
            if error <= 1 or self.stage.force:
                right.append((version, leaves))
        return right

    def error(
        self,
        version: Version,
        leaves: list[Tensor],
        weights: Tensor,
        exact: dict[str, Tensor],
        what: str,
    ) -> float:
        """As :func:`versions.check`; an error of ours fails the stage.

        One of another project's is shown in its row only.
        """
        mine = Failures()
        error = math.nan
        with mine.kept(what):
            error = versions.check(version, leaves, weights, exact)
            if not error <= 1:
                mine.texts.append(f'{what} is wrong: error {error:.3g}')
        if version.foreign:
            for text in mine.texts:
                self.stage.record.note(text.strip().splitlines()[-1])
        else:
            self.failures.texts += mine.texts
        return error

    def time_pass(
        self,
        shape: Shape,
        dtype: torch.dtype,
        what: str,
        prepared: Sequence[tuple[Version, list[Tensor]]],
    ) -> None:
        """A row per version, and one of the copy."""
        backward = what != PASSES[0]
        calls = [versions.make_call(*pair, backward) for pair in prepared]
        if calls and self.stage.device == 'cuda':
            calls.append(versions.make_copy(calls[0]))
        device = self.stage.device
        # one version after the other: a slow moment meets all of them
        rounds = [
            [timer(call.run, self.budget.take(), device) for call in calls]
            for timer in TIMERS
        ]
        for call, *timings in zip(calls, *rounds, strict=True):
            self.times.add(
                shape=str(shape),
                dtype=name_of(dtype),
                what=what,
                **_summarize(call, *timings),
                **_against_floor(call, shape, dtype, backward, timings),
            )


def _summarize(
    call: Call, first: Timing, second: Timing, graph: Timing
) -> dict[str, Any]:
    return dict(
        version=call.name,
        directions=call.directions,
        first=first.median,
        second=second.median,
        spread=f'{show(first.low)} to {show(first.high)}',
        graph=graph.median,
    )


def _against_floor(
    call: Call,
    shape: Shape,
    dtype: torch.dtype,
    backward: bool,
    timings: Sequence[Timing],
) -> dict[str, Any]:
    best = _best(timings[0].median, timings[2].median)
    floors = [forward_floor, backward_floor][: 1 + backward]
    floor = sum(
        function(
            shape, dtype.itemsize, gate=False, directions=call.directions
        ).ms
        for function in floors
    )
    return dict(
        bandwidth=call.moved / best / 1e6,
        floor=floor,
        share=None if call.name == versions.COPY else floor / best,
    )


def _best(call: float, graph: float) -> float:
    """Milliseconds of the GPU, or of the call where that is not known."""
    return call if math.isnan(graph) else graph


def _times_table(stage: Stage) -> Table:
    stage.record.note(
        'ms: median of a call by do_bench, measured twice; GPU ms: that of '
        'the recorded launches alone, without Python; GB/s and the share of '
        'the floor follow the GPU ms where there are any.'
    )
    stage.record.note(
        'floor: the larger one of bytes / 4.3 TB/s and exponentials / '
        '(132 x 16 x 1.98 GHz), without a gate: a model.'
    )
    return stage.record.table(
        'Times',
        shape='batch, length, dim, state',
        dtype='dtype',
        what='pass',
        version='version',
        directions='directions',
        first='ms',
        second='ms, again',
        spread='20 to 80 %',
        graph='GPU ms',
        bandwidth='GB/s',
        floor='floor ms',
        share='floor / ms',
    )


def add_aims(stage: Stage, rows: Sequence[dict[str, Any]]) -> None:
    """What the kernels are meant to reach, and the worst case found."""
    table = stage.record.table(
        'Aims',
        aim='aim',
        wanted='wanted',
        worst='worst',
        where='at',
        met='met',
    )
    shares = [
        (row['share'], row)
        for row in rows
        if row['version'] == versions.BOTH and row['what'] == PASSES[0]
    ]
    ratios = [
        *_ratios(rows, versions.MAMBA, versions.ONE),
        *_ratios(rows, versions.MAMBA_FLIP, versions.BOTH),
    ]
    at_197 = [(r, row) for r, row in ratios if ', 197, ' in row['shape']]
    for aim, wanted, found in (
        ('share of the floor, forward, both directions', 0.5, shares),
        ('times faster than mamba_ssm, any shape', 1.0, ratios),
        ('times faster than mamba_ssm, L = 197', 2.0, at_197),
    ):
        worst, row = min(found, key=lambda f: f[0], default=(None, None))
        table.add(
            aim=aim,
            wanted=f'≥ {wanted}',
            worst=worst,
            where=row and f'{row["shape"]}, {row["dtype"]}, {row["what"]}',
            met=None if worst is None or stage.quick else worst >= wanted,
        )


def _ratios(
    rows: Sequence[dict[str, Any]], other: str, ours: str
) -> list[tuple[float, dict[str, Any]]]:
    """How many times faster ours is, and where."""

    def by_case(version: str) -> dict[tuple, dict[str, Any]]:
        return {
            (row['shape'], row['dtype'], row['what']): row
            for row in rows
            if row['version'] == version
        }

    def ms(row: dict[str, Any]) -> float:
        return _best(row['first'], row['graph'])

    theirs, mine = by_case(other), by_case(ours)
    return [
        (ms(theirs[case]) / ms(mine[case]), mine[case])
        for case in mine
        if case in theirs
    ]


def name_of(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix('torch.')

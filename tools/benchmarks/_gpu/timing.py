"""How long something takes on a GPU, and how to share a stage's time."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from _gpu.stage import OutOfTimeError

WARMUP_MS, REP_MS = 200, 1000
"""Of one measurement by triton's ``do_bench``, where time allows."""

SMALLEST_SCALE = 0.02
"""Of both: with less, start-up is all that is measured."""


class Budget:
    """Shares what is left of a stage's time among its measurements.

    Args:
        deadline (float): ``time.monotonic()`` at which all must be done.
        count (int): Measurements planned.
    """

    def __init__(self, deadline: float, count: int) -> None:
        self.deadline, self.count = deadline, count

    def take(self) -> float:
        """Seconds for the next measurement.

        Raises:
            OutOfTimeError: If there are none left.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError('The time was over before the end.')
        share = left / max(self.count, 1)
        self.count -= 1
        return share

    def drop(self, count: int) -> None:
        """Give up measurements: the others get their time."""
        self.count -= count


class Timing(NamedTuple):
    """Milliseconds of a call: median, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Width of the percentiles' range, as a share of the median."""
        return (self.high - self.low) / self.median


NOTHING = Timing(math.nan, math.nan, math.nan)


def measure(
    function: Callable[[], Any], seconds: float, device: str
) -> Timing:
    """Time calls, the second-level cache emptied before each.

    Args:
        function (Callable): Warm: compiled, and right.
        seconds (float): May be spent; from 1.2 s on the full protocol runs.
        device (str): ``'cuda'``; on a ``'cpu'`` one call is timed.

    Returns:
        Timing: Of triton's ``do_bench``.
    """
    if device != 'cuda':
        start = time.perf_counter()
        function()
        spent = 1e3 * (time.perf_counter() - start)
        return Timing(spent, spent, spent)
    from triton.testing import do_bench

    scale = 1e3 * seconds / (WARMUP_MS + REP_MS)
    scale = min(1.0, max(SMALLEST_SCALE, scale))
    return Timing(
        *do_bench(
            function,
            warmup=scale * WARMUP_MS,
            rep=scale * REP_MS,
            quantiles=[0.5, 0.2, 0.8],
        )
    )


def measure_graph(
    function: Callable[[], Any], seconds: float, device: str
) -> Timing:
    """Time a replay of the recorded launches: the GPU's share of a call.

    A short kernel is over before Python has prepared the next call; then
    :func:`measure` sees Python. Nothing (NaN) where recording fails.
    """
    if device != 'cuda':
        return NOTHING
    try:
        graph = record_graph(function)
    except RuntimeError:
        # what cannot be recorded is timed call by call only
        torch.cuda.synchronize()
        return NOTHING
    return measure(graph.replay, seconds, device)


def record_graph(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The launches of one call, after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def measure_steps(
    step: Callable[[], Any], seconds: float, device: str
) -> Timing:
    """Time whole steps of a model, at least three and at most fifty.

    The GPU is not waited for between them: it may still work while Python
    prepares the next one, as in a real loop.
    """
    step()
    (once,) = _time_steps(step, 1, device)
    count = max(3, min(50, int(1e3 * seconds / once)))
    times = _time_steps(step, count, device) if device == 'cuda' else [once]
    if len(times) == 1:
        return Timing(once, once, once)
    cuts = statistics.quantiles(times, n=5, method='inclusive')
    return Timing(statistics.median(times), cuts[0], cuts[-1])


def _time_steps(
    step: Callable[[], Any], count: int, device: str
) -> list[float]:
    """Milliseconds from the end of one step to the end of the next."""
    if device != 'cuda':
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def free_memory() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` yields NaN: an element that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

"""Write a report of a divergence in Markdown."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmstabvim.engine.divergence.alarm import CAUSES
from mmstabvim.engine.divergence.tensor_range import TensorRange
from mmstabvim.engine.divergence.trace import StepTrace


@dataclass
class Divergence:
    """A divergence and the state of training around it.

    Attributes:
        cause (str): One of ``CAUSES``.
        detail (str): Numbers that belong to the cause.
        iteration (int): Number of the iteration, from 1.
        epoch (int): Number of the epoch, from 1.
        rank (int): Process on which it was found.
        world_size (int): Number of processes.
        trace (StepTrace): Trace of a replay of the step.
        learning_rates (dict[str, list[float]]): Rates of the groups, by name.
        training (dict[str, str]): Optimizer, precision and the like.
        hooks (list[str]): Hooks of this project in use, with settings.
        checkpoint (tuple[str, int], optional): Path of the last good
            checkpoint and its iteration.
        record (str): File that holds the step.
        config (str, optional): File that builds the model.
        advice (list[str]): Cures that depend on the model, one sentence each.
        outcome (str): Reaction of the training.
        losses (list[tuple[int, float]]): Iterations and losses before it.
        notes (list[str]): Further sentences.
    """

    cause: str
    detail: str
    iteration: int
    epoch: int
    rank: int
    world_size: int
    trace: StepTrace
    learning_rates: dict[str, list[float]]
    training: dict[str, str]
    hooks: list[str]
    checkpoint: tuple[str, int] | None
    record: str
    config: str | None
    advice: list[str] = field(default_factory=list)
    outcome: str = ''
    losses: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def headline(self) -> str:
        """Summarize cause and place in one line."""
        line = f'iteration {self.iteration}: {CAUSES[self.cause]}'
        if self.trace.first_nonfinite is not None:
            line += f'; first: {self.trace.first_nonfinite.describe()}'
        return line


def write_report(
    path: str | os.PathLike, divergence: Divergence, num_rows: int = 20
) -> None:
    """Write a Markdown report.

    Args:
        path (str | os.PathLike): File to write.
        divergence (Divergence): Subject of the report.
        num_rows (int): Longest table. Defaults to 20.
    """
    sections = {
        'What': _what(divergence),
        'Where': _where(divergence.trace),
        'Ranges before it': _ranges(divergence.trace, num_rows),
        'Largest activations': _largest(divergence.trace, num_rows // 2),
        'Loss before it': _losses(divergence.losses, num_rows),
        'State of training': _state(divergence),
        'What to try': _suggestions(divergence),
        'How to reproduce': _reproduction(divergence),
    }
    lines = ['# Divergence report', '']
    for title, content in sections.items():
        lines += [f'## {title}', '', *content, '']
    Path(path).write_text('\n'.join(lines), encoding='utf-8')


def _what(divergence: Divergence) -> Iterator[str]:
    """Yield cause, place in the training and outcome."""
    what = CAUSES[divergence.cause]
    yield f'- {what[0].upper()}{what[1:]}: {divergence.detail}.'
    yield (
        f'- Iteration {divergence.iteration}, epoch {divergence.epoch} (both '
        'counted from 1).'
    )
    if divergence.world_size > 1:
        yield (
            f'- Rank {divergence.rank} of {divergence.world_size} processes; '
            'what follows is from there.'
        )
    yield f'- {divergence.outcome}'
    yield from (f'- {note}' for note in divergence.notes)


def _where(trace: StepTrace) -> Iterator[str]:
    """Yield lines about the first tensor that is not finite."""
    first = trace.first_nonfinite
    if first is None:
        yield (
            'The batch was run again: every number of the forward and the '
            'backward pass is finite.'
        )
    else:
        yield f'First non-finite tensor: **{first.describe()}**.'
        yield ''
        yield trace.reason
        if not math.isnan(first.nonfinite):
            yield ''
            yield (
                f'It has the shape {first.shape} and the dtype '
                f'{first.dtype} (autocast: {first.autocast}); '
                f'{first.nonfinite:.3g} of its elements are not finite.'
            )
    # those of a forward pass that is not finite say nothing
    in_backward = first is None or first.role.startswith('gradient')
    for what, names in (
        ('Parameters', trace.parameters),
        ('Gradients of parameters', trace.gradients if in_backward else []),
    ):
        if names:
            yield ''
            yield f'{what} that are not finite: {_names(names)}.'
    if trace.losses:
        losses = (f'{k} {v:.6g}' for k, v in trace.losses.items())
        yield ''
        yield f'Losses of the batch: {", ".join(losses)}.'
    if trace.error:
        yield ''
        yield f'The step could not be run to its end: {trace.error}'


def _names(names: list[str], most: int = 8) -> str:
    """List some names and count the rest."""
    listed = ', '.join(f'`{name}`' for name in names[:most])
    rest = len(names) - most
    return f'{listed} and {rest} more' if rest > 0 else listed


def _ranges(trace: StepTrace, num_rows: int) -> list[str]:
    """Tabulate the last outputs before it, in order, and the tensor."""
    made = [r for r in trace.before if r.role.startswith(('out', 'grad'))]
    rows = made[-num_rows:]
    if trace.first_nonfinite is not None and trace.first_nonfinite.shape:
        rows = [*rows, trace.first_nonfinite]
    return _table(rows)


def _largest(trace: StepTrace, num_rows: int) -> list[str]:
    """Tabulate the outputs with the largest finite values."""
    finite = [r for r in trace.outputs if not math.isnan(r.peak)]
    finite.sort(key=lambda r: r.peak, reverse=True)
    return _table(finite[:num_rows])


def _table(rows: list[TensorRange]) -> list[str]:
    """Format ranges as a Markdown table."""
    if not rows:
        return ['Nothing was measured.']
    lines = [
        '| module | class | tensor | shape | dtype | autocast | min | max '
        '| mean abs | non-finite |',
        '| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |',
    ]
    for r in rows:
        shape = ' x '.join(map(str, r.shape)) or 'scalar'
        lines.append(
            f'| `{r.module or "(model)"}` | {r.kind} | {r.role} | {shape} '
            f'| {r.dtype} | {r.autocast} | {r.minimum:.4g} | {r.maximum:.4g} '
            f'| {r.mean_abs:.4g} | {r.nonfinite:.3g} |'
        )
    return lines


def _losses(losses: list[tuple[int, float]], num_rows: int) -> list[str]:
    """Tabulate the last losses."""
    if not losses:
        return ['None has been seen.']
    rows = [f'| {i} | {value:.6g} |' for i, value in losses[-num_rows:]]
    return ['| iteration | loss |', '| ---: | ---: |', *rows]


def _state(divergence: Divergence) -> Iterator[str]:
    """List learning rate, optimizer, precision, hooks, checkpoint."""
    for name, values in divergence.learning_rates.items():
        shown = sorted({f'{value:.6g}' for value in values}, key=float)
        yield f'- {name}: {", ".join(shown)}'
    for name, value in divergence.training.items():
        yield f'- {name}: {value}'
    if divergence.hooks:
        yield from (f'- hook: {hook}' for hook in divergence.hooks)
    else:
        yield '- hook: none of the stabilizers is in use'
    if divergence.checkpoint is None:
        yield '- last good checkpoint: none'
    else:
        path, iteration = divergence.checkpoint
        yield (
            f'- last good checkpoint: `{path}`, after {iteration} iterations'
        )


def _suggestions(divergence: Divergence) -> Iterator[str]:
    """Yield options that may help, the likeliest first."""
    first = divergence.trace.first_nonfinite
    role, module = '', ''
    if first is not None:
        role, module = first.role, first.module
    if role.startswith('input') and module in ('', 'data_preprocessor'):
        yield (
            '- Look at the images and labels of the batch (below), and at '
            '`mean` and `std` of the data preprocessor.'
        )
    if role.startswith('parameter'):
        yield (
            '- The weights were not finite before this step: look at the '
            'checkpoint that training started from and at hooks that change '
            'weights, or go on from the last good checkpoint.'
        )
    if _uses_float16(divergence):
        yield (
            '- Use bfloat16, which has the range of float32: '
            "`optim_wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16', "
            'loss_scale=1.0)` (`tools/train.py --amp --amp-dtype bfloat16`).'
        )
    yield from (f'- {advice}' for advice in divergence.advice)
    if 'clip_grad' not in divergence.training:
        yield (
            '- Clip gradients: '
            '`optim_wrapper=dict(clip_grad=dict(max_norm=1.0))`.'
        )
    rates = [
        v for values in divergence.learning_rates.values() for v in values
    ]
    if rates:
        yield (
            '- Lower the learning rate, for instance to '
            f'{max(rates) / 2:.3g}, or warm up longer (`LinearLR` in '
            '`param_scheduler`).'
        )
    if 'rolled back' not in divergence.outcome:
        yield (
            "- Let training recover by itself: `dict(type='mmstabvim."
            "DivergenceHook', action='rollback')`."
        )
    if divergence.cause == 'spike':
        yield (
            '- If such losses are normal here, raise `spike_factor` or '
            '`spike_floor`, or set `spike_factor=None`.'
        )


def _uses_float16(divergence: Divergence) -> bool:
    """Tell a step with tensors or autocast of float16."""
    ranges = divergence.trace.outputs
    return divergence.cause == 'skipped' or any(
        r.dtype == 'float16' or r.autocast == 'float16' for r in ranges
    )


def _reproduction(divergence: Divergence) -> Iterator[str]:
    """Name the files and show a snippet that runs."""
    yield (
        f'`{divergence.record}` holds the batch as the data loader gave it, '
        'the state of the random number generators at the start of the '
        'iteration, and the weights before its optimizer step.'
    )
    yield ''
    yield '```python'
    yield 'from mmstabvim.engine.divergence import replay'
    yield ''
    model = 'model'
    if divergence.config is None:
        yield '# model: build it here as in your own script'
    else:
        model = repr(divergence.config)
    yield f'trace = replay(\n    {divergence.record!r},\n    {model},\n)'
    yield 'print(trace.first_nonfinite, trace.reason)'
    yield '```'
    yield ''
    yield (
        'It runs without the hooks, so what they add to the model or its '
        'losses is missing.'
    )
    if divergence.checkpoint is not None:
        yield (
            f'To go on from the last good state: `tools/train.py CONFIG '
            f'--resume {divergence.checkpoint[0]}`.'
        )

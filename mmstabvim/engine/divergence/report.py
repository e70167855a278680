"""Write down, for a person to read, where a training run has diverged."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmstabvim.engine.divergence.trace import Finding, TensorRange

CAUSES = {
    'loss': 'the loss is not finite',
    'activation': 'an activation is not finite',
    'gradient': 'a gradient is not finite',
    'spike': 'the loss has jumped',
    'skipped': 'float16 training has skipped too many steps in a row',
}

STABILIZERS = {
    'sn': (
        'SpectralNormalizationHook',
        'bounds the spectral radius of the state matrices',
    ),
    'ec': (
        'EigenvalueClampingHook',
        'keeps their eigenvalues in the stable half plane',
    ),
    'sp': ('StabilityLossHook', 'penalizes eigenvalues that leave it'),
}
"""Key under ``default_hooks``, class and effect of each stabilizer."""

FLOAT16_MAX = 65504.0


@dataclass
class Divergence:
    """A divergence and the state of training around it.

    Attributes:
        cause (str): One of ``CAUSES``.
        detail (str): Numbers that belong to the cause.
        iteration (int): Number of the iteration, from 1.
        epoch (int): Number of the epoch, from 1.
        rank (int): Process that it was found on.
        world_size (int): Number of processes.
        finding (Finding): What a replay of the step has shown.
        learning_rates (dict[str, list[float]]): By name, of each group.
        training (dict[str, str]): Optimizer, precision and the like.
        hooks (list[str]): Hooks of this project in use, with settings.
        has_state_matrix (bool): Whether the model has one.
        checkpoint (tuple[str, int], optional): Path of the last good
            checkpoint and its iteration.
        record (str): File that holds the step.
        config (str, optional): File that builds the model.
        outcome (str): What the hook does about it.
        losses (list[tuple[int, float]]): Iterations and losses before it.
        notes (list[str]): What else there is to say.
    """

    cause: str
    detail: str
    iteration: int
    epoch: int
    rank: int
    world_size: int
    finding: Finding
    learning_rates: dict[str, list[float]]
    training: dict[str, str]
    hooks: list[str]
    has_state_matrix: bool
    checkpoint: tuple[str, int] | None
    record: str
    config: str | None
    outcome: str = ''
    losses: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def headline(self) -> str:
        """Say in one line what has happened and where."""
        line = f'iteration {self.iteration}: {CAUSES[self.cause]}'
        if self.finding.culprit is not None:
            line += f'; first: {self.finding.culprit.describe()}'
        return line


def write_report(
    path: str | os.PathLike, divergence: Divergence, num_rows: int = 20
) -> None:
    """Write a Markdown report.

    Args:
        path (str | os.PathLike): File to write.
        divergence (Divergence): What to report.
        num_rows (int): Longest table. Defaults to 20.
    """
    sections = {
        'What': _what(divergence),
        'Where': _where(divergence.finding),
        'Ranges before it': _ranges(divergence.finding, num_rows),
        'Largest activations': _largest(divergence.finding, num_rows // 2),
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
    """Cause, place in the training and outcome."""
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


def _where(finding: Finding) -> Iterator[str]:
    """The first tensor that is not finite."""
    culprit = finding.culprit
    if culprit is None:
        yield (
            'The batch was run again: every number of the forward and the '
            'backward pass is finite.'
        )
    else:
        yield f'First non-finite tensor: **{culprit.describe()}**.'
        yield ''
        yield finding.reason
        if not math.isnan(culprit.nonfinite):
            yield ''
            yield (
                f'It has the shape {culprit.shape} and the dtype '
                f'{culprit.dtype} (autocast: {culprit.autocast}); '
                f'{culprit.nonfinite:.3g} of its elements are not finite.'
            )
    # those of a forward pass that is not finite say nothing
    in_backward = culprit is None or culprit.role.startswith('gradient')
    for what, names in (
        ('Parameters', finding.parameters),
        ('Gradients of parameters', finding.gradients if in_backward else []),
    ):
        if names:
            yield ''
            yield f'{what} that are not finite: {_names(names)}.'
    if finding.losses:
        losses = (f'{k} {v:.6g}' for k, v in finding.losses.items())
        yield ''
        yield f'Losses of the batch: {", ".join(losses)}.'
    if finding.error:
        yield ''
        yield f'The step could not be run to its end: {finding.error}'


def _names(names: list[str], most: int = 8) -> str:
    """List some names and count the rest."""
    listed = ', '.join(f'`{name}`' for name in names[:most])
    rest = len(names) - most
    return f'{listed} and {rest} more' if rest > 0 else listed


def _ranges(finding: Finding, num_rows: int) -> list[str]:
    """What modules have made just before, in order, and the culprit."""
    made = [r for r in finding.before if r.role.startswith(('out', 'grad'))]
    rows = made[-num_rows:]
    if finding.culprit is not None and finding.culprit.shape:
        rows = [*rows, finding.culprit]
    return _table(rows)


def _largest(finding: Finding, num_rows: int) -> list[str]:
    """Outputs with the largest finite values."""
    finite = [r for r in finding.outputs if not math.isnan(r.peak)]
    finite.sort(key=lambda r: r.peak, reverse=True)
    return _table(finite[:num_rows])


def _table(rows: list[TensorRange]) -> list[str]:
    """Markdown table of ranges."""
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
    """The last losses."""
    if not losses:
        return ['None has been seen.']
    rows = [f'| {i} | {value:.6g} |' for i, value in losses[-num_rows:]]
    return ['| iteration | loss |', '| ---: | ---: |', *rows]


def _state(divergence: Divergence) -> Iterator[str]:
    """Learning rate, optimizer, precision, hooks, checkpoint."""
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
    """Options of this project that may help, the likeliest first."""
    culprit = divergence.finding.culprit
    role, module = '', ''
    if culprit is not None:
        role, module = culprit.role, culprit.module
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
    yield from _missing_stabilizers(divergence)
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
    """Whether the step ran in float16 or near its largest number."""
    ranges = divergence.finding.outputs
    return divergence.cause == 'skipped' or any(
        r.dtype == 'float16' or r.autocast == 'float16' for r in ranges
    )


def _missing_stabilizers(divergence: Divergence) -> Iterator[str]:
    """Stabilizers that could be added."""
    if not divergence.has_state_matrix:
        return
    used = ' '.join(divergence.hooks)
    for key, (name, effect) in STABILIZERS.items():
        if name not in used:
            yield (
                f'- Add `--cfg-options default_hooks.{key}.type='
                f'mmstabvim.{name}`: it {effect}.'
            )


def _reproduction(divergence: Divergence) -> Iterator[str]:
    """Files and a snippet that runs."""
    yield (
        f'`{divergence.record}` holds the batch as the data loader gave it, '
        'the state of the random number generators at the start of the '
        'iteration, and the weights before its optimizer step.'
    )
    yield ''
    yield '```python'
    yield 'from mmstabvim.engine.divergence.record import replay'
    yield ''
    model = 'model'
    if divergence.config is None:
        yield '# model: build it here as in your own script'
    else:
        model = repr(divergence.config)
    yield f'finding = replay(\n    {divergence.record!r},\n    {model},\n)'
    yield 'print(finding.culprit, finding.reason)'
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

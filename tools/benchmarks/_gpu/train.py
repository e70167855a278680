"""Stage ``train``: a short real training, in three precisions."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _gpu.stage import ROOT, Stage, StageFailedError

EPOCHS, QUICK_EPOCHS = 5, 3  # the schedule wants more than two
PRECISIONS = {
    'float32': [],
    'bfloat16': ['--amp', '--amp-dtype', 'bfloat16'],
    'float16': ['--amp', '--amp-dtype', 'float16'],
}
QUICK_OPTIONS = [
    'train_dataloader.dataset.indices=64',
    'val_dataloader.dataset.indices=64',
    'model.backbone.arch.num_layers=1',
    'default_hooks.logger.interval=1',
]
LOG_LINES = 15
"""Of a run that failed."""


def run(stage: Stage) -> None:
    """Train through ``tools/train.py``, as a user does.

    Raises:
        StageFailedError: If a run failed, or logged a NaN or an infinity.
    """
    stage.record.note(f'{stage.train_config.name}, seed 0.')
    table = stage.record.table(
        'Runs',
        precision='precision',
        epochs='epochs',
        accuracy='accuracy, %',
        loss='last loss',
        finite='all finite',
        seconds='s per iteration',
        status='end',
    )
    wrong = []
    for i, (precision, options) in enumerate(PRECISIONS.items()):
        if stage.quick and precision != 'bfloat16':
            table.add(precision=precision, status='skipped in a dry run')
            continue
        share = stage.seconds_left() / (len(PRECISIONS) - i)
        row = train(stage, precision, options, share)
        table.add(precision=precision, **row)
        if row['status'] != 'ok' or not row['finite']:
            wrong.append(f'{precision}: {row["status"]}')
    if wrong:
        raise StageFailedError('\n\n'.join(wrong))


def train(
    stage: Stage, precision: str, options: list[str], seconds: float
) -> dict[str, Any]:
    """One run: what it logged, and how it ended."""
    folder = stage.out / 'work_dirs' / precision
    epochs = QUICK_EPOCHS if stage.quick else EPOCHS
    changes = [f'train_cfg.max_epochs={epochs}']
    changes += QUICK_OPTIONS if stage.quick else []
    command = [sys.executable, str(ROOT / 'tools' / 'train.py')]
    command += [str(stage.train_config), '--work-dir', str(folder)]
    command += ['--seed', '0', *options, '--cfg-options', *changes]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / 'output.txt'
    with log.open('w') as output:
        status = _run(command, output, seconds)
    if status != 'ok':
        tail = log.read_text(errors='replace').splitlines()[-LOG_LINES:]
        status = '\n'.join([status, *tail])
    return dict(epochs=epochs, **summarize(folder), status=status)


def _run(command: list[str], output: Any, seconds: float) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(os.environ),
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f'stopped after {seconds:.0f} s'
    return 'ok' if done.returncode == 0 else f'exit code {done.returncode}'


def summarize(folder: Path) -> dict[str, Any]:
    """Last accuracy and loss, median time, from the newest scalars file."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    if not files:
        return dict(accuracy=None, loss=None, finite=False, seconds=None)
    lines = [json.loads(x) for x in files[-1].read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    accuracies = [
        line['accuracy/top1'] for line in lines if 'accuracy/top1' in line
    ]
    numbers = [
        value
        for line in lines
        for value in line.values()
        if isinstance(value, float)
    ]
    return dict(
        accuracy=accuracies[-1] if accuracies else None,
        loss=steps[-1]['loss'] if steps else None,
        finite=bool(steps) and all(map(math.isfinite, numbers)),
        seconds=statistics.median(s['time'] for s in steps) if steps else None,
    )

"""Summary of a training for its last line."""

from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmstabvim.engine.work_dir import find_checkpoint


def training_summary(runner: Any) -> str:
    """Say how a training ended and where its results are.

    Args:
        runner (Runner): After ``train``.

    Returns:
        str: Several lines: last metrics, checkpoints, curves.
    """
    lines = ['Training is done.']
    metrics = _last_metrics(runner)
    if metrics:
        lines.append(f'{_split_name(runner.cfg)}: {metrics}')
    try:
        last = find_checkpoint(runner.work_dir)
    except FileNotFoundError:
        last = 'none'
    lines.append(f'Last checkpoint: {last}')
    best = runner.message_hub.runtime_info.get('best_ckpt')
    if best:
        lines.append(f'Best checkpoint: {best}')
    curves = Path(runner.log_dir, 'vis_data')
    if (curves / 'scalars.json').exists():
        lines.append(f'Curves: {curves / "scalars.json"}')
    if any(curves.glob('events.out.tfevents*')):
        lines.append(f'TensorBoard: tensorboard --logdir {runner.work_dir}')
    return '\n'.join(lines)


def _last_metrics(runner: Any) -> str:
    """List the metrics of the last validation, empty if there was none."""
    skip = {'val/time', 'val/data_time'}
    return ', '.join(
        f'{name.removeprefix("val/")} {buffer.current():.2f}'
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith('val/') and name not in skip
    )


def _split_name(cfg: Config) -> str:
    """Name the images behind the metrics: often the test set itself."""
    val, test = (
        (cfg.get(f'{split}_dataloader') or {}).get('dataset')
        for split in ('val', 'test')
    )
    if val == test:
        return 'Test set'
    return 'Validation set'

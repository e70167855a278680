"""Sweep perturbations over one checkpoint, or over those of a study."""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope
from rich.progress import Progress

from mmstabvim.ablation import layout, results, statistics
from mmstabvim.analysis.mixers import no_progress
from mmstabvim.analysis.robustness.options import SweepOptions
from mmstabvim.engine import launch

Rows = list[dict[str, Any]]

_TRAINING = (
    'train_dataloader',
    'train_cfg',
    'optim_wrapper',
    'param_scheduler',
    'val_dataloader',
    'val_cfg',
    'val_evaluator',
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Results of one checkpoint.

    Attributes:
        facet (str): Panel of the figure.
        series (str): Line in it.
        seed (int | None): Of the training.
        rows (Rows): Of ``mmstabvim.RobustnessMetric``.
    """

    facet: str
    series: str
    seed: int | None
    rows: Rows


def evaluate(
    config: str,
    checkpoint: str,
    options: SweepOptions,
    progress: Progress | None = None,
) -> Rows:
    """Sweep perturbations over the test images of one checkpoint.

    Args:
        config (str): Path of the config.
        checkpoint (str): Path or URL.
        options (SweepOptions): What to do.
        progress (Progress, optional): Gets a bar. Defaults to None.

    Returns:
        list[dict]: Rows of ``mmstabvim.RobustnessMetric``.

    Raises:
        ValueError: If the config has no test set, or fewer images than asked
            for.

    Example:
        >>> options = SweepOptions(dict(frequencies=3), samples=32)
        >>> rows = evaluate(config, checkpoint, options)  # doctest: +SKIP
    """
    progress = progress or no_progress()
    cfg = launch.load_config(
        argparse.Namespace(
            config=config,
            cfg_options=dict(options.cfg_options),
            work_dir=None,
            launcher='none',
            local_rank=0,
        )
    )
    checkpoint = launch.find_checkpoint(checkpoint)
    task = progress.add_task(Path(checkpoint).name, total=None)
    with tempfile.TemporaryDirectory() as folder, launch.explain_errors():
        prepare(cfg, checkpoint, options, folder)
        runner = launch.build_runner(cfg)
        if options.device is not None:
            runner.model.to(options.device)
        runner.load_checkpoint = partial(runner.load_checkpoint, strict=True)
        batches = len(runner.test_dataloader)

        def on_pass(number: int, passes: int) -> None:
            progress.update(task, total=batches * passes, advance=1)

        runner.model.on_pass = on_pass
        runner.test()
    progress.remove_task(task)
    return runner.test_evaluator.metrics[0].rows


def prepare(
    cfg: Config, checkpoint: str, options: SweepOptions, folder: str
) -> None:
    """Make a config test the wrapped model and nothing else, in place."""
    if 'test_dataloader' not in cfg:
        raise ValueError('the config needs a test_dataloader, got none')
    for name in _TRAINING:
        cfg.pop(name, None)
    cfg.load_from, cfg.resume, cfg.work_dir = checkpoint, False, folder
    cfg.model = ConfigDict(
        type='mmstabvim.RobustnessWrapper',
        module=cfg.model,
        seed=options.seed,
        **options.wrapper,
    )
    cfg.test_evaluator = [dict(type='mmstabvim.RobustnessMetric')]
    cfg.test_cfg = dict(cfg.get('test_cfg') or {}, fp16=options.amp)
    cfg.randomness = dict(seed=options.seed)
    cfg.log_level = 'ERROR'
    cfg.setdefault('visualizer', ConfigDict(type='Visualizer'))
    cfg.visualizer.vis_backends = None
    launch.set_loader_defaults(cfg, no_pin_memory=True)
    if options.samples is not None:
        choose_samples(cfg, options.samples, options.seed)


def choose_samples(cfg: Config, count: int, seed: int) -> None:
    """Draw test images, as the first ones are often of one class."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset = cfg.test_dataloader.dataset
    known = dataset.get('indices')
    size = len(DATASETS.build(dataset))
    if not 1 <= count <= size:
        raise ValueError(
            f'--samples must be 1 to {size}, the test images, got {count}'
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = sorted(torch.randperm(size, generator=generator)[:count].tolist())
    if isinstance(known, (list, tuple)):
        drawn = [known[i] for i in drawn]
    dataset.indices = drawn


def evaluate_study(
    folder: Path,
    options: SweepOptions,
    progress: Progress,
    out: Path,
    only: str = '*',
) -> tuple[list[Sweep], str]:
    """Sweep over all checkpoints of an ablation study.

    Results in ``out`` of an earlier call with the same options and
    checkpoints are used again. Cells without a checkpoint are named.

    Args:
        folder (Path): Of ``ablation.py run``.
        options (SweepOptions): What to do.
        progress (Progress): Gets bars.
        out (Path): Results of each cell are kept here.
        only (str): Pattern of names of cells. Defaults to ``'*'``.

    Returns:
        tuple[list[Sweep], str]: In the study's order, and the meaning of the
        series.

    Raises:
        ValueError: If there is no cell with a checkpoint.
    """
    study = results.read_study(folder)
    cells = [c for c in study.cells if fnmatch.fnmatch(c.name, only)]
    ready = ready_cells(cells, folder, progress)
    out.mkdir(parents=True, exist_ok=True)
    task = progress.add_task('all checkpoints', total=len(ready))
    found = {}
    for cell in ready:
        found[cell.name] = _evaluate_cell(cell, options, progress, out)
        progress.advance(task)
    combinations = statistics.combine(study)
    shape = layout.make_layout(study, combinations)
    sweeps = [
        Sweep(shape.facet(c), shape.name(c), cell.seed, found[cell.name])
        for c in combinations
        for cell in c.cells
        if cell.name in found
    ]
    return sweeps, shape.series


def ready_cells(
    cells: Sequence[results.Result], folder: Path, progress: Progress
) -> list[results.Result]:
    """Choose the cells that are done and have a checkpoint; name the others.

    Args:
        cells (Sequence[Result]): Of a study.
        folder (Path): Of the study.
        progress (Progress): Prints.

    Returns:
        list[Result]: In their order.

    Raises:
        ValueError: If there is none.
    """
    ready = []
    for cell in cells:
        checkpoint = find_checkpoint(cell.folder)
        if cell.status == results.DONE and checkpoint:
            ready.append(cell)
        else:
            progress.console.print(
                f'{cell.name}: left out, {cell.status}, '
                f'{"a" if checkpoint else "no"} checkpoint'
            )
    if not ready:
        raise ValueError(
            f'{folder} must have a finished training with its checkpoint, '
            f'got none in {len(cells)} cells'
        )
    return ready


def _evaluate_cell(
    cell: results.Result, options: SweepOptions, progress: Progress, out: Path
) -> Rows:
    """Results of one cell, from the file if they are there."""
    checkpoint: Any = find_checkpoint(cell.folder)
    path = out / f'{cell.name}.json'
    key = _fingerprint(checkpoint, options)
    known = results.read_json(path)
    if known.get('key') != key:
        rows = evaluate(
            str(cell_config(cell.folder)), str(checkpoint), options, progress
        )
        # JSON has no word for what is not finite
        text = json.dumps({'key': key, 'rows': rows}, indent=1)
        path.write_text(text + '\n', encoding='utf-8')
        known = json.loads(text)
    return known['rows']


def cell_config(folder: Path) -> Path:
    """The config that a training wrote into its folder.

    Args:
        folder (Path): Of the cell.

    Returns:
        Path: With all changes of the study in it.

    Raises:
        FileNotFoundError: If there is not exactly one.
    """
    found = sorted(folder.glob('*.py'))
    if len(found) != 1:
        raise FileNotFoundError(
            f'{folder} must have one config, got {[p.name for p in found]}'
        )
    return found[0]


def find_checkpoint(folder: Path) -> Path | None:
    """Last checkpoint of a training; its folder may have been moved.

    Args:
        folder (Path): Of the cell.

    Returns:
        Path | None: None if there is none, or it was deleted.
    """
    try:
        named = (folder / 'last_checkpoint').read_text(encoding='utf-8')
    except FileNotFoundError:
        return None
    path = folder / Path(named.strip()).name
    return path if path.is_file() else None


def _fingerprint(checkpoint: Path, options: SweepOptions) -> str:
    """Hash all that the results depend on."""
    content = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    text = json.dumps([content, dataclasses.asdict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Sweep disturbances over one checkpoint, or over those of a study."""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope
from rich.progress import Progress

from mmstabvim.ablation import results
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
class Options:
    """How to sweep.

    Attributes:
        wrapper (dict): Arguments of ``mmstabvim.RobustnessWrapper``.
        samples (int | None): Test images, drawn at random; None for all.
        seed (int): Of that choice, and of what the wrapper draws.
        device (str | None): None for the GPU if there is one.
        amp (bool): Automatic mixed precision.
        cfg_options (dict): Changes of the config.
    """

    wrapper: dict[str, Any]
    samples: int | None = None
    seed: int = 0
    device: str | None = None
    amp: bool = False
    cfg_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def evaluate(
    config: str, checkpoint: str, options: Options, progress: Progress
) -> Rows:
    """Sweep over one checkpoint.

    Args:
        config (str): Path of the config.
        checkpoint (str): Path or URL.
        options (Options): How.
        progress (Progress): Gets a bar.

    Returns:
        Rows: Of ``mmstabvim.RobustnessMetric``.
    """
    cfg = load_config(config, options)
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


def load_config(path: str, options: Options) -> Config:
    """Read a config and apply the changes."""
    return launch.load_config(
        argparse.Namespace(
            config=path,
            cfg_options=dict(options.cfg_options),
            work_dir=None,
            launcher='none',
            local_rank=0,
        )
    )


def prepare(
    cfg: Config, checkpoint: str, options: Options, folder: str
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


@dataclasses.dataclass(frozen=True)
class Measured:
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


def evaluate_study(
    folder: Path,
    options: Options,
    progress: Progress,
    out: Path,
    only: str | None = None,
) -> Iterator[tuple[results.Result, Rows]]:
    """Sweep over all checkpoints of an ablation study.

    What is in ``out`` from an earlier call with the same options and
    checkpoints is not done again. Cells without a checkpoint are named.

    Args:
        folder (Path): Of ``ablation.py run``.
        options (Options): How.
        progress (Progress): Gets bars.
        out (Path): Results of each cell are kept here.
        only (str, optional): Pattern of names of cells. Defaults to None,
            for all.

    Yields:
        tuple[Result, Rows]: Of each cell that is done.

    Raises:
        ValueError: If there is none.
    """
    cells = [
        cell
        for cell in results.read_study(folder).cells
        if fnmatch.fnmatch(cell.name, only or '*')
    ]
    ready = [cell for cell in cells if is_ready(cell)]
    for cell in cells:
        if cell not in ready:
            progress.console.print(
                f'{cell.name}: left out, {cell.status}, '
                f'{"a" if find_checkpoint(cell.folder) else "no"} checkpoint'
            )
    if not ready:
        raise ValueError(
            f'{folder} must have a finished training with its checkpoint, '
            f'got none in {len(cells)} cells'
        )
    out.mkdir(parents=True, exist_ok=True)
    task = progress.add_task('all checkpoints', total=len(ready))
    for cell in ready:
        yield cell, _evaluate_cell(cell, options, progress, out)
        progress.advance(task)


def _evaluate_cell(
    cell: results.Result, options: Options, progress: Progress, out: Path
) -> Rows:
    """Results of one cell, from the file if they are there."""
    checkpoint = find_checkpoint(cell.folder)
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


def is_ready(cell: results.Result) -> bool:
    """Whether a training is done and its checkpoint is there."""
    return cell.status == results.DONE and bool(find_checkpoint(cell.folder))


def _fingerprint(checkpoint: Path, options: Options) -> str:
    """Of all that the results depend on."""
    content = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    text = json.dumps([content, dataclasses.asdict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

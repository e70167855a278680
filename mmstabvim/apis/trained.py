"""Models and images that a command line names."""

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn

from mmstabvim.apis.model import get_model
from mmstabvim.engine import launch
from mmstabvim.layers import VisionMambaBlock

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp', '.tif', '.tiff')
NOT_FOR_FILES = ('LoadImageFromFile', 'LoadAnnotations', 'CheckSegMap')


def add_options(parser: argparse.ArgumentParser, samples: int) -> None:
    """Add the options that the tools have in common.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
        samples (int): Default of ``--samples``.
    """
    add = parser.add_argument
    add('config', help='path of the config')
    launch.add_checkpoint(parser)
    add('--samples', type=int, default=samples, help='images to look at')
    add('--images', type=Path, metavar='DIR', help='in place of the test set')
    add('--seed', type=int, default=0, help='of the choice of images')
    add('--device', default='cpu', help='where the model runs')
    add('--out', type=Path, metavar='DIR', help='folder for the results')
    launch.add_cfg_options(parser)


def load_model(args: argparse.Namespace) -> tuple[Config, nn.Module]:
    """Build the model of a command line; it must have Vision Mamba blocks.

    Args:
        args (argparse.Namespace): Of :func:`add_options`; ``checkpoint``
            becomes the path of the file.

    Returns:
        tuple[Config, nn.Module]: Config, and the model in evaluation mode.

    Raises:
        ValueError: If the checkpoint does not fit, or the model has no block
            of a Vision Mamba.
    """
    args.checkpoint = launch.find_checkpoint(args.checkpoint)
    print(f'Checkpoint: {args.checkpoint}')  # noqa: T201
    model = get_model(
        args.config, args.checkpoint, args.cfg_options, args.device
    )
    if not find_blocks(model):
        raise ValueError(
            f'the model must have blocks of a Vision Mamba, got '
            f'{type(model).__name__} without one'
        )
    return model.cfg, model


def find_blocks(model: nn.Module) -> dict[str, VisionMambaBlock]:
    """Find the Vision Mamba blocks of a model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, VisionMambaBlock)
    }


def load_images(
    args: argparse.Namespace, cfg: Config, model: Any
) -> Iterator[Tensor]:
    """Yield images as the model reads them, (1, channels, height, width)."""
    samples = (
        test_samples(args, cfg)
        if args.images is None
        else file_samples(args, cfg)
    )
    for sample in samples:
        data = model.data_preprocessor(pseudo_collate([sample]), False)
        yield data['inputs']


def choose(count: int, args: argparse.Namespace) -> list[int]:
    """Draw ``--samples`` of some positions, in increasing order."""
    order = np.random.default_rng(args.seed).permutation(count)
    return sorted(order[: args.samples].tolist())


def test_samples(args: argparse.Namespace, cfg: Config) -> Iterator[Any]:
    """Yield samples of the config's test set."""
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    for index in choose(len(dataset), args):
        yield dataset[index]


def file_samples(args: argparse.Namespace, cfg: Config) -> Iterator[Any]:
    """Yield images of a folder, through the pipeline of the test set.

    Raises:
        FileNotFoundError: If there is no image in the folder.
    """
    paths = sorted(
        path
        for path in args.images.glob('*')
        if path.suffix.lower() in SUFFIXES
    )
    if not paths:
        raise FileNotFoundError(
            f'--images: {str(args.images)!r} has no image that ends in one '
            f'of {SUFFIXES}'
        )
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset:  # a wrapper has none of its own
        dataset = dataset.dataset
    pipeline = Compose(file_pipeline(dataset.pipeline))
    for index in choose(len(paths), args):
        yield pipeline(dict(img_path=str(paths[index]), sample_idx=index))


def file_pipeline(pipeline: Sequence[dict]) -> list[dict]:
    """Change a pipeline so that it reads a file, and no labels."""
    kept = [
        copy.deepcopy(step)
        for step in pipeline
        if launch.type_name(step) not in NOT_FOR_FILES
    ]
    return [dict(type='LoadImageFromFile'), *kept]


def out_folder(args: argparse.Namespace, name: str) -> Path:
    """Make the folder of the results."""
    default = Path('work_dirs', Path(args.config).stem, name)
    folder = args.out or default
    mmengine.mkdir_or_exist(folder)
    return folder


def check_samples(
    parser: argparse.ArgumentParser, args: argparse.Namespace, least: int
) -> None:
    """Refuse numbers that make no sense."""
    if args.samples < least:
        parser.error(f'--samples must be at least {least}, got {args.samples}')
    if args.device != 'cpu' and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: there is no GPU')

"""Short real training runs for the tests: digits and scenes, cut down."""

import copy
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from mmengine.config import Config
from mmengine.config import config as config_module
from mmengine.runner import Runner
from yapf.yapflib import yapf_api

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / 'configs/vim/vim-nano-p4_1xb64-20e_digits.py'
SCENES = (
    ROOT
    / 'configs/upernet'
    / 'vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64.py'
)
ARCH = dict(embed_dims=16, num_layers=2, d_state=4)

_numbers = itertools.count()


def digits_config(tmp_path):
    """The digits config, cut to 48 images, 2 layers and 4 epochs."""
    cfg = Config.fromfile(DIGITS)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.backbone.arch = dict(ARCH)
    cfg.model.backbone.drop_path_rate = 0.2
    cfg.model.head.in_channels = 16
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.indices = 48
        loader.update(batch_size=16, num_workers=0, persistent_workers=False)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
    cfg.param_scheduler = [
        dict(
            type='CosineAnnealingLR',
            T_max=4,
            by_epoch=True,
            convert_to_iter_based=True,
        )
    ]
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=-1
    )
    cfg.vis_backends = [dict(type='LocalVisBackend')]
    cfg.visualizer.vis_backends = cfg.vis_backends
    cfg.randomness = dict(seed=3)
    cfg.log_level = 'ERROR'
    return cfg


def scenes_config(tmp_path):
    """The digit scenes' config, cut to 8 scenes, 3 layers, 4 iterations."""
    cfg = Config.fromfile(SCENES)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.data_preprocessor.size = (32, 32)
    cfg.model.backbone.update(
        # of which the last has a rate of its own
        arch=dict(ARCH, num_layers=3),
        drop_path_rate=0.6,
        img_size=32,
        out_indices=[0, 2],
    )
    cfg.model.neck.update(in_channels=16, out_strides=[4, 8])
    cfg.model.decode_head.update(
        in_channels=[16, 16], in_index=[0, 1], channels=8
    )
    cfg.model.auxiliary_head.update(in_channels=16, channels=8)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.update(img_size=32, num_samples=8)
        loader.batch_size = 4
    cfg.train_cfg.update(max_iters=4, val_interval=2)
    cfg.param_scheduler = []
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.stability.interval = 2
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=2
    )
    cfg.vis_backends = [dict(type='LocalVisBackend')]
    cfg.visualizer.vis_backends = cfg.vis_backends
    cfg.randomness = dict(seed=3)
    cfg.log_level = 'ERROR'
    return cfg


@contextmanager
def unformatted_configs():
    """Write configs as they are: formatting takes most of a short run."""
    with ExitStack() as patches:
        for module in (config_module, yapf_api):
            # OneDL's mmengine imports it where it is called
            if hasattr(module, 'FormatCode'):
                patches.enter_context(
                    patch.object(
                        module, 'FormatCode', lambda x, **_: (x, True)
                    )
                )
        yield


def without_randomness(cfg):
    """The same images in the same order, no augmentation, no drop path."""
    cfg.model.backbone.drop_path_rate = 0.0
    test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = test_pipeline
    cfg.train_dataloader.sampler.shuffle = False


def train(cfg):
    cfg = copy.deepcopy(cfg)
    # the default is the time in seconds: quick runs would share their logs
    cfg.experiment_name = f'run{next(_numbers)}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def scalars(cfg, key='loss'):
    """Logged values by iteration, of every run in the work dir."""
    values = {}
    for path in sorted(Path(cfg.work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if key in row:
                values[row['step']] = row[key]
    return values


def shake_generators():
    """What a new process would have: other random numbers."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


def assert_same_weights(a, b):
    """Bit by bit, of two runners."""
    a, b = a.model.state_dict(), b.model.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def load_tool(name):
    """Import a tool, as its file is no part of a package."""
    spec = importlib.util.spec_from_file_location(
        f'tool_{name}', ROOT / f'tools/{name}.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(tool, config, *args):
    """Run a tool; mmengine's global state wants a new name each time."""
    name = f'experiment_name=tool{next(_numbers)}'
    tool.main([str(config), *map(str, args), '--cfg-options', name])


def vary_predictions(source, path):
    """Save a segmentor's weights under a head that tells classes apart.

    After a few steps it says one class everywhere.
    """
    saved = torch.load(source, weights_only=False)
    weight = saved['state_dict']['decode_head.conv_seg.weight']
    generator = torch.Generator().manual_seed(0)
    weight.copy_(torch.randn(weight.shape, generator=generator))
    torch.save(saved, path)
    return path


WEIGHTS_OF_RANKS = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WeightsOfRanks(Hook):
    def after_train_epoch(self, runner):
        path = f'{runner.work_dir}/rank{get_rank()}.pth'
        torch.save(runner.model.module.state_dict(), path)
"""


def train_in_two_processes(cfg, tmp_path, port):
    """Train on the CPU; the weights of both ranks after the last epoch."""
    (tmp_path / 'weights_of_ranks.py').write_text(WEIGHTS_OF_RANKS)
    cfg.custom_imports.imports += ['weights_of_ranks']
    cfg.custom_hooks += [dict(type='mmengine.WeightsOfRanks')]
    path = tmp_path / 'two.py'
    cfg.dump(path)
    here = str(Path(sys.executable).parent)
    paths = [str(tmp_path), os.environ.get('PYTHONPATH', '')]
    env = dict(
        os.environ,
        PATH=os.pathsep.join([here, os.environ['PATH']]),
        PYTHONPATH=os.pathsep.join(paths),
        PORT=str(port),
    )
    done = subprocess.run(
        ['bash', 'tools/dist_train.sh', str(path), '2'],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f'{cfg.work_dir}/rank{rank}.pth') for rank in range(2)]

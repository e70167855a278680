"""Small models with random weights: config file and checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
from small_runs import digits_config, scenes_config

from mmstabvim.apis import get_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools/analysis_tools'))


def save_model(folder, cfg, change=lambda model: None, seed=0):
    """Write config and checkpoint; what the tools take as arguments."""
    torch.manual_seed(seed)
    model = get_model(cfg)
    with torch.no_grad():
        change(model)
    config, checkpoint = folder / 'small.py', folder / 'small.pth'
    cfg.dump(config)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return [str(config), str(checkpoint)]


def enlarge(factor):
    """Make projections larger, as training does."""

    def change(model):
        for name, parameter in model.named_parameters():
            if 'proj' in name and parameter.dim() == 2:
                parameter.mul_(factor)

    return change


@pytest.fixture
def digits(tmp_path):
    """Build the arguments of a classifier of digits, by its options."""

    def build(change=lambda model: None, channels=16, **backbone):
        cfg = digits_config(tmp_path)
        cfg.model.backbone.arch.embed_dims = channels
        cfg.model.head.in_channels = channels
        cfg.model.backbone.patch_size = 8  # 17 tokens
        cfg.model.backbone.update(backbone)
        return save_model(tmp_path, cfg, change)

    return build


@pytest.fixture
def scenes(tmp_path):
    return save_model(tmp_path, scenes_config(tmp_path))


@pytest.fixture
def rough():
    return enlarge(3.0)

"""Schedules in a training that is shorter than they are."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from small_runs import digits_config

from mmstabvim.engine import launch
from mmstabvim.engine.schedule import fit_schedule

CONFIGS = Path(__file__).parents[2] / 'configs'
ALL = sorted(
    path
    for folder in ('vim', 'upernet', 'own_data', 'transfer')
    for path in (CONFIGS / folder).glob('*.py')
)


def rates(schedulers, steps, epoch_length):
    """Learning rates of a training, as mmengine's hooks step."""
    weight = torch.nn.Parameter(torch.ones(1))
    wrapper = OptimWrapper(torch.optim.SGD([weight], lr=1.0))
    built = []
    for part in schedulers:
        part = dict(part)
        cls = PARAM_SCHEDULERS.get(part.pop('type'))
        if part.pop('convert_to_iter_based', False):
            made = cls.build_iter_from_epoch(
                wrapper, epoch_length=epoch_length, **part
            )
        else:
            made = cls(wrapper, **part)
        built.append(made)
    seen = []
    for step in range(steps):
        seen.append(wrapper.get_lr()['lr'][0])
        for made in built:
            last = (step + 1) % epoch_length == 0
            if not made.by_epoch or last:
                made.step()
    return seen


@pytest.mark.parametrize('path', ALL, ids=lambda path: path.stem)
@pytest.mark.parametrize('length', [1, 7])
def test_one_epoch_of_any_config(path, length):
    """Its schedulers build, and the rate stays between zero and its peak."""
    cfg = Config.fromfile(path)
    fitted = fit_schedule(cfg.param_scheduler, length, length)
    seen = rates(fitted, length, length)
    assert len(seen) == length
    assert all(0 <= rate <= 1 for rate in seen)


def test_a_schedule_that_fits_is_left_alone():
    cfg = Config.fromfile(CONFIGS / 'vim/vim-tiny-p16_8xb128_in1k.py')
    assert fit_schedule(cfg.param_scheduler, 3000, 10) is cfg.param_scheduler


def test_the_warm_up_takes_a_tenth():
    cfg = Config.fromfile(CONFIGS / 'vim/vim-tiny-p16_8xb128_in1k.py')
    seen = rates(fit_schedule(cfg.param_scheduler, 100, 100), 100, 100)
    assert seen.index(max(seen)) in (9, 10)
    assert seen[0] < 0.1 * max(seen)
    assert seen[-1] < 0.1 * max(seen)


def test_what_cannot_be_moved_is_named():
    schedulers = [
        dict(type='LinearLR', by_epoch=True, begin=0, end=5),
        dict(type='CosineAnnealingLR', by_epoch=True, begin=5, T_max=95),
    ]
    with pytest.raises(ValueError, match='T_max of CosineAnnealingLR'):
        fit_schedule(schedulers, 10, 10)


def test_a_real_training_of_one_epoch(tmp_path):
    cfg = digits_config(tmp_path)
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = [
        dict(
            type='LinearLR',
            start_factor=0.1,
            begin=0,
            end=5,
            by_epoch=True,
            convert_to_iter_based=True,
        ),
        dict(type='CosineAnnealingLR', by_epoch=True, begin=5),
    ]
    runner = launch.build_runner(cfg)
    runner.train()
    assert runner.iter == 3

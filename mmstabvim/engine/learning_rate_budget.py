"""Distance by which a training can move a parameter, before it starts."""

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

MOST = 3.2
"""Largest move of a parameter by Adam with its usual betas, over the sum of
the learning rates; about 1 is usual."""


def adam_budget(runner: Runner, parameters: Iterable[Tensor]) -> float | None:
    """Sum the learning rates of some parameters over the training.

    Adam divides a gradient by its size, so a parameter moves by about the
    learning rate in a step, whatever the loss.

    Args:
        runner (Runner): About to train, with optimizer and schedules.
        parameters (Iterable[Tensor]): Parameters of one optimizer group.

    Returns:
        float | None: The sum; None for other optimizers, and where it cannot
        be known before.
    """
    wrapper = runner.optim_wrapper
    schedulers = runner.param_schedulers or []
    if isinstance(wrapper, OptimWrapperDict) or isinstance(schedulers, dict):
        return None
    optimizer = wrapper.optimizer
    if 'adam' not in type(optimizer).__name__.lower():
        return None
    wanted = {id(p) for p in parameters}
    group = next(
        (
            i
            for i, g in enumerate(optimizer.param_groups)
            if any(id(p) in wanted for p in g['params'])
        ),
        None,
    )
    if group is None or not runner.max_iters:
        return None
    return _sum(optimizer, schedulers, group, runner)


def _sum(
    optimizer: Any, schedulers: list[Any], group: int, runner: Runner
) -> float:
    """Walk copies of the schedules on a copy of the groups."""
    groups = [
        {
            **{k: v for k, v in g.items() if k != 'params'},
            'params': [torch.nn.Parameter(torch.zeros(()))],
        }
        for g in optimizer.param_groups
    ]
    twin = type(optimizer)(groups)
    memo = {id(optimizer): twin, id(runner.optim_wrapper): twin}
    walking = [copy.deepcopy(s, memo) for s in schedulers]
    length = max(len(runner.train_dataloader), 1)
    total = 0.0
    for i in range(runner.iter, runner.max_iters):
        total += float(twin.param_groups[group]['lr'])
        for scheduler in walking:
            if not scheduler.by_epoch or (i + 1) % length == 0:
                scheduler.step()
    return total


def say_if_out_of_reach(
    runner: Runner, what: str, matrices: Mapping[str, Any], real: float
) -> None:
    """Log if training can bring an eigenvalue to a border.

    Args:
        runner (Runner): About to train.
        what (str): Name of the hook that acts beyond the border.
        matrices (Mapping[str, StateMatrix]): State matrices, by name.
        real (float): Real part of the border, 1/step.
    """
    distances = {n: m.distance_to(real) for n, m in matrices.items()}
    name = min(distances, key=distances.__getitem__)
    distance = distances[name]
    if distance in (0, math.inf):  # it acts at once, or never can
        return
    budget = adam_budget(runner, matrices[name].parameters())
    if budget is None:
        return
    verdict, level = 'can act', logging.INFO
    if MOST * budget < distance:
        verdict, level = 'cannot act in this training', logging.WARNING
    elif budget < distance:
        verdict, level = 'is unlikely to act in this training', logging.WARNING
    print_log(
        f'{what} {verdict}: the nearest eigenvalue ({name}) is {distance:.3g} '
        f'from its border, and the learning rates add up to {budget:.3g}, by '
        f'about which Adam moves a parameter (at most by {MOST} times that)',
        logger='current',
        level=level,
    )

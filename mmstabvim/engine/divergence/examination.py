"""Run the iteration that diverged again and describe it for a report."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.runner import Runner

from mmstabvim.engine.divergence.alarm import Alarm
from mmstabvim.engine.divergence.record import save_record, snapshot_batch
from mmstabvim.engine.divergence.report import Divergence
from mmstabvim.engine.divergence.rollback import find_last_good
from mmstabvim.engine.divergence.step_watch import StepWatch
from mmstabvim.engine.divergence.tensor_range import nonfinite_names
from mmstabvim.engine.divergence.trace import (
    StepTrace,
    seen_in_step,
    trace_step,
)
from mmstabvim.engine.random_state import drawing_from
from mmstabvim.engine.runner_access import (
    accumulative_counts,
    bare_model,
    has_dynamic_scale,
    loss_scaler,
    optim_wrappers,
)


class StepInputs(NamedTuple):
    """Inputs from which an iteration can be run again.

    Attributes:
        iteration (int): Number of the iteration, from 1.
        batch (Any): Batch of the data loader.
        random_state (dict): Result of ``get_random_state`` at its start.
    """

    iteration: int
    batch: Any
    random_state: dict[str, Any]


class _Examined(NamedTuple):
    """Result of the examination on one rank."""

    alarm: Alarm
    trace: StepTrace


def examine(
    runner: Runner, alarm: Alarm, steps: list[StepInputs], watch: StepWatch
) -> Divergence:
    """Run an iteration again on every rank and describe the divergence.

    The rank on which it is found keeps the step in a file.

    Args:
        runner (Runner): In training, on every rank.
        alarm (Alarm): Reason of the examination.
        steps (list[StepInputs]): Iterations since the last optimizer step.
        watch (StepWatch): Values seen in the step itself.

    Returns:
        Divergence: Equal on all ranks; losses, advice and outcome are left to
        the caller.
    """
    steps = [s for s in steps if s.iteration <= alarm.iteration]
    if alarm.cause != 'gradient':  # which may come from an earlier batch
        steps = steps[-1:]
    traces = [_replay(runner, step, alarm.cause) for step in steps]
    found = (i for i, t in enumerate(traces) if t.first_nonfinite is not None)
    place = next(found, -1)
    trace = traces[place] if traces else StepTrace()
    rank, (alarm, trace) = _agree(runner, alarm, trace, watch)
    record = Path(runner.log_dir, f'divergence_iter_{alarm.iteration}.pth')
    if rank == get_rank() and steps:
        record.parent.mkdir(parents=True, exist_ok=True)
        _save(runner, record, steps[place], alarm)
    checkpoint = [find_last_good(runner) if is_main_process() else None]
    broadcast_object_list(checkpoint)
    return Divergence(
        cause=alarm.cause,
        detail=alarm.detail,
        iteration=alarm.iteration,
        epoch=runner.epoch + 1,
        rank=rank,
        world_size=get_world_size(),
        trace=trace,
        learning_rates=runner.optim_wrapper.get_lr(),
        training=_describe_training(runner),
        hooks=_describe_hooks(runner),
        checkpoint=checkpoint[0],
        record=str(record),
        config=_config_path(runner),
    )


def _agree(
    runner: Runner, alarm: Alarm, trace: StepTrace, watch: StepWatch
) -> tuple[int, _Examined]:
    """Choose the rank on which most is known, on all ranks alike."""
    gathered = all_gather_object(_Examined(alarm, trace))
    if all(found.trace.first_nonfinite is None for found in gathered):
        if alarm.here:
            trace = _seen_in_step(runner, alarm, trace, watch)
        gathered = all_gather_object(_Examined(alarm, trace))
    rank = _choose_rank(gathered)
    return rank, gathered[rank]


def _replay(runner: Runner, step: StepInputs, cause: str) -> StepTrace:
    """Trace an iteration as it was run."""
    model = bare_model(runner.model)
    wrapper = optim_wrappers(runner.optim_wrapper)[0]
    context = partial(wrapper.optim_context, model)
    with drawing_from(step.random_state):
        return trace_step(
            model,
            snapshot_batch(step.batch),
            context,
            _loss_factor(wrapper, cause),
        )


def _seen_in_step(
    runner: Runner, alarm: Alarm, trace: StepTrace, watch: StepWatch
) -> StepTrace:
    """Name a tensor of the step itself where its replay is finite."""
    model = bare_model(runner.model)
    if alarm.cause == 'activation':
        place = watch.first_bad_activation()
        if place is not None:
            return seen_in_step(trace, model, place, 'output')
    if alarm.cause == 'gradient':
        names = nonfinite_names(
            (name, p.grad) for name, p in model.named_parameters()
        )
        if names:
            # the last one is nearest to the loss
            place, _, name = names[-1].rpartition('.')
            role = f'gradient of parameter {name}'
            trace = seen_in_step(trace, model, place, role)
            return replace(trace, gradients=names)
    return trace


def _save(runner: Runner, path: Path, step: StepInputs, alarm: Alarm) -> None:
    """Keep the step in a file."""
    model = bare_model(runner.model)
    wrapper = optim_wrappers(runner.optim_wrapper)[0]
    device = next(model.parameters()).device.type
    autocast = None
    with wrapper.optim_context(model):
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            autocast = str(dtype).removeprefix('torch.')
    save_record(
        path,
        model,
        step.batch,
        step.random_state,
        iter=step.iteration,
        epoch=runner.epoch + 1,
        cause=alarm.cause,
        rank=get_rank(),
        autocast=autocast,
        scale=_loss_factor(wrapper, alarm.cause),
    )


def _choose_rank(gathered: list[_Examined]) -> int:
    """Find the first rank that knows most."""

    def knowledge(rank: int) -> tuple[bool, bool]:
        alarm, trace = gathered[rank]
        return trace.first_nonfinite is not None, alarm.here

    return max(range(len(gathered)), key=knowledge)


def _loss_factor(wrapper: Any, cause: str) -> float:
    """Return the factor of the loss in the backward pass."""
    factor = 1 / accumulative_counts(wrapper)
    scaler = loss_scaler(wrapper)
    if scaler is None or cause != 'skipped':
        # gradients that overflow by the scale are not what has gone wrong
        return factor
    factor *= scaler.get_scale()
    if has_dynamic_scale(wrapper):
        # the skipped step has just lowered it
        factor /= scaler.get_backoff_factor()
    return factor


def _describe_training(runner: Runner) -> dict[str, str]:
    """Describe optimizer and precision, for the report."""
    described = {}
    for wrapper in optim_wrappers(runner.optim_wrapper):
        described['optimizer'] = type(wrapper.optimizer).__name__
        described['optim_wrapper'] = type(wrapper).__name__
        if wrapper.clip_grad_kwargs:
            described['clip_grad'] = str(wrapper.clip_grad_kwargs)
        counts = accumulative_counts(wrapper)
        if counts > 1:
            described['accumulative_counts'] = str(counts)
        scaler = loss_scaler(wrapper)
        if scaler is not None:
            described['loss scale'] = f'{scaler.get_scale():g}'
    return described


def _describe_hooks(runner: Runner) -> list[str]:
    """List this project's other hooks, with their settings."""
    given = [
        *(runner.cfg.get('custom_hooks') or []),
        *(runner.cfg.get('default_hooks') or {}).values(),
    ]
    configured = {
        str(cfg.get('type')).rpartition('.')[2]: cfg
        for cfg in given
        if isinstance(cfg, dict)
    }
    described = []
    for hook in runner.hooks:
        name = type(hook).__name__
        ours = type(hook).__module__.startswith('mmstabvim.')
        if not ours or name in ('DivergenceHook', 'RandomStateHook'):
            continue
        settings = ', '.join(
            f'{key}={value!r}'
            for key, value in configured.get(name, {}).items()
            if key != 'type'
        )
        described.append(f'`{name}` {settings}'.rstrip())
    return described


def _config_path(runner: Runner) -> str | None:
    """Return the path of the config; None if it builds no model."""
    if not isinstance(runner.cfg.get('model'), dict):
        return None
    return str(Path(runner.log_dir, 'divergence_config.py'))

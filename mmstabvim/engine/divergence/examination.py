"""Run the iteration that diverged again and collect what a report says."""

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

from mmstabvim.engine.divergence.record import (
    drawing_from,
    save_record,
    snapshot_batch,
)
from mmstabvim.engine.divergence.report import Divergence
from mmstabvim.engine.divergence.rollback import (
    bare_model,
    find_last_good,
    optim_wrappers,
)
from mmstabvim.engine.divergence.step_watch import StepWatch, loss_scaler
from mmstabvim.engine.divergence.trace import (
    Finding,
    nonfinite_names,
    trace_step,
    without_reproduction,
)


class Step(NamedTuple):
    """What is needed to run an iteration again.

    Attributes:
        iteration (int): From 1.
        batch (Any): As from the data loader.
        random_state (dict): Of ``get_random_state``, at its start.
    """

    iteration: int
    batch: Any
    random_state: dict[str, Any]


class Alarm(NamedTuple):
    """Why an iteration is examined.

    Attributes:
        cause (str): One of ``CAUSES``.
        detail (str): Numbers that belong to it.
        iteration (int): From 1.
        here (bool): Whether it was seen on this rank.
    """

    cause: str
    detail: str
    iteration: int
    here: bool


def examine(
    runner: Runner, alarm: Alarm, steps: list[Step], watch: StepWatch
) -> Divergence:
    """Run an iteration again on every rank and describe what is found.

    The rank on which it is found keeps the step in a file.

    Args:
        runner (Runner): In training, on every rank.
        alarm (Alarm): The cause.
        steps (list[Step]): Iterations since the last optimizer step.
        watch (StepWatch): What the step itself has shown.

    Returns:
        Divergence: The same on all ranks, without the losses before it.
    """
    steps = [s for s in steps if s.iteration <= alarm.iteration]
    if alarm.cause != 'gradient':  # which may come from an earlier batch
        steps = steps[-1:]
    findings = [_replay(runner, step, alarm.cause) for step in steps]
    places = (i for i, f in enumerate(findings) if f.culprit is not None)
    place = next(places, -1)
    finding = findings[place] if findings else Finding()
    gathered = all_gather_object((alarm, finding))
    if all(found.culprit is None for _, found in gathered):
        if alarm.here:
            finding = _seen_in_the_step(runner, alarm, finding, watch)
        gathered = all_gather_object((alarm, finding))
    rank = _choose_rank(gathered)
    alarm, finding = gathered[rank]
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
        finding=finding,
        learning_rates=runner.optim_wrapper.get_lr(),
        training=_describe_training(runner),
        hooks=_describe_hooks(runner),
        has_state_matrix=_has_state_matrix(runner),
        checkpoint=checkpoint[0],
        record=str(record),
        config=_config_path(runner),
    )


def _replay(runner: Runner, step: Step, cause: str) -> Finding:
    """Trace an iteration as it was run."""
    model, wrapper = bare_model(runner), optim_wrappers(runner)[0]
    context = partial(wrapper.optim_context, model)
    with drawing_from(step.random_state):
        return trace_step(
            model,
            snapshot_batch(step.batch),
            context,
            _loss_factor(wrapper, cause),
        )


def _seen_in_the_step(
    runner: Runner, alarm: Alarm, finding: Finding, watch: StepWatch
) -> Finding:
    """Name what the step itself has shown, where its replay is finite."""
    model = bare_model(runner)
    if alarm.cause == 'activation':
        place = watch.first_bad_activation()
        if place is not None:
            return without_reproduction(finding, model, place, 'output')
    if alarm.cause == 'gradient':
        names = nonfinite_names(
            (name, p.grad) for name, p in model.named_parameters()
        )
        if names:
            finding.gradients = names
            # the last one is nearest to the loss
            place, _, name = names[-1].rpartition('.')
            role = f'gradient of parameter {name}'
            return without_reproduction(finding, model, place, role)
    return finding


def _save(runner: Runner, path: Path, step: Step, alarm: Alarm) -> None:
    """Keep the step in a file."""
    model, wrapper = bare_model(runner), optim_wrappers(runner)[0]
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


def _choose_rank(findings: list[tuple[Alarm, Finding]]) -> int:
    """The first rank on which something was found."""
    for wanted in (
        lambda alarm, finding: alarm.here and finding.culprit is not None,
        lambda alarm, finding: finding.culprit is not None,
        lambda alarm, finding: alarm.here,
    ):
        for rank, item in enumerate(findings):
            if wanted(*item):
                return rank
    return 0


def _loss_factor(wrapper: Any, cause: str) -> float:
    """What the loss is multiplied by before the backward pass."""
    factor = 1 / getattr(wrapper, '_accumulative_counts', 1)
    scaler = loss_scaler(wrapper)
    if scaler is None or cause != 'skipped':
        # gradients that overflow by the scale are not what has gone wrong
        return factor
    factor *= scaler.get_scale()
    if getattr(wrapper, '_scale_update_param', None) is None:
        # dynamic: the skipped step has just lowered it
        factor /= scaler.get_backoff_factor()
    return factor


def _describe_training(runner: Runner) -> dict[str, str]:
    """Optimizer and precision, for the report."""
    described = {}
    for wrapper in optim_wrappers(runner):
        described['optimizer'] = type(wrapper.optimizer).__name__
        described['optim_wrapper'] = type(wrapper).__name__
        if wrapper.clip_grad_kwargs:
            described['clip_grad'] = str(wrapper.clip_grad_kwargs)
        counts = getattr(wrapper, '_accumulative_counts', 1)
        if counts > 1:
            described['accumulative_counts'] = str(counts)
        scaler = loss_scaler(wrapper)
        if scaler is not None:
            described['loss scale'] = f'{scaler.get_scale():g}'
    return described


def _describe_hooks(runner: Runner) -> list[str]:
    """This project's other hooks that act on training, with settings."""
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


def _has_state_matrix(runner: Runner) -> bool:
    """Whether the stabilizers have something to act on."""
    names = (name for name, _ in bare_model(runner).named_modules())
    return any(name.endswith('state_matrix') for name in names)


def _config_path(runner: Runner) -> str | None:
    """Where the config goes; None if it does not build the model."""
    if not isinstance(runner.cfg.get('model'), dict):
        return None
    return str(Path(runner.log_dir, 'divergence_config.py'))

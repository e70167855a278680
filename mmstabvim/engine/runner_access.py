"""Access to the parts of a runner; its private attributes are read here only.

Written against mmengine 0.10.7 and its maintained fork.
"""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

HookType = TypeVar('HookType', bound=Hook)

# ------------------------------------------------------------------ model


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper for distributed training."""
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model


def model_with(model: Any, part: str) -> Any:
    """Find the model that has a part, inside any wrappers.

    Args:
        model (Any): Wrapped or not.
        part (str): Attribute of the wanted model, such as ``'head'``.

    Returns:
        Any: The first model that has the part; the innermost one where none
        has it.
    """
    inner = getattr(model, 'module', None)
    if not hasattr(model, part) and isinstance(inner, nn.Module):
        return model_with(inner, part)
    return model


def forward_losses(model: Any, batch: Any) -> dict[str, Any]:
    """Compute the losses of a batch as mmengine's training step does.

    Args:
        model (BaseModel): Not wrapped.
        batch (Any): Batch of a data loader.

    Returns:
        dict[str, Any]: For ``model.parse_losses``.
    """
    data = model.data_preprocessor(batch, True)
    return model._run_forward(data, mode='loss')


def wrap_again(runner: Runner, model: nn.Module) -> None:
    """Wrap the model again, so that its wrapper knows new parameters.

    Args:
        runner (Runner): In training; its model is replaced if it is wrapped.
        model (nn.Module): Without the wrapper.

    Raises:
        RuntimeError: If the wrapper is not PyTorch's for data parallelism.
    """
    if not is_model_wrapper(runner.model):
        return
    if not isinstance(runner.model, DistributedDataParallel):
        raise RuntimeError(
            "rule='learned' wants DistributedDataParallel, got a "
            f'{type(runner.model).__name__}'
        )
    runner.model = model
    # the old wrapper would go on to wait for its parameters
    gc.collect()
    runner.model = runner.wrap_model(
        runner.cfg.get('model_wrapper_cfg'), model
    )


# --------------------------------------------------------------- averages


def averages_of(runner: Runner) -> Iterator[Any]:
    """Yield the averaged models of a runner's ``EMAHook``."""
    for hook in hooks_of(runner, EMAHook):
        if hasattr(hook, 'ema_model'):
            yield hook.ema_model


def refresh_average(average: Any) -> None:
    """Tell mmengine's averaged model the new names of its parameters."""
    average.module.requires_grad_(False)
    average.avg_parameters = (
        average.module.state_dict()
        if average.update_buffers
        else dict(average.module.named_parameters())
    )


# ------------------------------------------------------------- optimizers


def optim_wrappers(
    wrapper: OptimWrapper | OptimWrapperDict,
) -> list[OptimWrapper]:
    """List a runner's optimizer wrappers, usually one."""
    if isinstance(wrapper, OptimWrapperDict):
        return list(wrapper.values())
    return [wrapper]


def optimizers_with(
    wrapper: Any, parameters: Iterable[Tensor]
) -> Iterator[Optimizer]:
    """Yield the optimizers that train one of these parameters.

    Args:
        wrapper (OptimWrapper | OptimWrapperDict): Wrapper of the runner.
        parameters (Iterable[Tensor]): Some parameters of the model.
    """
    wanted = {id(p) for p in parameters}
    for one in optim_wrappers(wrapper):
        groups = one.optimizer.param_groups
        if any(id(p) in wanted for group in groups for p in group['params']):
            yield one.optimizer


def loss_scaler(wrapper: OptimWrapper) -> Any:
    """Return the scaler that may skip float16 steps, None without one."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def has_dynamic_scale(wrapper: OptimWrapper) -> bool:
    """Tell a loss scale that changes by itself from one that is set."""
    return getattr(wrapper, '_scale_update_param', None) is None


def accumulative_counts(wrapper: OptimWrapper) -> int:
    """Return the number of iterations whose gradients make one step."""
    return getattr(wrapper, '_accumulative_counts', 1)


def _schedulers_of(runner: Runner) -> list[Any]:
    """List the parameter schedulers of a runner."""
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        return [s for group in schedulers.values() for s in group]
    return list(schedulers)


def scale_learning_rate(runner: Runner, factor: float) -> None:
    """Multiply the learning rate, now and in the rest of the schedule.

    Args:
        runner (Runner): In training.
        factor (float): Positive.
    """
    for wrapper in optim_wrappers(runner.optim_wrapper):
        for group in wrapper.param_groups:
            for key in ('lr', 'initial_lr', 'max_lr', 'min_lr'):
                if key in group:
                    group[key] = group[key] * factor
    for scheduler in _schedulers_of(runner):
        if scheduler.param_name != 'lr':
            continue
        for key in ('base_values', 'min_values', '_last_value'):
            values = getattr(scheduler, key, None)
            if values is not None:
                setattr(scheduler, key, [v * factor for v in values])
        if getattr(scheduler, 'eta_min', None) is not None:
            scheduler.eta_min *= factor


# -------------------------------------------------------- hooks, progress


def hooks_of(runner: Runner, kind: type[HookType]) -> list[HookType]:
    """List the runner's hooks of a class, in the order in which they act."""
    return [hook for hook in runner.hooks if isinstance(hook, kind)]


def is_resumed(runner: Runner) -> bool:
    """Tell a run that goes on with an earlier one."""
    return runner._resume


@contextmanager
def as_if_resumed(runner: Runner) -> Iterator[None]:
    """Let hooks take their state from a checkpoint as a resumed run does."""
    resumed, runner._resume = runner._resume, True
    try:
        yield
    finally:
        runner._resume = resumed


def progress_after(runner: Runner, batch_idx: int) -> tuple[int, int]:
    """Return the epochs and iterations that an iteration completes.

    Args:
        runner (Runner): At the end of the iteration.
        batch_idx (int): Place of its batch in the epoch.
    """
    epoch = runner.epoch
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        epoch += batch_idx + 1 == len(runner.train_dataloader)
    return epoch, runner.iter + 1

"""Notice a divergence, find where it starts, report it, stop or go back."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmstabvim.engine.divergence.alarm import (
    Alarm,
    LossHistory,
    SpikeRule,
    read_rows,
)
from mmstabvim.engine.divergence.examination import StepInputs, examine
from mmstabvim.engine.divergence.record import snapshot_batch
from mmstabvim.engine.divergence.report import Divergence, write_report
from mmstabvim.engine.divergence.rollback import (
    remove_last_good,
    roll_back,
    save_last_good,
)
from mmstabvim.engine.divergence.step_watch import StepWatch
from mmstabvim.engine.random_state import get_random_state
from mmstabvim.engine.runner_access import (
    bare_model,
    optim_wrappers,
    progress_after,
    scale_learning_rate,
)
from mmstabvim.layers.state_matrix import state_matrices
from mmstabvim.registry import HOOKS
from mmstabvim.stability.inputs import check_choice

ACTIONS = ('stop', 'rollback', 'continue')
CHECKPOINT_KEY = 'divergence_hook'

STABILIZERS = {
    'SpectralNormalizationHook': 'bounds the spectral radius of the state '
    'matrices',
    'EigenvalueClampingHook': 'keeps their eigenvalues in the stable half '
    'plane',
    'StabilityLossHook': 'penalizes eigenvalues that leave it',
}


class _Progress:
    """Progress of one training: inputs of a step, reports, a way back.

    Attributes:
        watch (StepWatch): Values of each step, on the device.
        spikes (SpikeRule): Definition of a jump of the loss.
        steps (list[StepInputs]): Iterations since the last optimizer step.
        reported (set[str]): Causes that are not reported again.
        healthy (bool): False once this iteration gave cause for alarm.
        target (tuple[str, int], optional): Checkpoint to go back to, and its
            iteration.
    """

    def __init__(self, watch: StepWatch, spikes: SpikeRule) -> None:
        self.watch, self.spikes = watch, spikes
        self.steps: list[StepInputs] = []
        self.reported: set[str] = set()
        self.healthy = True
        self.target: tuple[str, int] | None = None


@HOOKS.register_module()
class DivergenceHook(Hook):
    """Find the place where a training diverges; stop it or take it back.

    A run has diverged when its loss, a gradient or an activation is not
    finite, when its loss jumps, or when float16 training skips many steps in
    a row (a single skipped step is normal). Then the iteration is run again
    from the random numbers that it started with, before any optimizer step,
    and every module is watched: the first tensor that is not finite, and the
    ranges of those before it, go into ``divergence_report.md`` in the folder
    of the run. The batch, the random state and the weights go into a file
    beside it, from which :func:`mmstabvim.engine.divergence.replay`
    runs the step again. No number is ever replaced.

    During training a rolling checkpoint, ``last_good.pth`` in the work dir,
    is written whenever everything is finite; a run that ends well removes it.

    After that, by ``action``:

    - ``'stop'``: a ``RuntimeError`` that names the report, on every rank. The
      optimizer step is not taken; logs are written out.
    - ``'rollback'``: weights, optimizer state, loss scale, moving averages
      and logged histories become those of the last good checkpoint (this
      hook's, or a ``CheckpointHook``'s if that is newer), and the learning
      rate is multiplied by ``lr_factor`` for the rest of the schedule.
      Iterations and epochs are *not* counted back, in epoch-based and in
      iteration-based training alike: data, random numbers and the position
      in the schedule go on, so that a batch is not seen twice, logged steps
      stay unique and the run ends when it was meant to. After
      ``max_rollbacks`` the run stops.
    - ``'continue'``: each kind of divergence is reported once, and training
      goes on as without the hook.

    In distributed training all ranks decide alike. The report is written by
    rank 0 and names the rank on which the divergence was found.

    Args:
        action (str): ``'stop'``, ``'rollback'`` or ``'continue'``. Defaults
            to ``'stop'``.
        interval (int): Wait for the device and look at losses and gradients
            once in this many iterations. With more than 1 a divergence is
            dated rightly but found late, after steps have been taken with
            it. Defaults to 1.
        activation_interval (int): Look at the outputs of all leaf modules
            once in this many iterations; 0 for never. Defaults to 100.
        checkpoint_interval (int): Write the rolling checkpoint once in this
            many iterations, and before the first; 0 for never. Defaults to
            500.
        spike_factor (float, optional): A loss above this many times the
            median of the last ones is a divergence; None for never. Defaults
            to 10.0.
        spike_floor (float): No loss up to here is a jump. Defaults to 1.0.
        spike_window (int): Number of losses in the median. Defaults to 100.
        spike_warmup (int): Iterations before the first that can be a jump.
            Defaults to 100.
        max_skipped (int): Number of float16 steps skipped in a row that is a
            divergence; 0 for never. The default of 20 takes the usual loss
            scale of 2**16 below 1.
        lr_factor (float): Factor of the learning rate at a rollback.
            Defaults to 0.5.
        max_rollbacks (int): Rollbacks before the run stops. Defaults to 3.

    Raises:
        ValueError: If an argument is out of its range.
    """

    # after the hooks that average weights and step the schedule, before
    # CheckpointHook (VERY_LOW), which must not save what has diverged
    priority = 85

    def __init__(
        self,
        action: str = 'stop',
        interval: int = 1,
        activation_interval: int = 100,
        checkpoint_interval: int = 500,
        spike_factor: float | None = 10.0,
        spike_floor: float = 1.0,
        spike_window: int = 100,
        spike_warmup: int = 100,
        max_skipped: int = 20,
        lr_factor: float = 0.5,
        max_rollbacks: int = 3,
    ) -> None:
        check_choice('action', action, ACTIONS)
        _check_ints(
            1,
            interval=interval,
            spike_window=spike_window,
            max_rollbacks=max_rollbacks,
        )
        _check_ints(
            0,
            activation_interval=activation_interval,
            checkpoint_interval=checkpoint_interval,
            spike_warmup=spike_warmup,
            max_skipped=max_skipped,
        )
        if not 0 < lr_factor <= 1:
            raise ValueError(f'lr_factor must be in (0, 1], got {lr_factor}')
        self.action, self.interval = action, interval
        self.activation_interval = activation_interval
        self.checkpoint_interval = checkpoint_interval
        self.spikes = SpikeRule(
            spike_factor, spike_floor, spike_window, spike_warmup
        )
        self.max_skipped = max_skipped
        self.lr_factor, self.max_rollbacks = lr_factor, max_rollbacks
        self.history = LossHistory()
        self._loaded: dict[str, Any] = {}

    # ------------------------------------------------------ training loop

    def before_train(self, runner: Runner) -> None:
        """Get between model and optimizers; save what training starts from."""
        if not isinstance(runner, Runner):
            raise ValueError(
                'DivergenceHook wants a Runner of mmengine, got a '
                f'{type(runner).__name__}'
            )
        # of a resumed run; a checkpoint may also be only where one starts
        loaded = self._loaded if runner.iter else {}
        self._loaded = {}
        wrappers = optim_wrappers(runner.optim_wrapper)
        spikes = self.spikes
        if len(wrappers) > 1 and spikes.factor is not None:
            spikes = SpikeRule(None)
            print_log(
                'DivergenceHook: several optimizers, so losses are of several '
                'kinds and no jump is looked for',
                logger='current',
            )
        watch = StepWatch(partial(self._before_step, runner))
        self.history = LossHistory.load(loaded, self.spikes.window)
        self._now = _Progress(watch, spikes)
        watch.arm(wrappers)
        if self.checkpoint_interval:
            self._save(runner, runner.epoch, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Let go of the optimizers; tidy up after a good run."""
        self._now.watch.disarm()
        if self.checkpoint_interval and not self.history.num_divergences:
            remove_last_good(runner)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Remember how the iteration starts."""
        now, iteration = self._now, runner.iter + 1
        now.watch.begin(iteration)
        now.healthy = True
        batch = snapshot_batch(data_batch)
        now.steps.append(StepInputs(iteration, batch, get_random_state()))
        # code that is compiled would be compiled again for the hooks
        if not runner.cfg.get('compile') and _every(
            runner.iter, self.activation_interval
        ):
            now.watch.watch_activations(bare_model(runner.model))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Look at what no optimizer step has looked at; go back or save."""
        now, watch = self._now, self._now.watch
        loss = (outputs or {}).get('loss')
        if not watch.has_loss and loss is not None:
            watch.add_row(torch.as_tensor(loss))
        self._inspect(runner)
        if self.max_skipped and watch.num_skipped >= self.max_skipped:
            detail = f'{watch.num_skipped} steps in a row'
            self._act(runner, Alarm('skipped', detail, watch.iteration, True))
            watch.num_skipped = 0
        if now.target is not None:
            self._roll_back(runner, *now.target)
        elif now.healthy and _every(runner.iter + 1, self.checkpoint_interval):
            self._save(runner, *progress_after(runner, batch_idx))
        if not watch.rows and all(
            wrapper.should_update()
            for wrapper in optim_wrappers(runner.optim_wrapper)
        ):
            now.steps.clear()

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the losses and the number of rollbacks for a resumed run."""
        checkpoint[CHECKPOINT_KEY] = self.history.save()

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Take them from the checkpoint when training is resumed."""
        self._loaded = checkpoint.get(CHECKPOINT_KEY) or {}

    # ------------------------------------------------------------ noticing

    def _before_step(self, runner: Runner) -> bool:
        """Inspect before an optimizer step; False to leave it out."""
        self._inspect(runner)
        return self._now.target is None

    def _inspect(self, runner: Runner) -> None:
        """Read all steps since the last inspection, if it is time."""
        watch, done = self._now.watch, runner.iter + 1
        due = (
            _every(done, self.interval)
            or _every(done, self.checkpoint_interval)
            or done >= runner.max_iters
            or bool(watch.peaks)
        )
        if not watch.rows or not due:
            return
        rows, watch.rows = watch.rows, []
        for values in read_rows(rows):
            alarm = self.history.judge(values, self._now.spikes)
            if alarm is not None:
                self._act(runner, alarm)

    # -------------------------------------------------------------- acting

    def _act(self, runner: Runner, alarm: Alarm) -> None:
        """Examine, report, and do what ``action`` says."""
        now, history = self._now, self.history
        now.healthy = False
        if alarm.cause in now.reported or now.target is not None:
            return
        if self.action == 'continue':
            now.reported.add(alarm.cause)
        history.num_divergences += 1
        divergence = examine(runner, alarm, now.steps, now.watch)
        divergence.losses = list(history.losses)
        divergence.advice = _advise(runner, divergence.hooks)
        late = runner.iter + 1 - alarm.iteration
        if late:
            divergence.notes.append(
                f'Found {late} iterations late (interval={self.interval}): '
                'the weights have taken steps since.'
            )
        stop = self._decide(divergence)
        report = self._report(runner, divergence)
        runner.message_hub.update_scalar(
            'train/stab/divergence', float(history.num_divergences)
        )
        message = f'training diverged at {divergence.headline()}; see {report}'
        if stop:
            self._stop(runner, message)
        runner.logger.warning(message)

    def _decide(self, divergence: Divergence) -> bool:
        """Choose the reaction and note it; True to stop the training."""
        history = self.history
        if self.action == 'continue':
            divergence.outcome = (
                "Training goes on as it is (action='continue'); this kind of "
                'divergence is reported once.'
            )
            return False
        divergence.outcome = 'Training was stopped.'
        if self.action == 'stop':
            return True
        if divergence.checkpoint is None:
            divergence.outcome = (
                'Training was stopped: there is no checkpoint to go back to.'
            )
            return True
        if history.num_rollbacks >= self.max_rollbacks:
            divergence.outcome = (
                f'Training was stopped after {history.num_rollbacks} '
                'rollbacks.'
            )
            return True
        history.num_rollbacks += 1
        path, iteration = divergence.checkpoint
        divergence.outcome = (
            f'Training was rolled back to `{path}` (after {iteration} '
            f'iterations) and goes on with {self.lr_factor} times the '
            f'learning rate (rollback {history.num_rollbacks} of '
            f'{self.max_rollbacks}).'
        )
        self._now.target = divergence.checkpoint
        return False

    def _report(self, runner: Runner, divergence: Divergence) -> Path:
        """Write the report, on the main process."""
        count = self.history.num_divergences
        suffix = f'_{count}' if count > 1 else ''
        path = Path(runner.log_dir, f'divergence_report{suffix}.md')
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            if divergence.config is not None:
                runner.cfg.dump(divergence.config)
            write_report(path, divergence)
        return path

    def _stop(self, runner: Runner, message: str) -> None:
        """End training on every rank, with everything written out."""
        # a rank that ends earlier would take the one that writes with it
        barrier()
        self._now.watch.disarm()
        count = float(self.history.num_divergences)
        runner.visualizer.add_scalar('stab/divergence', count, runner.iter + 1)
        runner.visualizer.close()
        runner.logger.error(message)
        for handler in runner.logger.handlers:
            handler.flush()
        raise RuntimeError(message)

    def _roll_back(self, runner: Runner, path: str, iteration: int) -> None:
        """Take the state of the last good checkpoint, at a lower rate."""
        now, history = self._now, self.history
        now.target = None
        roll_back(runner, path)
        scale_learning_rate(runner, self.lr_factor)
        self._loaded = {}
        now.watch.num_skipped = 0
        history.forget_after(iteration)
        now.steps.clear()
        hub = runner.message_hub
        hub.update_scalar('train/stab/divergence', history.num_divergences)
        hub.update_scalar('train/stab/rollback', history.num_rollbacks)
        runner.logger.warning(
            f'rolled back to {path}, after {iteration} iterations, with '
            f'{self.lr_factor} times the learning rate'
        )

    def _save(self, runner: Runner, epoch: int, iteration: int) -> None:
        """Write the rolling checkpoint, unless something is not finite."""
        if not save_last_good(runner, epoch, iteration):
            runner.logger.warning(
                'weights or optimizer state are not finite after iteration '
                f'{iteration}: the last good checkpoint stays as it is'
            )


def _advise(runner: Runner, used: list[str]) -> list[str]:
    """Name the stabilizers that could be added, if the model has matrices."""
    if not state_matrices(bare_model(runner.model)):
        return []
    return [
        f"Add `dict(type='mmstabvim.{name}')` to `custom_hooks`: it {effect}."
        for name, effect in STABILIZERS.items()
        if name not in ' '.join(used)
    ]


def _check_ints(least: int, **values: int) -> None:
    """Refuse a value that is no whole number or too small."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f'{name} must be an int, got {value!r}')
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')


def _every(count: int, interval: int) -> bool:
    """Tell if it is time; an interval of 0 is never."""
    return interval > 0 and count % interval == 0

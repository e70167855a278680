"""Notice a divergence, find where it starts, report it, stop or go back."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import (
    all_reduce,
    barrier,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmstabvim.engine.divergence.examination import Alarm, Step, examine
from mmstabvim.engine.divergence.record import snapshot_batch
from mmstabvim.engine.divergence.report import Divergence, write_report
from mmstabvim.engine.divergence.rollback import (
    bare_model,
    optim_wrappers,
    remove_last_good,
    roll_back,
    save_last_good,
    scale_learning_rate,
)
from mmstabvim.engine.divergence.step_watch import StepWatch
from mmstabvim.engine.hooks.random_state_hook import get_random_state
from mmstabvim.registry import HOOKS

ACTIONS = ('stop', 'rollback', 'continue')


@HOOKS.register_module()
class DivergenceHook(Hook):
    """Find out where a training run diverges, and stop it or take it back.

    A run has diverged when its loss, a gradient or an activation is not
    finite, when its loss jumps, or when float16 training skips many steps in
    a row (a single skipped step is normal). Then the iteration is run again
    from the random numbers that it started with, before any optimizer step,
    and every module is watched: the first tensor that is not finite, and the
    ranges of those before it, go into ``divergence_report.md`` in the folder
    of the run. The batch, the random state and the weights go into a file
    beside it, from which :func:`mmstabvim.engine.divergence.record.replay`
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
        spike_floor (float): No loss up to here is one. Defaults to 1.0.
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
        if action not in ACTIONS:
            raise ValueError(
                f'action must be one of {ACTIONS}, got {action!r}'
            )
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
        if spike_factor is not None and not spike_factor > 1:
            raise ValueError(
                f'spike_factor must be above 1 or None, got {spike_factor}'
            )
        if not 0 < lr_factor <= 1:
            raise ValueError(f'lr_factor must be in (0, 1], got {lr_factor}')
        self.action, self.interval = action, interval
        self.activation_interval = activation_interval
        self.checkpoint_interval = checkpoint_interval
        self.spike_factor, self.spike_floor = spike_factor, spike_floor
        self.spike_warmup = spike_warmup
        self.max_skipped = max_skipped
        self.lr_factor, self.max_rollbacks = lr_factor, max_rollbacks
        self.losses: deque[tuple[int, float]] = deque(maxlen=spike_window)
        self.num_losses = self.num_divergences = self.num_rollbacks = 0
        self._loaded: dict[str, Any] | None = None
        self._reported: set[str] = set()
        self._steps: list[Step] = []
        self._healthy = True
        self._going_back: tuple[str, int] | None = None

    # -------------------------------------------------- of the training loop

    def before_train(self, runner: Runner) -> None:
        """Get between model and optimizers; save what training starts from."""
        if not isinstance(runner, Runner):
            raise ValueError(
                'DivergenceHook wants a Runner of mmengine, got a '
                f'{type(runner).__name__}'
            )
        # of a resumed run; a checkpoint may also be only where one starts
        loaded = self._loaded if self._loaded and runner.iter else {}
        self._loaded = None
        self.losses.clear()
        self.losses.extend(map(tuple, loaded.get('losses', [])))
        for name in ('num_losses', 'num_divergences', 'num_rollbacks'):
            setattr(self, name, loaded.get(name, 0))
        self._reported, self._steps = set(), []
        self._going_back, self._healthy = None, True
        wrappers = optim_wrappers(runner)
        self._factor = self.spike_factor or 0.0
        if len(wrappers) > 1 and self._factor:
            self._factor = 0.0
            print_log(
                'DivergenceHook: several optimizers, so losses are of several '
                'kinds and no jump is looked for',
                logger='current',
            )
        self._watch = StepWatch(partial(self._before_step, runner))
        self._watch.arm(wrappers)
        if self.checkpoint_interval:
            self._save(runner, runner.epoch, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Let go of the optimizers; tidy up after a good run."""
        self._watch.disarm()
        if self.checkpoint_interval and not self.num_divergences:
            remove_last_good(runner)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Remember how the iteration starts."""
        self._watch.begin(runner.iter + 1)
        self._healthy = True
        self._steps.append(
            Step(
                runner.iter + 1, snapshot_batch(data_batch), get_random_state()
            )
        )
        # code that is compiled would be compiled again for the hooks
        if not runner.cfg.get('compile') and _every(
            runner.iter, self.activation_interval
        ):
            self._watch.watch_activations(bare_model(runner))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Look at what no optimizer step has looked at; go back or save."""
        watch = self._watch
        loss = (outputs or {}).get('loss')
        if not watch.has_loss and loss is not None:
            watch.add_row(torch.as_tensor(loss))
        self._inspect(runner)
        if self.max_skipped and watch.num_skipped >= self.max_skipped:
            detail = f'{watch.num_skipped} steps in a row'
            self._act(runner, Alarm('skipped', detail, watch.iteration, True))
            watch.num_skipped = 0
        if self._going_back is not None:
            self._roll_back(runner)
        elif self._healthy and _every(
            runner.iter + 1, self.checkpoint_interval
        ):
            self._save(runner, *_progress(runner, batch_idx))
        if not watch.rows and all(
            wrapper.should_update() for wrapper in optim_wrappers(runner)
        ):
            self._steps.clear()

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the losses and the number of rollbacks for a resumed run."""
        checkpoint['divergence_hook'] = dict(
            losses=[list(item) for item in self.losses],
            num_losses=self.num_losses,
            num_divergences=self.num_divergences,
            num_rollbacks=self.num_rollbacks,
        )

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Take them from the checkpoint when training is resumed."""
        self._loaded = checkpoint.get('divergence_hook')

    # ------------------------------------------------------------ noticing

    def _before_step(self, runner: Runner) -> bool:
        """Inspect before an optimizer step; whether to take it."""
        self._inspect(runner)
        return self._going_back is None

    def _inspect(self, runner: Runner) -> None:
        """Read the rows of all steps since the last time, if it is time."""
        done = runner.iter + 1
        rows = self._watch.rows
        due = (
            _every(done, self.interval)
            or _every(done, self.checkpoint_interval)
            or done >= runner.max_iters
            or bool(self._watch.peaks)
        )
        if not rows or not due:
            return
        self._watch.rows = []
        iterations = [iteration for iteration, _ in rows]
        values = _read(torch.stack([row for _, row in rows]))
        for iteration, row in zip(iterations, values, strict=True):
            alarm = self._judge(iteration, *row)
            if alarm is not None:
                self._act(runner, alarm)

    def _judge(
        self,
        iteration: int,
        here: list[float],
        mean_loss: float,
        anywhere: list[bool],
    ) -> Alarm | None:
        """Find the cause of alarm in one iteration, if any."""
        causes = ('loss', 'gradient', 'activation')
        # what comes first in an iteration is nearest to the origin
        for index in (2, 0, 1):
            if anywhere[index]:
                value = here[index]
                bad = not math.isfinite(value)
                detail = f'{value}' if bad else 'on another rank'
                return Alarm(causes[index], detail, iteration, bad)
        alarm = None
        if self._is_spike(mean_loss):
            median = statistics.median(loss for _, loss in self.losses)
            detail = f'{mean_loss:.6g}, after a median of {median:.6g}'
            alarm = Alarm('spike', detail, iteration, True)
        self.losses.append((iteration, mean_loss))
        self.num_losses += 1
        return alarm

    def _is_spike(self, loss: float) -> bool:
        """Whether a finite loss is far above the last ones."""
        if not self._factor or not self.losses:
            return False
        if self.num_losses < self.spike_warmup or loss <= self.spike_floor:
            return False
        median = statistics.median(value for _, value in self.losses)
        return 0 < self._factor * median < loss

    # -------------------------------------------------------------- acting

    def _act(self, runner: Runner, alarm: Alarm) -> None:
        """Examine, report, and do what ``action`` says."""
        self._healthy = False
        if alarm.cause in self._reported or self._going_back is not None:
            return
        if self.action == 'continue':
            self._reported.add(alarm.cause)
        self.num_divergences += 1
        divergence = examine(runner, alarm, self._steps, self._watch)
        divergence.losses = list(self.losses)
        late = runner.iter + 1 - alarm.iteration
        if late:
            divergence.notes.append(
                f'Found {late} iterations late (interval={self.interval}): '
                'the weights have taken steps since.'
            )
        stop = self._decide(divergence)
        report = self._report(runner, divergence)
        runner.message_hub.update_scalar(
            'train/stab/divergence', float(self.num_divergences)
        )
        message = f'training diverged at {divergence.headline()}; see {report}'
        if stop:
            self._stop(runner, message)
        runner.logger.warning(message)

    def _decide(self, divergence: Divergence) -> bool:
        """Whether to stop; note in the report what happens instead."""
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
        if self.num_rollbacks >= self.max_rollbacks:
            divergence.outcome = (
                f'Training was stopped after {self.num_rollbacks} rollbacks.'
            )
            return True
        self.num_rollbacks += 1
        path, iteration = divergence.checkpoint
        divergence.outcome = (
            f'Training was rolled back to `{path}` (after {iteration} '
            f'iterations) and goes on with {self.lr_factor} times the '
            f'learning rate (rollback {self.num_rollbacks} of '
            f'{self.max_rollbacks}).'
        )
        self._going_back = divergence.checkpoint
        return False

    def _report(self, runner: Runner, divergence: Divergence) -> Path:
        """Write the report, on the main process."""
        count = self.num_divergences
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
        self._watch.disarm()
        runner.visualizer.add_scalar(
            'stab/divergence', float(self.num_divergences), runner.iter + 1
        )
        runner.visualizer.close()
        runner.logger.error(message)
        for handler in runner.logger.handlers:
            handler.flush()
        raise RuntimeError(message)

    def _roll_back(self, runner: Runner) -> None:
        """Take the state of the last good checkpoint, at a lower rate."""
        path, iteration = self._going_back or ('', 0)
        self._going_back = None
        roll_back(runner, path)
        scale_learning_rate(runner, self.lr_factor)
        self._loaded = None
        self._watch.num_skipped = 0
        kept = [item for item in self.losses if item[0] <= iteration]
        self.losses.clear()
        self.losses.extend(kept)
        self._steps.clear()
        hub = runner.message_hub
        hub.update_scalar('train/stab/divergence', self.num_divergences)
        hub.update_scalar('train/stab/rollback', self.num_rollbacks)
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


def _check_ints(least: int, **values: int) -> None:
    """Refuse what is no whole number or too small."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f'{name} must be an int, got {value!r}')
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')


def _every(count: int, interval: int) -> bool:
    """Whether it is time; an interval of 0 is never."""
    return interval > 0 and count % interval == 0


def _progress(runner: Runner, batch_idx: int) -> tuple[int, int]:
    """Epochs and iterations finished at the end of an iteration."""
    epoch = runner.epoch
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        epoch += batch_idx + 1 == len(runner.train_dataloader)
    return epoch, runner.iter + 1


def _read(rows: torch.Tensor) -> Iterable[tuple]:
    """Bring rows to the host, joined over ranks, with one wait.

    Yields for each the numbers of this rank, the mean loss and, for each
    number, whether it is not finite on any rank.
    """
    bad = (~torch.isfinite(rows)).float()
    shared = torch.cat([rows[:, :1], bad], dim=1)
    if get_world_size() > 1:
        all_reduce(shared, 'mean')
    for row in torch.cat([rows, shared], dim=1).tolist():
        yield row[:3], row[3], [share > 0 for share in row[4:]]

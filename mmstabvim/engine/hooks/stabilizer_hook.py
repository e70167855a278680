"""Base class of the hooks that apply rules to state matrices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from mmstabvim.engine.free_parameters import join, restore, separate
from mmstabvim.engine.hooks.after_step_hook import AfterStepHook
from mmstabvim.engine.runner_access import (
    averages_of,
    bare_model,
    optimizers_with,
)
from mmstabvim.engine.weight_reparametrization import live_and_average
from mmstabvim.layers.state_matrix import (
    Rule,
    StateMatrix,
    check_finite,
    decompose_all,
    state_matrices,
)
from mmstabvim.stability.inputs import check_choice

MODES = ('project', 'reparam')
CHECKPOINT_KEY = 'free_state_matrices'


class StabilizerHook(AfterStepHook):
    """Make every state matrix of the model obey rules during training.

    ``mode='project'`` changes the parameters in place, once before training
    (after loading) and then inside each optimizer step, through the
    optimizer's own post-step hook: a step that accumulates gradients, or that
    fp16 training skips, projects nothing. Averages kept by ``EMAHook`` are
    projected before they are evaluated or saved.

    ``mode='reparam'`` leaves the parameters free and applies the rule in
    every forward pass, with gradients through it. Checkpoints hold the
    parameters that the forward pass used, so that they are the same model
    without hooks, and the free ones beside them, for resuming.

    The stabilizers of a mode act as one: all their rules hold together
    afterwards. A matrix with a frozen parameter is left alone.

    Args:
        rules (Sequence[Rule]): At least one.
        mode (str): ``'project'`` or ``'reparam'``. Defaults to
            ``'project'``.

    Raises:
        ValueError: If there is no rule or the mode is unknown.
    """

    def __init__(self, rules: Sequence[Rule], mode: str = 'project') -> None:
        super().__init__()
        check_choice('mode', mode, MODES)
        if not rules:
            raise ValueError('rules must not be empty')
        self.rules, self.mode = list(rules), mode
        self.measuring = False
        self.measured: dict[str, dict[str, torch.Tensor]] = {}
        self._reparametrized = False
        if mode == 'reparam':
            # after EMAHook, which exchanges entries of equal names
            self.priority = 'BELOW_NORMAL'

    # ----------------------------------------------------- of a stabilizer

    def rules_for(self, name: str, matrix: StateMatrix) -> list[Rule]:
        """Return the rules of one layer."""
        return self.rules

    def why_idle(self, matrix: StateMatrix) -> str | None:
        """Tell why no rule can change this matrix; None if one can."""
        return None

    # ---------------------------------------------------------- life cycle

    def before_train(self, runner: Runner) -> None:
        """Find the matrices, apply the rules once, arm the optimizers."""
        matrices = find_matrices(runner, type(self).__name__)
        self._say_if_idle(matrices)
        ours = _hooks(runner, self.mode)
        if ours[0] is not self:
            return  # the first one acts for all
        matrices = trained(matrices)
        if self.mode == 'reparam':
            install(ours, matrices)
            self._reparametrized = True
            return
        say_if_blended(project(ours, matrices))
        for optimizer in optimizers_of(runner.optim_wrapper, matrices):
            self.arm(optimizer, lambda: project(ours, matrices))

    def before_val(self, runner: Runner) -> None:
        """The rules of the forward pass hold when a model is evaluated."""
        if self._acts_in(runner, 'reparam'):
            matrices = find_matrices(runner, type(self).__name__)
            install(_hooks(runner, 'reparam'), trained(matrices))

    def before_test(self, runner: Runner) -> None:
        """Apply the rules of the forward pass, for a test."""
        self.before_val(runner)

    def act_on_average(self, runner: Runner, model: nn.Module) -> None:
        """Project averages, which of stable matrices may be unstable."""
        if self._acts_in(runner, 'project'):
            # an average has no gradients: what is frozen says the model
            live = trained(state_matrices(bare_model(runner.model)))
            own = state_matrices(model)
            project(_hooks(runner, 'project'), {n: own[n] for n in live})

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Save the parameters in use, and the free ones beside them."""
        super().before_save_checkpoint(runner, checkpoint)
        if self._acts_in(runner, 'reparam'):
            matrices = state_matrices(bare_model(runner.model))
            checkpoint[CHECKPOINT_KEY] = separate(checkpoint, matrices)

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Go back to the free parameters where training goes on."""
        raw = checkpoint.get(CHECKPOINT_KEY)
        goes_on = runner._resume or self._reparametrized
        if not (raw and goes_on and self._acts_in(runner, 'reparam')):
            return
        averages = list(averages_of(runner))
        live, average = live_and_average(raw, bool(averages))
        join(checkpoint['state_dict'], live)
        for averaged in averages:
            restore(state_matrices(averaged.module), average)

    def _acts_in(self, runner: Runner, mode: str) -> bool:
        """Tell the hook that acts for all of a mode from the others."""
        ours = _hooks(runner, mode)
        return bool(ours) and ours[0] is self

    # --------------------------------------------------------------- parts

    def _say_if_idle(self, matrices: Mapping[str, StateMatrix]) -> None:
        with torch.no_grad():
            reasons = {self.why_idle(matrix) for matrix in matrices.values()}
        if None not in reasons:
            print_log(
                f'{type(self).__name__} has nothing to change in this model: '
                + '; '.join(sorted(map(str, reasons))),
                logger='current',
                level=logging.WARNING,
            )


def install(
    hooks: Sequence[StabilizerHook], matrices: Mapping[str, StateMatrix]
) -> None:
    """Put the hooks' rules into the forward pass of these matrices."""
    for name, matrix in matrices.items():
        matrix.reparametrizations = rules_of(hooks, name, matrix)
        matrix.check_reparametrizations(name)


def rules_of(
    hooks: Sequence[StabilizerHook], name: str, matrix: StateMatrix
) -> list[Rule]:
    """Collect the rules of several hooks for one layer, in their order."""
    rules = [rule for h in hooks for rule in h.rules_for(name, matrix)]
    return sorted(rules, key=lambda rule: rule.order)


def trained(
    matrices: Mapping[str, StateMatrix],
) -> dict[str, StateMatrix]:
    """The matrices without frozen parameters; the others are named once."""
    frozen = [name for name, m in matrices.items() if m.is_frozen]
    if frozen:
        _say_frozen(tuple(frozen))
    return {n: m for n, m in matrices.items() if not m.is_frozen}


@functools.cache
def _say_frozen(names: tuple[str, ...]) -> None:
    shown = ', '.join(names[:3]) + (' ...' if len(names) > 3 else '')
    print_log(
        f'{len(names)} state matrices have frozen parameters, and the '
        f'stabilizers leave them alone: {shown}',
        logger='current',
        level=logging.WARNING,
    )


def say_if_blended(reports: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Say how much the condition number of the initialization has cost."""
    shares = [float(r['blend'].amax()) for r in reports if 'blend' in r]
    if max(shares, default=0.0) > 0:
        print_log(
            f'{sum(s > 0 for s in shares)} of {len(reports)} layers start '
            'with eigenvectors of a larger condition number than '
            'condition_max: they were blended with a normal matrix, by s up '
            f"to {max(shares):.2f} of 1. init='ptd' is a start that fits; "
            'condition_max=None leaves the condition number out',
            logger='current',
            level=logging.WARNING,
        )


def find_matrices(runner: Runner, what: str) -> dict[str, StateMatrix]:
    """The state matrices of the runner's model.

    Args:
        runner (Runner): The runner.
        what (str): Who needs them, for the error.

    Raises:
        RuntimeError: If the model has none.
    """
    matrices = state_matrices(bare_model(runner.model))
    if not matrices:
        raise RuntimeError(
            f'{what} found no state matrix in {type(runner.model).__name__}: '
            "it needs a backbone such as 'mmstabvim.VisionMamba'"
        )
    return matrices


def _hooks(runner: Runner, mode: str) -> list[StabilizerHook]:
    """The runner's stabilizers of a mode in the order in which they act.

    It does not depend on their order in the config.
    """
    ours = (h for h in runner.hooks if isinstance(h, StabilizerHook))
    return sorted(
        (h for h in ours if h.mode == mode),
        key=lambda h: min(rule.order for rule in h.rules),
    )


@torch.no_grad()
def project(
    hooks: Sequence[StabilizerHook], matrices: Mapping[str, StateMatrix]
) -> list[dict[str, torch.Tensor]]:
    """Make matrices obey the rules of all hooks, in place.

    Args:
        hooks (Sequence[StabilizerHook]): Source of the rules, in their order.
        matrices (Mapping[str, StateMatrix]): By name.

    Returns:
        list[dict[str, Tensor]]: Report of each projection; see
        :meth:`.StateMatrix.apply_`.

    Raises:
        ValueError: If a parameter of a matrix is not finite, or a rule
            cannot be obeyed.
    """
    if not matrices:
        return []
    check_finite(matrices)
    decompose_all(matrices)
    measuring = any(hook.measuring for hook in hooks)
    reports = []
    for name, matrix in matrices.items():
        before = [p.detach().clone() for p in matrix.free if measuring]
        report = matrix.apply_(*rules_of(hooks, name, matrix), name=name)
        if measuring:
            hooks[0].measured[name] = _changes(before, matrix) | report
        reports.append(report)
    return reports


def optimizers_of(
    wrapper: Any, modules: Mapping[str, nn.Module]
) -> Iterator[Optimizer]:
    """The optimizers that train a parameter of these modules."""
    own = (p for m in modules.values() for p in m.parameters(recurse=False))
    return optimizers_with(wrapper, own)


def _changes(
    before: Sequence[torch.Tensor], matrix: StateMatrix
) -> dict[str, torch.Tensor]:
    """Measure length and share of a projection, for each direction."""
    pairs = [
        (matrix.by_direction(a), matrix.by_direction(b))
        for a, b in zip(matrix.free, before, strict=True)
    ]
    moved = sum((a != b).flatten(1).sum(1) for a, b in pairs)
    squares = sum((a - b).float().square().flatten(1).sum(1) for a, b in pairs)
    numbers = sum(b[0].numel() for _, b in pairs)
    return {
        'projection_distance': torch.as_tensor(squares).sqrt(),
        'projected_share': torch.as_tensor(moved) / numbers,
    }

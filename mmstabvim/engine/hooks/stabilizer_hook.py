"""What the hooks that constrain state matrices have in common."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from mmstabvim.engine.hooks.after_step_hook import (
    AfterStepHook,
    optimizers_with,
)
from mmstabvim.layers.state_matrix import (
    Constraint,
    StateMatrix,
    check_finite,
    state_matrices,
)
from mmstabvim.stability.inputs import check_choice

MODES = ('project', 'reparam')
CHECKPOINT_KEY = 'projected_by'


class StabilizerHook(AfterStepHook):
    """Make every state matrix of the model obey a rule during training.

    ``mode='project'`` changes the parameters in place, once before training
    (after loading; a resumed run with the same rules has been projected) and
    then inside each optimizer step, through the optimizer's own post-step
    hook: a step that accumulates gradients, or that fp16 training skips,
    projects nothing. Averages kept by ``EMAHook`` are projected before they
    are evaluated or saved.

    ``mode='reparam'`` leaves the parameters free and applies the rule in
    every forward pass, with gradients through it.

    Args:
        mode (str): ``'project'`` or ``'reparam'``.
    """

    rule: Constraint
    """What the hook asks for."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        check_choice('mode', mode, MODES)
        self.mode = mode
        self.measuring = False
        self.measured: dict[str, dict[str, torch.Tensor]] = {}
        self._projected_by: list[str] | None = None  # says the checkpoint

    # ----------------------------------------------------- of a stabilizer

    def rule_for(self, name: str, matrix: StateMatrix) -> Constraint:
        """The rule of one matrix."""
        raise NotImplementedError

    def why_idle(self, matrix: StateMatrix) -> str | None:
        """Why the rule leaves this matrix as it is; None if it need not."""
        return None

    # ---------------------------------------------------------- life cycle

    def before_train(self, runner: Runner) -> None:
        """Find the matrices, apply the rules once, arm the optimizers."""
        matrices = find_matrices(runner, type(self).__name__)
        self._say_if_idle(matrices)
        if self.mode == 'reparam':
            self._install(matrices)
            return
        ours = _hooks(runner, 'project')
        if ours[0] is not self:
            return  # the first one acts for all, in their order
        # where two rules act, doing it again can give other matrices
        resumed = runner._resume and self._projected_by == _rules(ours)
        if not resumed:
            project(ours, matrices)
        for optimizer in optimizers_of(runner.optim_wrapper, matrices):
            self.arm(optimizer, lambda: project(ours, matrices))

    def before_val(self, runner: Runner) -> None:
        """The rules of the forward pass hold when a model is evaluated."""
        if self.mode == 'reparam':
            self._install(find_matrices(runner, type(self).__name__))

    def before_test(self, runner: Runner) -> None:
        """As before validation."""
        self.before_val(runner)

    def act_on_average(self, runner: Runner, model: nn.Module) -> None:
        """Project averages, which of stable matrices may be unstable."""
        ours = _hooks(runner, 'project')
        if ours and ours[0] is self:
            project(ours, state_matrices(model))

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Note by what the weights have been projected."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint[CHECKPOINT_KEY] = _rules(_hooks(runner, 'project'))

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the checkpoint's note until it is known who asks."""
        self._projected_by = checkpoint.get(CHECKPOINT_KEY)

    # --------------------------------------------------------------- parts

    def apply_(self, matrices: Mapping[str, StateMatrix]) -> None:
        """Project each matrix in place."""
        for name, matrix in matrices.items():
            before = [p.detach().clone() for p in self._measured_of(matrix)]
            matrix.apply_(self.rule_for(name, matrix))
            if before:
                self.measured[name] = _changes(before, matrix.raw())

    def _measured_of(self, matrix: StateMatrix) -> tuple[torch.Tensor, ...]:
        return matrix.raw() if self.measuring else ()

    def _install(self, matrices: Mapping[str, StateMatrix]) -> None:
        """Add the rule to the forward pass, in the order of the hooks."""
        for name, matrix in matrices.items():
            rule = self.rule_for(name, matrix)
            others = [
                r
                for r in matrix.reparametrizations
                if type(r) is not type(rule)
            ]
            matrix.reparametrizations = sorted(
                [*others, rule], key=lambda r: r.order
            )

    def _say_if_idle(self, matrices: Mapping[str, StateMatrix]) -> None:
        with torch.no_grad():
            reasons = {self.why_idle(matrix) for matrix in matrices.values()}
        if None not in reasons:
            print_log(
                f'{type(self).__name__} has nothing to change in this model: '
                + '; '.join(sorted(map(str, reasons))),
                logger='current',
                level=30,
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


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside a wrapper for distributed training."""
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model


def _hooks(runner: Runner, mode: str) -> list[StabilizerHook]:
    """The runner's stabilizers of a mode in the order in which they act.

    It does not depend on their order in the config.
    """
    ours = (h for h in runner.hooks if isinstance(h, StabilizerHook))
    return sorted(
        (h for h in ours if h.mode == mode), key=lambda h: h.rule.order
    )


def _rules(hooks: list[StabilizerHook]) -> list[str]:
    """What the hooks ask for, as text."""
    return [
        f'{hook.rule!r}, from_start={getattr(hook, "from_start", False)}'
        for hook in hooks
    ]


@torch.no_grad()
def project(
    hooks: list[StabilizerHook], matrices: Mapping[str, StateMatrix]
) -> None:
    """Apply the hooks' rules in place, in this order.

    Args:
        hooks (list[StabilizerHook]): What to apply.
        matrices (Mapping[str, StateMatrix]): To which matrices, by name.

    Raises:
        ValueError: If a parameter of a matrix is not finite.
    """
    check_finite(matrices)
    for hook in hooks:
        hook.apply_(matrices)


def optimizers_of(
    wrapper: Any, modules: Mapping[str, nn.Module]
) -> Iterator[Optimizer]:
    """The optimizers that train a parameter of these modules."""
    own = (p for m in modules.values() for p in m.parameters(recurse=False))
    return optimizers_with(wrapper, own)


def _changes(
    before: list[torch.Tensor], after: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """How far a projection went, and what share of the numbers it moved."""
    moved = [(a != b).sum() for a, b in zip(after, before, strict=True)]
    squares = [
        (a - b).float().square().sum()
        for a, b in zip(after, before, strict=True)
    ]
    return {
        'projection_distance': torch.stack(squares).sum().sqrt(),
        'projected_share': torch.stack(moved).sum()
        / sum(x.numel() for x in before),
    }

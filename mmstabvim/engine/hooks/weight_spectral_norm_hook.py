"""Bound the spectral norms of weights during training."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmstabvim.engine.hooks.after_step_hook import AfterStepHook
from mmstabvim.engine.hooks.stabilizer_hook import MODES
from mmstabvim.engine.runner_access import (
    averages_of,
    bare_model,
    hooks_of,
    is_resumed,
    optimizers_with,
    refresh_average,
    wrap_again,
)
from mmstabvim.engine.weight_reparametrization import (
    RawStates,
    join,
    live_and_average,
    restore,
    separate,
    train_with,
)
from mmstabvim.registry import HOOKS
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.weights.layers import (
    START_STEPS,
    WeightGroup,
    find_layers,
    group_layers,
    layer_norms,
    project_norms_,
    weight_parameter,
)
from mmstabvim.stability.weights.parametrizations import (
    PARAMETRIZED_RULES,
    parametrize_norm,
)

CHECKPOINT_KEY = 'weight_spectral_norm'


@HOOKS.register_module()
class WeightSpectralNormHook(AfterStepHook):
    """``W <- W / max(1, norm(W) / max_norm)`` after each optimizer step.

    The norm is the largest singular value of the layer as a linear map of its
    input, without the bias: exact for linear layers and for patch embeddings
    whose patches do not overlap, at most 0.07 % too large for depthwise
    convolutions along a sequence, a bound for other convolutions.

    ``mode='project'`` changes the weights in place, once before training with
    the exact norms and then inside each optimizer step. The norms of matrices
    come from power iteration that goes on from step to step: an estimate from
    below, so a weight may exceed its bound by what the estimate has not yet
    caught up with; ``exact=True`` excludes that. Where the rule holds already
    not a bit changes.

    ``mode='reparam'`` leaves the parameters free and applies the rule in
    every forward pass, with gradients through it. Checkpoints hold the
    weights that the layers compute with, under their usual names, so any
    model loads them and evaluating needs no hook; what a resumed run needs
    beyond that is kept beside them. ``EMAHook`` averages the free parameters,
    whose norms are then estimated with the vectors of the model. Recomputing
    blocks in the backward pass (``with_cp``) makes another step of power
    iteration.

    Args:
        layers (Sequence[str]): Name patterns of linear and convolution
            layers: whole parts of the dotted name, ``*`` for anything.
            Defaults to the projections of a Vision Mamba.
        max_norm (float | str): Largest norm, or the norm itself where ``rule``
            divides by it, > 0; ``'init'`` for each layer's norm at the start
            of training, which is kept in the checkpoint. For
            ``rule='learned'`` the gain's first value. Defaults to 1.0.
        rule (str): ``'bound'``; ``'divide'``, literally ``W / norm(W)``,
            which also enlarges what is smaller; or, where ``mode='reparam'``,
            ``'learned'``, ``gain W / norm(W)`` with a trained gain, which is
            optimized as the layer's weight is. Defaults to ``'bound'``.
        mode (str): ``'project'`` in place after each step, or ``'reparam'``
            in every forward pass. Defaults to ``'project'``.
        exact (bool): Compute norms by singular value decompositions at every
            step, which takes longer. Defaults to False.
        steps (int): Power iterations each time, >= 1. Defaults to 1.

    Raises:
        ValueError: If an argument is out of range, or at the start of
            training a pattern matches no layer.

    Source: arXiv:1802.05957; the learned gain arXiv:2303.06296.
    """

    def __init__(
        self,
        layers: Sequence[str] = ('in_proj', 'x_proj', 'dt_proj', 'out_proj'),
        max_norm: float | str = 1.0,
        rule: str = 'bound',
        mode: str = 'project',
        exact: bool = False,
        steps: int = 1,
    ) -> None:
        super().__init__()
        check_choice('rule', rule, PARAMETRIZED_RULES)
        check_choice('mode', mode, MODES)
        _check_max_norm(max_norm)
        if mode == 'project' and rule == 'learned':
            raise ValueError("rule='learned' needs mode='reparam'")
        if mode == 'reparam' and exact:
            raise ValueError("exact=True needs mode='project'")
        if steps < 1:
            raise ValueError(f'steps must be at least 1, got {steps}')
        self.patterns, self.max_norm, self.rule = layers, max_norm, rule
        self.mode, self.exact, self.steps = mode, exact, steps
        if mode == 'reparam':
            # after EMAHook, which exchanges entries of equal names
            self.priority = 'BELOW_NORMAL'
        self.names: tuple[str, ...] = ()
        self.bounds: dict[str, float] = {}
        self.gains: dict[str, nn.Parameter] = {}
        self._groups: list[WeightGroup] = []
        self._parametrized = False
        self._loaded: dict[str, Any] = {}

    # ---------------------------------------------------------- life cycle

    def before_run(self, runner: Runner) -> None:
        """Give learned gains to the optimizer before its state is loaded."""
        training = isinstance(runner.optim_wrapper, OptimWrapper)
        if self.rule != 'learned' or self.gains or not training:
            return
        for name, layer in self._find(runner).items():
            weight = weight_parameter(layer)
            gain = self.gains[name] = nn.Parameter(weight.new_ones(()))
            optimizers = optimizers_with(runner.optim_wrapper, [weight])
            train_with(optimizers, weight, gain)

    def before_train(self, runner: Runner) -> None:
        """Find the layers, apply the rule once, arm the optimizers."""
        layers = self._find(runner)
        self.names = tuple(layers)
        self._refuse_overlap(runner)
        loaded = self._loaded if is_resumed(runner) else {}
        self._set_bounds(layers, loaded.get('bounds', {}))
        if self.mode == 'reparam':
            self._reparametrize(runner, loaded.get('raw', {}))
            return
        self._start(layers, loaded)
        weights = map(weight_parameter, layers.values())
        for optimizer in optimizers_with(runner.optim_wrapper, weights):
            self.arm(optimizer, self.project)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep vectors and bounds; give weights their usual names."""
        super().before_save_checkpoint(runner, checkpoint)
        if not self.names:
            return
        kept = dict(bounds=self.bounds, vectors=self._vectors())
        if self.mode == 'reparam':
            kept['raw'] = separate(checkpoint, self._find(runner))
        _merge(checkpoint.setdefault(CHECKPOINT_KEY, {}), kept)

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep them until training starts; in training go back to them."""
        self._loaded = checkpoint.get(CHECKPOINT_KEY, {})
        for group in self._groups:
            group.take_vectors(self._loaded.get('vectors', {}))
        raw = self._loaded.get('raw')
        if self._parametrized and raw:
            join(checkpoint, self._restore(runner, raw))

    def act_on_average(self, runner: Runner, model: nn.Module) -> None:
        """Apply the rule to averages of weights, exactly."""
        if self.mode == 'project' and self.names:
            groups = group_layers(find_layers(model, self.patterns))
            project_norms_(groups, self.bounds, self.rule, None)

    # --------------------------------------------------------------- parts

    def project(self) -> None:
        """Apply the rule in place, as after a step."""
        steps = None if self.exact else self.steps
        project_norms_(self._groups, self.bounds, self.rule, steps)

    def norms(self, runner: Runner) -> dict[str, float]:
        """Return the layers' norms, exact or bounds; changes nothing."""
        return layer_norms(self._find(runner))

    def _find(self, runner: Runner) -> dict[str, nn.Module]:
        return find_layers(bare_model(runner.model), self.patterns)

    def _refuse_overlap(self, runner: Runner) -> None:
        """Refuse two hooks that pull one weight to two norms."""
        for hook in hooks_of(runner, WeightSpectralNormHook):
            shared = set(hook.names) & set(self.names)
            if hook is not self and shared:
                raise ValueError(
                    f'two hooks choose the same layers: {sorted(shared)[:5]}'
                )

    def _set_bounds(
        self, layers: dict[str, nn.Module], loaded: dict[str, float]
    ) -> None:
        """Set the bound of each layer, the norm at the start for ``init``."""
        if self.max_norm != 'init':
            self.bounds = dict.fromkeys(layers, float(self.max_norm))
            return
        new = {n: layer for n, layer in layers.items() if n not in loaded}
        norms = {**loaded, **layer_norms(new)}
        self.bounds = {name: norms[name] for name in layers}
        zero = [name for name, bound in self.bounds.items() if bound == 0]
        if zero:
            raise ValueError(f"max_norm='init': the norm of {zero} is 0")

    def _start(
        self, layers: dict[str, nn.Module], loaded: dict[str, Any]
    ) -> None:
        """Project the weights that were not projected before."""
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer, 'weight'):
                raise ValueError(
                    f'the weight of {name} is parametrized: it cannot be '
                    "changed in place, use mode='reparam'"
                )
        known = loaded.get('bounds', {})
        new = {n: layer for n, layer in layers.items() if n not in known}
        vectors = dict(loaded.get('vectors', {}))
        groups = group_layers(new)
        if groups:
            project_norms_(groups, self.bounds, self.rule, None)
        for group in groups:
            group.estimate(START_STEPS)
            vectors.update(group.vectors)
        self._groups = group_layers(layers)
        for group in self._groups:
            group.take_vectors(vectors)

    def _vectors(self) -> dict[str, Tensor]:
        return {
            name: vector.cpu()
            for group in self._groups
            for name, vector in group.vectors.items()
        }

    def _reparametrize(self, runner: Runner, raw: RawStates) -> None:
        """Parametrize the model's layers and those of its average."""
        if self._parametrized:
            return
        self._parametrized = True
        model = bare_model(runner.model)
        self._install(model, self.gains)
        for average in averages_of(runner):
            self._install(average.module, {})
            refresh_average(average)
        if raw:
            self._restore(runner, raw)
        if self.gains:
            wrap_again(runner, model)

    def _install(
        self, model: nn.Module, gains: dict[str, nn.Parameter]
    ) -> None:
        keep = self.rule == 'learned' and self.max_norm == 'init'
        owners = Counter(
            id(p)
            for module in model.modules()
            for p in module.parameters(False)
        )
        for name, layer in find_layers(model, self.patterns).items():
            if owners[id(weight_parameter(layer))] > 1:
                raise ValueError(
                    f'{name}: the weight is shared with another module, '
                    "which would keep the free one: use mode='project'"
                )
            try:
                parametrize_norm(
                    layer,
                    self.rule,
                    None if keep else self.bounds[name],
                    self.steps,
                    gains.get(name),
                )
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from error

    def _restore(self, runner: Runner, raw: RawStates) -> dict[str, Any]:
        """Load free parameters; return those of the model."""
        averages = list(averages_of(runner))
        live, average = live_and_average(raw, bool(averages))
        restore(self._find(runner), live)
        for averaged in averages:
            layers = find_layers(averaged.module, self.patterns)
            restore(layers, average)
        return {name: live[name] for name in self.names if name in live}


def _check_max_norm(max_norm: float | str) -> None:
    if max_norm == 'init':
        return
    if isinstance(max_norm, str) or not 0 < max_norm < math.inf:
        raise ValueError(
            f"max_norm must be a positive number or 'init', got {max_norm!r}"
        )


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the entries of nested dictionaries, so that hooks can share one."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value

"""Bound the stable ranks of weights during training."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from mmstabvim.engine.hooks.after_step_hook import AfterStepHook
from mmstabvim.engine.runner_access import (
    bare_model,
    is_resumed,
    optimizers_with,
)
from mmstabvim.registry import HOOKS
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.weights.kernel_normalization import (
    MODES,
    SOLVERS,
    normalize_kernel_stable_rank,
)
from mmstabvim.stability.weights.kernel_spectrum import kernel_stable_rank
from mmstabvim.stability.weights.layers import find_layers, weight_parameter
from mmstabvim.stability.weights.stable_rank import (
    normalize_stable_rank,
    stable_rank,
)

CHECKPOINT_KEY = 'stable_rank'
TARGETS = dict(in_proj=0.3, x_proj=0.3, dt_proj=0.3, out_proj=0.3, conv1d=0.5)


@HOOKS.register_module()
class StableRankHook(AfterStepHook):
    """Bound stable ranks, ``||W||_F^2 / ||W||_2^2``, after optimizer steps.

    Each weight becomes the closest one of the stable rank that is asked for,
    with the same spectral norm; weights with a lower stable rank stay bit by
    bit as they are. Scaling a weight does not change its stable rank, so the
    rule goes together with :class:`WeightSpectralNormHook`, after which it
    acts.

    Linear layers and convolutions whose patches do not overlap are taken as
    matrices, depthwise convolutions of stride 1 channel by channel as
    circulant matrices.

    Args:
        targets (dict[str, float], optional): Share of the largest stable
            rank that a weight may have, in (0, 1], by name patterns of layers
            as in :class:`WeightSpectralNormHook`. The largest one is
            min(m, n) for matrices, whose target is at least 1, and the number
            of tokens or pixels for kernels, whose share cannot be less than
            1 / taps. Defaults to 0.3
            for the projections of a Vision Mamba and 0.5 for its convolution.
        preserved (int): Number of singular values of a matrix that keep their
            value; with 2 or more the target may become too low for them,
            which is an error. Defaults to 1.
        mode (str): ``'reduce'``, or ``'equal'`` to raise the stable ranks of
            kernels, too; those of matrices are never raised. Defaults to
            ``'reduce'``.
        solver (str): ``'exact'``, or ``'rgd'`` or ``'srn_c'``, which miss the
            target, see :func:`normalize_kernel_stable_rank`; for kernels.
            Defaults to ``'exact'``.
        solver_options (dict, optional): Options of the solver. Defaults to
            None.
        length (int | Sequence[int], optional): Period of the circulant
            matrices: tokens, or rows and columns. Defaults to None, the
            number of tokens of the model's :class:`VisionMamba`.
        interval (int): Act after every so many optimizer steps. Between them
            the weights are free, in checkpoints too. Defaults to 1.

    Raises:
        ValueError: If an argument is out of range, or at the start of
            training a pattern matches no layer, or a layer that the rule
            cannot be applied to.

    Source: arXiv:1906.04659; Zheng et al., Analysis of the Stable Rank
    Normalization for Convolutional Kernels.
    """

    # after the hooks that bound norms, before EMAHook swaps its averages in
    priority: Any = 45

    def __init__(
        self,
        targets: dict[str, float] | None = None,
        preserved: int = 1,
        mode: str = 'reduce',
        solver: str = 'exact',
        solver_options: dict[str, Any] | None = None,
        length: int | Sequence[int] | None = None,
        interval: int = 1,
    ) -> None:
        super().__init__()
        self.targets = dict(TARGETS if targets is None else targets)
        check_choice('mode', mode, MODES)
        check_choice('solver', solver, SOLVERS)
        _check_numbers(self.targets, preserved, interval)
        self.preserved = preserved
        self.kernel_options = dict(
            mode=mode, solver=solver, **(solver_options or {})
        )
        self.length, self.interval = length, interval
        self.steps = 0
        self._shares: dict[str, float] = {}  # by layer
        self._groups: list[_Group] = []
        self._loaded: dict[str, int] | None = None

    # ---------------------------------------------------------- life cycle

    def before_train(self, runner: Runner) -> None:
        """Find the layers, apply the rule once, arm the optimizers."""
        model = bare_model(runner.model)
        self._shares = _shares_by_layer(model, self.targets)
        self._groups = self._group(model)
        self._say_if_idle()
        # between two times that it acts a resumed run has free weights
        resumed = self._loaded if is_resumed(runner) else None
        self.steps = resumed['steps'] if resumed else 0
        if self.steps % self.interval == 0:
            self._project_and_report()
        weights = [w for group in self._groups for w in group.weights()]
        for optimizer in optimizers_with(runner.optim_wrapper, weights):
            self.arm(optimizer, self._after_step)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the number of steps."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint[CHECKPOINT_KEY] = dict(steps=self.steps)

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the checkpoint's number until it is known who asks."""
        self._loaded = checkpoint.get(CHECKPOINT_KEY)

    def act_on_average(self, runner: Runner, model: nn.Module) -> None:
        """Apply the rule to averages, which might break it."""
        for group in self._group(model):
            self._project(group)

    # --------------------------------------------------------------- parts

    def project(self) -> None:
        """Apply the rule to the weights that are trained, in place."""
        for group in self._groups:
            self._project(group)

    def _after_step(self) -> None:
        self.steps += 1
        if self.steps % self.interval == 0:
            self.project()

    @torch.no_grad()
    def _project(self, group: '_Group') -> None:
        """Apply the rule to weights of one shape, in place."""
        weights = group.stack()
        # the least difference that is more than the dtype's rounding
        slack = max(1e-6, torch.finfo(weights.dtype).eps)
        with torch.autocast(weights.device.type, enabled=False):
            if group.size is None:
                changed = normalize_stable_rank(
                    weights, group.rank, self.preserved, slack
                )
            else:
                changed = normalize_kernel_stable_rank(
                    weights,
                    group.size,
                    group.rank,
                    slack=slack,
                    **self.kernel_options,
                )
        for weight, new in zip(group.weights(), changed, strict=True):
            weight.copy_(new.reshape(weight.shape))

    def _group(self, model: nn.Module) -> list['_Group']:
        """Group the layers by shape and target; none before training."""
        length = self.length or _token_count(model)
        groups: dict[tuple, dict[str, nn.Module]] = {}
        for name, share in self._shares.items():
            layer = model.get_submodule(name)
            weight = weight_parameter(layer)
            matrix = _acts_as_matrix(name, layer)
            taps = tuple(weight.shape[2:])
            size = None if matrix else _grid(name, length, taps)
            rank = _target_rank(name, weight, share, size)
            key = rank, size, weight.shape, weight.dtype, weight.device
            groups.setdefault(key, {})[name] = layer
        return [_Group(members, *key[:2]) for key, members in groups.items()]

    def _project_and_report(self) -> None:
        """Apply the rule for the first time, and log its effect."""
        before = [group.shares() for group in self._groups]
        self.project()
        lines = []
        for group, old in zip(self._groups, before, strict=True):
            new = group.shares()
            lines.append(
                f'{len(group.layers)} like {next(iter(group.layers))}: '
                f'{old.min():.3f} to {old.max():.3f}, now {new.min():.3f} '
                f'to {new.max():.3f}'
            )
        print_log(
            'stable ranks as shares of the largest possible\n  '
            + '\n  '.join(lines),
            logger='current',
        )

    def _say_if_idle(self) -> None:
        idle = [name for name, share in self.targets.items() if share == 1]
        if idle and self.kernel_options['mode'] == 'reduce':
            print_log(
                f'StableRankHook never changes {", ".join(idle)}: a share of '
                '1 is no bound',
                logger='current',
                level=logging.WARNING,
            )


class _Group(NamedTuple):
    """Layers whose weights have one shape and one target.

    Attributes:
        layers (Mapping[str, Module]): The layers, by name.
        rank (float): Largest stable rank.
        size (tuple[int, ...] | None): Period of depthwise kernels, None for
            matrices.
    """

    layers: Mapping[str, nn.Module]
    rank: float
    size: tuple[int, ...] | None

    def weights(self) -> list[Tensor]:
        """List the parameters, in the order of the layers."""
        return [weight_parameter(layer) for layer in self.layers.values()]

    @torch.no_grad()
    def stack(self) -> Tensor:
        """Stack matrices (layers, m, n) or kernels (layers, channels, ...)."""
        stacked = torch.stack(self.weights())
        finite = torch.isfinite(stacked).flatten(1).all(-1)
        if not finite.all():
            name = list(self.layers)[int(finite.int().argmin())]
            raise ValueError(f'{name}.weight has a NaN or an infinity')
        return stacked.flatten(2) if self.size is None else stacked.squeeze(2)

    def shares(self) -> Tensor:
        """Return stable ranks over the largest possible one, any shape."""
        weights = self.stack()
        if self.size is None:
            return stable_rank(weights) / min(weights.shape[1:])
        ranks = kernel_stable_rank(weights, self.size)
        return ranks / math.prod(self.size)


def _check_numbers(
    targets: Mapping[str, float], preserved: int, interval: int
) -> None:
    for pattern, share in targets.items():
        if not 0 < share <= 1:
            raise ValueError(
                f'targets must be shares in (0, 1], got {share} for '
                f'{pattern!r}'
            )
    if preserved < 0:
        raise ValueError(f'preserved must not be negative, got {preserved}')
    if interval < 1:
        raise ValueError(f'interval must be at least 1, got {interval}')


def _shares_by_layer(
    model: nn.Module, targets: Mapping[str, float]
) -> dict[str, float]:
    """Find the shares of the layers that are trained, by name."""
    shares: dict[str, float] = {}
    for pattern, share in targets.items():
        for name, layer in find_layers(model, [pattern]).items():
            if shares.get(name, share) != share:
                raise ValueError(
                    f'targets: {name} matches two patterns, {pattern!r} and '
                    'one before it, with different shares'
                )
            if weight_parameter(layer).requires_grad:
                shares[name] = share
    if not shares:
        raise ValueError(f'targets: {list(targets)} match frozen weights only')
    return shares


def _acts_as_matrix(name: str, layer: Any) -> bool:
    """Tell a layer that is one matrix for each patch from kernels."""
    if isinstance(layer, nn.Linear):
        return True
    ones = tuple(1 for _ in layer.kernel_size)
    unpadded = layer.padding in ('valid', tuple(0 for _ in ones))
    if layer.groups == 1 and layer.stride == layer.kernel_size and unpadded:
        return True
    alone = layer.groups == layer.in_channels
    if alone and layer.stride == ones and layer.dilation == ones:
        return False
    raise ValueError(
        f'{name} must be a linear layer, a convolution of patches that do not '
        f'overlap, or a depthwise one of stride and dilation 1, got {layer}'
    )


def _token_count(model: nn.Module) -> int | None:
    """Count the tokens of the model's Vision Mamba, None without one."""
    for module in model.modules():
        if hasattr(module, 'grid') and hasattr(module, 'num_extra_tokens'):
            rows, columns = cast(Any, module).grid
            return rows * columns + cast(Any, module).num_extra_tokens
    return None


def _grid(
    name: str, length: int | Sequence[int] | None, taps: Sequence[int]
) -> tuple[int, ...]:
    """Return the period of a layer's kernels."""
    size = (length,) if isinstance(length, int) else tuple(length or ())
    if len(size) != len(taps):
        raise ValueError(
            f'length must have {len(taps)} numbers for {name} with its '
            f'{tuple(taps)} taps, got {length}'
        )
    return size


def _target_rank(
    name: str, weight: Tensor, share: float, size: tuple[int, ...] | None
) -> float:
    """Return the stable rank that a share stands for."""
    if size is None:
        return max(1.0, share * min(weight.flatten(1).shape))
    taps = math.prod(weight.shape[2:])
    if share * taps < 1 - 1e-9:
        raise ValueError(
            f'targets must be at least 1 / taps for kernels: {name} has '
            f'{taps} taps, so at least {1 / taps:.4g}, got {share}'
        )
    return share * math.prod(size)

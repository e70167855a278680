"""Watch the state matrices, step sizes and gradients during training."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmstabvim.engine.hooks.stabilizer_hook import (
    StabilizerHook,
    optimizers_of,
)
from mmstabvim.engine.runner_access import bare_model
from mmstabvim.layers.scan_order import direction_name
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import (
    Full,
    StateMatrix,
    StateMatrixView,
    decompose_all,
    state_matrices,
)
from mmstabvim.registry import HOOKS
from mmstabvim.stability.state.growth import growth_of_sums
from mmstabvim.stability.state.penalty import stability_penalty
from mmstabvim.stability.state.spectra import SMALLEST_COSINE

QUANTILES = (0.01, 0.5, 0.99)
FILE_NAME = 'stability.jsonl'
"""In the folder of the run; one JSON object per record."""

GROWTH = {'growth': 1, 'growth_4x': 4, 'growth_16x': 16}
"""Growth exponents, and at how many lengths of the sequence."""

_SNAPSHOTS = 20  # of the eigenvalues, if not told otherwise

Key = tuple[str | int, ...]
"""Layer, kind and name of a tensor that is brought to the host."""

SUMMARY: dict[str, Callable[[list[float]], float]] = {
    'spectral_radius': max,
    'spectral_abscissa': max,
    'decay_max': max,
    'horizon': max,
    'delta_max': max,
    'condition': max,
    'growth': max,
    'growth_4x': max,
    'growth_16x': max,
    'kind': max,
    'bounded_gradients': sum,
    'projected_matrices': sum,
    'blend': max,
    'stability_penalty': sum,
    'grad_norm': max,
    'projected_share': max,
    'projection_distance': max,
}
"""Values logged as one number over all directions, with its reduction."""


@HOOKS.register_module()
class StabilityMonitorHook(Hook):
    """Record every few iterations how stable each layer and direction is.

    For each: ``spectral_radius`` and ``spectral_abscissa`` of A (1/step),
    ``condition`` of the eigenvectors, ``stability_penalty`` (sum of the real
    parts above ``eps``), quantiles of the step size of this batch
    (``delta_q01``, ``delta_q50``, ``delta_q99``, ``delta_min``,
    ``delta_max``, ``delta_mean``), the range of ``|exp(delta A)|``
    (``decay_min``, ``decay_max``), the memory ``horizon`` of the slowest mode
    in tokens (1 over the product of the mean
    step and the real part), the ``growth`` exponent of a state along the
    sequence (nats) and, with the same steps, along one of 4 and of 16 times
    its length (``growth_4x``, ``growth_16x``), the norm of A's gradient as
    the optimizer sees it (unscaled and clipped), and what the stabilizers
    did: ``projected_share`` of the parameters and ``projection_distance``, in
    the mode ``'reparam'`` both of the eigenvalues. Of full matrices also
    ``kind``, how the scan runs (0 complex64, 1 complex128, 2 matrix
    exponential), ``bounded_gradients``, the number of nearly defective ones
    whose eigenvalues get a bounded gradient, and what a projection did:
    ``projected_matrices``, the largest share ``blend`` of a normal matrix,
    and ``fit_residual``.

    Written to ``stability.jsonl`` in the run's folder, to every visual
    backend as ``stab/<layer>/<name>``, and in one number over all layers to
    the message hub as ``train/stab/<name>``, which the log shows.

    All that a record needs reaches the host in one transfer, the parameters
    of the state matrices with it; eigenvalues are computed there. In a model
    without state matrices the norm of each layer's gradient is recorded.

    Args:
        interval (int): Iterations between two records. Defaults to 50.
        eps (float): Threshold of the penalty, 1/step. Defaults to 0.01.
        eigenvalue_interval (int, optional): Records between two that hold
            the eigenvalues themselves; 0 for none. Defaults to None, for
            about twenty over the whole training.
        max_eigenvalues (int): Eigenvalues kept of each layer and direction,
            evenly spread over its channels. Defaults to 256.

    Raises:
        ValueError: If an interval is out of range.
    """

    # after the gradients are there, before the log is written
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        interval: int = 50,
        eps: float = 0.01,
        eigenvalue_interval: int | None = None,
        max_eigenvalues: int = 256,
    ) -> None:
        few = eigenvalue_interval is not None and eigenvalue_interval < 0
        if interval < 1 or few or max_eigenvalues < 1:
            raise ValueError(
                'interval and max_eigenvalues must be at least 1 and '
                f'eigenvalue_interval at least 0, got {interval}, '
                f'{max_eigenvalues} and {eigenvalue_interval}'
            )
        self.interval, self.eps = interval, eps
        self.eigenvalue_interval = eigenvalue_interval
        self.max_eigenvalues = max_eigenvalues
        self._steps: dict[str, dict[str, Tensor]] = {}
        self._grads: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._records = 0

    def before_train(self, runner: Runner) -> None:
        """Look at gradients inside the step: after it they are gone."""
        model = bare_model(runner.model)
        modules = state_matrices(model) or layers_with_parameters(model)

        def look(*_: Any) -> None:
            if self._is_due(runner):
                self._grads = gradient_norms(modules)

        for optimizer in optimizers_of(runner.optim_wrapper, modules):
            self._handles.append(optimizer.register_step_pre_hook(look))

    def after_train(self, runner: Runner) -> None:
        """Stop looking."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Start to look, in an iteration that is to be recorded."""
        if not self._is_due(runner):
            return
        self._steps.clear()
        self._grads.clear()
        for name, ssm in _ssms(runner).items():
            ssm.observers.append(self._observer(name))
        for hook in _stabilizers(runner):
            hook.measuring = True

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the record, stop looking."""
        if not self._is_due(runner):
            return
        ssms = _ssms(runner)
        stabilizers = _stabilizers(runner)
        for hook in stabilizers:
            hook.measuring = False
        table = self._table(ssms, stabilizers)
        for ssm in ssms.values():
            ssm.observers.clear()
        found = to_host(table)
        layers = {name: Layer(ssm, found, name) for name, ssm in ssms.items()}
        decompose_all({name: layer.matrix for name, layer in layers.items()})
        rows = {
            name: row
            for layer in layers.values()
            for name, row in layer.rows(self.eps).items()
        }
        if not ssms:
            rows = {
                str(name): {'grad_norm': x.item()}
                for (name, *_), x in found.items()
            }
        self._publish(runner, rows)
        self._write(runner, rows, layers)
        self._records += 1

    def _is_due(self, runner: Runner) -> bool:
        return runner.iter % self.interval == 0

    def _observer(self, name: str) -> Any:
        """Return a function of step sizes, whose last call counts."""

        @torch.no_grad()
        def look(delta: Tensor) -> None:
            wide = delta.detach().float()  # (K, batch, length, d_inner)
            flat = wide.flatten(1, 2)
            self._steps[name] = {
                'min': flat.amin(1),
                'max': flat.amax(1),
                'mean': flat.mean(1),
                'quantiles': torch.stack([quantiles(x) for x in flat]),
                # of the sequence with the largest sum in each channel
                'whole': wide.sum(2).amax(1),
            }

        return look

    def _table(
        self,
        ssms: Mapping[str, SelectiveSSM],
        stabilizers: list[StabilizerHook],
    ) -> dict[Key, Tensor]:
        """Collect all that a record needs, still on the device."""
        table: dict[Key, Tensor] = {}
        if not ssms:
            return {(name, 'grad'): x for name, x in self._grads.items()}
        for name, ssm in ssms.items():
            matrix = ssm.state_matrix
            for i, parameter in enumerate(matrix.free):
                table[name, 'free', i] = parameter
            for i, rule in enumerate(matrix.reparametrizations):
                bound = getattr(rule, 'rho_max', None)
                if isinstance(bound, Tensor):
                    table[name, 'bound', i] = bound
            if matrix.basis is not None:
                table[name, 'condition'] = matrix.condition()
            for key, value in self._steps.get(name, {}).items():
                table[name, 'step', key] = value
            grads = self._grads.get(f'{name}.state_matrix')
            if grads is not None:
                table[name, 'row', 'grad_norm'] = grads
            for hook in stabilizers:
                measured = hook.measured.get(f'{name}.state_matrix', {})
                for key, value in measured.items():
                    table[name, 'row', key] = value
        for hook in stabilizers:
            hook.measured.clear()
        return table

    def _publish(self, runner: Runner, rows: dict[str, dict]) -> None:
        for key, combine in SUMMARY.items():
            found = [row[key] for row in rows.values() if key in row]
            if found:
                runner.message_hub.update_scalar(
                    f'train/stab/{key}', combine(found)
                )
        runner.visualizer.add_scalars(
            {
                f'stab/{name}/{key}': value
                for name, row in rows.items()
                for key, value in row.items()
            },
            step=runner.iter + 1,
        )

    @master_only
    def _write(
        self,
        runner: Runner,
        rows: dict[str, dict],
        layers: dict[str, 'Layer'],
    ) -> None:
        record: dict[str, Any] = {
            'step': runner.iter + 1,
            'layers': list(rows),
        }
        keys = dict.fromkeys(key for row in rows.values() for key in row)
        for key in keys:
            record[key] = [row.get(key) for row in rows.values()]
        due = self.eigenvalue_interval
        if due is None:
            due = max(1, round(runner.max_iters / self.interval / _SNAPSHOTS))
        if due and self._records % due == 0:
            record['eigenvalues'] = {
                name: _some(values, self.max_eigenvalues)
                for layer in layers.values()
                for name, values in layer.eigenvalues().items()
            }
        with Path(runner.log_dir, FILE_NAME).open('a') as file:
            file.write(json.dumps(record) + '\n')


class Layer:
    """One layer as it was in an iteration, on the host.

    Args:
        ssm (SelectiveSSM): The layer.
        found (Mapping[Key, Tensor]): Tensors of all layers.
        name (str): Of the layer.
    """

    def __init__(
        self, ssm: SelectiveSSM, found: Mapping[Key, Tensor], name: str
    ) -> None:
        self.own = {key[1:]: x for key, x in found.items() if key[0] == name}
        live = ssm.state_matrix
        self.matrix = StateMatrixView(
            live.parametrization.fresh(),
            self.part('free'),
            live.d_inner,
            [
                _with_bound(rule, self.own.get(('bound', i)))
                for i, rule in enumerate(live.reparametrizations)
            ],
        )
        self.basis_condition = self.own.get(('condition',))
        self.multiplicity = live.multiplicity
        self.names = [
            direction_name(name, k, live.directions)
            for k in range(live.directions)
        ]

    def part(self, kind: str) -> tuple[Tensor, ...]:
        """Return the numbered tensors of a kind, in their order."""
        return tuple(x for key, x in self.own.items() if key[0] == kind)

    @torch.no_grad()
    def eigenvalues(self) -> dict[str, Tensor]:
        """Compute the eigenvalues in use of each direction."""
        values = self.matrix.by_direction(self.matrix.eigenvalues())
        return dict(zip(self.names, values, strict=True))

    @torch.no_grad()
    def rows(self, eps: float) -> dict[str, dict[str, float]]:
        """Compute the numbers of each direction.

        Args:
            eps (float): Threshold of the penalty, 1/step.
        """
        matrix, split = self.matrix, self.matrix.by_direction
        values = split(matrix.eigenvalues())
        raw = split(matrix.eigenvalues(matrix.free))
        condition = self.basis_condition
        condition = matrix.condition() if condition is None else condition
        basis = _basis_rows(matrix)
        rows = {}
        for k, name in enumerate(self.names):
            row = {
                'spectral_radius': values[k].abs().amax(),
                'spectral_abscissa': values[k].real.amax(),
                'stability_penalty': self.multiplicity
                * stability_penalty(raw[k], eps, 'sum'),
                'condition': split(condition)[k].amax(),
                **{key: value[k] for key, value in basis.items()},
            }
            if matrix.reparametrizations:
                moved = values[k] != raw[k]
                row['projected_share'] = moved.float().mean()
                row['projection_distance'] = (values[k] - raw[k]).abs().norm()
            row |= self._known(k)
            steps = {
                str(key[1]): x[k]
                for key, x in self.own.items()
                if key[0] == 'step'
            }
            if steps:
                row |= _step_rows(values[k].real, steps, matrix.d_inner)
            rows[name] = {key: value.item() for key, value in row.items()}
        return rows

    def _known(self, number: int) -> dict[str, Tensor]:
        """Return the numbers of a direction that need no computation."""
        return {
            str(key[1]): x[number]
            for key, x in self.own.items()
            if key[0] == 'row'
        }


def layers_with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that hold parameters themselves, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def gradient_norms(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Compute the norm of the gradient of each module's own parameters.

    Args:
        modules (Mapping[str, nn.Module]): By name; those without gradient
            are left out.

    Returns:
        dict[str, Tensor]: Scalars; of state matrices (directions,).
    """
    norms = {}
    for name, module in modules.items():
        own = module.parameters(recurse=False)
        grads = [p.grad.detach() for p in own if p.grad is not None]
        if not grads:
            continue
        if isinstance(module, StateMatrix):
            parts = [module.by_direction(g).flatten(1) for g in grads]
            norms[name] = torch.cat(parts, 1).float().norm(dim=1)
        else:
            each = [grad.float().norm() for grad in grads]
            norms[name] = torch.stack(each).norm()
    return norms


def to_host(table: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Bring real tensors to the host, in one transfer.

    Args:
        table (Mapping[Key, Tensor]): On one device, any shapes.

    Returns:
        dict[Key, Tensor]: The same, float32 or wider.
    """
    tensors = [x.detach() for x in table.values()]
    dtype = torch.float32
    for x in tensors:
        if x.is_floating_point():
            dtype = torch.promote_types(dtype, x.dtype)
    device = tensors[0].device if tensors else torch.device('cpu')
    flat = [x.to(device, dtype).reshape(-1) for x in tensors]
    together = torch.cat(flat).cpu() if flat else torch.empty(0)
    parts = together.split([len(x) for x in flat])
    return {
        key: part.reshape(x.shape)
        for (key, x), part in zip(table.items(), parts, strict=True)
    }


def _with_bound(rule: Any, rho_max: Tensor | None) -> Any:
    if rho_max is None:
        return rule
    return dataclasses.replace(rule, rho_max=rho_max)


def quantiles(x: Tensor, most: int = 1 << 16) -> Tensor:
    """Quantiles of all elements, of a sample of rows where there are many."""
    flat = some_rows(x, most).reshape(-1)
    return torch.quantile(flat, flat.new_tensor(QUANTILES))


def some_rows(x: Tensor, most: int) -> Tensor:
    """Whole rows, evenly spread: about ``most`` numbers, one row at least.

    A stride over single numbers would favour some columns where the two have
    a common divisor.
    """
    return x[:: -(-x.numel() // most)]


def _step_rows(
    real: Tensor, steps: dict[str, Tensor], d_inner: int
) -> dict[str, Tensor]:
    """Combine the eigenvalues' real parts with the step sizes."""
    real = real.repeat_interleave(d_inner // len(real), 0)
    low, high = real.amin(-1), real.amax(-1)  # (d_inner,)
    least, most = steps['min'], steps['max']
    slowest = torch.where(high > 0, most * high, least * high).amax()
    fastest = torch.where(low > 0, least * low, most * low).amin()
    horizon = 1 / (real.abs().amin(-1) * steps['mean'])
    names = [f'delta_q{round(100 * q):02d}' for q in QUANTILES]
    return {
        'delta_min': least.amin(),
        'delta_max': most.amax(),
        'delta_mean': steps['mean'].mean(),
        **dict(zip(names, steps['quantiles'], strict=True)),
        'decay_max': slowest.exp(),
        'decay_min': fastest.exp(),
        'horizon': horizon.amax(),
        **{
            key: growth_of_sums(times * steps['whole'], least, real)
            for key, times in GROWTH.items()
        },
    }


def _basis_rows(matrix: StateMatrixView) -> dict[str, Tensor]:
    """Tell how the scan and the gradient of full matrices are computed."""
    basis, full = matrix.eigenbasis(), matrix.parametrization
    if basis is None or not isinstance(full, Full):
        return {}
    # a layer runs as its worst matrix needs
    kind = basis.kind(full.kappa_max, gradient=True).amax()
    bounded = matrix.by_direction(basis.cosine) < SMALLEST_COSINE
    return {
        'kind': kind.expand(matrix.directions),
        'bounded_gradients': bounded.sum(1),
    }


def _ssms(runner: Runner) -> dict[str, SelectiveSSM]:
    """Find the layers with state matrices, by name."""
    return {
        name: module
        for name, module in bare_model(runner.model).named_modules()
        if isinstance(module, SelectiveSSM)
    }


def _stabilizers(runner: Runner) -> list[StabilizerHook]:
    return [h for h in runner.hooks if isinstance(h, StabilizerHook)]


def _some(values: Tensor, most: int) -> list[list[float]]:
    """Choose eigenvalues (rows, N), evenly spread over the channels.

    Returns:
        list[list[float]]: (real, imaginary).
    """
    chosen = some_rows(values, most).reshape(-1)
    return torch.view_as_real(chosen + 0j).tolist()

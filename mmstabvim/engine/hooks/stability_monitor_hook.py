"""Watch the state matrices, step sizes and gradients during training."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
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
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import (
    FullStateMatrix,
    StateMatrix,
    decompose_together,
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

# prefixes of what is brought to the host and not recorded as it is
_OWN, _STEP, _BOUND = 'own:', 'step:', 'rho_max:'

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
"""What is logged as one number over all layers and directions, and how."""


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
        matrices = {name: ssm.state_matrix for name, ssm in ssms.items()}
        measured = self.collect(matrices)
        for hook in _stabilizers(runner):
            hook.measuring = False
            for name, values in hook.measured.items():
                row = measured[name.removesuffix('.state_matrix')]
                for key, value in values.items():
                    row[key] = row[key].maximum(value) if key in row else value
            hook.measured.clear()
        for ssm in ssms.values():
            ssm.observers.clear()
        found = to_host({**measured, **parameters_of(matrices)})
        twins = {
            name: on_host(matrix, found[_OWN + name])
            for name, matrix in matrices.items()
        }
        decompose_together(twins.values())
        rows = {
            name: self._row(found[name], twins.get(name)) for name in measured
        }
        self._publish(runner, rows)
        self._write(runner, rows, twins)
        self._records += 1

    def _is_due(self, runner: Runner) -> bool:
        return runner.iter % self.interval == 0

    def _observer(self, name: str) -> Any:
        """Called by a direction with its step sizes; last call counts."""

        @torch.no_grad()
        def look(delta: Tensor) -> None:
            flat = delta.detach().float().flatten(0, -2)  # (tokens, d_inner)
            self._steps[name] = {
                'min': flat.amin(0),
                'max': flat.amax(0),
                'mean': flat.mean(0),
                'quantiles': quantiles(flat),
                # of the sequence with the largest sum in each channel
                'whole': delta.detach().float().sum(-2).flatten(0, -2).amax(0),
            }

        return look

    def collect(
        self, matrices: Mapping[str, StateMatrix]
    ) -> dict[str, dict[str, Tensor]]:
        """What steps and gradients have shown, still on the device.

        Args:
            matrices (Mapping[str, StateMatrix]): By the names of their
                layers; empty for a model without any.

        Returns:
            dict[str, dict[str, Tensor]]: A row for each layer.
        """
        if not matrices:
            return {n: {'grad_norm': norm} for n, norm in self._grads.items()}
        table = {}
        for name in matrices:
            row = {_STEP + k: v for k, v in self._steps.get(name, {}).items()}
            if f'{name}.state_matrix' in self._grads:
                row['grad_norm'] = self._grads[f'{name}.state_matrix']
            table[name] = row
        return table

    @torch.no_grad()
    def _row(
        self, found: Mapping[str, Tensor], matrix: StateMatrix | None
    ) -> dict[str, float]:
        """Numbers of one direction of one layer, from tensors on the host."""
        steps = {
            key.removeprefix(_STEP): value
            for key, value in found.items()
            if key.startswith(_STEP)
        }
        row = {k: v for k, v in found.items() if not k.startswith(_STEP)}
        if matrix is not None:
            values, raw = matrix.eigenvalues(), matrix.raw_eigenvalues()
            row = {
                'spectral_radius': values.abs().amax(),
                'spectral_abscissa': values.real.amax(),
                'stability_penalty': matrix.multiplicity
                * stability_penalty(raw, self.eps, 'sum'),
                'condition': matrix.condition(),
                **_basis_rows(matrix),
            } | row
            if matrix.reparametrizations:
                row['projected_share'] = (values != raw).float().mean()
                row['projection_distance'] = (values - raw).abs().norm()
            if steps:
                row |= _step_rows(values.real, steps, matrix.d_inner)
        return {key: value.item() for key, value in row.items()}

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
        matrices: dict[str, StateMatrix],
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
                name: _some(matrix, self.max_eigenvalues)
                for name, matrix in matrices.items()
            }
        with Path(runner.log_dir, FILE_NAME).open('a') as file:
            file.write(json.dumps(record) + '\n')


def layers_with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters themselves, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def gradient_norms(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Norm of the gradient of each module's own parameters, if any."""
    norms = {}
    for name, module in modules.items():
        own = module.parameters(recurse=False)
        grads = [p.grad for p in own if p.grad is not None]
        if grads:
            each = [grad.detach().float().norm() for grad in grads]
            norms[name] = torch.stack(each).norm()
    return norms


def to_host(
    table: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """Bring the real tensors of a table to the host, in one transfer.

    Args:
        table (Mapping[str, Mapping[str, Tensor]]): On one device, any shapes.

    Returns:
        dict[str, dict[str, Tensor]]: The same, float32 or wider.
    """
    tensors = [x.detach() for row in table.values() for x in row.values()]
    dtype = torch.float32
    for x in tensors:
        if x.is_floating_point():
            dtype = torch.promote_types(dtype, x.dtype)
    flat = [x.reshape(-1).to(dtype) for x in tensors]
    together = torch.cat(flat).cpu() if flat else torch.empty(0)
    parts = iter(together.split([len(x) for x in flat]))
    return {
        name: {key: next(parts).reshape(x.shape) for key, x in row.items()}
        for name, row in table.items()
    }


def parameters_of(
    matrices: Mapping[str, StateMatrix],
) -> dict[str, dict[str, Tensor]]:
    """Parameters, buffers and bounds of state matrices, for :func:`to_host`.

    Args:
        matrices (Mapping[str, StateMatrix]): By the names of their layers.

    Returns:
        dict[str, dict[str, Tensor]]: A row for each, by another name.
    """
    return {
        _OWN + name: {
            **dict(matrix.named_parameters()),
            **dict(matrix.named_buffers()),
            **_bounds(matrix),
        }
        for name, matrix in matrices.items()
    }


def on_host(matrix: StateMatrix, tensors: Mapping[str, Tensor]) -> StateMatrix:
    """A state matrix that computes with these tensors instead of its own.

    Args:
        matrix (StateMatrix): Is left as it is.
        tensors (Mapping[str, Tensor]): Its row of :func:`parameters_of`, on
            the host.

    Returns:
        StateMatrix: Another one, without gradient.
    """
    twin = copy.deepcopy(matrix, dict(_stand_ins(matrix, tensors)))
    twin.reparametrizations = [
        _with_bounds(rule, tensors.get(f'{_BOUND}{i}'))
        for i, rule in enumerate(matrix.reparametrizations)
    ]
    if isinstance(twin, FullStateMatrix):
        # of the tensors that are replaced
        twin._known = twin._obeying = twin.projection = None
    return twin


def _stand_ins(
    matrix: StateMatrix, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[int, Any]]:
    """What a deep copy takes in the place of the tensors of a matrix."""
    for name, parameter in matrix.named_parameters():
        yield id(parameter), nn.Parameter(tensors[name], requires_grad=False)
    for name, buffer in matrix.named_buffers():
        yield id(buffer), tensors[name]
    yield id(matrix.reparametrizations), []
    for name in ('_known', '_obeying', 'projection'):
        found = getattr(matrix, name, None)
        if found is not None:  # need not be copied
            yield id(found), ()


def _bounds(matrix: StateMatrix) -> dict[str, Tensor]:
    """Bounds of its rules that are tensors."""
    bounds = (getattr(r, 'rho_max', None) for r in matrix.reparametrizations)
    return {
        f'{_BOUND}{i}': bound
        for i, bound in enumerate(bounds)
        if isinstance(bound, Tensor)
    }


def _with_bounds(rule: Any, rho_max: Tensor | None) -> Any:
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
    """What follows from the eigenvalues' real parts and the step sizes."""
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


def _basis_rows(matrix: StateMatrix) -> dict[str, Tensor]:
    """How the scan runs with a full matrix, and how its gradient is taken."""
    if not isinstance(matrix, FullStateMatrix):
        return {}
    basis = matrix.eigenbasis()
    return {
        'kind': basis.kind(matrix.kappa_max, gradient=True).amax(),
        'bounded_gradients': (basis.cosine < SMALLEST_COSINE).sum(),
    }


def _ssms(runner: Runner) -> dict[str, SelectiveSSM]:
    """Directions of the model's layers by their names."""
    return {
        name: module
        for name, module in bare_model(runner.model).named_modules()
        if isinstance(module, SelectiveSSM)
    }


def _stabilizers(runner: Runner) -> list[StabilizerHook]:
    return [h for h in runner.hooks if isinstance(h, StabilizerHook)]


@torch.no_grad()
def _some(matrix: StateMatrix, most: int) -> list[list[float]]:
    """Eigenvalues as (real, imaginary), evenly spread over the channels."""
    chosen = some_rows(matrix.eigenvalues(), most).reshape(-1)
    return torch.view_as_real(chosen + 0j).tolist()

"""The selective scan in several versions, what they must give, their calls."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from _gpu import timing
from _gpu.roofline import Shape
from _gpu.stage import Stage
from mmstabvim.ops import selective_scan, selective_scan_directions

ROWS, CHANNELS = 2, 32
"""Last of their axes, compared with float64: it is slow."""

TOLERANCE = 3e-5
"""Of an array's largest magnitude, for thousands of float32 sums in a row."""

BOTH, ONE, FLIP = 'triton, one launch', 'triton', 'triton, flips'
MAMBA, MAMBA_FLIP = 'mamba_ssm', 'mamba_ssm, flips'
COPY = 'copy of the same bytes'

Inputs = dict[str, Tensor]
"""Of both directions, by the names of selective_scan_directions."""


@dataclasses.dataclass
class Version:
    """One way to compute the scan of one direction, or of both.

    Args:
        name (str): As in the table.
        directions (int): 1 or 2.
        scan (Callable): Takes the leaves, gives the output of each direction,
            (batch, length, dim).
        channels_first (bool): Wants mamba_ssm's layout: tokens last.
            Defaults to False.
    """

    name: str
    directions: int
    scan: Callable[..., list[Tensor]]
    channels_first: bool = False

    @property
    def foreign(self) -> bool:
        """Whether another project's: its layout tells."""
        return self.channels_first

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        """Inputs in this version's layout, requiring gradients."""
        tensors = list(inputs.values())
        if self.directions == 1:
            tensors = [x[0] for x in tensors]
        if self.channels_first:
            u, delta, A, B, C, D, bias = tensors
            u, delta = u.transpose(-1, -2), delta.transpose(-1, -2)
            B, C = (x.squeeze(-2).transpose(-1, -2) for x in (B, C))
            tensors = [u, delta, A, B, C, D, bias]
        return [x.detach().contiguous().requires_grad_() for x in tensors]

    def restore(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the leaves in the layout of the inputs."""
        tensors = list(grads)
        if self.channels_first:
            u, delta, A, B, C, D, bias = tensors
            u, delta = u.transpose(-1, -2), delta.transpose(-1, -2)
            B, C = (x.transpose(-1, -2).unsqueeze(-2) for x in (B, C))
            tensors = [u, delta, A, B, C, D, bias]
        return [x[None] for x in tensors] if self.directions == 1 else tensors


def find_mamba(stage: Stage) -> Callable[..., Tensor] | None:
    """mamba_ssm's function, if it can be imported; else says why not."""
    if stage.device != 'cuda':
        stage.record.note('mamba_ssm and the copy: skipped without a GPU.')
        return None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # whatever a foreign extension raises
        stage.record.note(
            f'mamba_ssm is not there ({type(error).__name__}: {error}); '
            '--build-mamba tries to build it.'
        )
        return None
    return selective_scan_fn


def make_versions(mamba: Callable[..., Tensor] | None) -> list[Version]:
    """Ours, and mamba_ssm's where it is."""
    flips = functools.partial(_flips, _one_direction, 1)
    versions = [
        Version(BOTH, 2, _both_directions),
        Version(ONE, 1, lambda *x: [_one_direction(*x)]),
        Version(FLIP, 2, flips),
    ]
    if mamba is None:
        return versions

    def one(*tensors: Tensor) -> Tensor:
        *inputs, bias = tensors
        return mamba(*inputs, delta_bias=bias, delta_softplus=True)

    def transposed(*tensors: Tensor) -> list[Tensor]:
        return [y.transpose(1, 2) for y in _flips(one, 2, *tensors)]

    return [
        *versions,
        Version(MAMBA, 1, lambda *x: [one(*x).transpose(1, 2)], True),
        Version(MAMBA_FLIP, 2, transposed, True),
    ]


def _both_directions(*tensors: Tensor) -> list[Tensor]:
    """One launch; the second direction walks backwards by index."""
    y = selective_scan_directions(
        *tensors,
        delta_softplus=True,
        reverse=(False, True),
        backend='triton',
    )
    return list(y.unbind())


def _one_direction(*tensors: Tensor) -> Tensor:
    *inputs, bias = tensors
    return selective_scan(
        *inputs,
        delta_bias=bias,
        delta_softplus=True,
        channels_last=True,
        backend='triton',
    )


def _flips(
    scan: Callable[..., Tensor], axis: int, *tensors: Tensor
) -> list[Tensor]:
    """Vim's way: flip the inputs, scan forwards, flip the output.

    Vim flips x and its gate before the convolution: as many bytes as u and
    delta here.
    """
    ahead, behind = ([x[k] for x in tensors] for k in (0, 1))
    for i in (0, 1, 3, 4):  # u, delta, B, C
        behind[i] = behind[i].flip(axis)
    return [scan(*ahead), scan(*behind).flip(axis)]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Inputs of two directions."""

    def normal(*size: int) -> Tensor:
        return torch.randn(2, *size, device=device)

    batch, length, dim, state = shape
    modes = torch.arange(1.0, state + 1, device=device)
    return dict(
        u=normal(batch, length, dim).to(dtype),
        delta=(normal(batch, length, dim) - 4).to(dtype),
        A=-modes.repeat(2, dim, 1),
        B=normal(batch, length, 1, state).to(dtype),
        C=normal(batch, length, 1, state).to(dtype),
        D=normal(dim),
        delta_bias=normal(dim),
    )


def _of_subset(name: str, shape: Sequence[int]) -> tuple[slice, ...]:
    """Index of the checked rows and channels in a tensor of the scan."""
    rows = slice(max(0, shape[1] - ROWS), None)
    channels = slice(max(0, shape[-1] - CHANNELS), None)
    whole = slice(None)
    if name in ('y', 'u', 'delta'):
        return whole, rows, whole, channels
    if name in ('B', 'C'):
        return whole, rows
    # A, D, delta_bias
    return whole, slice(max(0, shape[1] - CHANNELS), None)


def subset_weights(u: Tensor) -> Tensor:
    """Gradient of the output: zero outside the checked subset.

    Every gradient is then that of the subset alone, zero elsewhere.
    """
    weights = torch.zeros_like(u)
    part = weights[_of_subset('y', u.shape)]
    part.copy_(torch.randn_like(part))
    return weights


def exact_results(inputs: Inputs, weights: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the subset in float64.

    By the ``cpu`` backend's PyTorch operations, on a processor: a step of
    them is too small for a GPU, and autograd over the definition would take
    longer than the stage has. The tests compare both.
    """
    leaves = {
        name: x[_of_subset(name, x.shape)].double().cpu().requires_grad_()
        for name, x in inputs.items()
    }
    y = selective_scan_directions(
        **leaves,
        delta_softplus=True,
        reverse=(False, True),
        backend='cpu',
    )
    dy = weights[_of_subset('y', weights.shape)].double().cpu()
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return dict(y=y.detach(), **dict(zip(leaves, grads, strict=True)))


def check(
    version: Version,
    leaves: list[Tensor],
    weights: Tensor,
    exact: dict[str, Tensor],
) -> float:
    """Largest error, as a multiple of what is allowed; NaN if any is NaN."""
    count = version.directions
    with timing.poisoned():
        ys = version.scan(*leaves)
        grads = torch.autograd.grad(ys, leaves, list(weights[:count]))
    y = torch.stack([y.detach() for y in ys])
    if not torch.isfinite(y).all():
        return math.nan
    names = [name for name in exact if name != 'y']
    results = dict(zip(names, version.restore(grads), strict=True))
    errors = [_error(y[_of_subset('y', y.shape)], exact['y'][:count])]
    for name, result in results.items():
        wanted = torch.zeros_like(result, dtype=torch.float64)
        part = wanted[_of_subset(name, result.shape)]
        part.copy_(exact[name][:count])
        errors.append(_error(result, wanted))
    # max() would hide a NaN that comes second
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _error(result: Tensor, exact: Tensor) -> float:
    """Against float32 sums, and the rounding of the result's own dtype."""
    exact = exact.to(result.device)
    eps = torch.finfo(result.dtype).eps
    allowed = TOLERANCE * exact.abs().max() + eps * exact.abs()
    # zero where nothing may be: 0 / 0
    tiny = torch.finfo(torch.float64).tiny
    return ((result - exact).abs() / (allowed + tiny)).max().item()


class Call(NamedTuple):
    """What is timed."""

    name: str
    directions: int
    run: Callable[[], Any]
    moved: int  # bytes that it cannot avoid to move


def make_call(version: Version, leaves: list[Tensor], backward: bool) -> Call:
    """A forward pass, or a forward and a backward pass."""

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return version.scan(*leaves)

    ys = forward()
    inputs, outputs = (sum(x.nbytes for x in xs) for xs in (leaves, ys))
    if not backward:
        moved = inputs + outputs
        return Call(version.name, version.directions, forward, moved)
    dys = [torch.randn_like(y) for y in ys]

    def both() -> None:
        torch.autograd.grad(version.scan(*leaves), leaves, dys)

    # forward as above; backward: inputs again, dys, and the gradients
    moved = 3 * inputs + 2 * outputs
    return Call(version.name, version.directions, both, moved)


def make_copy(call: Call) -> Call:
    """A copy that reads half of a call's bytes and writes the other half."""
    half = call.moved // 2
    source = torch.zeros(half, dtype=torch.uint8, device='cuda')
    target = torch.empty_like(source)
    return call._replace(name=COPY, run=lambda: target.copy_(source))

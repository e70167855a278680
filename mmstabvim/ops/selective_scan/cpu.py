"""The ``cpu`` backend: a sequential scan with recomputation, in PyTorch.

Tokens are walked in tiles: what does not depend on the state is computed for
a whole tile at once, the recurrence one token at a time, in place, on buffers
small enough to stay in the cache. The backward pass recomputes the states of
one chunk at a time from the state at the chunk's border; the derivation is in
README.md beside this file. Only tensor operations are used, so it runs on
any device and needs no compiler.

Inside, a token's state is (batch, groups, state, channels of a group): the
long axis last.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.ops.backend import no_autocast
from mmstabvim.ops.selective_scan.discretization import phi1, phi1_derivative
from mmstabvim.ops.selective_scan.inputs import ScanInputs

CHUNK = 16
"""Tokens between two stored states."""

TILE_NUMEL = 1 << 17
"""Elements of a tile's state buffer that still fit in the cache."""


@dataclass
class _Scan:
    """Inputs in the state's precision and the layout of the inner loop."""

    u: Tensor  # (length, batch, groups, channels), real
    delta: Tensor  # as u, after bias and softplus
    A: Tensor  # (groups, state, channels)
    B: Tensor  # (length, batch, groups, state, 1) or (groups, state, channels)
    C: Tensor
    reverse: bool
    zoh: bool

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.u.shape[1], *self.A.shape)

    @property
    def tile(self) -> int:
        """Tokens per tile, from the shape alone."""
        numel = self.u.shape[1] * self.A.numel()
        return max(1, min(CHUNK, TILE_NUMEL // max(numel, 1)))

    def chunks(self) -> list[tuple[int, int]]:
        """Chunks of tokens in the order of the walk."""
        spans = _spans(0, self.u.shape[0], CHUNK)
        return spans[::-1] if self.reverse else spans

    def tiles(self, span: tuple[int, int]) -> list[tuple[int, int]]:
        """Tiles of one chunk in the order of the walk."""
        spans = _spans(*span, self.tile)
        return spans[::-1] if self.reverse else spans

    def order(self, count: int) -> range:
        """Positions in a tile of ``count`` tokens, as walked."""
        return range(count - 1, -1, -1) if self.reverse else range(count)


def _spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


def _prepare(inputs: ScanInputs, k: int) -> _Scan:
    """The inputs of direction ``k``."""
    real, wide, groups = inputs.real, inputs.wide, inputs.groups

    def by_group(x: Tensor) -> Tensor:
        grouped: Tensor = x.to(real).unflatten(-1, (groups, -1))
        return grouped.transpose(0, 1)

    def by_state(x: Tensor) -> Tensor:
        x = x.to(wide)
        if x.dim() == 2:  # constant: (dim, state)
            x = x.unflatten(0, (groups, -1)).mT.contiguous()
            return x
        x = x.transpose(0, 1)[..., None]
        return x if x.shape[2] == groups else x.expand(-1, -1, groups, -1, -1)

    delta = inputs.delta[k].to(real)
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias[k].to(real)
    if inputs.delta_softplus:
        delta = F.softplus(delta)
    return _Scan(
        by_group(inputs.u[k]),
        by_group(delta),
        by_state(inputs.A[k]),
        by_state(inputs.B[k]),
        by_state(inputs.C[k]),
        inputs.reverse[k],
        inputs.b_disc == 'zoh',
    )


def _per_token(matrix: Tensor, start: int, stop: int) -> Tensor:
    """B or C of a tile, to broadcast with (tokens, *state_shape)."""
    return matrix[start:stop] if matrix.dim() == 5 else matrix


def _discretize(scan: _Scan, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """``exp(delta A)`` and ``B_bar u`` of a tile."""
    step = scan.delta[start:stop, :, :, None]
    drive = scan.u[start:stop, :, :, None]
    decay = step * scan.A
    drive = step * drive
    if scan.zoh:
        drive = phi1(decay) * drive
    return decay.exp_(), drive * _per_token(scan.B, start, stop)


def _walk(
    scan: _Scan, state: Tensor, span: tuple[int, int]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Advance ``state`` through a chunk; yield each tile's states, decays."""
    for start, stop in scan.tiles(span):
        decay, states = _discretize(scan, start, stop)
        previous = state
        for i in scan.order(stop - start):
            previous = states[i].addcmul_(decay[i], previous)
        state.copy_(previous)
        yield start, stop, states, decay


def _reduce_state(states: Tensor, matrix: Tensor) -> Tensor:
    """Sum states times B or C over the state axis."""
    if matrix.dim() == states.dim() and matrix.shape[-1] == 1:
        return torch.matmul(matrix.mT, states).squeeze(-2)
    return (states * matrix).sum(-2)


def borders_shape(inputs: ScanInputs, keep_states: bool) -> tuple[int, ...]:
    """Return the shape of the states that enter each chunk, as walked.

    (directions, chunks, batch, groups, state, channels of a group), no
    chunks unless ``keep_states``.
    """
    directions, batch, length, dim = inputs.u.shape
    chunks = -(-length // CHUNK) if keep_states else 0
    groups, state = inputs.groups, inputs.A.shape[2]
    return (directions, chunks, batch, groups, state, dim // groups)


def output_dtype(inputs: ScanInputs) -> torch.dtype:
    """Return the dtype of y and of the gradients of u and delta."""
    return inputs.real


@torch.no_grad()
def forward(
    inputs: ScanInputs, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan each direction; see :func:`.reference.selective_scan_ref`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: y (directions, batch, length, dim),
        last state (directions, batch, dim, state), and the states entering
        each chunk, see :func:`borders_shape`.
    """
    u = inputs.u
    y = u.new_empty(u.shape, dtype=inputs.real)
    shape = borders_shape(inputs, keep_states)
    borders = u.new_empty(shape, dtype=inputs.wide)
    with no_autocast(u.device):
        last = [
            _forward(_prepare(inputs, k), y[k], borders[k])
            for k in range(len(u))
        ]
        if inputs.D is not None:
            y.addcmul_(u.to(y.dtype), inputs.D.to(y.dtype)[:, None, None])
    return y, torch.stack(last), borders


def _forward(scan: _Scan, y: Tensor, borders: Tensor) -> Tensor:
    """Fill y (batch, length, dim) and borders; return the last state."""
    state = scan.A.new_zeros(scan.state_shape)
    y_tokens = y.unflatten(-1, scan.u.shape[2:]).transpose(0, 1)
    for i, span in enumerate(scan.chunks()):
        if len(borders):
            borders[i] = state
        for start, stop, states, _ in _walk(scan, state, span):
            read = _reduce_state(states, _per_token(scan.C, start, stop))
            y_tokens[start:stop] = 2 * read.real if read.is_complex() else read
    return state.mT.flatten(1, 2)


@torch.no_grad()
def backward(
    dy: Tensor, dlast: Tensor | None, borders: Tensor, inputs: ScanInputs
) -> tuple[Tensor, ...]:
    """Compute the gradients of :func:`forward`, recomputing by chunks.

    Returns:
        tuple[Tensor, ...]: Gradients of u, delta, A, B, C, D and delta_bias
        in the precision of the state (D's and delta_bias's are empty where
        the input is absent).
    """
    dy = dy.to(inputs.real)
    with no_autocast(dy.device):
        grads = []
        for k in range(len(dy)):
            given = None if dlast is None else dlast[k]
            grads.append(_backward(inputs, k, dy[k], given, borders[k]))
        du, dstep, dA, dB, dC = (
            torch.stack(x) for x in zip(*grads, strict=True)
        )
        dD, dbias = du.new_empty(0), du.new_empty(0)
        if inputs.D is not None:
            dD = torch.einsum('kbld,kbld->kd', dy, inputs.u.to(dy.dtype))
            du.addcmul_(dy, inputs.D.to(dy.dtype)[:, None, None])
        if inputs.delta_softplus:
            raw = inputs.delta.to(dy.dtype)
            if inputs.delta_bias is not None:
                bias = inputs.delta_bias.to(dy.dtype)
                raw = raw + bias[:, None, None]
            dstep.mul_(torch.sigmoid(raw))
        if inputs.delta_bias is not None:
            dbias = dstep.sum((1, 2))
    return du, dstep, dA, dB, dC, dD, dbias


def _backward(
    inputs: ScanInputs,
    k: int,
    dy: Tensor,
    dlast: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, the step size, A, B and C of one direction."""
    scan = _prepare(inputs, k)
    adjoint = _Adjoint(scan, dy, dlast)
    chunks = scan.chunks()
    for i in range(len(chunks) - 1, -1, -1):
        adjoint.walk_back(chunks[i], borders[i])
    return adjoint.finish(dy.shape, inputs.B[k], inputs.C[k])


class _Adjoint:
    """Buffers of the backward pass, filled chunk by chunk."""

    def __init__(self, scan: _Scan, dy: Tensor, dlast: Tensor | None) -> None:
        self.scan = scan
        self.dy = dy.unflatten(-1, scan.u.shape[2:]).transpose(0, 1)
        self.carry = scan.A.new_zeros(scan.state_shape)
        if dlast is not None:
            by_group = dlast.unflatten(1, (scan.u.shape[2], -1)).mT
            self.carry.copy_(by_group)
        self.du = torch.empty_like(scan.u)
        self.dstep = torch.empty_like(scan.u)
        self.dA = self.carry.new_zeros(scan.state_shape)
        self.dB = _gradient_buffer(scan.B, self.carry)
        self.dC = _gradient_buffer(scan.C, self.carry)

    def walk_back(self, span: tuple[int, int], border: Tensor) -> None:
        """Propagate the adjoint state through one chunk."""
        state, tiles = border.clone(), []
        for start, stop, states, decay in _walk(self.scan, state, span):
            tiles.append((start, stop, states, decay))
        entering = border
        starts = []
        for start, stop, states, decay in tiles:
            starts.append((start, stop, states, decay, entering))
            entering = states[self.scan.order(stop - start)[-1]]
        for tile in reversed(starts):
            self._tile_back(*tile)

    def _tile_back(
        self,
        start: int,
        stop: int,
        states: Tensor,
        decay: Tensor,
        entering: Tensor,
    ) -> None:
        """Gradients of one tile; ``self.carry`` holds a[t+1] g[t+1]."""
        scan, count = self.scan, stop - start
        dy = self.dy[start:stop, :, :, None]
        C = _per_token(scan.C, start, stop)
        B = _per_token(scan.B, start, stop)
        scale = 2 if scan.A.is_complex() else 1
        self._add_matrix(self.dC, start, stop, states.conj(), scale * dy)
        grad = (scale * dy) * C.conj()  # becomes dL/dh[t]
        grad = grad.broadcast_to(states.shape).contiguous()
        # from here on `decay` becomes q[t] = g[t] conj(a[t] h[t-1])
        order = scan.order(count)
        for k in range(count - 1, -1, -1):
            i = order[k]
            grad[i].add_(self.carry)
            torch.mul(grad[i], decay[i].conj(), out=self.carry)
            before = states[order[k - 1]] if k else entering
            torch.mul(self.carry, before.conj(), out=decay[i])
        q = decay
        step = scan.delta[start:stop, :, :, None]
        u = scan.u[start:stop, :, :, None]
        if scan.zoh:
            self._zoh_back(start, stop, grad, q, B, step, u)
            return
        self._add_matrix(self.dB, start, stop, grad, step * u)
        dx = _reduce_state(grad, B.conj())  # dL/d(step u)
        self.dA += (q * step).sum(0)
        dstep = _real((q * scan.A.conj()).sum(-2))
        dx = _real(dx)
        self.dstep[start:stop] = dstep + dx * u.squeeze(-2)
        self.du[start:stop] = dx * step.squeeze(-2)

    def _zoh_back(
        self,
        start: int,
        stop: int,
        grad: Tensor,
        q: Tensor,
        B: Tensor,
        step: Tensor,
        u: Tensor,
    ) -> None:
        """The part of a tile that depends on how B is discretized."""
        A = self.scan.A
        x = step * A
        gain = step * phi1(x)
        self._add_matrix(self.dB, start, stop, grad * gain.conj(), u)
        dgain = grad * (B * u).conj()
        dx = q + dgain * (step * phi1_derivative(x)).conj()
        self.dA += (dx * step).sum(0)
        dstep = (dx * A.conj() + dgain * phi1(x).conj()).sum(-2)
        self.dstep[start:stop] = _real(dstep)
        self.du[start:stop] = _real((grad * (gain * B).conj()).sum(-2))

    def _add_matrix(
        self, into: Tensor, start: int, stop: int, x: Tensor, weight: Tensor
    ) -> None:
        """Gradient of B or C: sum over channels, or over batch and tokens."""
        if into.dim() == 4:
            reduced = torch.matmul(x, weight.mT.to(x.dtype))
            into[start:stop] = reduced.squeeze(-1)
        else:
            into += (x * weight).sum((0, 1))

    def finish(
        self, shape: torch.Size, B: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients in the layout of the inputs."""
        return (
            self.du.transpose(0, 1).reshape(shape),
            self.dstep.transpose(0, 1).reshape(shape),
            self.dA.sum(0).mT.flatten(0, 1).contiguous(),
            _input_layout(self.dB, B),
            _input_layout(self.dC, C),
        )


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _gradient_buffer(matrix: Tensor, like: Tensor) -> Tensor:
    if matrix.dim() == 3:
        return torch.zeros_like(matrix)
    return like.new_empty(matrix.shape[:4])


def _input_layout(grad: Tensor, matrix: Tensor) -> Tensor:
    if matrix.dim() == 2:  # (groups, state, channels) -> (dim, state)
        return grad.mT.flatten(0, 1).contiguous()
    grad = grad.transpose(0, 1)  # (batch, length, groups, state)
    if grad.shape[2] != matrix.shape[2]:
        grad = grad.sum(2, keepdim=True)
    return grad.contiguous()

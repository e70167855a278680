"""One forward and backward pass of each kernel, on shapes with tails.

For compute-sanitizer: ``compute-sanitizer python -m _gpu.tiny_kernels``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmstabvim.ops import (
    add_rms_norm,
    causal_conv1d_directions,
    gated_merge,
    selective_scan_directions,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BATCH, LENGTH, DIM, STATE = (
    (2, 67, 40, 16) if DEVICE == 'cuda' else (1, 3, 4, 2)
)
DTYPE = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """A leaf."""
    x = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return x.requires_grad_()


def scan(complex_a: bool = False, length: int = LENGTH) -> Tensor:
    """Both directions, with every input."""
    wide = torch.complex64 if complex_a else DTYPE
    a_dtype = torch.complex64 if complex_a else torch.float32
    decay = -torch.rand(2, DIM, STATE, device=DEVICE).to(a_dtype)
    return selective_scan_directions(
        normal(2, BATCH, length, DIM),
        normal(2, BATCH, length, DIM),
        decay.requires_grad_(),
        normal(2, BATCH, length, 1, STATE, dtype=wide),
        normal(2, BATCH, length, 1, STATE, dtype=wide),
        normal(2, DIM, dtype=torch.float32),
        normal(2, DIM, dtype=torch.float32),
        delta_softplus=True,
        reverse=(False, True),
        backend='triton',
    )


def conv() -> Tensor:
    """Both directions, from half of a projection."""
    x = normal(BATCH, LENGTH, 2 * DIM).chunk(2, dim=-1)[0]
    weight, bias = normal(2, DIM, 4), normal(2, DIM)
    return causal_conv1d_directions(
        x, weight, bias, reverse=(False, True), activation='silu'
    )


def merge() -> Tensor:
    """Two directions and their gate."""
    z = normal(BATCH, LENGTH, 2 * DIM).chunk(2, dim=-1)[1]
    return gated_merge(normal(2, BATCH, LENGTH, DIM), z)


def norm() -> Tensor:
    """Both outputs matter."""
    hidden = normal(BATCH, LENGTH, DIM)
    residual = normal(BATCH, LENGTH, DIM, dtype=torch.float32)
    weight = normal(DIM, dtype=torch.float32)
    normed, stream = add_rms_norm(hidden, residual, weight, 1e-5)
    return normed + stream


KERNELS: dict[str, Callable[[], Tensor]] = {
    'scan': scan,
    'complex scan': lambda: scan(complex_a=True),
    # long for its batch: the length is split
    'long scan': lambda: scan(length=5 * LENGTH),
    'conv1d': conv,
    'gated merge': merge,
    'add + RMSNorm': norm,
}


def main() -> None:
    """Run them all, naming each at its end."""
    for name, kernel in KERNELS.items():
        kernel().float().square().sum().backward()
        if DEVICE == 'cuda':
            torch.cuda.synchronize()
        print(f'done: {name}', flush=True)


if __name__ == '__main__':
    main()

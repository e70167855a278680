"""Additions to the eigenvalues of a complex state matrix."""

import torch
from torch import Tensor, nn


class FixedBasis(nn.Module):
    """An eigenbasis X, as real matrices that change B_t and C_t to it.

    Args:
        vectors (Tensor): (N, N), complex, the eigenbasis X.
    """

    into: Tensor
    out_of: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        inverse = torch.linalg.inv(vectors).mT
        # real, as casts of a module lose the imaginary parts of buffers; and
        # half of X, as the scan of complex modes doubles the real part
        self.register_buffer('into', as_real(inverse).to(device, dtype))
        self.register_buffer('out_of', as_real(vectors / 2).to(device, dtype))

    def forward(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """Map real (..., N) to pairs (..., 2 N), float32 or wider."""
        dtype = torch.promote_types(B.dtype, torch.float32)
        dtype = torch.promote_types(dtype, self.into.dtype)
        into, out_of = self.into.to(dtype), self.out_of.to(dtype)
        return B.to(dtype) @ into, C.to(dtype) @ out_of

    @property
    def vectors(self) -> Tensor:
        """The eigenbasis X, complex, (N, N)."""
        return 2 * as_complex(self.out_of)

    def dense(self, values: Tensor) -> Tensor:
        """Compute ``X diag(lambda) X^-1`` of (rows, N), (rows, N, N)."""
        X, inverse = self.vectors, as_complex(self.into).mT
        return (X * values[:, None]) @ inverse


class InputBias(nn.Module):
    """A trainable constant in B_t, for each direction.

    Args:
        value (Tensor): (numbers * d_state,), real, its initial value.
        directions (int): Directions of the layer. Defaults to 1.
    """

    def __init__(self, value: Tensor, directions: int = 1) -> None:
        super().__init__()
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        self.directions = directions
        self.value = nn.Parameter(value.to(device, dtype).repeat(directions))

    def forward(self, B: Tensor) -> Tensor:
        """Add to (directions, batch, length, numbers * d_state)."""
        return B + self.value.view(self.directions, 1, 1, -1)


def as_complex(x: Tensor) -> Tensor:
    """View interleaved pairs (..., 2 n) as complex (..., n)."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())


def as_real(x: Tensor) -> Tensor:
    """View complex or real (..., n) as interleaved pairs (..., 2 n)."""
    return torch.view_as_real(x.to(x.dtype.to_complex())).flatten(-2)

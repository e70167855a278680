"""What a complex state matrix may have beside its eigenvalues."""

import torch
from torch import Tensor, nn


class FixedBasis(nn.Module):
    """An eigenbasis X, as real matrices that change B_t and C_t to it.

    Args:
        vectors (Tensor): (N, N), complex, the X above.
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
        """Real (..., N) to interleaved pairs (..., 2 N), float32 or wider."""
        dtype = torch.promote_types(B.dtype, torch.float32)
        dtype = torch.promote_types(dtype, self.into.dtype)
        into, out_of = self.into.to(dtype), self.out_of.to(dtype)
        return B.to(dtype) @ into, C.to(dtype) @ out_of

    @property
    def vectors(self) -> Tensor:
        """(N, N), complex, the X above."""
        return 2 * as_complex(self.out_of)

    def dense(self, values: Tensor) -> Tensor:
        """``X diag(lambda) X^-1`` of (rows, N), complex (rows, N, N)."""
        X, inverse = self.vectors, as_complex(self.into).mT
        return (X * values[:, None]) @ inverse


class InputBias(nn.Module):
    """A trainable constant in B_t.

    Args:
        value (Tensor): (numbers * d_state,), real, its start.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        self.value = nn.Parameter(value.to(device, dtype))

    def forward(self, B: Tensor) -> Tensor:
        """Of (..., numbers * d_state), in the wider of both dtypes."""
        return B + self.value


def as_complex(x: Tensor) -> Tensor:
    """(..., 2 n) interleaved pairs as complex (..., n)."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())


def as_real(x: Tensor) -> Tensor:
    """Complex or real (..., n) as interleaved pairs (..., 2 n)."""
    return torch.view_as_real(x.to(x.dtype.to_complex())).flatten(-2)

"""Gradients through an eigendecomposition that is known already."""

from typing import Any

import torch
from torch import Tensor


class _KnownEig(torch.autograd.Function):
    """``torch.linalg.eig`` of A with its result given."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, eigenvalues: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(eigenvalues, vectors)
        return eigenvalues.clone(), vectors.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dvalues: Tensor, dvectors: Tensor
    ) -> tuple[Tensor, None, None]:
        values, X = ctx.saved_tensors
        # columns have unit norm, which the second term accounts for
        inner = X.mH @ dvectors
        norms = inner.diagonal(dim1=-2, dim2=-1).real
        inner = inner - (X.mH @ X) * norms[..., None, :]
        gap = (values[..., None, :] - values[..., :, None]).conj()
        gap.diagonal(dim1=-2, dim2=-1).fill_(1)
        inner = inner / gap
        inner.diagonal(dim1=-2, dim2=-1).copy_(dvalues)
        return torch.linalg.solve(X.mH, inner @ X.mH).real, None, None


def known_eig(
    A: Tensor, eigenvalues: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """The given decomposition of A, with the gradient of ``torch.linalg.eig``.

    So one decomposition serves many forward passes. With the decomposition
    of a neighbour of A the gradient is that of the neighbour.

    Args:
        A (Tensor): (..., N, N), real, 1/step.
        eigenvalues (Tensor): (..., N), complex, all different, 1/step.
        vectors (Tensor): (..., N, N), complex, unit columns, in that order.

    Returns:
        tuple[Tensor, Tensor]: Copies of both. Right for functions that do
        not depend on the scale of a column; differentiable once.
    """
    return _KnownEig.apply(A, eigenvalues, vectors)

"""Linear maps as matrices, for the tests of norms."""

import math

import torch


def operator_matrix(function, *shape):
    """Matrix of a linear map, from its values at the unit tensors."""
    count = math.prod(shape)
    units = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    return function(units).flatten(1).T


def top(matrix):
    return torch.linalg.svdvals(matrix)[0]


def causal_norm(taps, length):
    """Norm of a causal depthwise convolution of so many tokens, one kernel."""
    layer = torch.nn.Conv1d(1, 1, len(taps), padding=len(taps) - 1, bias=False)
    layer.double().weight.data.copy_(taps)
    with torch.no_grad():
        return top(
            operator_matrix(lambda x: layer(x)[..., :length], 1, length)
        )

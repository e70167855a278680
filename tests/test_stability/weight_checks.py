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

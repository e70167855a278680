"""Matrices that need no random numbers, plain scans, and comparisons."""

import torch

from mmstabvim.stability import matrix_exponential_scan


def detmat(rows, columns, tag=0):
    """``sin(k^2 + tag)`` for k = 1, 2, ... in reading order, float64."""
    k = torch.arange(1, rows * columns + 1, dtype=torch.float64)
    return torch.sin(k * k + tag).reshape(rows, columns)


def batch_of(count, size):
    """Matrices of :func:`detmat` with different tags, of both signs."""
    return torch.stack([detmat(size, size, tag) for tag in range(count)])


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def hippo(size):
    """HiPPO-LegS: stable, and far from normal."""
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    return torch.tril(-torch.outer(root, root), -1) - torch.diag(n + 1)


def normal_and_coupled():
    """Stable 4 x 4 blocks plus rank 1, with numerical abscissa above 0."""
    blocks = torch.block_diag(
        double([[-0.5, -2], [2, -0.5]]), double([[-1, 0.5], [0, -1.5]])
    )
    return blocks + 0.5 * detmat(4, 1, 1) @ detmat(4, 1, 2).T


def assert_printed(actual, expected):
    """Equal to ten printed digits."""
    if not isinstance(expected, torch.Tensor):
        wide = torch.complex128 if actual.is_complex() else torch.float64
        expected = torch.tensor(expected, dtype=wide)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-8, atol=1e-9)


def sorted_eigenvalues(A):
    """By real part, then imaginary part, descending."""
    values = torch.linalg.eigvals(A).tolist()
    values.sort(key=lambda z: (round(z.real, 8), z.imag), reverse=True)
    return torch.tensor(values, dtype=torch.complex128)


def scan(A, delta, u, B, C, **options):
    """One channel: (length,) inputs, (length, N) matrices."""
    y, last = matrix_exponential_scan(
        u[None, :, None],
        delta[None, :, None],
        A[None],
        B[None],
        C[None],
        **options,
    )
    return y[0, :, 0], last[0, 0]


def phi1(z):
    small = z.abs() < 1e-3
    safe = torch.where(small, 1.0, z)
    series = 1 + z / 2 + z**2 / 6
    return torch.where(small, series, (torch.exp(safe) - 1) / safe)


def eigenbasis_scan(basis, delta, u, B, C, b_disc='euler'):
    """A diagonal scan of one channel in complex128, all modes kept."""
    values, X = basis.eigenvalues, basis.vectors
    state, outputs = torch.zeros_like(values), []
    for t in range(len(u)):
        z = delta[t] * values
        gain = delta[t] * (phi1(z) if b_disc == 'zoh' else 1)
        drive = torch.linalg.solve(X, B[t].to(X.dtype)) * gain * u[t]
        state = torch.exp(z) * state + drive
        outputs.append((C[t].to(X.dtype) @ X * state).sum().real)
    return torch.stack(outputs)


def coupled_inputs():
    t = torch.arange(6).double()
    return 0.1 + 0.05 * t, torch.cos(t), detmat(6, 4, 3), detmat(6, 4, 4)

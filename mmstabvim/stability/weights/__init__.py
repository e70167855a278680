"""Weights: spectral and stable norms of matrices and kernels."""

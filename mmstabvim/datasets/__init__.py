"""Datasets: the embedded default data."""

from mmstabvim.datasets.digits import Digits

__all__ = ['Digits']

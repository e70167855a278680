"""Figures: plain data in, matplotlib figures out, no logic of their own.

Every function takes rows (one dict per mark), draws exactly these and returns
a figure: so a file with the rows is the data of the figure.
"""

from mmstabvim.visualization.curves import Quantity, curve_figure
from mmstabvim.visualization.lines import (
    line_figure,
    robustness_figure,
    scatter_figure,
)
from mmstabvim.visualization.scores import (
    ladder_figure,
    rate_figure,
    score_figure,
)
from mmstabvim.visualization.spectra import decay_figure, eigenvalue_figure
from mmstabvim.visualization.stable_rank import sphere_figure, target_figure

__all__ = [
    'Quantity',
    'curve_figure',
    'decay_figure',
    'eigenvalue_figure',
    'ladder_figure',
    'line_figure',
    'rate_figure',
    'robustness_figure',
    'scatter_figure',
    'score_figure',
    'sphere_figure',
    'target_figure',
]

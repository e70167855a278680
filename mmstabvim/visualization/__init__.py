"""Figures: plain data in, matplotlib figures out, no logic of their own.

Every function takes rows (one dict per mark), draws exactly these and returns
a figure: so a file with the rows is the data of the figure.
"""

from mmstabvim.visualization.curves import curve_figure
from mmstabvim.visualization.scores import ladder_figure, score_figure
from mmstabvim.visualization.spectra import decay_figure, eigenvalue_figure

__all__ = [
    'curve_figure',
    'decay_figure',
    'eigenvalue_figure',
    'ladder_figure',
    'score_figure',
]

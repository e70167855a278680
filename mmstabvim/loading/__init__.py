"""One way for weights into a model: find, rename, load, count.

:func:`install` puts it into mmengine's loading, so ``load_from``,
``init_cfg``, the toolkits' own tools and their inferencers use it too. A file
of which nothing, or less than half of the backbone, fits is an error; one
summary lists everything else that does not fit.
"""

from mmstabvim.loading.file import find_weights
from mmstabvim.loading.into_mmengine import install
from mmstabvim.loading.report import LoadReport
from mmstabvim.loading.weights import load_weights

__all__ = ['LoadReport', 'find_weights', 'install', 'load_weights']

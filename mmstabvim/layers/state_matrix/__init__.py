"""Parametrizations of the continuous-time state matrix A."""

from mmstabvim.layers.state_matrix.build import (
    STATE_MATRICES,
    build_state_matrix,
)
from mmstabvim.layers.state_matrix.diagonal import Complex, NegExp, Signed
from mmstabvim.layers.state_matrix.full import Full
from mmstabvim.layers.state_matrix.initialization import INITS
from mmstabvim.layers.state_matrix.matrix import (
    ParametrizedMatrix,
    StateMatrix,
    StateMatrixView,
    check_finite,
    decompose_all,
    state_matrices,
)
from mmstabvim.layers.state_matrix.parametrization import (
    Parametrization,
    ScanMatrices,
)
from mmstabvim.layers.state_matrix.rules import (
    EigenvalueClamping,
    Rule,
    SpectralNormalization,
)

__all__ = [
    'INITS',
    'STATE_MATRICES',
    'Complex',
    'EigenvalueClamping',
    'Full',
    'NegExp',
    'Parametrization',
    'ParametrizedMatrix',
    'Rule',
    'ScanMatrices',
    'Signed',
    'SpectralNormalization',
    'StateMatrix',
    'StateMatrixView',
    'build_state_matrix',
    'check_finite',
    'decompose_all',
    'state_matrices',
]

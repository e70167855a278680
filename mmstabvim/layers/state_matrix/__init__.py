"""Parametrizations of the continuous-time state matrix A."""

from typing import Any

from mmstabvim.layers.state_matrix.base import (
    ScanMatrices,
    StateMatrix,
    check_finite,
    state_matrices,
)
from mmstabvim.layers.state_matrix.constraints import (
    Constraint,
    EigenvalueClamping,
    SpectralNormalization,
)
from mmstabvim.layers.state_matrix.diagonal import (
    ComplexStateMatrix,
    NegExpStateMatrix,
    SignedStateMatrix,
)
from mmstabvim.layers.state_matrix.full import (
    FullStateMatrix,
    decompose_together,
)
from mmstabvim.layers.state_matrix.initialization import (
    INITS,
    pack_perturbation,
)
from mmstabvim.stability.state.perturbation import Perturbation

__all__ = [
    'INITS',
    'STATE_MATRICES',
    'ComplexStateMatrix',
    'Constraint',
    'EigenvalueClamping',
    'FullStateMatrix',
    'NegExpStateMatrix',
    'Perturbation',
    'ScanMatrices',
    'SignedStateMatrix',
    'SpectralNormalization',
    'StateMatrix',
    'build_state_matrix',
    'check_finite',
    'decompose_together',
    'state_matrices',
]

STATE_MATRICES: dict[str, type[StateMatrix]] = {
    'neg_exp': NegExpStateMatrix,
    'signed': SignedStateMatrix,
    'complex': ComplexStateMatrix,
    'full': FullStateMatrix,
}


def build_state_matrix(
    d_inner: int, d_state: int, type: str = 'neg_exp', **options: Any
) -> StateMatrix:
    """Build a state matrix by the name of its parametrization.

    Args:
        d_inner (int): Channels.
        d_state (int): Eigenvalues of each matrix.
        type (str): Name in ``STATE_MATRICES``. Defaults to ``'neg_exp'``.
        **options (Any): Further arguments of that class; those that begin
            with ``ptd_`` are fields of :class:`Perturbation`.

    Returns:
        StateMatrix: The module.

    Raises:
        TypeError: If the parametrization does not know an option.
        ValueError: If the name is unknown, or an option is out of range.
    """
    if type not in STATE_MATRICES:
        raise ValueError(
            f'state_matrix type must be one of {sorted(STATE_MATRICES)}, '
            f'got {type!r}'
        )
    return STATE_MATRICES[type](d_inner, d_state, **pack_perturbation(options))

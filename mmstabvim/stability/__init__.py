"""Mathematics of stable state matrices, as functions on tensors."""

from mmstabvim.stability.clamping import (
    clamp_discrete,
    clamp_matrix,
    clamp_modulus,
    clamp_real_part,
    continuous_margin,
    fit_block_low_rank,
    project_to_disc,
    straight_through,
)
from mmstabvim.stability.diagnostics import (
    count_nonfinite,
    gradient_flow,
    state_bound,
    state_growth,
    step_ranges,
    token_log_gain_bound,
    token_log_gains,
    transient_bounds,
    transient_peak,
)
from mmstabvim.stability.eigenbasis import (
    Eigenbasis,
    decompose,
    matrix_exponential_scan,
)
from mmstabvim.stability.normalization import (
    check_rho_max,
    discrete_shift,
    log_radius_scale,
    radius_scale,
)
from mmstabvim.stability.penalty import (
    numerical_abscissa_penalty,
    penalty_counts,
    stability_penalty,
)
from mmstabvim.stability.spectral import (
    block_low_rank_radius_bound,
    gelfand_bound,
    numerical_abscissa,
    spectral_abscissa,
    spectral_radius,
)

__all__ = [
    'Eigenbasis',
    'block_low_rank_radius_bound',
    'check_rho_max',
    'clamp_discrete',
    'clamp_matrix',
    'clamp_modulus',
    'clamp_real_part',
    'continuous_margin',
    'count_nonfinite',
    'decompose',
    'discrete_shift',
    'fit_block_low_rank',
    'gelfand_bound',
    'gradient_flow',
    'log_radius_scale',
    'matrix_exponential_scan',
    'numerical_abscissa',
    'numerical_abscissa_penalty',
    'penalty_counts',
    'project_to_disc',
    'radius_scale',
    'spectral_abscissa',
    'spectral_radius',
    'stability_penalty',
    'state_bound',
    'state_growth',
    'step_ranges',
    'straight_through',
    'token_log_gain_bound',
    'token_log_gains',
    'transient_bounds',
    'transient_peak',
]

"""Mathematics of stable state matrices, as functions on tensors."""

from mmstabvim.stability.sensitivity.attribution import (
    attribution_instability,
    attributions,
    frechet_distance,
    gaussian_changes,
    prepare_attributions,
)
from mmstabvim.stability.sensitivity.curvature import (
    hessian_extremes,
    hessian_product,
)
from mmstabvim.stability.sensitivity.entropy import (
    attribution_condition_number,
    effective_rank,
    spectral_entropy,
)
from mmstabvim.stability.sensitivity.jacobian import (
    input_jacobian,
    largest_gain,
    parameter_jacobian,
    singular_values,
    tangent_kernel,
    typical_gain,
)
from mmstabvim.stability.sensitivity.lanczos import Extremes, lanczos_extremes
from mmstabvim.stability.sensitivity.profile import (
    SensitivityProfile,
    evaluated,
    sensitivity_profile,
)
from mmstabvim.stability.state.clamping import (
    clamp_discrete,
    clamp_matrix,
    clamp_modulus,
    clamp_real_part,
    continuous_margin,
    fit_block_low_rank,
    project_to_disc,
    straight_through,
)
from mmstabvim.stability.state.diagnostics import (
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
from mmstabvim.stability.state.eigenbasis import (
    Eigenbasis,
    decompose,
    matrix_exponential_scan,
)
from mmstabvim.stability.state.growth import (
    growth_exponent,
    growth_exponent_bound,
    state_gain_bound,
)
from mmstabvim.stability.state.hippo import (
    S4D_PAIRS,
    hippo_condition,
    hippo_legs,
    hippo_response,
    legs_normal_form,
    s4d_inv,
    s4d_legs,
    s4d_legs_input,
    s4d_lin,
    s4d_real,
    state_response,
)
from mmstabvim.stability.state.normalization import (
    check_rho_max,
    discrete_shift,
    log_radius_scale,
    radius_scale,
)
from mmstabvim.stability.state.penalty import (
    numerical_abscissa_penalty,
    penalty_counts,
    stability_penalty,
)
from mmstabvim.stability.state.perturbation import (
    Perturbation,
    PerturbedBasis,
    diagonalize_perturbed,
    perturb_then_diagonalize,
    random_perturbations,
)
from mmstabvim.stability.state.spectra import (
    block_low_rank_radius_bound,
    eigenvalues,
    gelfand_bound,
    numerical_abscissa,
    spectral_abscissa,
    spectral_radius,
)
from mmstabvim.stability.weights.kernel_descent import sphere_descent
from mmstabvim.stability.weights.kernel_normalization import (
    normalize_kernel_stable_rank,
)
from mmstabvim.stability.weights.kernel_spectrum import (
    causal_stable_rank,
    frequency_planes,
    kernel_stable_rank,
    squared_gains,
)
from mmstabvim.stability.weights.layers import (
    find_layers,
    layer_norms,
    norm_divisors,
)
from mmstabvim.stability.weights.lipschitz import (
    local_jacobian_norm,
    scan_gain_bound,
)
from mmstabvim.stability.weights.norms import (
    causal_conv_norm,
    circular_conv2d_norm,
    circular_conv_norm,
    conv_norm,
    conv_norm_bound,
    overlap_factor,
    power_iteration,
    spectral_norm,
)
from mmstabvim.stability.weights.parametrizations import parametrize_norm
from mmstabvim.stability.weights.srn_c import rank_one_kernel, srn_c
from mmstabvim.stability.weights.stable_rank import (
    normalize_stable_rank,
    stable_rank,
)

__all__ = [
    'S4D_PAIRS',
    'Eigenbasis',
    'Extremes',
    'Perturbation',
    'PerturbedBasis',
    'SensitivityProfile',
    'attribution_condition_number',
    'attribution_instability',
    'attributions',
    'block_low_rank_radius_bound',
    'causal_conv_norm',
    'causal_stable_rank',
    'check_rho_max',
    'circular_conv2d_norm',
    'circular_conv_norm',
    'clamp_discrete',
    'clamp_matrix',
    'clamp_modulus',
    'clamp_real_part',
    'continuous_margin',
    'conv_norm',
    'conv_norm_bound',
    'count_nonfinite',
    'decompose',
    'diagonalize_perturbed',
    'discrete_shift',
    'effective_rank',
    'eigenvalues',
    'evaluated',
    'find_layers',
    'fit_block_low_rank',
    'frechet_distance',
    'frequency_planes',
    'gaussian_changes',
    'gelfand_bound',
    'gradient_flow',
    'growth_exponent',
    'growth_exponent_bound',
    'hessian_extremes',
    'hessian_product',
    'hippo_condition',
    'hippo_legs',
    'hippo_response',
    'input_jacobian',
    'kernel_stable_rank',
    'lanczos_extremes',
    'largest_gain',
    'layer_norms',
    'legs_normal_form',
    'local_jacobian_norm',
    'log_radius_scale',
    'matrix_exponential_scan',
    'norm_divisors',
    'normalize_kernel_stable_rank',
    'normalize_stable_rank',
    'numerical_abscissa',
    'numerical_abscissa_penalty',
    'overlap_factor',
    'parameter_jacobian',
    'parametrize_norm',
    'penalty_counts',
    'perturb_then_diagonalize',
    'power_iteration',
    'prepare_attributions',
    'project_to_disc',
    'radius_scale',
    'random_perturbations',
    'rank_one_kernel',
    's4d_inv',
    's4d_legs',
    's4d_legs_input',
    's4d_lin',
    's4d_real',
    'scan_gain_bound',
    'sensitivity_profile',
    'singular_values',
    'spectral_abscissa',
    'spectral_entropy',
    'spectral_norm',
    'spectral_radius',
    'sphere_descent',
    'squared_gains',
    'srn_c',
    'stability_penalty',
    'stable_rank',
    'state_bound',
    'state_gain_bound',
    'state_growth',
    'state_response',
    'step_ranges',
    'straight_through',
    'tangent_kernel',
    'token_log_gain_bound',
    'token_log_gains',
    'transient_bounds',
    'transient_peak',
    'typical_gain',
]

"""Mathematics of stable state matrices, as functions on tensors."""

from mmstabvim.stability.inputs import count_nonfinite
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
from mmstabvim.stability.state.block_low_rank import fit_block_low_rank
from mmstabvim.stability.state.clamping import (
    clamp_matrix,
    clamp_real_part,
    continuous_margin,
    straight_through,
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
    abscissa_shift,
    discrete_shift,
    log_radius_scale,
    radius_scale,
)
from mmstabvim.stability.state.penalty import (
    numerical_abscissa_penalty,
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
    eigenvalues,
    gelfand_bound,
    numerical_abscissa,
    spectral_abscissa,
    spectral_radius,
)
from mmstabvim.stability.state.steps import gradient_flow, step_ranges
from mmstabvim.stability.weights.kernel_baselines import (
    rank_one_kernel,
    sphere_descent,
    srn_c,
)
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
)
from mmstabvim.stability.weights.lipschitz import (
    local_jacobian_norm,
    scan_gain_bound,
)
from mmstabvim.stability.weights.norms import (
    conv_norm_bound,
    overlap_factor,
    power_iteration,
    spectral_norm,
)
from mmstabvim.stability.weights.parametrizations import parametrize_norm
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
    'abscissa_shift',
    'attribution_condition_number',
    'attribution_instability',
    'attributions',
    'causal_stable_rank',
    'clamp_matrix',
    'clamp_real_part',
    'continuous_margin',
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
    'normalize_kernel_stable_rank',
    'normalize_stable_rank',
    'numerical_abscissa',
    'numerical_abscissa_penalty',
    'overlap_factor',
    'parameter_jacobian',
    'parametrize_norm',
    'perturb_then_diagonalize',
    'power_iteration',
    'prepare_attributions',
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
    'state_gain_bound',
    'state_response',
    'step_ranges',
    'straight_through',
    'tangent_kernel',
    'typical_gain',
]

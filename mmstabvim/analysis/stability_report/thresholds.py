"""Levels from which on a number is a finding, and their severities."""

import math

import torch

from mmstabvim.analysis.stability_report.directions import LONG, SHORT
from mmstabvim.stability.state.steps import EXPLODING, SKIPPED, VANISHED

BROKEN, HIGH, MEDIUM, LOW = 3, 2, 1, 0
WORDS = {BROKEN: 'broken', HIGH: 'high', MEDIUM: 'medium', LOW: 'low'}

THRESHOLDS: dict[str, tuple[int, float, str]] = {
    'nonfinite_weight': (BROKEN, 0, 'any weight is NaN or infinite'),
    'nonfinite_tensor': (BROKEN, 0, 'any tensor is NaN or infinite on images'),
    'nonfinite_loss': (BROKEN, 0, 'the logged loss became NaN or infinite'),
    'unstable': (HIGH, 0, 'any eigenvalue has Re λ > 0'),
    'growth': (
        HIGH,
        math.log(torch.finfo(torch.float16).max),
        'a state can grow beyond float16 at 16 times the length of the '
        'sequence',
    ),
    'exploding': (
        HIGH,
        0,
        f"any mode's gradient grows above e^{EXPLODING:g} over the sequence",
    ),
    'overflow': (HIGH, 1, 'a value on the images exceeds float16'),
    'above_bound': (HIGH, 1, 'a value exceeds its certified bound'),
    'ill_conditioned': (
        MEDIUM,
        100,
        'an eigenbasis has a condition number of 100 or more',
    ),
    'near_overflow': (
        MEDIUM,
        0.1,
        "a value on the images reaches 10 % of float16's limit",
    ),
    'uncertified': (MEDIUM, 0, 'a certified bound is infinite'),
    'loss_rise': (
        MEDIUM,
        1.5,
        'the loss ends 1.5 times above its lowest mean over 5 % of the run',
    ),
    'spikes': (
        MEDIUM,
        10,
        "the gradient's norm has exceeded 10 times its median",
    ),
    'unstable_before': (
        MEDIUM,
        0,
        'the monitor has recorded an eigenvalue with Re λ > 0',
    ),
    'aliasing': (MEDIUM, math.pi, 'a mode turns by more than π in one step'),
    'short_memory': (
        LOW,
        0.1,
        f'10 % of the modes forget within {SHORT:g} tokens',
    ),
    'integrators': (
        LOW,
        0.1,
        f'10 % of the modes remember more than {LONG:g} lengths of the '
        'sequence',
    ),
    'vanishing': (
        MEDIUM,
        0.9,
        f'90 % of the modes carry less than e^{VANISHED:g} of a gradient '
        'over the sequence',
    ),
    'unstable_attribution': (
        MEDIUM,
        0.5,
        'attributions change by half under noise of 2 % of the contrast',
    ),
    'skipped': (
        LOW,
        0.1,
        f'10 % of the step sizes are below {SKIPPED:g}: tokens are skipped',
    ),
    'underflow': (LOW, 87, 'exp(ΔA) underflows float32 (Δ|Re λ| > 87)'),
    'low_rank': (LOW, 1.5, 'a weight has a stable rank of 1.5 or less'),
    'zero_weight': (LOW, 0, 'all singular values of a weight are 0'),
    'large_weight': (
        LOW,
        10,
        "a weight's norm is 10 times the median of its kind",
    ),
    'small_values': (
        LOW,
        0.5,
        'half of a tensor is below the normal numbers of float16',
    ),
    'may_overflow': (LOW, 0, 'float16 is not certified'),
}
"""Of each kind: severity, level and words. Documented in
docs/stability_report.md."""

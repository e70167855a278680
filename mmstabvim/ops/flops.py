"""Operations of the custom operators, for MMEngine's complexity analysis."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def teach_mmengine(
    operator: str, formula: Callable[..., Any], activation: str | None = None
) -> None:
    """Let ``get_model_complexity_info`` count an operator, where installed.

    MMEngine offers no public way to do so.

    Args:
        operator (str): Name of the operator, ``'mmstabvim::...'``.
        formula (Callable): Number of multiply-adds, from the operator's
            traced inputs and outputs.
        activation (str, optional): Name under which the size of its output
            is counted as activations. Defaults to None: not counted.
    """
    if find_spec('mmengine') is None:
        return
    from mmengine.analysis import complexity_analysis
    from mmengine.analysis.jit_handles import generic_activation_jit

    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[operator] = formula
    if activation is not None:
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[operator] = (
            generic_activation_jit(activation)
        )

"""Operations of the custom operators, for MMEngine's complexity analysis."""

from collections.abc import Callable
from typing import Any

from mmstabvim import stack


def teach_mmengine(
    operator: str, formula: Callable[..., Any], activation: str | None = None
) -> None:
    """Let ``get_model_complexity_info`` count an operator.

    MMEngine offers no public way to do so. It is not imported for it.

    Args:
        operator (str): Name of the operator, ``'mmstabvim::...'``.
        formula (Callable): Number of multiply-adds, from the operator's
            traced inputs and outputs.
        activation (str, optional): Name under which the size of its output
            is counted as activations. Defaults to None: not counted.
    """

    def teach(analysis: Any) -> None:
        analysis._DEFAULT_SUPPORTED_FLOP_OPS[operator] = formula
        if activation is not None:
            analysis._DEFAULT_SUPPORTED_ACT_OPS[operator] = (
                analysis.generic_activation_jit(activation)
            )

    stack.after_import('mmengine.analysis.complexity_analysis', teach)

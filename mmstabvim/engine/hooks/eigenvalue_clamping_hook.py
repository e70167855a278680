"""Keep the eigenvalues of the state matrices in the stable half plane."""

from mmengine.runner import Runner

from mmstabvim.engine.hooks.stabilizer_hook import (
    StabilizerHook,
    find_matrices,
    trained,
)
from mmstabvim.engine.learning_rate_budget import say_if_out_of_reach
from mmstabvim.layers.state_matrix import EigenvalueClamping, StateMatrix
from mmstabvim.registry import HOOKS


@HOOKS.register_module()
class EigenvalueClampingHook(StabilizerHook):
    """``Re(lambda) <= -eps`` for every eigenvalue after each optimizer step.

    The eigenvectors of a full matrix are kept below ``condition_max`` too, so
    that ``||exp(t A)|| <= condition_max exp(-eps t)``. Its structure, blocks
    plus low rank, is kept, and what is stored is checked. Together with
    :class:`SpectralNormalizationHook` both rules hold, up to ``eps`` more in
    modulus.

    Args:
        domain (str): ``'continuous'``, or ``'discrete'`` for
            ``|exp(delta_ref lambda)| <= 1 - margin`` with the phase kept.
            Defaults to ``'continuous'``.
        eps (float): Distance kept from instability, >= 0, 1/step; continuous
            domain. Defaults to 0.01.
        margin (float): Share forgotten per reference step, in (0, 1);
            discrete domain. Defaults to 1e-3.
        delta_ref (float): Reference step of the discrete domain, in steps.
            Defaults to 0.1.
        lambda_max (float, optional): Also ``Re(lambda) >= -lambda_max``.
            Defaults to None.
        method (str, optional): For full matrices ``'shift'``, or for
            analysis ``'eig'`` or ``'schur'``, in place only. Defaults to
            None, for ``'shift'``.
        mode (str): ``'project'`` in place after each step, or ``'reparam'``
            in every forward pass. Defaults to ``'project'``.
        grad (str): With ``'reparam'``, the gradient of a clamped eigenvalue:
            ``'ste'`` passes it straight through, ``'clamp'`` is zero.
            Defaults to ``'ste'``.
        condition_max (float | str, optional): Of full matrices: largest
            condition number of the eigenvectors; ``'auto'`` is the matrix's
            ``kappa_max``, None leaves it out, and then the bound speaks of
            eigenvalues only. Defaults to ``'auto'``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        domain: str = 'continuous',
        eps: float = 0.01,
        margin: float = 1e-3,
        delta_ref: float = 0.1,
        lambda_max: float | None = None,
        method: str | None = None,
        mode: str = 'project',
        grad: str = 'ste',
        condition_max: float | str | None = 'auto',
    ) -> None:
        if mode == 'reparam' and method not in (None, 'shift'):
            raise ValueError(
                f'method {method!r} is fitted to blocks and low rank, which '
                "has no gradient: use method='shift' with mode='reparam'"
            )
        self.rule = EigenvalueClamping(
            domain,
            eps,
            margin,
            delta_ref,
            lambda_max,
            method,
            grad,
            condition_max,
        )
        super().__init__([self.rule], mode)

    def before_train(self, runner: Runner) -> None:
        """Say if training cannot reach the bound, then start."""
        matrices = trained(find_matrices(runner, type(self).__name__))
        if matrices and self.rule.lambda_max is None:
            say_if_out_of_reach(
                runner, type(self).__name__, matrices, -self.rule.floor
            )
        super().before_train(runner)

    def why_idle(self, matrix: StateMatrix) -> str | None:
        """Name stable parametrizations without a very slow mode."""
        parametrization = matrix.parametrization
        if parametrization.can_be_unstable or self.rule.lambda_max is not None:
            return None
        why = f'{type(parametrization).__name__} has negative real parts only'
        floor = self.rule.floor
        if floor == 0:
            return why
        if matrix.eigenvalues(matrix.free).real.max() > -floor:
            return None
        return f'{why}, and no mode is slower than {floor:g} per step so far'

"""Give the model to metrics that need more than its predictions."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmstabvim.engine.runner_access import bare_model
from mmstabvim.registry import HOOKS


@HOOKS.register_module()
class ModelForMetricsHook(Hook):
    """Set ``model`` of every metric with ``needs_model = True``.

    A metric of MMEngine sees batches and predictions only. One that measures
    derivatives, such as :class:`mmstabvim.SensitivityMetric`, needs the model
    itself; this hook hands it over before each validation and test.
    """

    # after EMAHook, whose averages are measured where it has swapped them in
    priority = 'LOW'

    def before_val_epoch(self, runner: Runner) -> None:
        """Hand the model over before a validation."""
        self._give(runner, runner.val_loop)

    def before_test_epoch(self, runner: Runner) -> None:
        """Hand the model over before a test."""
        self._give(runner, runner.test_loop)

    def _give(self, runner: Runner, loop: Any) -> None:
        model = bare_model(runner.model)
        for metric in loop.evaluator.metrics:
            if getattr(metric, 'needs_model', False):
                metric.model = model

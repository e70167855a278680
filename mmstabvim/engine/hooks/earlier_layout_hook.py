"""Resume from checkpoints whose directions were modules, as up to 0.1."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from mmstabvim.engine.earlier_layout import convert_checkpoint
from mmstabvim.engine.hooks.stabilizer_hook import bare_model
from mmstabvim.registry import HOOKS


@HOOKS.register_module()
class EarlierLayoutHook(Hook):
    """Convert checkpoints of the earlier layout before anything reads them.

    Up to version 0.1 each direction of a mixer was a module. Weights load
    without this hook; averages, optimizer state and what the stabilizers keep
    need it. ``tools/train.py`` and ``tools/test.py`` have it.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Rename weights and join directions, in place."""
        wrapper = runner.optim_wrapper
        going_on = runner._resume and isinstance(wrapper, OptimWrapper)
        optimizer = wrapper.optimizer if going_on else None
        if convert_checkpoint(checkpoint, bare_model(runner.model), optimizer):
            print_log(
                'the checkpoint has the earlier layout: its directions were '
                'joined',
                logger='current',
            )

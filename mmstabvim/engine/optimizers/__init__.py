"""Registered constructors of optimizer wrappers."""

from mmstabvim.engine.optimizers.layer_decay import (
    LayerDecayOptimWrapperConstructor,
)

__all__ = ['LayerDecayOptimWrapperConstructor']

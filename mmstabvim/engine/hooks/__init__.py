"""Registered hooks."""

from mmstabvim.engine.hooks.random_state_hook import RandomStateHook

__all__ = ['RandomStateHook']

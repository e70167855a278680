"""Registered hooks and what the command-line tools share."""

from mmstabvim.engine.hooks import RandomStateHook

__all__ = ['RandomStateHook']

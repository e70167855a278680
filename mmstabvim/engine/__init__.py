"""Training: hooks, optimizers, and what surrounds a run.

Nothing is imported here, so that :mod:`mmstabvim.engine.divergence` can be
used without the layers that the hooks need.
"""

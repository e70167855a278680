"""Parts of ``eval_robustness.py``."""

"""Parts of ``reproduce_ptd.py``."""

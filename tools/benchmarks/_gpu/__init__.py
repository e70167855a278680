"""Stages of ``gpu_suite.py``, one module each, and what they share."""

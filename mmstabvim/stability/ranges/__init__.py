"""Ranges: certified bounds of activations, and hidden attention."""

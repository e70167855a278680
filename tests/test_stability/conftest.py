"""Beside the oracles, so that the tests of every room can import them."""

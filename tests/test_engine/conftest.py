"""Fixtures of the tests of the engine."""

import pytest
from divergence_runs import digits_config


@pytest.fixture
def small_digits(tmp_path):
    """The digits config, cut to 32 images and 2 small layers."""
    return digits_config(tmp_path)

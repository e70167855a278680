"""The examples in the docstrings of the operators."""

import doctest
import importlib

import pytest

from mmstabvim.ops import backend

MODULES = ('backend', 'selective_scan', 'causal_conv1d', 'gated_merge')
MODULES += ('rms_norm',)


@pytest.mark.parametrize('name', MODULES)
def test_examples(name, monkeypatch):
    """Each module has one; lines of the log do not mix with results."""
    monkeypatch.setattr(backend, 'print_log', lambda *_, **__: None)
    module = importlib.import_module(f'mmstabvim.ops.{name}')
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed

"""Every example in a docstring runs, and gives the result that it shows."""

import doctest
from importlib import import_module

import pytest
import torch
from small_runs import ROOT

PACKAGE = ROOT / 'mmstabvim'
MODULES = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in PACKAGE.rglob('*.py')
    if '>>> ' in path.read_text(encoding='utf-8')
)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    module = import_module(name.removesuffix('.__init__'))
    torch.manual_seed(0)
    failed, tried = doctest.testmod(module, optionflags=OPTIONS)
    assert tried
    assert not failed

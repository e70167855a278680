"""The conversion tools, run in the tests' own process."""

import importlib.util
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / 'tools/model_converters'


def converter(name, capsys):
    """Function that runs a tool and returns what it printed."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*args):
        tool.main([str(arg) for arg in args])
        return capsys.readouterr().out

    return run


def refusal(convert, capsys, *args):
    """What the tool says when it stops."""
    with pytest.raises(SystemExit) as stop:
        convert(*args)
    assert stop.value.code
    return f'{stop.value.code}{capsys.readouterr().err}'


def same(a, b):
    """Whether two state dicts hold the same names and tensors."""
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)

"""Examples in docstrings give the results that they print."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import mmstabvim
from mmstabvim import stability
from mmstabvim.ops import backend

PACKAGE = Path(mmstabvim.__file__).parent
PROMPT = re.compile(r'^\s*>>> (?!.*\+SKIP)', re.MULTILINE)
FILES = {
    path: len(PROMPT.findall(path.read_text()))
    for path in sorted(PACKAGE.rglob('*.py'))
}
EXAMPLES = {path: count for path, count in FILES.items() if count}
LIBRARIES = ('mmstabvim', 'torch', 'numpy')


class Finder(doctest.DocTestFinder):
    """Sees decorated functions too, whose globals are the decorator's."""

    def _from_module(self, module, object):
        home = getattr(object, '__module__', None)
        return home == module.__name__ or super()._from_module(module, object)


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(part for part in parts if part != '__init__')


def imported(name):
    """A module; skips the test where an optional library is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split('.')[0] in LIBRARIES:
            raise
        return pytest.skip(f'{name} needs {error.name}')


def examples_of(module):
    """Doctests of a module that have an example."""
    found = Finder(exclude_empty=True).find(module, module.__name__)
    return [test for test in found if test.examples]


@pytest.mark.parametrize('path', EXAMPLES, ids=name_of)
def test_examples(path, monkeypatch):
    """Each one runs, so none is where the finder does not look."""
    # operators say once which backend runs
    monkeypatch.setattr(backend, 'print_log', lambda *args, **options: None)
    module = imported(name_of(path))
    runner = doctest.DocTestRunner(verbose=False)
    report = []
    for test in examples_of(module):
        with torch.random.fork_rng():
            runner.run(test, out=report.append)
    assert not runner.failures, ''.join(report)
    assert runner.tries == EXAMPLES[path]


def test_everything_public_of_stability_has_an_example():
    public = {name: getattr(stability, name) for name in stability.__all__}
    without = [
        name
        for name, value in public.items()
        if (inspect.isclass(value) or callable(value))
        and not PROMPT.search(inspect.getdoc(value) or '')
    ]
    assert not without
    assert sum(map(callable, public.values())) > 50

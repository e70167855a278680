"""What the tests of the kernels share."""

import pytest
import torch

from mmstabvim.ops import native


@pytest.fixture
def one_thread():
    """Quick on a busy machine; tests of threads ask for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)


@pytest.fixture
def messages(monkeypatch):
    """What a build logs, with libraries forgotten before and after."""
    lines = []
    monkeypatch.setattr(
        native, 'print_log', lambda line, **_: lines.append(line)
    )
    native.load.cache_clear()
    yield lines
    native.load.cache_clear()


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A cache folder of the test's own, and a compiler in a hurry."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(native, 'FLAGS', (*native.FLAGS, '-O1'))
    return tmp_path / 'mmstabvim'


@pytest.fixture
def no_compiler(monkeypatch, empty_cache, messages):
    """Nothing built, and nothing to build with."""
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(native, 'COMPILERS', ('no-such-compiler',))


@pytest.fixture
def fast_interpreter(monkeypatch):
    """Prepare ``triton.language`` once a test, not at every function call."""
    triton = pytest.importorskip('triton')
    interpreter = pytest.importorskip('triton.runtime.interpreter')
    prepared = set()

    def call(self, *args, **kwargs):
        modules = {
            id(x)
            for x in self.fn.__globals__.values()
            if x is triton.language or x is triton.language.core
        }
        if not modules <= prepared:
            interpreter._patch_lang(self.fn)
            prepared.update(modules)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, '__call__', call)

"""Building, caching and loading C++ kernels."""

import ctypes
import threading
from pathlib import Path

import pytest
import torch

from mmstabvim.ops import native

CODE = """
#include <omp.h>
extern "C" int answer() {
  int sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 1; i < 9; i++) sum += i;
  return sum + 6;
}
"""


@pytest.fixture
def source(tmp_path, empty_cache, messages):
    """A small kernel, not built yet; skips where nothing can build it."""
    path = tmp_path / 'kernel.cpp'
    path.write_text(CODE)
    try:
        native._compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    return path


def test_builds_once(source, empty_cache, messages, monkeypatch):
    """Later calls get the same library, a new process the cached file."""
    built = native.load(source, 'kernel')
    assert built.answer() == 42
    assert native.load(source, 'kernel') is built
    (path,) = empty_cache.iterdir()
    assert path.name.startswith('kernel_')
    native.load.cache_clear()
    monkeypatch.delattr(native, '_build')
    assert native.load(source, 'kernel').answer() == 42
    assert not messages


def no_compiler(monkeypatch, source):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(native, 'COMPILERS', ('no-such-compiler',))


def failing_compiler(monkeypatch, source):
    monkeypatch.setenv('CXX', 'false')


def broken_source(monkeypatch, source):
    source.write_text('not C++')


def no_source(monkeypatch, source):
    source.unlink()


def no_folder(monkeypatch, source):
    monkeypatch.setenv('XDG_CACHE_HOME', str(source))


@pytest.mark.parametrize(
    'obstacle',
    [no_compiler, failing_compiler, broken_source, no_source, no_folder],
)
def test_says_once_why_not(obstacle, source, monkeypatch, messages):
    obstacle(monkeypatch, source)
    for _ in range(2):
        assert native.load(source, 'kernel') is None
    assert len(messages) == 1
    assert messages[0].startswith('kernel runs without')
    assert '\n' not in messages[0]


def empty(content):
    return b''


def no_library(content):
    return b'\x7fELF'


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize('damage', [empty, no_library, cut])
def test_rebuilds_a_broken_file(damage, source, empty_cache, messages):
    native._load_or_build(source, 'kernel')
    (path,) = empty_cache.glob('*.so')
    content = path.read_bytes()
    path.unlink()  # this process has the old file mapped: make another
    path.write_bytes(damage(content))
    assert native.load(source, 'kernel').answer() == 42
    assert path.read_bytes() == content
    assert not messages


def test_builds_at_the_same_time(source, empty_cache):
    """Several builders leave one intact file and nothing else."""
    built = []
    builders = [
        threading.Thread(
            target=lambda: built.append(
                native._load_or_build(source, 'kernel')
            )
        )
        for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(built) == 3
    (path,) = empty_cache.iterdir()
    assert native._intact(path)


def test_key_knows_source_and_processor(source, monkeypatch):
    """A home folder may be shared by machines of different kinds."""
    compiler = native._compiler()
    here = native._key(compiler, source)
    source.write_text(CODE + '\n')
    other = native._key(compiler, source)
    monkeypatch.setattr(native, '_cpu_model', lambda: ['another'])
    assert len({here, other, native._key(compiler, source)}) == 3


def test_shares_the_openmp_runtime_of_torch(source):
    """Two runtimes would mean two sets of threads."""
    path = Path(torch.__file__).parent / 'lib' / 'libtorch_cpu.so'
    entry = 'GOMP_parallel'
    if not path.exists() or not hasattr(ctypes.CDLL(str(path)), entry):
        pytest.skip('this torch does not use GNU OpenMP')

    def address(library):
        return ctypes.cast(library[entry], ctypes.c_void_p).value

    built = native.load(source, 'kernel')
    assert address(built) == address(ctypes.CDLL(str(path)))


def test_one_thread_after_a_fork(two_threads, monkeypatch):
    """The parent's OpenMP threads are missing in a forked child."""
    assert native.threads() == 2
    monkeypatch.setattr(native, '_IMPORTING_PROCESS', -1)
    assert native.threads() == 1

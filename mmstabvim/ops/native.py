"""C++ kernels for the CPU: compiled at first use, called through ctypes.

A source file is built with the system's compiler into a per-user cache.
Without a compiler, or with ``MMSTABVIM_FUSED=0``, the callers compute the
same function with PyTorch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from mmstabvim.log import print_log

ENVIRONMENT_VARIABLE = 'MMSTABVIM_FUSED'
COMPILERS = ('g++', 'clang++', 'c++')
FLAGS = (
    '-std=c++17',
    '-O3',
    '-march=native',
    '-fopenmp',
    '-shared',
    '-fPIC',
    '-ffp-contract=fast',
    # same values, but GCC may turn a choice of two into vector code
    '-fno-trapping-math',
)

_DIGEST_SIZE = hashlib.sha256().digest_size
_IMPORTING_PROCESS = os.getpid()


def enabled() -> bool:
    """Tell if the environment allows C++ kernels, asked at each call."""
    return os.environ.get(ENVIRONMENT_VARIABLE, '1') != '0'


def threads() -> int:
    """PyTorch's setting, but 1 in a forked process.

    OpenMP's threads do not survive a fork; waiting for them would hang.
    """
    if os.getpid() != _IMPORTING_PROCESS:
        return 1
    return torch.get_num_threads()


@functools.cache
def load(source: Path, what: str) -> ctypes.CDLL | None:
    """The compiled ``source``, or None; says once why not.

    Args:
        source (Path): The C++ file.
        what (str): Name of the function it computes, for the log and the
            cached file.

    Returns:
        ctypes.CDLL | None: The library, the same one at every call.
    """
    try:
        return _load_or_build(source, what)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        print_log(
            f'{what} runs without its fused C++ path: '
            + ' '.join(str(error).split())[:300],
        )
        return None


def _load_or_build(source: Path, what: str) -> ctypes.CDLL:
    compiler = _compiler()
    path = _cache_folder() / f'{what}_{_key(compiler, source)}.so'
    if not _intact(path):
        _build(compiler, source, path)
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """Command of the C++ compiler: CXX, or the first one found."""
    names = (os.environ.get('CXX') or '', *COMPILERS)
    for command in filter(None, map(shlex.split, names)):
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f'no C++ compiler (CXX, {", ".join(COMPILERS)})')


def _cache_folder() -> Path:
    """Return the build cache folder, creating it if needed."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folder = Path(base, 'mmstabvim')
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(compiler: list[str], source: Path) -> str:
    """Hash of everything the machine code depends on."""
    version = subprocess.run(
        [*compiler, '--version'], capture_output=True, check=True, timeout=60
    ).stdout
    described = repr((compiler, FLAGS, _cpu_model())).encode()
    text = b'\n'.join((source.read_bytes(), version, described))
    return hashlib.sha256(text).hexdigest()[:16]


def _cpu_model() -> list[str]:
    """Describe what ``-march=native`` depends on; homes may be shared."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    wanted = ('model name', 'flags', 'CPU part', 'Features')
    return [
        platform.machine(),
        platform.processor(),
        *sorted({line for line in lines if line.startswith(wanted)}),
    ]


def _intact(path: Path) -> bool:
    """Tell if the file is there and ends in the digest of the rest.

    Loading a truncated library could kill the process.
    """
    if not path.is_file():
        return False
    content = path.read_bytes()
    code, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    return hashlib.sha256(code).digest() == digest


def _build(compiler: list[str], source: Path, path: Path) -> None:
    """Compile beside ``path``, then rename: others may build it too."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder, path.name)
        done = subprocess.run(
            [*compiler, *FLAGS, str(source), '-o', str(output)],
            capture_output=True,
            text=True,
            errors='replace',
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f'{compiler[0]} failed: {done.stderr}')
        code = output.read_bytes()
        output.write_bytes(code + hashlib.sha256(code).digest())
        output.replace(path)

"""Report of the environment, to be pasted into a bug report.

``python -m mmstabvim.check_env`` prints versions, shims, backends (each is
run), a comparison with stored numbers of the official implementations, and
a speed. It ends with 1 if a backend fails or a number differs. A part that
fails does not keep the others from being printed.
"""

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmstabvim import stack
from mmstabvim.layers import VisionMambaBlock
from mmstabvim.ops import (
    backend,
    causal_conv1d,
    gated_merge,
    native,
    rms_norm,
    selective_scan,
)
from mmstabvim.ops.causal_conv1d import causal_conv1d_ref
from mmstabvim.ops.causal_conv1d import fused as fused_conv
from mmstabvim.ops.selective_scan import fused as fused_scan
from mmstabvim.version import __version__

NUMBERS = Path(__file__).parent / 'data' / 'parity.npz'
"""Numbers of the official implementations: see tests/data/goldens."""

TOLERANCE = 2e-5
LIBRARIES = ('torch', 'torchvision', 'triton', 'numpy', 'scipy')
SECONDS = 5.0

Lines = Iterator[tuple[str, str]]


def main() -> int:
    """Print the report.

    Returns:
        int: Exit status, 1 if a check failed.
    """
    failed = False
    for title, part in (
        ('versions', versions),
        ('shims', shims),
        ('compiled kernels', compiled),
        ('backends', backends),
        ('parity with official numbers', parity),
        ('speed', speed),
    ):
        _print(f'-- {title}')
        for name, text in _guarded(part):
            failed |= text.startswith('FAILED')
            _print(f'{name:<28} {_private(text)}')
    _print('-- ' + ('something FAILED' if failed else 'all good'))
    return int(failed)


def _guarded(part: Callable[[], Lines]) -> Lines:
    """Turn an error of a part into a line."""
    try:
        yield from part()
    except Exception as error:
        yield part.__name__, _failed(error)


def _failed(error: Exception) -> str:
    """Word an error in one line."""
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    return f'FAILED {text[:250]}'


def _print(line: str) -> None:
    """Write a line of the report."""
    sys.stdout.write(f'{line}\n')
    sys.stdout.flush()


def _private(text: str) -> str:
    """Show the home folder, which may name its owner, as ``~``."""
    home = str(Path.home())
    return text.replace(home, '~') if len(home) > 1 else text


# --- parts ------------------------------------------------------------------


def versions() -> Lines:
    """List Python, the machine, PyTorch and OpenMMLab."""
    yield 'mmstabvim', f'{__version__} in {Path(__file__).parent}'
    yield 'python', f'{platform.python_version()} on {platform.platform()}'
    yield 'processor', f'{_processor()}, {os.cpu_count()} seen'
    for name in LIBRARIES:
        yield name, _version(name)
    yield 'threads', str(torch.get_num_threads())
    yield 'GPU', _gpu()
    for package in stack.DISTRIBUTIONS:
        found = stack.installed(package)
        names = ', '.join(f'{k} {v}' for k, v in found.items())
        yield package, names or 'not installed'
    for package in stack.NEEDS:
        problem = stack.find_problem(package)
        if problem is not None and 'is not installed' not in problem:
            yield package, f'FAILED {problem}'
    for name in (backend.ENVIRONMENT_VARIABLE, native.ENVIRONMENT_VARIABLE):
        if name in os.environ:
            yield name, os.environ[name]


def _version(name: str) -> str:
    """Look up a distribution's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return 'not installed'


def _processor() -> str:
    """Name the processor, from Linux' list where there is one."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [x.partition(':')[2] for x in lines if x.startswith('model name')]
    return (names or [platform.processor() or platform.machine()])[0].strip()


def _gpu() -> str:
    """Name the GPU and the CUDA that PyTorch was built with."""
    built = f'PyTorch built with CUDA {torch.version.cuda}'
    if not torch.cuda.is_available():
        return f'none ({built})'
    major, minor = torch.cuda.get_device_capability()
    return f'{torch.cuda.get_device_name()}, sm_{major}{minor} ({built})'


def shims() -> Lines:
    """List the shims of OpenMMLab and their state."""
    if not stack.installed('mmengine'):
        yield 'none', 'MMEngine is not installed: none is needed'
        return
    from mmstabvim import compat

    yield from compat.status().items()


def compiled() -> Lines:
    """Describe the compiler, the cache and the state of the C++ kernels."""
    yield 'cache folder', str(native._cache_folder())
    if not native.enabled():
        yield 'C++ kernels', f'off ({native.ENVIRONMENT_VARIABLE}=0)'
        return
    try:
        yield 'compiler', ' '.join(native._compiler())
    except RuntimeError as error:
        yield 'compiler', f'{error}: plain PyTorch, several times slower'
        return
    for name, module in (('scan', fused_scan), ('convolution', fused_conv)):
        library = module.library()
        yield f'C++ {name}', 'FAILED to build' if library is None else 'built'


def backends() -> Lines:
    """Run each operator with each backend, against the reference."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    for name, call, backend_name in _calls(device):
        label = f'{name} {backend_name}'
        if backend_name == 'triton' and device.type == 'cpu':
            yield label, 'not run: needs a GPU'
        elif backend_name == 'fused' and not _has_fused():
            yield label, 'not run: no C++ kernels'
        else:
            yield label, _judge(call, device)


def _has_fused() -> bool:
    """Tell if the C++ kernels are built and allowed."""
    return native.enabled() and fused_scan.library() is not None


def _calls(
    device: torch.device,
) -> Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor]], str]]:
    """Walk pairs of (computed, expected), by operator and backend."""
    torch.manual_seed(0)
    u, z = torch.randn(2, 2, 4, 33, device=device)
    delta, bias = torch.rand(2, 4, 33, device=device), None
    A = -torch.rand(4, 8, device=device)
    B, C = torch.randn(2, 2, 8, 33, device=device)
    weight = torch.randn(33, 4, device=device)

    def scan(name: str) -> Any:
        inputs = (u, delta, A, B, C, None, z, bias)
        wanted = selective_scan(*inputs, backend='reference')
        return selective_scan(*inputs, backend=name), wanted

    for name in ('reference', 'cpu', 'fused', 'triton'):
        choose = {'fused': 'cpu'}.get(name, name)
        fused = '1' if name == 'fused' else '0'

        def run(choose: str = choose, fused: str = fused) -> Any:
            with _environment(native.ENVIRONMENT_VARIABLE, fused):
                return scan(choose)

        yield 'selective_scan', run, name
    own = 'triton' if device.type == 'cuda' else 'cpu'
    for name, conv in (
        (own, lambda: causal_conv1d(u, weight)),
        ('fused', lambda: causal_conv1d(u.cpu(), weight.cpu())),
    ):
        fused = '1' if name == 'fused' else '0'

        def convolve(conv: Any = conv, fused: str = fused) -> Any:
            with _environment(native.ENVIRONMENT_VARIABLE, fused):
                got = conv()
            return got, causal_conv1d_ref(u, weight).to(got.device)

        yield 'causal_conv1d', convolve, name
    ones = torch.ones(33, device=device)
    mean = u.square().mean(-1, keepdim=True)
    yield (
        'rms_norm',
        lambda: (rms_norm(u, ones), u / (mean + 1e-5).sqrt()),
        own,
    )
    gate = torch.nn.functional.silu(z)
    yield (
        'gated_merge',
        lambda: (gated_merge(torch.stack([u, u]), z), u * gate),
        own,
    )


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _judge(call: Callable[[], tuple[Tensor, Tensor]], device: Any) -> str:
    """Run a backend and compare; say FAILED where it does not agree."""
    try:
        got, wanted = call()
        error = _difference(got, wanted)
    except Exception as problem:
        return _failed(problem)
    verdict = 'ok' if error <= TOLERANCE else 'FAILED'
    return f'{verdict} on {device.type}, differs by {error:.0e}'


def _difference(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, of the largest magnitude wanted."""
    difference = (got.double() - wanted.to(got.device).double()).abs().max()
    return (difference / wanted.double().abs().max().to(got.device)).item()


def parity() -> Lines:
    """Compare with numbers that the official implementations gave."""
    with np.load(NUMBERS, allow_pickle=False) as stored:
        data = {name: torch.from_numpy(stored[name]) for name in stored.files}
    yield 'Vim block', _verdict(_run_block(data), data['block.output'])
    for case in ('real', 'complex'):
        inputs: dict[str, Any] = {
            k.removeprefix(f'{case}.'): v
            for k, v in data.items()
            if k.startswith(f'{case}.')
        }
        wanted = inputs.pop('output')
        got: Any = selective_scan(**inputs, delta_softplus=True)
        yield f'selective scan, {case}', _verdict(got, wanted)


def _run_block(data: dict[str, Tensor]) -> Tensor:
    """Run the official model's first block on its tokens."""
    weights = {
        k.removeprefix('block.weights.'): v
        for k, v in data.items()
        if k.startswith('block.weights.')
    }
    block = VisionMambaBlock(data['block.input'].shape[-1]).eval()
    block.load_state_dict(weights)
    with torch.no_grad():
        return block(data['block.input'])[0]


def _verdict(got: Tensor, wanted: Tensor) -> str:
    """Say how far a result is from the stored one."""
    error = _difference(got, wanted)
    good = 'ok' if error <= TOLERANCE else 'FAILED'
    return f'{good}, differs by {error:.0e} of the largest value'


def speed() -> Lines:
    """Time two blocks of Vim-tiny's width on 197 tokens, for some seconds."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    blocks = torch.nn.ModuleList(VisionMambaBlock(192) for _ in range(2))
    blocks.to(device)
    tokens = torch.randn(8, 197, 192, device=device)

    def run() -> Tensor:
        hidden, residual = tokens, None
        for block in blocks:
            hidden, residual = block(hidden, residual)
        return hidden

    def infer() -> None:
        with torch.no_grad():
            run()

    def step() -> None:
        run().square().mean().backward()

    for name, act in (('inference', infer), ('forward and backward', step)):
        per_second = 8 * 197 / _seconds(act, device)
        yield name, f'{per_second:.3g} tokens per second through two blocks'


def _seconds(act: Callable[[], None], device: torch.device) -> float:
    """Return the median time of a call, after two calls."""
    times: list[float] = []
    until = time.perf_counter() + SECONDS / 2
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 500):
        start = time.perf_counter()
        act()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


if __name__ == '__main__':
    logging.disable(logging.INFO)  # messages of backends between the lines
    sys.exit(main())

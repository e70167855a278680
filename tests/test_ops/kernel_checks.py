"""What the tests of the Triton kernels share."""

import json
import mmap
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from packaging.version import Version


def on_gpu(test):
    """Mark a test that needs a GPU, and skip it where there is none."""
    absent = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason='no GPU')(test))


def sparse(shape, strides, dtype=torch.float16):
    """A tensor of zeros that spans more memory than there is."""
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, a name since Python 3.13
    memory = mmap.mmap(
        -1,
        (last + 1) * dtype.itemsize,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve,
    )
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def compile_kernel(kernel, pointers, constants, architecture, **options):
    """Registers and bytes of stack of a kernel.

    ``pointers`` gives the dtype of a pointer by its name, absent ones are
    constants. Numbers, not being constants, are multiples of 16 unless they
    are named here.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    odd = ('length', 'blocks', 'span', 'tokens', 'eps')
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name.endswith('_ptr'):
            signature[name] = '*' + pointers.get(name, 'fp32')
        else:
            signature[name] = 'fp32' if name == 'eps' else 'i32'
        if signature[name] != 'constexpr' and name not in odd:
            attributes[i,] = [['tt.divisibility', 16]]
    source = triton.compiler.ASTSource(
        kernel, signature, constants, attributes
    )
    target = GPUTarget('cuda', architecture, 32)
    built = triton.compile(source, target=target, options=options)
    return resources(built.asm['cubin'])


def resources(cubin):
    """Registers and bytes of stack of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, '-res-usage', file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    used = dict(x.split(':') for x in report.split() if x.count(':') == 1)
    return int(used['REG']), int(used['STACK'])


def compiled_apart(file, cache):
    """What ``file`` prints as JSON: interpreted kernels cannot be compiled."""
    environment = dict(os.environ)
    environment.pop('TRITON_INTERPRET', None)
    environment['TRITON_CACHE_DIR'] = str(cache)
    done = subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_compiled(found, recorded):
    """With the recorded compiler the recorded registers, no spills since."""
    import triton

    assert found.keys() == recorded.keys()
    if Version(triton.__version__) >= Version('3.6'):
        assert {k: stack for k, (_, stack) in found.items() if stack} == {}
    if triton.__version__ == '3.6.0':
        assert {k: used for k, (used, _) in found.items()} == recorded

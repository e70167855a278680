"""What the selective scan's Triton kernels cost, compiled without a GPU.

Compiles ahead of time for bfloat16 inputs, one group and 16 states, and prints
registers, bytes of stack (spills) and shared memory, and the instructions of
the main loop per (token, channel, state): what a warp issues for a token,
times 32 lanes, over the states of its channels.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.pop('TRITON_INTERPRET', None)  # it would leave nothing to compile

import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmstabvim.ops.selective_scan import kernels, kernels_backward
from mmstabvim.ops.selective_scan import triton as backend

KERNELS = {
    'forward': kernels._scan_fwd_kernel,
    'backward': kernels_backward._scan_bwd_kernel,
    'forward ends': kernels._scan_ends_kernel,
    'backward ends': kernels_backward._adjoint_ends_kernel,
}
OPTIONS = {
    'forward': backend.FORWARD_OPTIONS,
    'backward': backend.BACKWARD_OPTIONS,
}
STATE, CHANNELS = 16, 384
STRIDES = dict(
    u_strides=3, delta_strides=3, dy_strides=3, B_strides=4, C_strides=4
)
HALF = {'u_ptr', 'delta_ptr', 'dy_ptr', 'y_ptr', 'du_ptr', 'ddelta_ptr'}
QUICK = [
    *((name, 'real', 'euler', 90) for name in KERNELS),
    *((name, 'real', 'euler', arch) for name in OPTIONS for arch in (80, 100)),
    *(
        (name, 'complex', 'euler', 90)
        for name in KERNELS
        if name != 'backward'
    ),
    ('forward', 'real', 'zoh', 90),
]
"""(kernel, A, b_disc, architecture)"""

SLOW = [
    *(('backward', 'complex', 'euler', arch) for arch in (80, 90, 100)),
    *(('forward', 'complex', 'euler', arch) for arch in (80, 100)),
    ('forward', 'complex', 'zoh', 90),
    *(('backward', kind, 'zoh', 90) for kind in ('real', 'complex')),
]
"""The same, half a minute each at worst."""

TABLES = dict(quick=QUICK, slow=SLOW)


class Resources(NamedTuple):
    """Of one kernel."""

    registers: int  # of each lane
    stack: int  # bytes of each lane
    shared: int  # bytes of a program
    instructions: float  # per (token, channel, state), of the main loop


def compile_kernel(
    name: str,
    kind: str = 'real',
    b_disc: str = 'euler',
    arch: int = 90,
    split: bool = False,
    **specialized: Any,
) -> Any:
    """Compile a kernel ahead of time.

    Args:
        name (str): One of ``KERNELS``.
        kind (str): ``'real'`` or ``'complex'``. Defaults to ``'real'``.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.
        arch (int): Ten times the compute capability. Defaults to 90.
        split (bool): As launched for several spans. Defaults to False.
        **specialized: Arguments to compile in, by name.

    Returns:
        triton.compiler.CompiledKernel: Its ``asm`` has the ``'cubin'``.
    """
    kernel = KERNELS[name]
    forward_tile, backward_tile = _tiles(kind, b_disc)
    one_span = dict(ends_ptr=None, sums_ptr=None)
    constants = dict(
        groups=1,
        STATE=STATE,
        WHOLE=True,
        CONSTANT_B=False,
        CONSTANT_C=False,
        SOFTPLUS=True,
        ZOH=b_disc == 'zoh',
        COMPLEX=kind == 'complex',
        CHUNK=backend.CHUNK,
        GROUP=_group(name, b_disc),
        **({} if split or 'ends' in name else one_span),
        **(backward_tile if name == 'backward' else forward_tile)._asdict(),
    )
    constants = {
        argument: value
        for argument, value in (constants | specialized).items()
        if argument in kernel.arg_names
    }
    half = HALF if kind == 'complex' else HALF | {'B_ptr', 'C_ptr'}
    signature, attributes = {}, {}
    aligned = [['tt.divisibility', 16]]
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = 'constexpr'
        elif argument in STRIDES:
            signature[argument] = ('i32',) * STRIDES[argument]
            attributes |= {(i, j): aligned for j in range(STRIDES[argument])}
        elif argument.endswith('_ptr'):
            signature[argument] = '*bf16' if argument in half else '*fp32'
            attributes[i,] = aligned
        else:
            signature[argument] = 'i32'
            if argument == 'channels':
                attributes[i,] = aligned
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget('cuda', arch, 32),
        options=OPTIONS.get(name, backend.ENDS_OPTIONS),
    )


def _group(name: str, b_disc: str) -> int:
    return backend.groups(b_disc)[name == 'backward']


def _tiles(kind: str, b_disc: str) -> tuple[Any, Any]:
    return backend.tiles(STATE, CHANNELS, kind == 'complex', b_disc)


def measure(
    name: str, kind: str, b_disc: str, arch: int, **specialized: Any
) -> Resources:
    """Compile a kernel and read what the assembler made of it."""
    built = compile_kernel(name, kind, b_disc, arch, **specialized)
    cubin = built.asm['cubin']
    usage = _cuobjdump(cubin, '-res-usage')
    used = dict(x.split(':', 1) for x in usage.split() if x.count(':') == 1)
    tile = _tiles(kind, b_disc)[0]
    per_token = STATE * tile.DL * tile.DR / 32
    return Resources(
        int(used['REG']),
        int(used['STACK']),
        int(used['SHARED']),
        round(
            _per_token(name, _cuobjdump(cubin, '-sass'), _group(name, b_disc))
            / per_token,
            1,
        ),
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run(
            [tool, option, file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def _per_token(name: str, sass: str, group: int) -> float:
    """Instructions for one token in the longest loop, nested ones included.

    The forward kernel's loop walks a chunk in groups, unless unrolled; the
    backward kernel's a group, before which it recomputes the groups between
    it and its border: half of those of a chunk on average.
    """
    found = sorted(_loops(sass), key=lambda loop: loop[1] - loop[0])
    if not found:
        raise RuntimeError(f'no loop in the {name} kernel')
    *others, (start, stop) = found
    nested = sum(b - a for a, b in others if start < a and b <= stop)
    groups = backend.CHUNK // group
    tokens = backend.CHUNK if name == 'forward' else group
    trips = groups if name == 'forward' else (groups - 1) / 2
    if name == 'backward' and not nested:
        raise RuntimeError('the recomputing loop is not where it was')
    return (stop - start + (trips - 1) * nested) / tokens


def _loops(sass: str) -> Iterator[tuple[int, int]]:
    """First and one past the last instruction of each loop, as counted."""
    lines = re.findall(r'^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);', sass, re.M)
    position = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    for address, text in lines:
        jump = re.search(r'\bBRA\b.*?(0x[0-9a-f]+)', text)
        if jump and int(jump[1], 16) < int(address, 16):
            yield position[int(jump[1], 16)], position[int(address, 16)] + 1


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--table',
        choices=list(TABLES),
        help='what to compile (default: all)',
    )
    parser.add_argument(
        '--json', action='store_true', help='JSON instead of Markdown'
    )
    return parser.parse_args()


def main() -> None:
    """Compile and print the table."""
    args = parse_args()
    table = TABLES[args.table] if args.table else QUICK + SLOW
    rows = {
        row: measure(*row)
        for row in track(table, transient=True, disable=args.json)
    }
    if args.json:
        print(json.dumps([[*row, *used] for row, used in rows.items()]))
        return
    print(
        f'triton {triton.__version__}, N = {STATE}, bfloat16 inputs, '
        f'a state stored every {backend.CHUNK} tokens\n\n'
        '| kernel | A | b_disc | sm | registers | stack | shared '
        '| instructions per (token, channel, state) |\n' + '|---' * 8 + '|'
    )
    for row, used in rows.items():
        print('|', ' | '.join(map(str, (*row, *used))), '|')


if __name__ == '__main__':
    main()

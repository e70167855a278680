"""Stage ``sanitize``: compute-sanitizer over one tiny call of each kernel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from _gpu.stage import SkippedError, Stage, StageFailedError

TOOLS = ('memcheck', 'racecheck')
PLACES = ('/usr/local/cuda/bin', '/usr/local/cuda/compute-sanitizer')
REPORT_CHARACTERS = 4000
STOPPED = 'stopped'
SUMMARY = re.compile(r'(?:ERROR|RACECHECK) SUMMARY: (\d+)')


def run(stage: Stage) -> None:
    """Run the kernels under each tool, while time lasts.

    Raises:
        StageFailedError: If a tool found something, or memcheck did not end.
        SkippedError: Without a GPU, or without the program.
    """
    table = stage.record.table(
        'Tools', tool='tool', errors='errors', kernels='kernels', end='end'
    )
    if stage.device == 'cpu':
        _, end, output = _call([], stage.seconds_left())
        table.add(tool='none', kernels=_kernels(output), end=end)
        if end != 'ok':
            raise StageFailedError(output[-REPORT_CHARACTERS:])
        raise SkippedError('There is no GPU.')
    program = find_program()
    if program is None:
        raise SkippedError('There is no compute-sanitizer on this machine.')
    reports = []
    for tool in TOOLS:
        command = [str(program), '--tool', tool, '--error-exitcode', '86']
        errors, end, output = _call(command, stage.seconds_left())
        table.add(tool=tool, errors=errors, kernels=_kernels(output), end=end)
        # the first one is a must, the others take what time is left
        late = end.startswith(STOPPED) and tool != TOOLS[0]
        if not late and (end != 'ok' or errors != 0):
            reports.append(f'{tool}: {end}\n{output[-REPORT_CHARACTERS:]}')
    if reports:
        raise StageFailedError('\n\n'.join(reports))


def find_program() -> Path | None:
    """On PATH, in CUDA's usual folders, or in NVIDIA's wheels."""
    name = 'compute-sanitizer'
    found = shutil.which(name)
    candidates = [Path(found)] if found else []
    candidates += [Path(place, name) for place in PLACES]
    spec = importlib.util.find_spec('nvidia')
    for root in (spec and spec.submodule_search_locations) or []:
        candidates += sorted(Path(root).glob(f'**/bin/{name}'))
    return next((path for path in candidates if path.is_file()), None)


def _call(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Errors found, how it ended, and what it printed."""
    # each tensor in an allocation of its own, so that its end is known
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING='1')
    try:
        done = subprocess.run(
            [*command, sys.executable, '-m', '_gpu.tiny_kernels'],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b''
        if isinstance(output, bytes):
            output = output.decode(errors='replace')
        return None, f'{STOPPED} after {seconds:.0f} s', output
    found = SUMMARY.findall(done.stdout)
    end = 'ok' if done.returncode == 0 else f'exit code {done.returncode}'
    return int(found[-1]) if found else None, end, done.stdout


def _kernels(output: str) -> str:
    """Which ones came to their end."""
    return ', '.join(re.findall(r'^done: (.+)$', output, re.MULTILINE))

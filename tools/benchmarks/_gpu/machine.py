"""What a report says about the machine; run as a module, it prints JSON."""

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

PACKAGES = ('torch', 'triton', 'mmengine', 'mmpretrain', 'mamba_ssm', 'numpy')

SMI_FIELDS = {
    'driver_version': 'driver',
    'clocks.max.sm': 'largest SM clock',
    'clocks.max.mem': 'largest memory clock',
    'power.limit': 'power limit',
}
"""What ``nvidia-smi`` is asked for, and its name in the report."""


def describe() -> dict[str, Any]:
    """Device, driver, versions, commit; unknown ones are left out."""
    import torch

    import mmstabvim

    with_gpu = torch.cuda.is_available()
    found: dict[str, Any] = dict(device=processor())
    if with_gpu:
        properties = torch.cuda.get_device_properties(0)
        found['device'] = properties.name
        found['processor'] = processor()
        found['multiprocessors'] = properties.multi_processor_count
        found['memory GB'] = round(properties.total_memory / 1e9, 1)
        found.update(_from_smi())
    found['CUDA'] = torch.version.cuda
    found['python'] = platform.python_version()
    found['mmstabvim'] = mmstabvim.__version__
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found['commit'] = commit()
    return {name: value for name, value in found.items() if value}


def processor() -> str:
    """Model of the CPU."""
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.exists() else ''
    match = re.search(r'^model name\s*:\s*(.+)$', text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of this checkout, with a mark if files differ from it."""
    describe = ['git', 'describe', '--always', '--abbrev=40', '--dirty']
    return _output(describe, cwd=ROOT)


def _from_smi() -> dict[str, str]:
    query = ['nvidia-smi', f'--query-gpu={",".join(SMI_FIELDS)}']
    line = _output([*query, '--format=csv,noheader', '-i', '0'])
    if line is None:
        return {}
    values = (value.strip() for value in line.split(','))
    return dict(zip(SMI_FIELDS.values(), values, strict=True))


def _output(command: list[str], **options: Any) -> str | None:
    """Standard output of a command, None where it fails or is not there."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, **options
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    """Print whether there is a GPU, and the description."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    import torch

    print(json.dumps(dict(gpu=torch.cuda.is_available(), header=describe())))


if __name__ == '__main__':
    main()

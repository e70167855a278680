"""Imports go down only: registry and functions, layers, registered parts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'mmstabvim'
LEVELS = {
    'version': 0,
    'checkpoint': 0,
    'file_formats': 0,
    'loading': 0,
    'log': 0,
    'model_hub': 0,
    'stack': 0,
    'registry': 0,
    'compat': 0,
    'ops': 1,
    'stability': 1,
    'layers': 2,
    'models': 3,
    'engine': 3,
    'datasets': 3,
    'evaluation': 3,
    'visualization': 3,
    'apis': 4,
    'building': 0,
    'reporting': 3,
    'analysis': 5,
    'ablation': 5,
    'check_env': 4,
}
# registered parts know each other through the registry only
APART = {'models', 'engine', 'datasets'}
HEAVY = {'triton', 'mmpretrain', 'mmseg', 'mmcv'}


def imported_modules(path):
    """Absolute names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def upward_imports(path, folder):
    """Imports of a file in ``folder`` that its level forbids."""
    for name in imported_modules(path):
        parts = name.split('.')
        if parts[0] != 'mmstabvim' or len(parts) == 1:
            continue
        other = parts[1]
        if other not in LEVELS or other == folder:
            continue
        apart = folder in APART and other in APART
        if apart or LEVELS[other] > LEVELS[folder]:
            yield name


@pytest.mark.parametrize('folder', sorted(LEVELS))
def test_imports_go_down_only(folder):
    files = [*PACKAGE.glob(f'{folder}.py'), *PACKAGE.glob(f'{folder}/**/*.py')]
    for path in files:
        assert not list(upward_imports(path, folder)), path


def test_every_folder_has_a_level():
    found = {
        p.stem
        for p in PACKAGE.iterdir()
        if p.suffix == '.py' or (p / '__init__.py').exists()
    }
    assert found - {'__init__'} <= set(LEVELS)


def test_the_walk_sees_an_upward_import(tmp_path):
    file = tmp_path / 'wrong.py'
    file.write_text(
        'def f():\n    from mmstabvim.models import VisionMamba\n'
        'import mmstabvim.ops\n'
    )
    assert list(upward_imports(file, 'layers')) == [
        'mmstabvim.models',
        'mmstabvim.models.VisionMamba',
    ]


def test_importing_the_package_is_light():
    """Beside mmengine, for which older versions of PyTorch load triton."""
    code = (
        'import sys, mmengine.runner\n'
        'before = set(sys.modules)\n'
        'import mmstabvim\n'
        'print(*set(sys.modules) - before)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())

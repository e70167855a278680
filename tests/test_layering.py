"""Imports go down only, from the tools to functions on tensors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmstabvim'
LENGTH = 60
LARGE = ('benchmarks', 'reproduce')  # folders of tools that may be longer
LEVELS = {
    'version': 0,
    'checkpoint': 0,
    'file_formats': 0,
    'hook_handles': 0,
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
HOOKS = 'mmstabvim.engine.hooks'
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


SCRIPTS = sorted((ROOT / 'tools').rglob('*.py'))
THIN = [path for path in SCRIPTS if path.parts[-2] not in LARGE]
THIN = [path for path in THIN if path.parts[-3] not in LARGE]


def top_names(path):
    """First words of what a file imports."""
    return {name.partition('.')[0] for name in imported_modules(path)}


@pytest.mark.parametrize('path', THIN, ids=lambda path: path.stem)
def test_tools_are_thin(path):
    """The work is in the package, where it can be imported."""
    assert len(path.read_text().splitlines()) <= LENGTH
    folders = {path.parent.name for path in SCRIPTS}
    others = {path.stem for path in SCRIPTS} | folders
    assert not top_names(path) & (others - sys.stdlib_module_names)


def test_the_package_imports_no_tool():
    tools = {path.stem for path in SCRIPTS} | {'tools'}
    for path in PACKAGE.rglob('*.py'):
        assert not top_names(path) & (tools - sys.stdlib_module_names), path


MAMBA = {'layers', 'models', 'ops', 'stability'}


def mamba_imports(path):
    """Imports of a file that only a state-space model needs."""
    names = (n for n in imported_modules(path) if n.startswith('mmstabvim.'))
    return [
        name
        for name in names
        if name.split('.')[1] in MAMBA or name.startswith(HOOKS)
    ]


@pytest.mark.parametrize(
    'path',
    [
        *sorted((PACKAGE / 'engine/divergence').glob('*.py')),
        PACKAGE / 'engine/__init__.py',
        PACKAGE / 'engine/random_state.py',
        PACKAGE / 'engine/runner_access.py',
    ],
    ids=lambda path: f'{path.parent.name}/{path.stem}',
)
def test_divergence_needs_no_mamba(path):
    assert not mamba_imports(path)


def test_the_door_of_divergence_loads_no_mamba():
    code = (
        'import sys, mmstabvim.engine.divergence\n'
        "print(*(n for n in sys.modules if n.startswith('mmstabvim.')))"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.split('.')[1] for name in done.stdout.split()}
    assert 'engine' in loaded
    assert not MAMBA & loaded


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

"""Which OpenMMLab is installed, and what is said where it cannot work."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmstabvim
from mmstabvim import stack

ROOT = Path(__file__).parents[1]


def run(code, *flags, **env):
    """Run code in another Python; return what it printed."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *flags, '-c', code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_without(folder, packages, code):
    """Run code where some import packages, and their metadata, are not.

    The others are linked into a folder that stands for that of the installed
    packages, with no import hook of this environment.
    """
    names = {n for p in packages for n in (p, *stack.DISTRIBUTIONS[p])}
    site = Path(torch.__file__).parents[1]
    for path in site.iterdir():
        name = path.name.split('-')[0].replace('_', '-')
        if path.suffix == '.dist-info':
            name = re.sub(r'-\d.*', '', path.name).replace('_', '-')
        if name not in names and 'mmstabvim' not in name:
            (folder / path.name).symlink_to(path)
    return run(code, '-S', PYTHONPATH=f'{ROOT}{os.pathsep}{folder}')


LOG = """
import logging, sys
logging.basicConfig(
    level=logging.INFO, format='LOG %(message)s', stream=sys.stdout
)
"""


def test_functions_and_layers_work_with_pytorch_alone(tmp_path):
    """No module of OpenMMLab is imported; messages go to ``logging``."""
    code = LOG + (
        'import torch\n'
        'import mmstabvim.stability\n'
        'from mmstabvim.layers import VisionMambaBlock\n'
        'from mmstabvim.ops import selective_scan\n'
        'u = torch.ones(1, 2, 3)\n'
        'y = selective_scan(u, u, -torch.ones(2, 4), torch.ones(1, 4, 3),'
        ' torch.ones(1, 4, 3))\n'
        'hidden, residual = VisionMambaBlock(8)(torch.ones(1, 5, 8))\n'
        'hidden.sum().backward()\n'
        'print(*y.shape, *hidden.shape)\n'
        'print([m for m in sys.modules if m.split(".")[0] in '
        f'{list(stack.DISTRIBUTIONS)}])\n'
    )
    out = run_without(tmp_path, stack.DISTRIBUTIONS, code).splitlines()
    assert out[-2:] == ['1 2 3 1 5 8', '[]']
    assert any(line.startswith('LOG selective_scan uses') for line in out)


MODULES = sorted(
    path.stem
    for path in Path(mmstabvim.__file__).parent.iterdir()
    if path.stem[0] not in '_.' and path.suffix in ('', '.py')
)


def test_what_is_missing_is_named(tmp_path):
    """By every part that needs it; to look for it is no error."""
    code = (
        'from importlib import import_module\n'
        'from importlib.util import find_spec\n'
        'import mmstabvim\n'
        'print(find_spec("mmengine"))\n'
        f'for name in {MODULES}:\n'
        '    try:\n        import_module(f"mmstabvim.{name}")\n'
        '    except ModuleNotFoundError as error:\n'
        '        print(name, error.name, error)\n'
        'try:\n    from mmstabvim import VisionMamba\n'
        'except ImportError as error:\n'
        '    print("VisionMamba", error.name, error)\n'
    )
    found, *said = run_without(
        tmp_path, stack.DISTRIBUTIONS, code
    ).splitlines()
    assert found == 'None'
    for line in said:
        assert re.match(
            r"\w+ mmengine .*pip install 'mmstabvim\[lite\]'", line
        )
    needy = {line.split()[0] for line in said}
    assert needy >= {'VisionMamba', 'models', 'engine', 'compat'}
    assert not needy & {'layers', 'ops', 'stability', 'stack'}


def test_what_needs_no_mmengine_works_beside_two():
    """They are named where one is needed, or was imported before."""
    code = (
        'import importlib.metadata as metadata\n'
        'import sys\n'
        'real = metadata.version\n'
        'metadata.version = lambda name: (\n'
        '    "0.10.12" if name.endswith("mmengine") else real(name))\n'
        'import mmstabvim.layers, mmstabvim.stability\n'
        'for module in ("mmengine", "mmstabvim.models"):\n'
        '    try:\n        __import__(module)\n'
        '    except ImportError as error:\n        print(error)\n'
        'sys.meta_path.remove(mmstabvim.stack._watcher)\n'
        'for name in [m for m in sys.modules if m.startswith("mmstab")]:\n'
        '    del sys.modules[name]\n'
        'import mmengine\n'
        'try:\n    import mmstabvim\n'
        'except ImportError as error:\n    print(error)\n'
    )
    said = run(code).splitlines()
    assert len(said) == 3
    for line in said:
        assert 'mmengine and onedl-mmengine are both installed' in line


def test_backbones_and_hooks_need_mmengine_only(tmp_path):
    code = (
        'import torch\n'
        'from mmstabvim import VisionMamba, SpectralNormalizationHook\n'
        'model = VisionMamba(dict(embed_dims=8, num_layers=1), img_size=32)\n'
        'print(*model(torch.ones(1, 3, 32, 32))[0].shape)\n'
        'from mmengine.registry import DATASETS\n'
        'try:\n    DATASETS.build(dict(type="mmstabvim.CamVidDataset"))\n'
        'except ImportError as error:\n    print(error)\n'
    )
    packages = stack.DISTRIBUTIONS.keys() - {'mmengine'}
    *_, shape, said = run_without(tmp_path, packages, code).splitlines()
    assert shape == '1 8'
    assert 'needs MMSegmentation: pip install' in said


@pytest.fixture
def metadata(monkeypatch):
    """Let other distributions be installed than there are."""

    def pretend(**versions):
        names = {k.replace('_', '-'): v for k, v in versions.items()}

        def version(name):
            if name not in names:
                raise stack.PackageNotFoundError(name)
            return names[name]

        monkeypatch.setattr(stack, 'version', version)

    return pretend


LITE = dict(
    mmengine='0.10.7',
    mmcv_lite='2.1.0',
    mmpretrain='1.2.0',
    mmsegmentation='1.2.2',
)
BAD = {
    'mmcv too new': (LITE | {'mmcv_lite': '2.2.0'}, 'mmseg', '< 2.2.0, got'),
    'mmcv too old': (LITE | {'mmcv_lite': '1.7.0'}, 'mmpretrain', 'got mmcv-'),
    'two mmcv': (LITE | {'mmcv': '2.1.0'}, 'mmseg', 'mmcv and mmcv-lite are'),
    'two stacks': (
        LITE | {'onedl_mmengine': '0.10.12'},
        'mmengine',
        "pip install 'mmstabvim[onedl]'",
    ),
    'two mmseg': (
        LITE | {'onedl_mmsegmentation': '1.4.2'},
        'mmseg',
        'mmsegmentation and onedl-mmsegmentation are both installed',
    ),
}


TOOLKITS = {
    'mmseg': "MMCV_MIN = '2.0.0rc4'\nMMCV_MAX = '2.2.0'\n",
    'mmpretrain': (
        "mmcv_minimum_version = '2.0.0'\nmmcv_maximum_version = '2.4.0'\n"
    ),
}


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """Toolkits that accept other versions than the installed ones may."""
    for name, source in TOOLKITS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures('toolkits')
@pytest.mark.parametrize('name', BAD)
def test_a_combination_that_cannot_work(metadata, name):
    versions, package, wanted = BAD[name]
    metadata(**versions)
    with pytest.raises(ImportError, match=re.escape(wanted)):
        stack.check(package)


ONEDL = dict(
    onedl_mmengine='0.10.12',
    onedl_mmcv='2.3.6',
    onedl_mmpretrain='1.3.6',
    onedl_mmsegmentation='1.4.2',
)


@pytest.mark.parametrize(
    'versions',
    [
        {},
        LITE | ONEDL,
        LITE | {'mmcv': '2.1.0'},
        LITE | {'onedl_mmengine': '0.10.12'},
        ONEDL | {'mmengine': '0.10.7'},
        {k: v for k, v in ONEDL.items() if k != 'onedl_mmcv'},
        LITE | {'mmengine_lite': '0.10.7'},
    ],
    ids=[
        'none',
        'all',
        'two mmcv',
        'fork on top',
        'old on top',
        'fork without mmcv',
        'original',
    ],
)
def test_the_cure_works(metadata, monkeypatch, versions):
    """One go: what it installs, beside what it leaves, can work."""
    monkeypatch.setattr(stack, '_find_spec', lambda name: None)
    metadata(**versions)
    problem = next(filter(None, map(stack.find_problem, stack.NEEDS)))
    removed = re.findall(r'uninstall -y ([^;]+);', problem)
    removed = ' '.join(removed).replace('-', '_').split()
    (form,) = re.findall(r"pip install 'mmstabvim\[(\w+)\]'", problem)
    left = {k: v for k, v in versions.items() if k not in removed}
    metadata(**left | {'lite': LITE, 'onedl': ONEDL}[form])
    for package in stack.NEEDS:
        assert stack.find_problem(package) is None


@pytest.mark.parametrize('package', stack.NEEDS)
def test_the_tested_combination_passes(metadata, package):
    metadata(**LITE)
    stack.check(package)


@pytest.mark.parametrize(
    ('versions', 'wanted'),
    [(LITE, "'mmcv>=2.0.0,<2.2.0'"), (ONEDL, 'onedl-mmcv')],
    ids=['lite', 'fork'],
)
def test_operators_of_mmcv(metadata, versions, wanted):
    """Compiled for what is installed, in a version that is accepted."""
    metadata(**versions)
    command = stack.ops_command()
    assert command.endswith(wanted)
    assert ('uninstall -y mmcv-lite' in command) == (versions is LITE)


@pytest.mark.usefixtures('toolkits')
def test_classification_alone_takes_a_newer_mmcv(metadata):
    metadata(**LITE | {'mmcv_lite': '2.2.0'})
    stack.check('mmpretrain')


def test_a_toolkit_is_checked_at_its_import():
    """Not at the import of this package, which does not need it."""
    (name,) = stack.installed('mmcv')
    # the fork's MMSegmentation accepts any mmcv
    new, refuses, accepts = (
        ('2.4.0', 'mmpretrain', 'mmseg')
        if name.startswith('onedl')
        else ('2.2.0', 'mmseg', 'mmpretrain')
    )
    code = (
        'import importlib.metadata as metadata\n'
        'real = metadata.version\n'
        'metadata.version = (\n'
        f'    lambda n: {new!r} if n == {name!r} else real(n))\n'
        'import mmstabvim\n'
        'for _ in range(2):\n'
        f'    try:\n        import {refuses}\n'
        '    except ImportError as error:\n        print(error)\n'
        f'import {accepts}\n'
        'print("the other works")\n'
    )
    *said, last = run(code).splitlines()
    assert len([x for x in said if f"pip install '{name}>=2" in x]) == 2
    assert last == 'the other works'


CONFIGS = {
    'mmpretrain': 'vim/vim-nano-p4_1xb64-20e_digits.py',
    'mmseg': 'upernet/vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64.py',
}


@pytest.mark.parametrize('toolkit', CONFIGS)
def test_tools_name_a_toolkit_that_cannot_work(tmp_path, toolkit):
    """mmengine goes on without it."""
    config = str(ROOT / 'configs' / CONFIGS[toolkit])
    code = (
        'from mmstabvim.engine import launch\n'
        'try:\n'
        f'    launch.read_settings({config!r}, {{}})\n'
        'except ValueError as error:\n    print(error)\n'
    )
    said = run_without(tmp_path, [toolkit], code)
    assert f'{toolkit} is not installed. Cure: pip install' in said


def test_after_import(tmp_path, monkeypatch):
    (tmp_path / 'watched_module.py').write_text('value = 3')
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    stack.after_import('watched_module', seen.append)
    stack.after_import('watched_module', seen.append)
    module = importlib.import_module('watched_module')
    stack.after_import('watched_module', seen.append)
    assert seen == [module] * 3
    assert module.value == 3
    assert type(module.__loader__).__name__ == 'SourceFileLoader'

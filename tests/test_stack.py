"""Which OpenMMLab is installed, and what is said where it cannot work."""

import importlib
import re
import subprocess
import sys

import pytest

from mmstabvim import stack


def run(code):
    """Run code in another Python; return what it printed."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {hidden}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util, importlib.machinery
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: (
    None if name.split('.')[0] in {hidden} else real(name, *a))
machinery = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *a: (
    None if name.split('.')[0] in {hidden} else machinery(name, *a))
import importlib.metadata as metadata
version = metadata.version
def hidden_version(name):
    short = name.replace('onedl-', '').replace('mmsegmentation', 'mmseg')
    if short in {hidden}:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = hidden_version
"""
ALL = {'mmengine', 'mmcv', 'mmcv-lite', 'mmpretrain', 'mmseg', 'mmdet'}


def without(hidden):
    return WITHOUT.format(hidden=sorted(hidden))


def test_functions_and_layers_work_with_pytorch_alone():
    """No module of OpenMMLab is imported; messages go to ``logging``."""
    code = without(ALL) + (
        'import logging\n'
        'logging.basicConfig(level=logging.INFO, format="LOG %(message)s",'
        ' stream=sys.stdout)\n'
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
        f'{sorted(ALL)}])\n'
    )
    out = run(code).splitlines()
    assert out[-2:] == ['1 2 3 1 5 8', '[]']
    assert any(line.startswith('LOG selective_scan uses') for line in out)


def test_a_backbone_names_what_is_missing():
    code = without(ALL) + (
        'try:\n    from mmstabvim import VisionMamba\n'
        'except ImportError as error:\n    print(error)\n'
    )
    said = run(code)
    assert 'mmengine is not installed' in said
    assert "pip install 'mmstabvim[lite]'" in said


def test_backbones_and_hooks_need_mmengine_only():
    code = without(ALL - {'mmengine'}) + (
        'import torch\n'
        'from mmstabvim import VisionMamba, SpectralNormalizationHook\n'
        'model = VisionMamba(dict(embed_dims=8, num_layers=1), img_size=32)\n'
        'print(*model(torch.ones(1, 3, 32, 32))[0].shape)\n'
    )
    assert run(code).splitlines()[-1] == '1 8'


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
        'pip uninstall -y mmsegmentation onedl-mmsegmentation',
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_a_combination_that_cannot_work(metadata, name):
    versions, package, wanted = BAD[name]
    metadata(**versions)
    with pytest.raises(ImportError, match=re.escape(wanted)):
        stack.check(package)


@pytest.mark.parametrize('package', stack.NEEDS)
def test_the_tested_combination_passes(metadata, package):
    metadata(**LITE)
    stack.check(package)


def test_classification_alone_takes_a_newer_mmcv(metadata):
    metadata(**LITE | {'mmcv_lite': '2.2.0'})
    stack.check('mmpretrain')


def test_a_toolkit_is_checked_at_its_import():
    """Not at the import of this package, which does not need it."""
    code = (
        'import importlib.metadata as metadata\n'
        'real = metadata.version\n'
        'metadata.version = (\n'
        '    lambda n: "2.2.0" if n == "mmcv-lite" else real(n))\n'
        'import mmstabvim\n'
        'for _ in range(2):\n'
        '    try:\n        import mmseg\n'
        '    except ImportError as error:\n        print(error)\n'
        'import mmpretrain\n'
        'print("classification works")\n'
    )
    *said, last = run(code).splitlines()
    assert len([x for x in said if "pip install 'mmcv-lite>=2" in x]) == 2
    assert last == 'classification works'


def test_after_import(tmp_path, monkeypatch):
    (tmp_path / 'watched_module.py').write_text('value = 3')
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    stack.after_import('watched_module', seen.append)
    module = importlib.import_module('watched_module')
    stack.after_import('watched_module', seen.append)
    assert seen == [module, module]
    assert module.value == 3
    assert type(module.__loader__).__name__ == 'SourceFileLoader'

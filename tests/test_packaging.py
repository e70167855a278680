"""Wheel, editable install, metadata and the set-up of the Makefile."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
MIM_CONFIG = 'mmstabvim::vim/vim-tiny-p16_8xb128_in1k.py'


def python(*args, cwd, **env):
    """Run a Python that sees no other copy of the package."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the tree, as building writes into it."""
    root = tmp_path_factory.mktemp('source')
    files = ['setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE']
    for name in [*files, 'model-index.yml']:
        shutil.copy2(ROOT / name, root)
    ignore = shutil.ignore_patterns('__pycache__', '.mim', 'build')
    for name in ('mmstabvim', 'configs', 'tools', 'requirements'):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    return root


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    python('setup.py', '-q', 'bdist_wheel', '-d', folder, cwd=source)
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """Folder with the wheel's content, as pip leaves it."""
    folder = tmp_path_factory.mktemp('site')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope='module')
def metadata(installed):
    (info,) = installed.glob('*.dist-info')
    return importlib.metadata.Distribution.at(info).metadata


def files_below(folder):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


def test_wheel_has_configs_tools_and_index(installed, source):
    mim = installed / 'mmstabvim' / '.mim'
    assert files_below(mim / 'configs') == files_below(source / 'configs')
    assert files_below(mim / 'tools') == files_below(source / 'tools')
    assert (mim / 'model-index.yml').is_file()


def test_wheel_has_every_module_and_no_test(installed, source):
    package = files_below(source / 'mmstabvim')
    modules = {name for name in package if name.endswith('.py')}
    assert modules <= files_below(installed / 'mmstabvim')
    assert {path.name for path in installed.iterdir()} == {
        'mmstabvim',
        f'mmstabvim-{version()}.dist-info',
    }


def test_building_a_wheel_leaves_no_mim_folder(wheel, source):
    assert not (source / 'mmstabvim' / '.mim').is_symlink()
    assert not (source / 'mmstabvim' / '.mim').exists()


def test_installed_configs_are_bases(installed, tmp_path):
    """``mmstabvim::`` works in a config and in mmengine's hub."""
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = {MIM_CONFIG!r}')
    code = (
        'import mmstabvim\n'
        'from mmengine.config import Config\n'
        'from mmengine.hub import get_config\n'
        f'assert mmstabvim.__file__.startswith({str(installed)!r})\n'
        f'print(Config.fromfile({str(config)!r}).model.backbone.type)\n'
        f'print(get_config({MIM_CONFIG!r}).model.backbone.type)\n'
    )
    out = python('-c', code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.split() == ['mmstabvim.VisionMamba'] * 2


def test_installed_tools_start(installed, tmp_path):
    tool = installed / 'mmstabvim' / '.mim' / 'tools' / 'train.py'
    out = python(tool, '--help', cwd=tmp_path, PYTHONPATH=str(installed))
    assert '--cfg-options' in out


def test_editable_install_links(source, tmp_path):
    """Links, so that edits take effect."""
    tree = tmp_path / 'tree'
    shutil.copytree(source, tree)
    for _ in range(2):  # again over what is there
        args = ('setup.py', '-q', 'editable_wheel', '-d', tmp_path)
        python(*args, cwd=tree)
    mim = tree / 'mmstabvim' / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).is_symlink()
        assert (mim / name).samefile(tree / name)


def version():
    text = (ROOT / 'mmstabvim' / 'version.py').read_text()
    return text.split("'")[1]


def test_version_and_pythons(metadata):
    assert metadata['Version'] == version()
    wanted = SpecifierSet(metadata['Requires-Python'])
    pythons = [f'3.{minor}.0' for minor in range(9, 14)]
    assert list(wanted.filter(pythons)) == pythons[1:4]


def required(metadata, extra=''):
    """Requirements by name that apply with an extra."""
    found = map(Requirement, metadata.get_all('Requires-Dist'))
    return {
        r.name: r.specifier
        for r in found
        if not r.marker or r.marker.evaluate({'extra': extra})
    }


def test_mmcv_is_the_users_choice(metadata):
    """mmcv and mmcv-lite install the same folder: require neither."""
    assert not {'mmcv', 'mmcv-lite'} & required(metadata).keys()
    for extra in ('lite', 'test', 'dev'):
        assert 'mmcv-lite' in required(metadata, extra)


def pins(name, python_version):
    """Pinned versions of a requirements file, for one Python."""
    pinned = {}
    for line in (ROOT / 'requirements' / name).read_text().splitlines():
        line = line.partition('#')[0].strip()
        if line.startswith('-r '):
            pinned.update(pins(line[3:], python_version))
        elif line:
            requirement = Requirement(line)
            marker = requirement.marker
            if not marker or marker.evaluate(
                {'python_version': python_version}
            ):
                (spec,) = requirement.specifier
                assert spec.operator == '=='
                assert requirement.name not in pinned
                pinned[requirement.name] = spec.version
    return pinned


@pytest.mark.parametrize('python_version', ['3.10', '3.11', '3.12'])
def test_tested_versions_satisfy_the_ranges(metadata, python_version):
    pinned = pins('dev.txt', python_version)
    for name, allowed in required(metadata, 'test').items():
        assert pinned[name] in allowed, f'{name} {pinned[name]} {allowed}'


def test_model_index_names_real_configs():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    for metafile in index['Import']:
        content = yaml.safe_load((ROOT / metafile).read_text())
        collections = {item['Name'] for item in content['Collections']}
        for model in content['Models']:
            assert (ROOT / model['Config']).is_file(), model['Config']
            assert model['In Collection'] in collections


def make(*args, **env):
    return subprocess.run(
        ['make', '-C', str(ROOT), *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def fake(path, script):
    """An executable that stands for another."""
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)
    return path


# runs what it is given as if it were Python 3.13
OTHER_PYTHON = f"""
test "$1" = --version && echo 'Python 3.13.1' && exit
exec {sys.executable} -c 'import sys
sys.version_info = (3, 13, 1, "final", 0)
exec(sys.argv[1])' "$2"
"""
NO_VENV = 'case "$2" in *ensurepip*) exit 1;; esac'


@pytest.mark.parametrize(
    ('script', 'message'),
    [(OTHER_PYTHON, 'is Python 3.13.1'), (NO_VENV, 'python3-venv')],
    ids=['version', 'venv'],
)
def test_make_explains_an_unfit_python(tmp_path, script, message):
    path = fake(tmp_path / 'python', script)
    done = make('setup', f'PYTHON={path}', f'VENV={tmp_path}/venv')
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / 'venv').exists()


def test_make_without_python(tmp_path):
    done = make('test', 'PYTHON=no-python', f'VENV={tmp_path}/venv')
    assert done.returncode != 0
    assert 'there is no "no-python"' in done.stderr


def test_make_sets_up_once(tmp_path):
    """With an environment that is up to date nothing is installed."""
    (tmp_path / '.installed').touch()
    done = make('-n', 'demo', f'VENV={tmp_path}')
    assert 'tools/train.py' in done.stdout
    assert 'pip install' not in done.stdout
    done = make('-n', 'demo', f'VENV={tmp_path}/new')
    assert 'pip install' in done.stdout


@pytest.mark.parametrize('target', ['demo', 'demo-seg'])
def test_demos_train_configs_that_are_there(tmp_path, target):
    """Each with one of its own, into a folder of its name; ``help`` tells."""
    (tmp_path / '.installed').touch()
    done = make('-n', target, f'VENV={tmp_path}')
    pattern = r'tools/train\.py (\S+\.py).*--work-dir work_dirs/(\S+)'
    ((config, folder),) = re.findall(pattern, done.stdout, re.DOTALL)
    assert (ROOT / config).is_file()
    assert Path(config).stem == folder
    assert ('scenes' in folder) == (target == 'demo-seg')
    assert re.search(rf'^make {target} ', make('help').stdout, re.MULTILINE)


def test_ci_runs_make_test(tmp_path):
    fake(tmp_path / 'make', 'echo "$PWD: make $*"')
    path = f'{tmp_path}:{os.environ["PATH"]}'
    out = subprocess.check_output(
        [ROOT / '.ci' / 'run'], env={**os.environ, 'PATH': path}, text=True
    )
    assert out.strip() == f'{ROOT}: make test'

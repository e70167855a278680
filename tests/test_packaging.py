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
from packaging.version import Version

from mmstabvim import stack

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
    files += ['README.md', 'CHANGELOG.md']
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


def test_types_are_shipped(installed):
    """Without this file type checkers ignore the annotations."""
    assert (installed / 'mmstabvim' / 'py.typed').is_file()


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


def test_source_distribution_installs_and_works(source, tmp_path):
    """As from an index: archive, wheel of it, a model that computes."""
    tree = tmp_path / 'tree'
    shutil.copytree(source, tree)
    python('setup.py', '-q', 'sdist', '-d', tmp_path, cwd=tree)
    (archive,) = tmp_path.glob('*.tar.gz')
    python('-m', 'tarfile', '-e', archive, tmp_path / 'out', cwd=tmp_path)
    (unpacked,) = (tmp_path / 'out').iterdir()
    python('setup.py', '-q', 'bdist_wheel', '-d', tmp_path, cwd=unpacked)
    (wheel,) = tmp_path.glob('*.whl')
    site = tmp_path / 'site'
    with zipfile.ZipFile(wheel) as zipped:
        zipped.extractall(site)
    code = (
        'import mmstabvim, torch\n'
        f'assert mmstabvim.__file__.startswith({str(site)!r})\n'
        'model = mmstabvim.VisionMamba(dict(embed_dims=8, num_layers=1))\n'
        'print(*model(torch.ones(1, 3, 32, 32))[0].shape)\n'
    )
    out = python('-c', code, cwd=tmp_path, PYTHONPATH=str(site))
    assert out.splitlines()[-1] == '1 8'
    assert (site / 'mmstabvim/ops/selective_scan/fused.cpp').is_file()


def test_links_of_the_readme_become_absolute(source, tmp_path):
    """Without the files beside it, a relative link leads nowhere."""
    tree = tmp_path / 'tree'
    shutil.copytree(source, tree)
    (tree / 'README.md').write_text(
        '[![b](docs/b.svg)](docs/b.md) [`a`](a.md#x) [c](#c) [d](https://d.e)\n'
        '<img src="docs/e.png" alt="e"> <a href="mailto:f@g.h">f</a> [i][i]\n'
        '`list[0](key)`\n\n```python\nx = layers[0](tokens)\n```\n\n[i]: j.md'
    )
    python('setup.py', '-q', 'egg_info', cwd=tree)
    info = (tree / 'mmstabvim.egg-info' / 'PKG-INFO').read_text()
    home = 'https://github.com/mmstabvim/mmstabvim'
    assert info.partition('\n\n')[2].strip() == (
        f'[![b]({home}/raw/main/docs/b.svg)]({home}/blob/main/docs/b.md) '
        f'[`a`]({home}/blob/main/a.md#x) [c](#c) [d](https://d.e)\n'
        f'<img src="{home}/raw/main/docs/e.png" alt="e"> '
        '<a href="mailto:f@g.h">f</a> [i][i]\n'
        '`list[0](key)`\n\n```python\nx = layers[0](tokens)\n```\n\n'
        f'[i]: {home}/blob/main/j.md'
    )


def test_metadata_are_fit_for_an_index(metadata):
    text = metadata.get_payload()
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    assert links
    assert not [x for x in links if not x.startswith(('https://', '#'))]
    for name in ('Author', 'License-Expression', 'Summary'):
        assert metadata[name] or metadata['License'], name
    urls = metadata.get_all('Project-URL')
    assert {u.split(',')[0] for u in urls} >= {'Source', 'Documentation'}
    assert metadata['Description-Content-Type'] == 'text/markdown'


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


def pip(environment, *args):
    """Run pip for an environment that has none."""
    args = ('-m', 'pip', '--python', environment / 'bin' / 'python', *args)
    return python(*args, cwd=environment)


def test_mim_finds_an_editable_install(source, tmp_path):
    """A link, which pip removes without touching what it leads to."""
    tree = tmp_path / 'tree'
    shutil.copytree(source, tree)
    python('setup.py', '-q', 'editable_wheel', '-d', tmp_path, cwd=tree)
    (editable,) = tmp_path.glob('*.whl')
    environment = tmp_path / 'env'
    python('-m', 'venv', '--without-pip', environment, cwd=tmp_path)
    pip(environment, 'install', '--no-index', '--no-deps', editable)
    (site,) = environment.glob('lib/python*/site-packages')
    for _ in range(2):  # again over what is there
        tool = [
            environment / 'bin' / 'python',
            tree / 'tools/link_editable.py',
        ]
        subprocess.run(tool, check=True, capture_output=True)
    assert (site / 'mmstabvim').samefile(tree / 'mmstabvim')
    assert (site / 'mmstabvim/.mim/model-index.yml').is_file()
    (record,) = site.glob('*.dist-info/RECORD')
    assert record.read_text().splitlines().count('mmstabvim,,') == 1
    before = files_below(tree)
    pip(environment, 'uninstall', '--yes', 'mmstabvim')
    assert not list(environment.glob('lib/*/site-packages/*mmstabvim*'))
    assert files_below(tree) == before


def test_only_an_editable_install_is_linked(wheel, tmp_path):
    environment = tmp_path / 'env'
    python('-m', 'venv', '--without-pip', environment, cwd=tmp_path)
    link = [environment / 'bin' / 'python', ROOT / 'tools/link_editable.py']
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install -e .' in done.stderr
    pip(environment, 'install', '--no-index', '--no-deps', wheel)
    done = subprocess.run(link, capture_output=True, text=True, check=True)
    assert 'no editable install' in done.stdout
    (package,) = environment.glob('lib/python*/site-packages/mmstabvim')
    assert not package.is_symlink()


def version():
    text = (ROOT / 'mmstabvim' / 'version.py').read_text()
    return text.split("'")[1]


def test_version_and_pythons(metadata):
    assert metadata['Version'] == version()
    wanted = SpecifierSet(metadata['Requires-Python'])
    pythons = [f'3.{minor}.0' for minor in range(9, 15)]
    assert list(wanted.filter(pythons)) == pythons[1:5]


def required(metadata, extra=''):
    """Requirements by name that apply with an extra."""
    found = map(Requirement, metadata.get_all('Requires-Dist'))
    return {
        r.name: r.specifier
        for r in found
        if not r.marker or r.marker.evaluate({'extra': extra})
    }


def test_openmmlab_is_the_users_choice(metadata):
    """Packages that install the same folder: nobody gets two of them."""
    folders = {n for names in stack.DISTRIBUTIONS.values() for n in names}
    for extra in ('', 'test', 'dev'):
        assert not folders & required(metadata, extra).keys()
    for names in stack.DISTRIBUTIONS.values():
        for extra in ('lite', 'openmmlab', 'onedl'):
            both = required(metadata, extra).keys() & set(names)
            assert len(both) <= 1, f'{both} in {extra}'
    assert 'mmcv-lite' in required(metadata, 'lite')
    assert not {'mmcv', 'mmcv-lite'} & required(metadata, 'openmmlab').keys()
    assert 'onedl-mmengine' in required(metadata, 'onedl')


@pytest.mark.parametrize('package', ['mmcv', 'mmengine'])
@pytest.mark.parametrize('toolkit', ['mmpretrain', 'mmseg'])
def test_ranges_suit_what_the_toolkits_assert(metadata, toolkit, package):
    """Whatever version pip picks, the toolkit does not refuse it."""
    fork = any(name.startswith('onedl') for name in stack.installed(toolkit))
    asserted = stack.accepted_versions(toolkit, package)
    if asserted is None:
        assert fork  # its MMSegmentation accepts any
        return
    declared = required(metadata, 'onedl' if fork else 'lite')
    name = next(n for n in declared if n in stack.DISTRIBUTIONS[package])
    bounds = {s.operator: Version(s.version) for s in declared[name]}
    assert Version(asserted[0]) <= bounds['>=']
    assert bounds['<'] <= Version(asserted[1])


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


@pytest.mark.parametrize('python_version', ['3.10', '3.11', '3.12', '3.13'])
def test_tested_versions_satisfy_the_ranges(metadata, python_version):
    pinned = pins('dev.txt', python_version)
    wanted = required(metadata, 'lite') | required(metadata, 'test')
    for name, allowed in wanted.items():
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


# runs what it is given as if it were Python 3.14
OTHER_PYTHON = f"""
test "$1" = --version && echo 'Python 3.14.1' && exit
exec {sys.executable} -c 'import sys
sys.version_info = (3, 14, 1, "final", 0)
exec(sys.argv[1])' "$2"
"""
NO_VENV = 'case "$2" in *ensurepip*) exit 1;; esac'


@pytest.mark.parametrize(
    ('script', 'message'),
    [(OTHER_PYTHON, 'is Python 3.14.1'), (NO_VENV, 'python3-venv')],
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


@pytest.mark.parametrize('stack', ['lite', 'onedl'])
def test_latest_is_an_environment_without_pins(tmp_path, metadata, stack):
    """Of a stack that is declared; the chosen tests are there."""
    done = make('-n', 'test-latest', f'STACK={stack}', f'LATEST={tmp_path}/x')
    assert f"pip install -e '.[{stack},test]'" in done.stdout
    assert 'requirements/' not in done.stdout
    assert stack in metadata.get_all('Provides-Extra')
    chosen = re.findall(r'tests/\S+\.py', done.stdout)
    assert chosen
    assert all((ROOT / path).is_file() for path in chosen)
    assert re.search('^make test-latest ', make('help').stdout, re.MULTILINE)


def test_ci_runs_the_checks(tmp_path):
    """One after the other; the first that fails ends it."""
    fake(tmp_path / 'make', 'echo "$PWD: make $*"')
    path = f'{tmp_path}:{os.environ["PATH"]}'
    out = subprocess.check_output(
        [ROOT / '.ci' / 'run'], env={**os.environ, 'PATH': path}, text=True
    )
    targets = ['lint', 'test', 'test-all', 'docs']
    assert out.splitlines() == [f'{ROOT}: make {t}' for t in targets]
    fake(tmp_path / 'make', 'echo "$*"; test $1 = lint')
    done = subprocess.run(
        [ROOT / '.ci' / 'run'],
        env={**os.environ, 'PATH': path},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert done.stdout.split() == ['lint', 'test']


def test_tiers():
    """The fast tier leaves out what is marked, the other one nothing."""
    assert "pytest -m 'not slow' -n 2\n" in make('-n', 'test').stdout
    assert 'pytest -n 2\n' in make('-n', 'test-all').stdout


@pytest.mark.parametrize('target', ['lint', 'coverage', 'docs'])
def test_targets_install_what_they_need(tmp_path, target):
    done = make('-n', target, f'VENV={tmp_path}/venv')
    name = 'docs' if target == 'docs' else 'dev'
    assert f'pip install -r requirements/{name}.txt' in done.stdout
    assert re.search(f'^make {target} ', make('help').stdout, re.MULTILINE)


def test_one_version_everywhere():
    """Package, citation and changelog name the same one."""
    number = re.escape(version())
    for name, pattern in {
        'CITATION.cff': rf'^version: {number}$',
        'README.md': rf'version = {{{number}}}',
        'CHANGELOG.md': rf'^## {number}\b',
    }.items():
        text = (ROOT / name).read_text(encoding='utf-8')
        assert re.search(pattern, text, re.MULTILINE), name

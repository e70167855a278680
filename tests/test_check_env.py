"""The report of the environment: what it prints, and when it fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmstabvim import check_env
from mmstabvim.models.vim_checkpoint import from_official
from mmstabvim.ops import native

GOLDENS = Path(__file__).parent / 'data' / 'goldens'


def stored_numbers():
    """The content of ``parity.npz``, from the golden files."""
    vim = np.load(GOLDENS / 'vim_cls_midcls.npz')
    state = {
        k.removeprefix('state/'): torch.from_numpy(vim[k])
        for k in vim.files
        if k.startswith('state/')
    }
    start = 'backbone.layers.0.'
    numbers = {
        f'block.weights.{k.removeprefix(start)}': v.numpy()
        for k, v in from_official(state)[0].items()
        if k.startswith(start)
    }
    numbers['block.input'] = vim['residual/0']
    numbers['block.output'] = vim['f64/hidden_states/0']
    scan = np.load(GOLDENS / 'selective_scan.npz')
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
    for case, kind in (('case02', 'real'), ('case14', 'complex')):
        assert scan[f'{case}/delta_softplus']
        for name in names:
            numbers[f'{kind}.{name}'] = scan[f'{case}/{name}']
        numbers[f'{kind}.output'] = scan[f'{case}/out_f64']
    return numbers


def test_stored_numbers_are_those_of_the_goldens():
    stored = np.load(check_env.NUMBERS)
    wanted = stored_numbers()
    assert set(stored.files) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(stored[name], value)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(check_env, 'SECONDS', 0.0)


def report(capsys):
    status = check_env.main()
    return status, capsys.readouterr().out


def test_all_good(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    status, out = report(capsys)
    assert status == 0, out
    assert out.rstrip().endswith('-- all good')
    for title in ('versions', 'shims', 'backends', 'parity', 'speed'):
        assert f'-- {title}' in out
    for name in ('torch', 'mmengine', 'selective_scan fused', 'Vim block'):
        assert name in out
    assert str(tmp_path) not in out  # the home folder


def test_as_a_module():
    """The command that the README names, from another folder."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'mmstabvim.check_env'],
        capture_output=True,
        text=True,
        cwd='/',
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'inference' in done.stdout


def test_a_wrong_number_is_found(capsys, monkeypatch, tmp_path):
    numbers = stored_numbers()
    numbers['block.output'] = numbers['block.output'].copy()
    numbers['block.output'].flat[0] += 1e-3
    np.savez(tmp_path / 'parity.npz', **numbers)
    monkeypatch.setattr(check_env, 'NUMBERS', tmp_path / 'parity.npz')
    status, out = report(capsys)
    assert status == 1
    (line,) = (x for x in out.splitlines() if x.startswith('Vim block'))
    assert 'FAILED' in line
    assert 'speed' in out


def test_parts_survive_each_other(capsys, monkeypatch, tmp_path):
    """Numbers that are not there, a backend that raises."""
    monkeypatch.setattr(check_env, 'NUMBERS', tmp_path / 'none.npz')

    def broken(*_args, **_kwargs):
        raise RuntimeError('broken on purpose')

    monkeypatch.setattr(check_env, 'rms_norm', broken)
    status, out = report(capsys)
    assert status == 1
    assert re.search(r'rms_norm \w+ +FAILED RuntimeError: broken', out)
    assert 'none.npz' in out
    assert 'inference' in out


def test_a_wrong_backend_is_found(capsys, monkeypatch):
    monkeypatch.setattr(check_env, 'gated_merge', lambda y, z: y[0] * z)
    status, out = report(capsys)
    assert status == 1
    assert re.search(r'gated_merge \w+ +FAILED', out)


def test_without_a_compiler(capsys, monkeypatch, tmp_path):
    """Slow, and said so, but nothing is wrong."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(native, 'COMPILERS', ('no-such-compiler',))
    native.load.cache_clear()
    status, out = report(capsys)
    native.load.cache_clear()
    assert status == 0, out
    assert 'no C++ compiler' in out
    assert re.search('selective_scan fused +not run', out)


def test_without_openmmlab():
    """With PyTorch alone the report is there, and says so."""
    code = (
        'import sys, importlib.metadata as m\n'
        'real = m.version\n'
        'def version(name):\n'
        '    if "mm" in name and name != "mmstabvim":\n'
        '        raise m.PackageNotFoundError(name)\n'
        '    return real(name)\n'
        'm.version = version\n'
        'from importlib.machinery import PathFinder\n'
        'find = PathFinder.find_spec\n'
        'PathFinder.find_spec = (\n'
        '    lambda n, *a: None if n == "mmengine" else find(n, *a))\n'
        'from mmstabvim import check_env\n'
        'check_env.SECONDS = 0\n'
        'assert "mmengine" not in sys.modules\n'
        'sys.exit(check_env.main())\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'MMEngine is not installed' in done.stdout


def test_issue_template_asks_for_it():
    path = Path(__file__).parents[1] / '.github/ISSUE_TEMPLATE/bug_report.yml'
    assert 'python -m mmstabvim.check_env' in path.read_text()

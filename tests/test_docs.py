"""Every code block of README and docs: run, built or at least parsed.

Two pages are walked from the first block to the last, as their readers do.
Other Python blocks run as they are, after what ``CONTEXT`` puts in front of
them; blocks of a config are parsed and what they name is built. Commands
are parsed by the tool that they call; those that train for minutes are run
by tests of their own. What is only output is not counted as a block.
"""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from PIL import Image

from mmstabvim import VisionMamba
from mmstabvim.models.vim_checkpoint import to_official

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
WALKED = ('docs/tutorial_classification.md', 'docs/tutorial_segmentation.md')
OUTPUT = ('text', 'diff', '')
"""Diffs of README and mix_in are applied by tests of those configs."""

BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)


class Block:
    """A block of code, with the page and the line it begins at."""

    def __init__(self, path, match):
        text = path.read_text()
        self.page = str(path.relative_to(ROOT))
        self.line = text.count('\n', 0, match.start()) + 1
        self.language, self.code = match.groups()

    def __str__(self):
        return f'{self.page}:{self.line}'

    @property
    def is_config(self):
        """Assignments of settings, and nothing that computes."""
        tree = ast.parse(self.code)
        return all(isinstance(node, ast.Assign) for node in tree.body)


def blocks(*languages):
    return [
        block
        for path in PAGES
        for block in (Block(path, m) for m in BLOCK.finditer(path.read_text()))
        if block.language in languages and block.page not in WALKED
    ]


def run(code, folder, **env):
    """Run Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f'{done.stdout[-3000:]}{done.stderr[-3000:]}'
    return done.stdout


# --- Python -----------------------------------------------------------------

PYTHON = blocks('python')
CODE = [block for block in PYTHON if not block.is_config]
CONFIGS = [block for block in PYTHON if block.is_config]

SEGMENTOR = """
import mmstabvim, torch
from mmengine.config import Config
from mmengine.hub import get_config, get_model
name = 'mmstabvim::upernet/vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64.py'
get_config(name).dump('config.py')
state = get_model(name).state_dict()
torch.save({'state_dict': state, 'meta': {}}, 'checkpoint.pth')
from PIL import Image
Image.new('RGB', (64, 48)).save('image.png')
"""
CONTEXT = {'MMSegInferencer(': SEGMENTOR}
"""Files that a block wants to be there, by what it contains."""


@pytest.mark.parametrize('block', CODE, ids=str)
def test_python_runs(block, tmp_path):
    context = [code for key, code in CONTEXT.items() if key in block.code]
    run('\n'.join([*context, block.code]), tmp_path)


@pytest.mark.parametrize('block', CONFIGS, ids=str)
def test_config_builds(block, tmp_path):
    """Hooks and backbones that the block names accept its arguments."""
    (tmp_path / 'config.py').write_text(block.code)
    cfg = Config.fromfile(tmp_path / 'config.py')
    assert len(cfg)
    init_default_scope('mmengine')
    for hook in [
        *cfg.get('custom_hooks', ()),
        *cfg.get('default_hooks', {}).values(),
    ]:
        if 'type' in hook:
            HOOKS.build(hook)
    backbone = cfg.get('model', {}).get('backbone')
    if backbone and str(backbone.get('type', 'mmstabvim')).startswith(
        'mmstabvim'
    ):
        backbone = {k: v for k, v in backbone.items() if k != '_delete_'}
        kind = backbone.setdefault('type', 'mmstabvim.VisionMamba')
        assert kind == 'mmstabvim.VisionMamba'
        backbone.pop('init_cfg', None)
        MODELS.build(backbone)


# --- commands ---------------------------------------------------------------


def commands():
    """Each command of the shell blocks, its lines joined."""
    for block in blocks('shell', 'bash'):
        text = block.code.replace('\\\n', ' ')
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield pytest.param(words, id=f'{block}-{" ".join(words[:3])}')


def load_tool(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(tool)
    finally:
        sys.path.pop(0)
    return tool


OTHERS = ('pip', 'mim', 'mkdir', 'tar', '.')
"""Programs that are not of this project."""


@pytest.mark.parametrize('words', commands())
def test_command_is_right(words):
    """Scripts and configs are there, options are known."""
    words = [w for w in words if not re.match(r'[A-Z_]+=', w)]
    words = [w.strip('[]') for w in words]
    if not words or words[0] in OTHERS:
        return  # others' programs
    if words[0] == 'make':
        makefile = (ROOT / 'Makefile').read_text()
        for target in (w for w in words[1:] if '=' not in w):
            assert re.search(rf'^{target}:', makefile, re.M), target
        return
    scripts = [w for w in words if re.match(r'(tools|\.ci)/.*\.(py|sh)$', w)]
    configs = [w for w in words if w.startswith('configs/') and '*' not in w]
    for name in (*scripts, *configs):
        assert (ROOT / name).exists(), name
    if words[0] != 'python' or not scripts:
        assert words[0] in (
            'pip',
            'python',
            'mim',
            'bash',
            'nsys',
            'torchrun',
            '.',
        )
        return
    tool = load_tool(ROOT / scripts[0])
    arguments = words[words.index(scripts[0]) + 1 :]
    if 'argv' in inspect.signature(tool.parse_args).parameters:
        # what a parser checks on the disk is not there
        arguments = [
            a for a in arguments if a != 'work_dirs/ablation/robustness'
        ]
        tool.parse_args(arguments)


# --- the tutorials, from the first line to the last -------------------------


def official_checkpoint(path):
    """A file like the published one, with random weights."""
    torch.manual_seed(0)
    backbone = VisionMamba('tiny')
    state = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    state['head.fc.weight'] = torch.randn(1000, 192) / 100
    state['head.fc.bias'] = torch.zeros(1000)
    torch.save({'model': to_official(state)[0]}, path)


def images(root):
    random = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for name in ('daisy', 'rose', 'tulip'):
            folder = root / 'data/flowers' / split / name
            folder.mkdir(parents=True)
            for i in range(1, 3):
                pixels = random.integers(0, 255, (80, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i:03}.jpg')


def masks(root):
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('img_dir', 'ann_dir'):
            (root / 'data/leaves' / kind / split).mkdir(parents=True)
        for i in range(1, 3):
            name = f'{split}/{i:03}'
            pixels = random.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            folder = root / 'data/leaves'
            Image.fromarray(pixels).save(folder / f'img_dir/{name}.jpg')
            labels = random.integers(0, 3, (96, 128), dtype=np.uint8)
            Image.fromarray(labels).save(folder / f'ann_dir/{name}.png')


SHORTER = {
    'docs/tutorial_classification.md': {
        # the commands as they are, on six images and for one epoch
        'train.py flowers.py': 'train.py flowers.py --cfg-options '
        'train_cfg.max_epochs=1 train_dataloader.batch_size=3',
        'epoch_20.pth': 'epoch_1.pth',
    },
    'docs/tutorial_segmentation.md': {
        # two iterations of two crops of 64 pixels
        'train.py leaves.py': 'train.py leaves.py --cfg-options '
        'train_cfg.max_iters=2 train_cfg.val_interval=2 '
        'default_hooks.checkpoint.interval=2 train_dataloader.batch_size=2',
        'iter_4000.pth': 'iter_2.pth',
        "upernet_1xb4-4k_folders-512x512.py'\n": (
            "upernet_1xb4-4k_folders-512x512.py'\n"
            'model = dict(data_preprocessor=dict(size=(64, 64)))\n'
            'small = dict(type="RandomCrop", crop_size=(64, 64))\n'
        ),
    },
}


def shortened(page):
    text = (ROOT / page).read_text()
    for old, new in SHORTER[page].items():
        assert old in text, f'{page}: {old}'
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize('page', WALKED)
def test_tutorial(page, tmp_path):
    """Each block in turn, in one folder; what it promises is there."""
    own = 'flowers' if 'classification' in page else 'leaves'
    (images if own == 'flowers' else masks)(tmp_path)
    official_checkpoint(tmp_path / 'vim_t_midclstok_76p1acc.pth')
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    outputs = []
    for language, code in BLOCK.findall(shortened(page)):
        if language == 'python' and code.startswith('_base_'):
            (tmp_path / f'{own}.py').write_text(code)
        elif language == 'python':
            outputs.append(run(code, tmp_path))
        elif language == 'shell':
            words = shlex.split(code)
            assert words[0] == 'python'
            done = subprocess.run(
                [sys.executable, '-W', 'ignore', *words[1:]],
                cwd=tmp_path,
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
                capture_output=True,
                text=True,
            )
            said = done.stdout + done.stderr
            assert done.returncode == 0, f'{code}\n{said[-4000:]}'
            outputs.append(said)
    assert 'official Vim classifier, names converted' in outputs[0]
    report = list((tmp_path / 'work_dirs' / own).rglob('*.html'))
    assert report, sorted(tmp_path.rglob('*.md'))
    if own == 'flowers':
        assert any(re.match('(daisy|rose|tulip) ', out) for out in outputs)
    else:
        for folder in ('masks', 'overlays', 'results/vis', 'results/pred'):
            assert list((tmp_path / folder).rglob('*.png')) or list(
                (tmp_path / folder).rglob('*.jpg')
            ), folder


def test_every_block_has_a_test(record_property, capsys):
    """A language that nobody looks at would go unseen."""
    known = {'python', 'shell', 'bash', *OUTPUT}
    found = [
        (str(path), language)
        for path in PAGES
        for language, _ in BLOCK.findall(path.read_text())
    ]
    assert not [entry for entry in found if entry[1] not in known]
    left_out = sum(language in OUTPUT for _, language in found)
    record_property('blocks that are output or diffs', left_out)
    with capsys.disabled():
        sys.stdout.write(
            f'\n{len(found)} code blocks, {left_out} of them output or '
            f'diffs, {len(CODE)} run, {len(CONFIGS)} built\n'
        )

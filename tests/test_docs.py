"""Every code block of README and docs is run, built or checked.

The pages of ``WALKED`` are run from their first block to their last, as a
reader does. Of the other pages each block stands alone: Python runs,
settings are put on a config whose model, hooks and metrics are built,
commands run on small trained models. Commands of ``NOT_RUN`` take minutes,
or want more than a test has: there the script, its options and its config
are checked. The last test prints the numbers.
"""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    HOOKS,
    METRICS,
    MODELS,
    init_default_scope,
)
from PIL import Image
from small_runs import ROOT, digits_config, scenes_config, train

from mmstabvim import VisionMamba
from mmstabvim.engine import launch
from mmstabvim.models.vim_checkpoint import to_official

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
WALKED = ('docs/tutorial_classification.md', 'docs/tutorial_segmentation.md')
OUTPUT = ('text', 'diff')
"""Not code; tests/test_mix_in.py applies the diffs and trains with them."""

ELSEWHERE = {
    'MMSegInferencer(': 'test_segmentation_inference.py:'
    'test_snippet_of_the_page',
    'load_digits(': 'test_mix_in.py:test_plain_pytorch_example',
    'features[0].square().mean()': 'test_mix_in.py:'
    'test_plain_pytorch_example_of_the_readme',
}
"""Python that another test runs, by what it contains: they check results."""

NOT_RUN = {
    'make ': 'installs, or trains for minutes',
    'pip ': 'changes the environment',
    'mim ': 'installs, or is run by test_mix_in.py',
    'python -m mmstabvim.check_env': 'run by test_check_env.py',
    'bash tools/dist_train.sh ': 'wants eight GPUs and a large data set',
    'python tools/train.py configs/': 'trains for minutes to days',
    'python tools/test.py configs/': 'wants ImageNet',
    'python tools/benchmarks/': 'takes minutes to hours',
    'python tools/ablation.py report work_dirs/ablation/digits': 'wants a '
    'study that takes hours; the page of another study runs it',
    'python tools/analysis_tools/eval_robustness.py work_dirs/': 'wants a '
    'study that takes hours',
    'python tools/reproduce/sensitivity.py': 'takes minutes, '
    'or wants a study that takes hours',
}
"""Commands that are only checked, by how they begin, and why."""

INSTEAD = {
    # lists what it would train
    'tools/ablation.py run ': 'tools/ablation.py run --dry-run ',
    # there are 48 images
    '--samples 1000': '--samples 40',
}

DIRECTIVE = re.compile(r'^```\{toctree\}\n.*?^```$', re.M | re.S)
"""A table of contents, which Sphinx reads."""
FENCE = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.M | re.S)


class Block:
    """A block of code, with the page and the line it begins at."""

    def __init__(self, path, match):
        self.page = str(path.relative_to(ROOT))
        self.line = match.string.count('\n', 0, match.start()) + 1
        self.language = match[2]
        self.code = textwrap.dedent(match[3])

    def __str__(self):
        return f'{self.page}:{self.line}'

    @property
    def is_config(self):
        """Assignments of settings, and nothing that computes."""
        tree = ast.parse(self.code)
        return all(isinstance(node, ast.Assign) for node in tree.body)

    @property
    def elsewhere(self):
        return [test for key, test in ELSEWHERE.items() if key in self.code]

    @property
    def commands(self):
        """Each with its lines joined, without comments."""
        lines = self.code.replace('\\\n', ' ').splitlines()
        lines = (re.sub(r'(^| +)# .*', '', line) for line in lines)
        optional = re.compile(r'\[(--[^]]+)\]')
        return [optional.sub(r'\1', line) for line in lines if line]


def read(path):
    return DIRECTIVE.sub('', path.read_text())


def all_blocks(path):
    return [Block(path, match) for match in FENCE.finditer(read(path))]


BLOCKS = [block for path in PAGES for block in all_blocks(path)]
ALONE = [block for block in BLOCKS if block.page not in WALKED]
PYTHON = [block for block in ALONE if block.language == 'python']
CODE = [b for b in PYTHON if not b.is_config and not b.elsewhere]
CONFIGS = [block for block in PYTHON if block.is_config]
SHELL = [block for block in ALONE if block.language == 'shell']


def is_run(command):
    return not command.startswith(tuple(NOT_RUN))


def run(words, folder):
    """Run a program; both its outputs."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
        words,
        cwd=folder,
        env={
            **os.environ,
            'PATH': path,
            'OMP_NUM_THREADS': '1',
            'PYTHONWARNINGS': 'ignore',
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


# --- Python -----------------------------------------------------------------


@pytest.mark.parametrize('block', CODE, ids=str)
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init_default_scope('mmengine')
    exec(compile(block.code, str(block), 'exec'), {'__name__': '__main__'})


# --- settings ---------------------------------------------------------------

DEFAULT_HOST = 'mmstabvim::vim/vim-tiny-p16_8xb128_in1k.py'
HOSTS = {
    'decode_head': 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_'
    '8xb2-160k_ade20k-512x512.py',
}
"""Config that a block is put on, by what it contains."""


def complete(code):
    """Add what a block leaves out: the base, or where a setting belongs."""
    if '_base_' not in code:
        hosts = [host for key, host in HOSTS.items() if key in code]
        code = f'_base_ = {(hosts or [DEFAULT_HOST])[0]!r}\n{code}'
    return re.sub(
        r'^state_matrix = (.*)$',
        r'model = dict(backbone=dict(state_matrix=\1))',
        code.replace(')  #', ')\n#'),
        flags=re.M,
    )


def alternatives(code):
    """One config for each time that a block sets the same name again."""
    found = [{}]
    for node in ast.parse(code).body:
        name = node.targets[0].id
        if name in found[-1]:
            found.append({'_base_': found[-1]['_base_']})
        found[-1][name] = ast.get_source_segment(code, node)
    return ['\n'.join(config.values()) for config in found]


def is_ours(hook):
    return hook and str(hook['type']).startswith('mmstabvim.')


def build_all(cfg):
    """Model, optimizer, hooks and metrics; weights stay without values."""
    scope = cfg.default_scope
    init_default_scope(scope)
    importlib.import_module(f'{scope}.models')
    importlib.import_module(f'{scope}.evaluation')
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    build_optim_wrapper(model, cfg.optim_wrapper)
    named = [h for h in cfg.default_hooks.values() if is_ours(h)]
    for hook in [*cfg.get('custom_hooks', []), *named]:
        assert isinstance(HOOKS.build(hook), Hook)
    evaluators = cfg.get('test_evaluator') or []
    for metric in evaluators if isinstance(evaluators, list) else [evaluators]:
        METRICS.build(metric)


@pytest.mark.parametrize('block', CONFIGS, ids=str)
def test_settings_build(block, tmp_path):
    """Each name is read by something, each argument is accepted."""
    path = tmp_path / 'config.py'
    for code in alternatives(complete(block.code)):
        path.write_text(code)
        build_all(launch.read_settings(str(path), {}))


# --- commands ---------------------------------------------------------------


def trained(cfg, folder):
    """Names in the pages, and what they stand for: a short training."""
    config, work_dir = folder / 'config.py', folder / 'work'
    cfg.dump(config)
    train(cfg)
    (checkpoint,) = work_dir.glob('*.pth')
    return {
        'CONFIG': config,
        'CHECKPOINT': checkpoint,
        'WORK_DIR': work_dir,
        'OTHER_WORK_DIR': work_dir,
        'OTHER': checkpoint,
    }


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classifier')
    cfg = digits_config(folder)
    cfg.model.backbone.patch_size = 8  # 17 tokens
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.stability.interval = 2
    return trained(cfg, folder)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentor')
    cfg = scenes_config(folder)
    cfg.default_hooks.checkpoint.update(interval=4, save_last=False)
    return trained(cfg, folder)


def fill_in(command, names):
    """Write paths for the names in capitals."""
    for old, new in INSTEAD.items():
        command = command.replace(old, new)
    pattern = r'\b(' + '|'.join(names) + r')\b'
    return re.sub(pattern, lambda match: str(names[match[0]]), command)


def load_tool(script, monkeypatch):
    path = ROOT / script
    monkeypatch.syspath_prepend(str(path.parent))
    # a second copy would register its classes a second time
    loaded = sys.modules.get(path.stem)
    if getattr(loaded, '__file__', None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def of_a_tool(command):
    return command.startswith('python tools/')


@pytest.mark.parametrize(
    'block', [b for b in SHELL if any(map(is_run, b.commands))], ids=str
)
def test_commands_run(block, tmp_path, monkeypatch, request):
    """In a folder of their own, with small models for large ones."""
    kind = 'segmentor' if 'segmentation' in block.page else 'classifier'
    names = request.getfixturevalue(kind)
    commands = [fill_in(c, names) for c in block.commands if is_run(c)]
    for name in ('tools', 'configs', 'docs'):
        (tmp_path / name).symlink_to(ROOT / name)
    official_checkpoint(tmp_path / 'vim_t_midclstok.pth')
    if not all(map(of_a_tool, commands)):
        run(['bash', '-euc', '\n'.join(commands)], tmp_path)
        return
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)[1:]
        assert not load_tool(words[0], monkeypatch).main(words[1:])


def check_tool(words, monkeypatch):
    """The options are known, and a config has the settings they change."""
    script, *words = words
    tool = load_tool(script, monkeypatch)
    monkeypatch.setattr(sys, 'argv', [script, *words])
    takes_words = inspect.signature(tool.parse_args).parameters
    args = tool.parse_args(words) if takes_words else tool.parse_args()
    if script in ('tools/train.py', 'tools/test.py'):
        build_all(launch.load_config(args))


def check_make(targets):
    makefile = (ROOT / 'Makefile').read_text()
    for target in targets:
        assert re.search(rf'^{target}:', makefile, re.M), target


def check_command(command, folder, monkeypatch):
    program, *words = shlex.split(command)
    for word in words:
        if word.startswith('work_dirs/ablation/'):
            (folder / word).mkdir(parents=True, exist_ok=True)
        elif word.startswith(('configs/', 'requirements/', 'tools/')):
            assert (ROOT / word).exists(), word
    if program == 'make':
        check_make(words)
    elif words[0] == 'tools/dist_train.sh':
        check_tool(['tools/train.py', words[1], *words[3:]], monkeypatch)
    elif program == 'python' and words[0] != '-m':
        check_tool(words, monkeypatch)


@pytest.mark.parametrize(
    'block', [b for b in SHELL if not all(map(is_run, b.commands))], ids=str
)
def test_commands_are_right(block, tmp_path, monkeypatch):
    """What is too long to run: script, options, config, its model."""
    for name in ('tools', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for command in block.commands:
        if not is_run(command):
            check_command(command, tmp_path, monkeypatch)


# --- the tutorials, from the first line to the last -------------------------


ARCH = dict(embed_dims=192, num_layers=4)


def official_checkpoint(path):
    """A file like the published one: fewer layers, random weights."""
    torch.manual_seed(0)
    backbone = VisionMamba(ARCH)
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


SMALL = {
    WALKED[0]: {
        'model.backbone.arch': dict(ARCH, _delete_=True),
        'train_cfg.max_epochs': 1,
        'train_dataloader.batch_size': 3,
    },
    WALKED[1]: {
        'model.backbone.arch': dict(ARCH, _delete_=True),
        'model.backbone.out_indices': [0, 1, 2, 3],
        'model.data_preprocessor.size': (64, 64),
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'default_hooks.checkpoint.interval': 2,
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.pipeline.2.scale': (128, 64),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'val_dataloader.dataset.pipeline.1.scale': (128, 64),
        'test_dataloader.dataset.pipeline.1.scale': (128, 64),
    },
}
"""What a tutorial's base is changed to: fewer layers, images and steps."""

SHORTER = {'epoch_20.pth': 'epoch_1.pth', 'iter_4000.pth': 'iter_2.pth'}


def small_base(page, base, path):
    """Write a config between the page's and its base."""
    cfg = get_config(base)
    cfg.merge_from_dict(SMALL[page])
    changed = {option.split('.')[0] for option in SMALL[page]}
    lines = [f'{name} = {cfg.to_dict()[name]}' for name in sorted(changed)]
    lines = [line.replace('{', "{'_delete_': True, ", 1) for line in lines]
    path.write_text('\n'.join([f'_base_ = {base!r}', *lines]))


def walk(page, folder, config):
    """Run each block of a page in turn; their outputs."""
    text = (ROOT / page).read_text()
    for old, new in SHORTER.items():
        text = text.replace(old, new)
    for _, language, code in FENCE.findall(text):
        if code.startswith('_base_'):
            base = re.match("_base_ = '(.+)'", code)[1]
            small_base(page, base, folder / 'small.py')
            (folder / config).write_text(code.replace(base, 'small.py', 1))
        elif language == 'python':
            yield run([sys.executable, '-c', code], folder)
        elif language == 'shell':
            yield run(['bash', '-euc', code], folder)


@pytest.fixture
def folder(tmp_path):
    """What a reader has: the tools and an official checkpoint."""
    official_checkpoint(tmp_path / 'vim_t_midclstok_76p1acc.pth')
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    return tmp_path


def test_own_images(folder):
    images(folder)
    train, test, predict, report = walk(WALKED[0], folder, 'flowers.py')
    assert 'official Vim classifier, names converted' in train
    assert 'accuracy/top1' in test
    assert re.search(r'(daisy|rose|tulip) 0\.\d+$', predict, re.M)
    assert list((folder / 'work_dirs/flowers').rglob('*.html')), report


def test_own_masks(folder):
    masks(folder)
    train, test, _, report = walk(WALKED[1], folder, 'leaves.py')
    assert 'official Vim classifier, names converted' in train
    assert 'mIoU' in test
    for pattern in (
        'masks/*.png',
        'overlays/**/*.png',
        'results/vis/001.jpg',
        'results/pred/*.png',
    ):
        assert list(folder.glob(pattern)), pattern
    assert list((folder / 'work_dirs/leaves').rglob('*.html')), report


# --- all pages --------------------------------------------------------------


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_every_fence_is_a_block(path):
    """None that the tests overlook, of a kind that they know."""
    fences = re.findall(r'^ *```', read(path), re.M)
    found = all_blocks(path)
    assert len(fences) == 2 * len(found)
    assert {b.language for b in found} <= {'python', 'shell', *OUTPUT}


WRITTEN_BY_TOOLS = [
    *(ROOT / 'docs').glob('*/*/**/*.md'),
    *(ROOT / 'docs/sensitivity').glob('*.md'),
    ROOT / 'docs/benchmarks/resolution.md',
]
LINK = re.compile(r'\]\(([^)\s]+)\)|\b(?:src|href)="([^"]+)"')
CODE = re.compile(r'^( *)```.*?^\1```$|`[^`\n]+`', re.M | re.S)
ELSEWHERE_ON_THE_NET = ('http://', 'https://', 'mailto:')
TEXTS = [*PAGES, ROOT / 'CHANGELOG.md', ROOT / 'CONTRIBUTING.md']


def slug(heading):
    """Anchor that GitHub and MyST give a heading."""
    words = re.sub(r'[^\w\- ]', '', heading.strip().lower())
    return words.replace(' ', '-')


def broken_links(path):
    """Links and images of a page that lead nowhere."""
    broken = []
    for groups in LINK.findall(CODE.sub('', path.read_text())):
        link = ''.join(groups)
        if link.startswith(ELSEWHERE_ON_THE_NET):
            continue
        place, _, anchor = link.partition('#')
        target = (path.parent / place).resolve() if place else path
        if not target.exists():
            broken.append(link)
        elif anchor:
            found = re.findall(r'^#+ (.+)$', target.read_text(), re.M)
            if anchor not in map(slug, found):
                broken.append(link)
    return broken


@pytest.mark.parametrize('path', TEXTS, ids=relative)
def test_links_lead_somewhere(path):
    assert not broken_links(path)


def test_broken_links_are_found(tmp_path):
    (tmp_path / 'there.md').write_text('# A Heading, here\n')
    page = tmp_path / 'page.md'
    page.write_text(
        '[a](there.md) [b](there.md#a-heading-here) [c](there.md#b)\n'
        '![d](no.png) `[e](code)` <img src="no.svg"> [f](https://g.h)\n'
        '```text\n[g](code)\n```\n'
    )
    assert broken_links(page) == ['there.md#b', 'no.png', 'no.svg']


PICTURES = ('.png', '.svg', '.pdf')


def test_results_are_small():
    """One picture per figure, no page of a megabyte, no large archive."""
    listed = ['git', 'ls-files', '-z', 'docs']
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    named = [ROOT / name for name in done.stdout.split('\0') if name]
    paths = [path for path in named if path.exists()]
    if not paths:
        pytest.skip('needs a clone')
    pictures = [p.with_suffix('') for p in paths if p.suffix in PICTURES]
    assert len(pictures) == len({*pictures})
    limit = {'.xz': 300_000, '.csv': 100_000}
    for path in paths:
        assert path.suffix not in ('.html', '.pdf'), path
        assert path.stat().st_size <= limit.get(path.suffix, 250_000), path
    assert sum(path.stat().st_size for path in paths) <= 5_000_000


@pytest.mark.parametrize(
    'path',
    [path for path in TEXTS if path not in WRITTEN_BY_TOOLS],
    ids=relative,
)
def test_lines_are_short(path):
    """At most 100 columns, rows of tables aside."""
    lines = path.read_text().splitlines()
    assert not [x for x in lines if len(x) > 100 and not x.startswith('|')]


def test_exceptions_are_needed():
    """Each stands for a block that is there, and a test that is there."""
    code = '\n'.join(block.code for block in PYTHON)
    for key, test in ELSEWHERE.items():
        file, name = test.split(':')
        assert key in code
        assert f'def {name}(' in (ROOT / 'tests' / file).read_text()
    commands = [command for block in SHELL for command in block.commands]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands), start


def test_count(record_property):
    """The exceptions; the summary of the tests prints them."""
    commands = [command for block in SHELL for command in block.commands]
    output = sum(block.language in OUTPUT for block in BLOCKS)
    checked = sum(not is_run(command) for command in commands)
    record_property(
        'code blocks of the pages',
        f'{len(BLOCKS)}, of which {output} are output or diffs; {checked} of '
        f'{len(commands)} commands outside the tutorials are not run but '
        'checked',
    )


def test_every_tool_is_listed():
    """With a line and a command of its own, and nothing that is not there."""
    page = (ROOT / 'docs/analysis_tools.md').read_text()
    rows = re.findall(r'^\| `(\w+\.py)` \| .+ \| `(\w+\.py)[ `]', page, re.M)
    assert all(name == command for name, command in rows)
    tools = {
        path.name for path in (ROOT / 'tools/analysis_tools').glob('*.py')
    }
    assert {name for name, _ in rows} == tools

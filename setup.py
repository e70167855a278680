"""Package metadata; the tested versions are in requirements/tested.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_PARTS = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Put configs, tools and the model index under ``mmstabvim/.mim``.

    OpenMMLab's ``mim`` and ``mmstabvim::`` config paths look there. A wheel
    gets copies; an editable install gets links, so edits take effect.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            self.link_mim()
        else:
            self.copy_mim()

    def link_mim(self):
        """Link from the source tree's (git-ignored) ``.mim``."""
        mim = ROOT / 'mmstabvim' / '.mim'
        mim.mkdir(exist_ok=True)
        for name in MIM_PARTS:
            link = mim / name
            if not link.is_symlink():
                link.symlink_to(Path('..', '..', name))

    def copy_mim(self):
        """Copy into the build folder, never into the source tree."""
        mim = Path(self.build_lib, 'mmstabvim', '.mim')
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in MIM_PARTS:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns('__pycache__')
                shutil.copytree(source, mim / name, ignore=ignore)
            else:
                shutil.copy2(source, mim / name)


def read_version():
    text = (ROOT / 'mmstabvim' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE).group(1)


HOME = 'https://github.com/mmstabvim/mmstabvim'
CODE = re.compile(r'(```.*?```|`[^`\n]*`)', re.DOTALL)
LINK = re.compile(
    r'(\]\(|(?:src|href)="|^\[[^]]+\]: *)(?!\w+:|#)([^)\s">]+)', re.MULTILINE
)
IMAGES = {'.gif', '.jpg', '.png', '.svg', '.webp'}


def read_readme():
    """README with absolute links: an index shows it without the files."""
    parts = CODE.split((ROOT / 'README.md').read_text(encoding='utf-8'))
    parts[::2] = [LINK.sub(make_absolute, part) for part in parts[::2]]
    return ''.join(parts)


def make_absolute(link):
    before, path = link.groups()
    kind = 'raw' if Path(path).suffix in IMAGES else 'blob'
    return f'{before}{HOME}/{kind}/main/{path}'


# What figures, tables and logs need beside either form of OpenMMLab.
TOOLS = ['rich>=13', 'tensorboard>=2.14']

# The original OpenMMLab without mmcv: mmcv and mmcv-lite install the same
# folder, so who has the full one must not get the light one on top.
OPENMMLAB = [
    *TOOLS,
    'mmengine>=0.10.7,<1',
    'mmpretrain>=1.2.0,<2',
    'mmsegmentation>=1.2.2,<2',
    'numpy<2.4',  # mmpretrain uses np.in1d, removed in 2.4
    'scikit-learn>=1.4,<1.7',  # mmpretrain's vis_tsne
    'matplotlib>=3.8,<3.11',  # mmpretrain's browse_dataset
    'setuptools<82',  # mmengine 0.10 imports pkg_resources
    'ftfy',  # mmseg imports it, and does not require it
    'regex',  # so does mmseg
]
LITE = [*OPENMMLAB, 'mmcv-lite>=2.0.0,<2.2.0']  # mmseg 1.2 refuses 2.2
# The maintained fork, under the same import names: never beside the original.
ONEDL = [
    *TOOLS,
    'onedl-mmengine>=0.10.12,<1',
    # pip builds it without ops; one that is there, with ops, stays
    'onedl-mmcv>=2.3.6,<2.4',
    'onedl-mmpretrain>=1.3.6,<2',
    'onedl-mmsegmentation>=1.4.2,<2',
    'scikit-learn>=1.4',
    'matplotlib>=3.8',
    'ftfy',
    'regex',
]
CAM = ['grad-cam>=1.5']  # class activation maps
TEST = [*CAM, 'pytest>=8', 'pytest-xdist>=3.5', 'timm>=1.0']
DEV = ['ruff>=0.12', 'mypy>=1.11', 'pre-commit>=3.5']

setup(
    name='mmstabvim',
    version=read_version(),
    description='Stabilized Vision Mamba for MMPretrain and MMSegmentation',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='The mmstabvim authors',
    url=HOME,
    project_urls={
        'Documentation': f'{HOME}/tree/main/docs',
        'Source': HOME,
        'Changelog': f'{HOME}/blob/main/CHANGELOG.md',
        'Issues': f'{HOME}/issues',
    },
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, state-space model, Vision Mamba, OpenMMLab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: C++',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    packages=find_packages(include=['mmstabvim', 'mmstabvim.*']),
    include_package_data=True,  # what MANIFEST.in names
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
    python_requires='>=3.10,<3.14',
    install_requires=[
        'torch>=2.8',
        'torchvision>=0.23',
        'numpy>=1.26',
        'scipy>=1.11',
        'safetensors>=0.4',
        'packaging>=21',
    ],
    extras_require={
        'lite': LITE,
        'openmmlab': OPENMMLAB,
        'onedl': ONEDL,
        'cam': CAM,
        'test': TEST,
        'dev': [*TEST, *DEV],
    },
)

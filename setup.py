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


def read_readme():
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


LITE = ['mmcv-lite>=2.0.0']
TEST = ['pytest>=8', 'pytest-xdist>=3.5']

setup(
    name='mmstabvim',
    version=read_version(),
    description='Stabilized Vision Mamba for MMPretrain and MMSegmentation',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, state-space model, Vision Mamba, OpenMMLab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmstabvim', 'mmstabvim.*']),
    include_package_data=True,  # what MANIFEST.in names: fused.cpp
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
    python_requires='>=3.10,<3.13',
    # Neither mmcv nor mmcv-lite: both install the folder `mmcv`, so a user
    # of the full one must not get the light one on top (extra `lite`).
    install_requires=[
        'torch>=2.4',
        'torchvision>=0.19',
        'mmengine>=0.10.7,<1',
        'mmpretrain>=1.2.0,<2',
        'mmsegmentation>=1.2.2,<2',
        'numpy>=1.26,<2.4',  # mmpretrain uses np.in1d, removed in 2.4
        'scipy>=1.11',
        'scikit-learn>=1.4',
        'matplotlib>=3.8,<3.11',  # mmpretrain's browse_dataset
        'setuptools<82',  # mmengine 0.10 imports pkg_resources
        'rich>=13',  # progress bars and tables
        'tensorboard>=2.14',
        'ftfy',  # mmseg imports it, and does not require it
        'regex',  # so does mmseg
    ],
    extras_require={
        'lite': LITE,
        'test': LITE + TEST,
        'dev': [*LITE, *TEST, 'ruff>=0.12', 'mypy>=1.11', 'pre-commit>=3.5'],
    },
)

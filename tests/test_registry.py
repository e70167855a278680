"""Registered names are classes; some are imported when asked for."""

import inspect
import subprocess
import sys

import pytest

import mmstabvim
from mmstabvim import registry

REGISTRIES = {
    name: value
    for name, value in vars(registry).items()
    if isinstance(value, registry.LazyRegistry)
}


@pytest.mark.parametrize('name', sorted(REGISTRIES))
def test_registered_names_are_classes(name):
    pytest.importorskip('mmseg')
    ours = REGISTRIES[name]
    ours.import_from_location()
    names = {*ours.module_dict, *ours.deferred}
    assert names
    for registered in names:
        found = ours.get(f'mmstabvim.{registered}')
        assert inspect.isclass(found)
        assert found.__name__ == registered
        assert found is getattr(mmstabvim, registered)


def test_a_deferred_class_is_found_from_a_root():
    """A config of any toolkit asks so, before anybody imported it."""
    pytest.importorskip('mmseg')
    code = (
        'import sys, mmstabvim\n'
        'from mmengine.registry import DATASETS\n'
        "DATASETS.get('mmstabvim.Digits')\n"
        "assert 'mmseg' not in sys.modules\n"
        "print(DATASETS.get('mmstabvim.CamVidDataset').__module__)"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == 'mmstabvim.datasets.camvid'


def test_near_names_of_a_deferred_class():
    with pytest.raises(KeyError) as error:
        registry.DATASETS.build(dict(type='mmstabvim.DigitScene'))
    assert 'DigitScenes' in registry.suggest_types(error.value)

"""Registered names are classes; some are imported when asked for."""

import inspect
import subprocess
import sys

import pytest
from mmengine.registry import MODELS, DefaultScope, Registry

import mmstabvim
from mmstabvim import registry
from mmstabvim.registry import suggest_types

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


def failed_build(type_, scope):
    overwrite = DefaultScope.overwrite_default_scope
    with overwrite(scope), pytest.raises(KeyError) as info:
        MODELS.build({'type': type_})
    return info.value


def test_near_names_of_the_own_scope():
    error = failed_build('mmstabvim.VisonMamba', 'mmpretrain')
    assert suggest_types(error).startswith('near names: mmstabvim.VisionMamba')


@pytest.mark.parametrize('wanted', ['ImageClasifier', 'imageclassifier'])
def test_near_names_of_the_host(wanted):
    error = failed_build(wanted, 'mmpretrain')
    assert suggest_types(error).startswith('near names: ImageClassifier')


def test_near_name_in_another_scope():
    """A forgotten scope is found, and written with it."""
    error = failed_build('VisionMamba', 'mmpretrain')
    assert 'mmstabvim.VisionMamba' in suggest_types(error)


def test_near_name_in_a_toolkit_not_yet_imported(tmp_path, monkeypatch):
    """Its modules are imported; one that does not import is passed over."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MODELS, '_children', {**MODELS.children})
    for scope in ('brokenscope', 'toyscope'):
        locations = [f'{scope}_models']
        Registry('model', parent=MODELS, scope=scope, locations=locations)
    (tmp_path / 'toyscope_models.py').write_text(
        'from mmengine.registry import MODELS\n'
        'MODELS.children["toyscope"].register_module("ToyNetwork", module=int)'
    )
    error = failed_build('ToyNetwrok', None)
    assert suggest_types(error) == 'near names: toyscope.ToyNetwork'


def test_no_near_name():
    assert suggest_types(failed_build('Qwxyz', None)) is None
    assert suggest_types(KeyError('another error')) is None


def test_near_names_of_a_deferred_class():
    with pytest.raises(KeyError) as error:
        registry.DATASETS.build(dict(type='mmstabvim.DigitScene'))
    assert 'DigitScenes' in suggest_types(error.value)

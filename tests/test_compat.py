"""The shims of mmstabvim.compat and the loading of foreign checkpoints."""

import argparse
import collections
import functools
import io
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import (
    MODELS,
    OPTIM_WRAPPERS,
    DefaultScope,
    Registry,
)
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from mmstabvim import compat
from mmstabvim.checkpoint import (
    Placeholder,
    load_checkpoint_tensors,
    load_tensors,
)
from mmstabvim.compat import cpu_amp
from mmstabvim.compat.config_package import (
    _with_own_path,
    config_module,
    hub_module,
)
from mmstabvim.registry import suggest_types

REPO = Path(__file__).resolve().parents[1]
WEIGHT = torch.arange(6.0).reshape(2, 3)
on_cpu = pytest.mark.skipif(get_device() != 'cpu', reason='for the CPU')


def run_python(code, *args, **env):
    """Run code in a new interpreter; return the completed process."""
    return subprocess.run(
        [sys.executable, '-W', 'ignore', *args, '-c', code]
        if code
        else [sys.executable, '-W', 'ignore', *args],
        env={**os.environ, 'PYTHONPATH': str(REPO), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- import -----------------------------------------------------------------


def test_install_twice_wraps_once():
    resume, seen = Runner.resume, mmengine_checkpoint.torch
    compat.install()
    assert Runner.resume is resume
    assert mmengine_checkpoint.torch is seen


# --- mmcv-lite --------------------------------------------------------------


def _has_full_mmcv():
    mmcv = PathFinder.find_spec('mmcv')
    folders = mmcv.submodule_search_locations
    return PathFinder.find_spec('mmcv._ext', folders) is not None


USE_MMSEG = """
import mmseg.models
import torch
from mmcv.ops import nms, roi_align
from mmcv.utils import collect_env
from mmcv.utils.ext_loader import check_ops_exist
collect_env()
print(check_ops_exist())
for op in (
    lambda: nms(torch.rand(3, 4), torch.rand(3), 0.5),
    lambda: roi_align(torch.rand(1, 3, 4, 4), torch.rand(1, 5), 2),
):
    try:
        op()
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(_has_full_mmcv(), reason='full mmcv is installed')
def test_mmseg_imports_with_mmcv_lite_only_with_the_stub():
    """Ops then raise with their name and what to install."""
    without = run_python(USE_MMSEG)
    assert "No module named 'mmcv._ext'" in without.stderr
    lines = run_python('import mmstabvim\n' + USE_MMSEG).stdout.splitlines()
    assert lines[0] == 'False'
    assert "'nms'" in lines[1]
    assert 'Cure: pip' in lines[1]
    assert "'roi_align_forward'" in lines[2]


@pytest.fixture
def fake_mmcv(tmp_path, monkeypatch):
    """An empty package ``mmcv`` in front of the real one."""
    for name in [n for n in sys.modules if n.split('.')[0] == 'mmcv']:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    sys.modules.pop('mmcv._ext', None)


def test_stub_where_the_extension_is_missing(fake_mmcv):
    compat.stub_mmcv_ext()
    stub = sys.modules['mmcv._ext']
    assert not hasattr(stub, '__path__')
    with pytest.raises(RuntimeError, match=r"'nms'.*Cure: pip"):
        stub.nms(1, 2)


def test_full_mmcv_is_not_touched(fake_mmcv):
    (fake_mmcv / '_ext.py').write_text('nms = 1\n')
    compat.stub_mmcv_ext()
    assert 'mmcv._ext' not in sys.modules
    assert 'mmcv' not in sys.modules


def test_without_mmcv_nothing_is_touched(fake_mmcv, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    compat.stub_mmcv_ext()
    assert 'mmcv._ext' not in sys.modules


# --- checkpoints: the files -------------------------------------------------


class Calls:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class OwnList(list):
    pass


class OwnDict(dict):
    pass


class OwnSet(set):
    pass


class HasMethod:
    def method(self):
        """Be pickled as a bound method."""


def evil_content(marker, function=os.system):
    """A checkpoint whose unpickling creates the file ``marker``."""
    argument = {
        os.system: f'touch {marker}',
        exec: f'open({str(marker)!r}, "w").close()',
        subprocess.getoutput: f'touch {marker}',
    }[function]
    return {
        'meta': Calls(function, argument),
        'state_dict': {'weight': WEIGHT},
    }


@pytest.fixture
def marker(tmp_path):
    """Path of the file that malicious code would create."""
    return tmp_path / 'was_here'


@pytest.fixture
def evil_file(tmp_path, marker):
    path = tmp_path / 'evil.pth'
    torch.save(evil_content(marker), path)
    return str(path)


FORMATS = {
    'zip': {},
    'zip-4': {'pickle_protocol': 4},
    'legacy': {'_use_new_zipfile_serialization': False},
}


@pytest.mark.parametrize('save', FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize('function', [os.system, exec, subprocess.getoutput])
def test_code_runner_is_refused(tmp_path, marker, function, save):
    path = tmp_path / 'evil.pth'
    torch.save(evil_content(marker, function), path, **save)
    with pytest.raises(ValueError, match=r'evil\.pth: refused.*call') as info:
        load_checkpoint_tensors(path)
    name = 'posix.system' if function is os.system else function.__name__
    assert name in str(info.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), 'the test file would have done nothing anyway'


@pytest.mark.parametrize('save', FORMATS.values(), ids=FORMATS)
def test_unknown_function_is_inert(tmp_path, marker, monkeypatch, save):
    """No list names this module, so safety does not rest on lists."""
    (tmp_path / 'some_module.py').write_text(
        'def touch(path):\n    open(path, "w").close()\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__('some_module')
    monkeypatch.setitem(sys.modules, 'some_module', module)
    path = tmp_path / 'file.pth'
    content = {'a': Calls(module.touch, str(marker)), 'weight': WEIGHT}
    torch.save(content, path, **save)
    loaded = load_checkpoint_tensors(path)
    assert not marker.exists()
    assert torch.equal(loaded['weight'], WEIGHT)
    assert isinstance(loaded['a'], Placeholder)
    torch.load(path, weights_only=False)
    assert marker.exists(), 'the test file would have done nothing anyway'


def test_bare_pickle_runs_no_code(tmp_path, marker):
    """PyTorch's old format starts with pickles read by another function."""
    path = tmp_path / 'bare.pth'
    path.write_bytes(pickle.dumps(evil_content(marker), 2))
    with pytest.raises(ValueError, match=r'refused.*posix\.system'):
        load_checkpoint_tensors(path)
    assert not marker.exists()


def test_classes_of_pytorch_cannot_be_changed(tmp_path):
    """BUILD with slot state would set attributes of the class itself."""
    path = tmp_path / 'file.pth'
    body = (
        b'\x80\x02ctorch.storage\nUntypedStorage\n'
        b'N}X\x05\x00\x00\x00stainX\x01\x00\x00\x00xs\x86b.'
    )
    head = (
        torch.serialization.MAGIC_NUMBER,
        torch.serialization.PROTOCOL_VERSION,
        {},
    )
    path.write_bytes(b''.join(pickle.dumps(x, 2) for x in head) + body)
    with pytest.raises(ValueError, match='state for a'):
        load_checkpoint_tensors(path)
    assert not hasattr(torch.UntypedStorage, 'stain')


@pytest.mark.parametrize('save', FORMATS.values(), ids=FORMATS)
def test_what_training_tools_save_beside_the_weights(tmp_path, save):
    """Tensors and plain containers survive, the rest is a placeholder."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    rest = {
        'history': history,
        'bound method': history.mean,
        'own method': HasMethod().method,
        'scalar': np.float64(3.0),
        'array': np.arange(3),
        'args': argparse.Namespace(lr=0.1, path=Path('x')),
        'own list': OwnList([1, 2]),
        'own dict': OwnDict(a=1, b=2),
        'own set': OwnSet([1, 2]),
        'partial': functools.partial(nn.Linear, 3),
        'class': nn.Linear,
        'deque': collections.deque([1, 2], maxlen=3),
    }
    plain = {
        'dtype': torch.bfloat16,
        'size': torch.Size([1, 2]),
        'device': torch.device('cpu'),
        'bytes': b'\x00\xff',
        'set': {1, 2},
        'frozenset': frozenset({1}),
        'complex': 1j,
        'slice': slice(1, 2),
        'ordered': collections.OrderedDict(a=1),
        'default': collections.defaultdict(list, a=[1]),
        'counter': collections.Counter('aab'),
        'nested': [(None, True, 'é', 2**70)],
    }
    linear = nn.Linear(3, 2)
    tensors = {
        'parameter': nn.Parameter(WEIGHT.clone()),
        'half': WEIGHT.half(),
        'uint16': torch.tensor([1, 2], dtype=torch.uint16),
        'strided': WEIGHT.t()[1:],
        **linear.state_dict(),
    }
    if save == FORMATS['legacy']:
        del tensors['uint16']  # PyTorch itself cannot read it back
    content = {**rest, 'plain': plain, 'tensors': tensors}
    content['state_dict'] = linear.state_dict()
    path = tmp_path / 'file.pth'
    torch.save(content, path, **save)
    loaded = load_checkpoint_tensors(path)
    assert loaded['plain'] == plain
    for name, tensor in tensors.items():
        assert torch.equal(loaded['tensors'][name], tensor), name
        assert loaded['tensors'][name].dtype == tensor.dtype, name
    nn.Linear(3, 2).load_state_dict(loaded['state_dict'])
    assert loaded['state_dict']._metadata == content['state_dict']._metadata
    for name in rest:
        inert = loaded[name]
        is_class = isinstance(inert, type) and issubclass(inert, Placeholder)
        assert is_class or isinstance(inert, Placeholder), name
    assert 'mmengine.logging.history_buffer.HistoryBuffer' in repr(
        loaded['history']
    )


def test_tensor_of_a_subclass_becomes_plain(tmp_path):
    tensor = WEIGHT.clone()
    tensor.note = HistoryBuffer()
    torch.save({'weight': tensor}, tmp_path / 'file.pth')
    weight = load_checkpoint_tensors(tmp_path / 'file.pth')['weight']
    assert type(weight) is torch.Tensor
    assert torch.equal(weight, WEIGHT)


def _zip_bytes(**extra):
    buffer = io.BytesIO()
    torch.save({'weight': torch.randn(64, 64), **extra}, buffer)
    return buffer.getvalue()


def _flip(data, start, stop):
    return (
        data[:start] + bytes(255 - b for b in data[start:stop]) + data[stop:]
    )


def _torchscript_bytes():
    """A zip that torch.load would hand to torch.jit.load."""
    buffer = io.BytesIO(_zip_bytes())
    with zipfile.ZipFile(buffer, 'a') as archive:
        archive.writestr('archive/constants.pkl', b'')
    return buffer.getvalue()


def _bad_files():
    history = {'history': HistoryBuffer([1.0], [1])}
    data, mixed = _zip_bytes(), _zip_bytes(**history)
    legacy = io.BytesIO()
    torch.save(
        {'w': WEIGHT, **history}, legacy, _use_new_zipfile_serialization=False
    )
    legacy = legacy.getvalue()
    files = {
        'empty': b'',
        'text': b'This is no checkpoint.\nSecond line.\n',
        'html': b'<!DOCTYPE html><html>404</html>',
        'zip magic only': b'PK\x03\x04',
        'truncated zip': data[: len(data) // 2],
        'truncated by a byte': data[:-1],
        'damaged pickle': _flip(data, 64, 128),
        'damaged weights': _flip(data, 4000, 4100),
        'damaged mixed': _flip(mixed, 64, 96),
        'truncated legacy': legacy[: len(legacy) // 2],
        'legacy without weights': legacy[:-8],
        'list': pickle.dumps([1, 2]),
        'torchscript': _torchscript_bytes(),
    }
    for seed in range(10):
        files[f'random {seed}'] = random.Random(seed).randbytes(2000)
        files[f'random pickle {seed}'] = b'\x80\x02' + random.Random(
            seed
        ).randbytes(200)
    return files


BAD_FILES = _bad_files()


@pytest.mark.parametrize('name', BAD_FILES)
def test_file_that_is_no_checkpoint(tmp_path, name):
    path = tmp_path / 'bad.pth'
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(ValueError, match=r'bad\.pth: wanted a checkpoint'):
        load_checkpoint_tensors(path)
    if name == 'empty':
        with pytest.raises(ValueError, match='got an empty file'):
            load_checkpoint_tensors(path)


@pytest.mark.parametrize('content', [[WEIGHT], 3, nn.Linear(2, 2)], ids=repr)
def test_checkpoint_of_another_type(tmp_path, content):
    path = tmp_path / 'odd.pth'
    torch.save(content, path)
    with pytest.raises(ValueError, match=r'odd\.pth: wanted.*a dict.*got a '):
        load_tensors(path)


def test_tensor_is_no_checkpoint_but_loads(tmp_path):
    path = tmp_path / 'tensor.pth'
    torch.save(WEIGHT, path)
    assert torch.equal(load_tensors(path), WEIGHT)
    with pytest.raises(ValueError, match=r'wanted.*a dict.*got a Tensor'):
        load_checkpoint_tensors(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth.*no such file'):
        load_checkpoint_tensors(tmp_path / 'none.pth')
    with pytest.raises(FileNotFoundError, match='got a folder'):
        load_checkpoint_tensors(tmp_path)


# --- checkpoints: mmengine's ways to load -----------------------------------


@MODELS.register_module()
class CompatToyModel(BaseModel):
    """One linear layer; notes the autocast state of each forward."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.linear = nn.Linear(3, 1)
        self.seen = []

    def forward(self, inputs, data_samples=None, mode='loss'):
        output = self.linear(torch.stack(inputs))
        self.seen.append(output.dtype)
        return {'loss': output.float().square().mean()}


def make_runner(work_dir, epochs=1, optim_wrapper=None, **kwargs):
    """A runner that trains 4 iterations an epoch."""
    torch.manual_seed(0)
    data = [{'inputs': torch.full((3,), float(i + 1))} for i in range(8)]
    return Runner(
        model={'type': 'CompatToyModel'},
        work_dir=str(work_dir),
        experiment_name=f'{work_dir}-{random.random()}',
        train_dataloader={
            'dataset': data,
            'batch_size': 2,
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        },
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        optim_wrapper={
            'optimizer': {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9},
            **(optim_wrapper or {}),
        },
        default_hooks={'logger': {'type': 'LoggerHook', 'interval': 1}},
        **kwargs,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A runner after one epoch, its checkpoint beside it."""
    runner = make_runner(tmp_path_factory.mktemp('trained'))
    runner.train()
    return runner


def checkpoint_of(runner):
    return str(Path(runner.work_dir) / 'epoch_1.pth')


def test_own_checkpoint_loads_from_elsewhere(trained, tmp_path):
    path = checkpoint_of(trained)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = load_checkpoint_tensors(path)
    weight = trained.model.linear.weight
    assert torch.equal(loaded['state_dict']['linear.weight'], weight)
    runner = make_runner(tmp_path, load_from=path)
    runner.load_or_resume()
    assert torch.equal(runner.model.linear.weight, weight)


def test_runner_load_from_never_runs_code(tmp_path, evil_file, marker):
    runner = make_runner(tmp_path, load_from=evil_file)
    with pytest.raises(ValueError, match='refused'):
        runner.train()
    assert not marker.exists()


def test_init_cfg_never_runs_code(evil_file, marker):
    init_cfg = {'type': 'Pretrained', 'checkpoint': evil_file}
    for extra in ({}, {'prefix': 'linear'}):
        module = BaseModule(init_cfg={**init_cfg, **extra})
        with pytest.raises(ValueError, match='refused'):
            module.init_weights()
    assert not marker.exists()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Serve a file wherever mmengine would go to the network."""

    def serve(path):
        data = Path(path).read_bytes()
        url = 'https://host.invalid/folder/file.pth?x=1'
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))
        monkeypatch.setenv('MMENGINE_HOME', str(Path(path).parent))
        patch = functools.partial(monkeypatch.setattr, mmengine_checkpoint)
        patch('get_torchvision_models', lambda: {'toy': url})
        patch('get_mmcls_models', lambda: {'toy': url})
        models = {'toy': url, 'local': Path(path).name}
        patch('get_external_models', lambda: models)
        backend = SimpleNamespace(get=lambda name: data)
        patch('get_file_backend', lambda *a, **k: backend)
        pavi = ModuleType('pavi')
        pavi.modelcloud = SimpleNamespace(
            get=lambda name: SimpleNamespace(
                name='x', download=lambda to: Path(to).write_bytes(data)
            )
        )
        monkeypatch.setitem(sys.modules, 'pavi', pavi)
        downloads = []

        def download(source, to, progress):
            downloads.append((source, to))
            Path(to).write_bytes(data)

        monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
        return downloads

    return serve


PLACES = [
    'https://host.invalid/folder/file.pth?x=1',
    'http://host.invalid/file.pth',
    'torchvision://toy',
    'modelzoo://toy',
    'open-mmlab://toy',
    'openmmlab://local',
    'mmcls://toy',
    's3://bucket/file.pth',
    'pavi://file.pth',
]


@pytest.mark.parametrize('place', PLACES)
def test_no_scheme_runs_code(offline, evil_file, marker, place):
    offline(evil_file)
    with pytest.raises(ValueError, match='refused'):
        load_checkpoint(nn.Linear(3, 1), place)
    assert not marker.exists()


@pytest.mark.parametrize('place', PLACES)
def test_every_scheme_loads_own_checkpoint(offline, trained, place):
    offline(checkpoint_of(trained))
    loaded = CheckpointLoader.load_checkpoint(place)
    assert 'state_dict' in loaded


def test_download_goes_to_the_hub_folder_once(offline, trained, tmp_path):
    downloads = offline(checkpoint_of(trained))
    for _ in range(2):
        CheckpointLoader.load_checkpoint(PLACES[0])
    folder = tmp_path / 'torch_home' / 'hub' / 'checkpoints'
    assert downloads == [(PLACES[0], str(folder / 'file.pth'))]


def test_weights_only_false_does_not_open_the_door(evil_file, marker):
    """mmengine 0.11 calls it so."""
    with pytest.raises(ValueError, match='refused'):
        mmengine_checkpoint.torch.load(
            evil_file, map_location='cpu', weights_only=False
        )
    assert not marker.exists()


# --- checkpoints: resume ----------------------------------------------------


def test_resume_loads_in_full_and_says_so(trained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    runner = make_runner(
        tmp_path, epochs=2, resume=True, load_from=checkpoint_of(trained)
    )
    runner.logger.addHandler(caplog.handler)
    runner.train()
    assert runner.iter == 8
    log = runner.message_hub.log_scalars['train/loss']
    assert isinstance(log, HistoryBuffer)
    assert len(log.data[0]) == 8, 'the first epoch was not restored'
    assert caplog.text.count('weights_only=False') == 1


def test_resume_gives_what_an_uninterrupted_run_gives(tmp_path, trained):
    whole = make_runner(tmp_path / 'whole', epochs=2)
    whole.train()
    resumed = make_runner(
        tmp_path / 'resumed',
        epochs=2,
        resume=True,
        load_from=checkpoint_of(trained),
    )
    resumed.train()
    expected = whole.model.linear.weight
    assert torch.equal(resumed.model.linear.weight, expected)


def test_only_the_resumed_file_is_trusted(
    trained, tmp_path, evil_file, marker
):
    """Neither a file that a hook loads meanwhile, nor one loaded later."""

    class LoadsMore(Hook):
        def after_load_checkpoint(self, runner, checkpoint):
            load_checkpoint(nn.Linear(3, 1), evil_file)

    path = checkpoint_of(trained)
    runner = make_runner(tmp_path, epochs=2, custom_hooks=[LoadsMore()])
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    with pytest.raises(ValueError, match='refused'):
        runner.resume(path)
    with pytest.raises(ValueError, match='refused'):
        load_checkpoint(nn.Linear(3, 1), evil_file)
    assert not marker.exists()


def test_resume_from_the_network_is_refused(offline, tmp_path, evil_file):
    downloads = offline(evil_file)
    runner = make_runner(tmp_path)
    with pytest.raises(ValueError, match='resume wants a local checkpoint'):
        runner.resume(PLACES[0])
    assert not downloads


def test_resume_of_a_damaged_file(trained, tmp_path):
    path = tmp_path / 'cut.pth'
    path.write_bytes(Path(checkpoint_of(trained)).read_bytes()[:-100])
    runner = make_runner(tmp_path)
    with pytest.raises(ValueError, match=r'cut\.pth: wanted a checkpoint'):
        runner.resume(str(path))


# --- AmpOptimWrapper on a CPU -----------------------------------------------


@on_cpu
def test_amp_trains_in_bfloat16_with_accumulation(tmp_path):
    amp = {'type': 'AmpOptimWrapper', 'loss_scale': 'dynamic'}
    amp['accumulative_counts'] = 2
    runner = make_runner(tmp_path, optim_wrapper=amp)
    steps = []

    class CountSteps(Hook):
        def before_train(self, runner):
            optimizer = runner.optim_wrapper.optimizer
            optimizer.register_step_post_hook(lambda *_: steps.append(1))

    runner.register_hook(CountSteps())
    before = runner.model.linear.weight.detach().clone()
    runner.train()
    assert runner.model.seen == [torch.bfloat16] * 4
    assert len(steps) == 2
    assert runner.model.linear.weight.dtype == torch.float32
    assert not torch.equal(runner.model.linear.weight, before)


@on_cpu
def test_amp_run_resumes(tmp_path):
    amp = {'type': 'AmpOptimWrapper', 'dtype': 'bfloat16'}
    make_runner(tmp_path, 1, amp).train()
    resumed = make_runner(tmp_path, 2, amp, resume=True)
    resumed.train()
    whole = make_runner(tmp_path / 'whole', 2, amp)
    whole.train()
    expected = whole.model.linear.weight
    assert torch.equal(resumed.model.linear.weight, expected)


@on_cpu
def test_amp_loads_the_state_of_a_gpu_run():
    linear = nn.Linear(2, 1)
    cfg = {'type': 'AmpOptimWrapper', 'loss_scale': 512.0}
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    wrapper = OPTIM_WRAPPERS.build({**cfg, 'optimizer': optimizer})
    optimizer.param_groups[0]['lr'] = 0.2
    state = {**wrapper.state_dict(), 'loss_scaler': {'scale': 65536.0}}
    optimizer.param_groups[0]['lr'] = 0.3
    wrapper.load_state_dict(state)
    assert optimizer.param_groups[0]['lr'] == 0.2


@pytest.mark.parametrize('dtype', ['float16', torch.float16, 'float32'])
def test_amp_refuses_another_dtype(dtype):
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"dtype.*'bfloat16'.*got.*float"):
        compat.CPUAmpOptimWrapper(dtype=dtype, optimizer=optimizer)


def test_amp_is_left_alone_with_a_gpu(monkeypatch):
    monkeypatch.setattr(cpu_amp, 'get_device', lambda: 'cuda')
    monkeypatch.setitem(OPTIM_WRAPPERS._module_dict, 'AmpOptimWrapper', None)
    compat.register_cpu_amp()
    assert OPTIM_WRAPPERS._module_dict['AmpOptimWrapper'] is None


# --- distributed training on a CPU ------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of one torchrun process, without a process group."""
    started = []
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr('torch.distributed.init_process_group', started.append)
    return started


def distributed_cfg(**kwargs):
    norm = {'type': 'SyncBN', 'requires_grad': True}
    model = {'norm_cfg': norm, 'heads': [{'norm': [{'type': 'MMSyncBN'}]}]}
    return Config(
        {
            'launcher': 'pytorch',
            'model': {'type': 'EncoderDecoder', **model},
            'env_cfg': {
                'cudnn_benchmark': True,
                'dist_cfg': {'backend': 'nccl', 'timeout': 60},
            },
            **kwargs,
        }
    )


def test_config_for_cpu_processes(torchrun, caplog):
    cfg = distributed_cfg(find_unused_parameters=True, sync_bn='torch')
    compat.prepare_cpu_distributed(cfg)
    assert torchrun == ['gloo']
    assert cfg.model_wrapper_cfg == {
        'type': 'MMDistributedDataParallel',
        'device_ids': None,
        'broadcast_buffers': False,
        'find_unused_parameters': True,
    }
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    assert cfg.env_cfg.dist_cfg.timeout == 60
    assert cfg.env_cfg.cudnn_benchmark
    assert cfg.model.norm_cfg == {'type': 'BN', 'requires_grad': True}
    assert cfg.model.heads[0].norm[0].type == 'BN'
    assert cfg.model.type == 'EncoderDecoder'
    assert cfg.get('sync_bn') is None


def test_users_model_wrapper_is_kept(torchrun):
    cfg = distributed_cfg(model_wrapper_cfg={'static_graph': True})
    compat.prepare_cpu_distributed(cfg)
    assert cfg.model_wrapper_cfg == {
        'type': 'MMDistributedDataParallel',
        'device_ids': None,
        'static_graph': True,
    }
    own = {'type': 'OwnWrapper', 'x': 1}
    cfg = distributed_cfg(model_wrapper_cfg=own)
    compat.prepare_cpu_distributed(cfg)
    assert cfg.model_wrapper_cfg == own


@pytest.mark.parametrize('why', ['gpu', 'launcher', 'not torchrun'])
def test_config_is_left_alone(torchrun, monkeypatch, why):
    if why == 'gpu':
        monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    if why == 'not torchrun':
        monkeypatch.delenv('RANK')
    launcher = 'none' if why == 'launcher' else 'pytorch'
    cfg = distributed_cfg(launcher=launcher)
    compat.prepare_cpu_distributed(cfg)
    assert cfg.to_dict() == distributed_cfg(launcher=launcher).to_dict()
    assert not torchrun


TRAIN_ON_TWO = """
import sys
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmstabvim.compat import prepare_cpu_distributed


@MODELS.register_module()
class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, inputs, data_samples=None, mode='loss'):
        return {'loss': self.linear(torch.stack(inputs)).square().mean()}


cfg = Config({
    'model': {'type': 'Toy'},
    'work_dir': sys.argv[1],
    'launcher': 'pytorch',
    'train_dataloader': {
        'dataset': [{'inputs': torch.tensor([float(i)])} for i in range(8)],
        'batch_size': 2,
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
    },
    'train_cfg': {'by_epoch': True, 'max_epochs': 1},
    'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.01}},
    'env_cfg': {'dist_cfg': {'backend': 'nccl'}},
    'randomness': {'seed': 0},
})
if '--without' not in sys.argv:
    prepare_cpu_distributed(cfg)
runner = Runner.from_cfg(cfg)
model = runner.train()
weight = model.module.linear.weight.item()
with open(f'{sys.argv[1]}/rank{runner.rank}', 'w') as file:
    file.write(f'{type(model).__name__} {runner.world_size} {weight!r}')
torch.distributed.destroy_process_group()
"""


@on_cpu
@pytest.mark.slow
def test_two_processes_train_on_a_cpu(tmp_path):
    """They agree, and differ from the start; without the shim: an error."""
    script = tmp_path / 'train.py'
    script.write_text(TRAIN_ON_TWO)
    launch = ['-m', 'torch.distributed.run', '--standalone']
    launch += ['--nproc-per-node', '2', str(script), str(tmp_path)]
    result = run_python('', *launch, OMP_NUM_THREADS='1')
    assert result.returncode == 0, result.stderr
    ranks = [(tmp_path / f'rank{i}').read_text().split() for i in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][:2] == ['MMDistributedDataParallel', '2']
    launch[launch.index('2')] = '1'
    without = run_python('', *launch, '--without', OMP_NUM_THREADS='1')
    assert without.returncode != 0
    assert 'set_device' in without.stderr


THREADS_AT_EXIT = """
import atexit
from pathlib import Path


def report():
    # all of them: older versions of PyTorch do not name those of gloo
    print('threads:', len(list(Path('/proc/self/task').iterdir())))


atexit.register(report)  # before the shim's, so it runs after it
import torch
from mmengine.config import Config
from mmstabvim import compat

compat.prepare_cpu_distributed(Config(dict(launcher='pytorch')))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
report()  # the model has used the group, so its threads are running
model.itself = [model]  # a cycle, as a runner and its hooks are
del model
"""


@pytest.mark.skipif(
    not Path('/proc/self/task').exists(), reason='threads are listed in /proc'
)
def test_no_gloo_thread_meets_the_end_of_python():
    """One that does aborts the process, now and then."""
    port = str(random.randint(20000, 40000))
    done = subprocess.run(
        [sys.executable, '-c', THREADS_AT_EXIT],
        capture_output=True,
        text=True,
        env=dict(
            os.environ,
            CUDA_VISIBLE_DEVICES='',
            RANK='0',
            WORLD_SIZE='1',
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
        ),
    )
    assert done.returncode == 0, done.stderr
    training, end = map(int, re.findall(r'threads: (\d+)', done.stdout))
    assert training - end >= 2  # gloo's, whatever else there is


# --- configs and names ------------------------------------------------------


def test_package_is_known_to_the_config_loader(tmp_path, monkeypatch):
    folder = tmp_path / '.mim' / 'configs' / '_base_'
    folder.mkdir(parents=True)
    (folder / 'base.py').write_text('value = 3\n')
    (tmp_path / '.mim' / 'model-index.yml').write_text('Import: []\n')
    monkeypatch.setattr(
        'mmengine.config.config.get_installed_path', lambda _: str(tmp_path)
    )
    child = tmp_path / 'child.py'
    child.write_text("_base_ = 'mmstabvim::_base_/base.py'\n")
    assert Config.fromfile(child).value == 3
    monkeypatch.delitem(config_utils.MODULE2PACKAGE, 'mmstabvim')
    with pytest.raises(AssertionError, match='mmstabvim'):
        Config.fromfile(child)


def test_package_is_found_by_its_import_path():
    """mmengine asks the distribution, which is elsewhere if editable."""
    own = str(Path(compat.__file__).parents[1])
    find = _with_own_path(lambda package: f'elsewhere/{package}')
    assert find('mmstabvim') == own
    assert find('mmseg') == 'elsewhere/mmseg'
    for module in (config_module, hub_module):
        assert module.get_installed_path('mmstabvim') == own
        assert hasattr(module.get_installed_path, '__wrapped__')


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

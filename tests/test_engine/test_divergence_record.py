"""Records of steps that diverged, and their replay."""

from pathlib import Path

import numpy as np
import pytest
import torch
from divergence_runs import diverge
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, PixelData
from torch import nn

from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.engine.divergence.alarm import Alarm, LossHistory
from mmstabvim.engine.divergence.record import (
    pack_batch,
    replay,
    unpack_batch,
)
from mmstabvim.engine.random_state import (
    drawing_from,
    get_random_state,
    set_random_state,
)


def test_record_repeats_the_step(small_digits, monkeypatch):
    """Mixup, drop path and batch: the loss of the step, bit by bit."""
    losses = []
    runner = Runner.from_cfg(small_digits)
    original = OptimWrapper.update_params

    def note(self, loss, *args, **kwargs):
        losses.append(loss.item())
        original(self, loss, *args, **kwargs)

    monkeypatch.setattr(OptimWrapper, 'update_params', note)

    def alarm_in_the_sixth(_history, values, _spikes):
        wanted = values.iteration == 6
        return Alarm('spike', 'of this test', 6, True) if wanted else None

    monkeypatch.setattr(LossHistory, '_spike', alarm_in_the_sixth)
    report = diverge(runner)
    (path,) = Path(runner.log_dir).glob('divergence_iter_6.pth')
    torch.load(path, weights_only=True)
    assert load_checkpoint_tensors(path)['cause'] == 'spike'
    trace = replay(path, Path(runner.log_dir, 'divergence_config.py'))
    assert trace.losses['loss'] == losses[5]
    assert f'loss {losses[5]:.6g}' in report
    assert trace.first_nonfinite is None
    with pytest.raises(ValueError, match=r"without \['batch'"):
        replay(Path(runner.work_dir, 'last_good.pth'), nn.Linear(1, 1))


def test_random_numbers_go_on_after_a_replay():
    state = get_random_state()
    first = torch.rand(3), np.random.rand(3)
    middle = get_random_state()
    second = torch.rand(3), np.random.rand(3)
    set_random_state(middle)
    with drawing_from(state):
        assert torch.equal(torch.rand(3), first[0])
        assert np.array_equal(np.random.rand(3), first[1])
        torch.rand(1), np.random.rand(1)
    assert torch.equal(torch.rand(3), second[0])
    assert np.array_equal(np.random.rand(3), second[1])


def test_batch_goes_there_and_back(tmp_path):
    """mmengine's elements, nested, with arrays and private fields."""

    class Odd:
        pass

    element = BaseDataElement(metainfo=dict(size=(3, 4), path='a.png'))
    element.seg = PixelData(data=torch.arange(6).reshape(1, 2, 3))
    element._private = np.float64(0.5)
    batch = dict(
        inputs=[torch.ones(2, dtype=torch.uint8)],
        samples=(element, np.arange(3, dtype=np.int16)),
        names=np.array(['a', 'b']),
    )
    torch.save(pack_batch(batch), tmp_path / 'batch.pth')
    again = unpack_batch(load_checkpoint_tensors(tmp_path / 'batch.pth'))
    sample, array = again['samples']
    assert type(sample.seg) is PixelData
    assert torch.equal(sample.seg.data, element.seg.data)
    assert sample.seg.shape == (2, 3)
    assert sample.metainfo == element.metainfo
    assert sorted(sample.keys()) == sorted(element.keys())
    assert array.dtype == np.int16
    assert array.tolist() == [0, 1, 2]
    assert again['names'] == ['a', 'b']
    assert again['inputs'][0].dtype == torch.uint8
    assert 'Odd' in str(pack_batch([Odd()]))
    packed = pack_batch(element)
    packed['__data_element__'] = 'os.system'
    with pytest.raises(ValueError, match=r"'os\.system', a class that is not"):
        unpack_batch(packed)

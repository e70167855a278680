"""Random states are stored and put back."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmstabvim import RandomStateHook
from mmstabvim.engine.hooks import random_state_hook
from mmstabvim.engine.random_state import get_random_state, set_random_state


def draw():
    return (
        random.random(),
        np.random.rand(),
        np.random.randn(),
        torch.rand(()).item(),
    )


def test_state_goes_there_and_back(tmp_path):
    """Through a file, and as often as one likes."""
    np.random.randn()  # leaves a cached second value
    state = get_random_state()
    first = draw()
    for _ in range(2):
        torch.save(state, tmp_path / 'state.pth')
        set_random_state(torch.load(tmp_path / 'state.pth'))
        assert draw() == first
    assert draw() != first


def runner(iteration, batches=None):
    loop = SimpleNamespace()
    if batches is not None:
        loop.dataloader_iterator = batches
    return SimpleNamespace(iter=iteration, train_loop=loop)


def test_restores_on_resume_only():
    checkpoint = {}
    RandomStateHook().before_save_checkpoint(None, checkpoint)
    expected = draw()
    hook = RandomStateHook()
    for iteration, restored in ((0, False), (5, True)):
        hook.after_load_checkpoint(None, checkpoint)
        hook.before_train_epoch(runner(iteration))
        assert (draw() == expected) == restored
    hook.before_train_epoch(runner(5))  # the next epoch goes on
    assert draw() != expected
    hook.after_load_checkpoint(None, {})  # a checkpoint without a state
    hook.before_train_epoch(runner(5))


def test_skipped_batches_do_not_count():
    checkpoint = {}
    RandomStateHook().before_save_checkpoint(None, checkpoint)
    expected = draw()
    hook = RandomStateHook()
    hook.after_load_checkpoint(None, checkpoint)
    loop = runner(2, (draw() for _ in range(4)))
    hook.before_train_epoch(loop)
    batches = list(loop.train_loop.dataloader_iterator)
    assert len(batches) == 4
    assert batches[2] == expected


class LazyBatches:
    """Batches of OneDL's loop: skipped by number, made late, with a seed."""

    def __init__(self):
        self.made, self.skipped = False, 0

    def skip_iter(self, count):
        self.made, self.skipped = False, self.skipped + count

    def _ensure_iterator(self):
        if not self.made:
            self.made = bool(torch.randint(2**31, (1,)) + 1)

    def __iter__(self):
        return self

    def __next__(self):
        self._ensure_iterator()
        return draw()


@pytest.mark.parametrize('fast_forward', [False, True])
def test_batches_skipped_by_number(fast_forward):
    """The loop asks to skip them, or, to save time, does not."""
    checkpoint = {}
    RandomStateHook().before_save_checkpoint(None, checkpoint)
    expected = draw()
    hook = RandomStateHook()
    hook.after_load_checkpoint(None, checkpoint)
    batches = LazyBatches()
    resumed = runner(2, batches)
    resumed.train_loop.fast_forward_on_resume = fast_forward
    hook.before_train_epoch(resumed)
    if fast_forward:
        assert draw() == expected
        return
    resumed.train_loop.dataloader_iterator.skip_iter(2)
    assert next(resumed.train_loop.dataloader_iterator) == expected
    assert next(resumed.train_loop.dataloader_iterator) != expected
    assert batches.skipped == 2


def test_validation_leaves_training_alone():
    hook, checkpoint = RandomStateHook(), {}
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    hook.before_val(None)
    draw()
    hook.before_save_checkpoint(None, checkpoint)  # the best one, say
    hook.after_val(None)
    assert draw() == expected
    set_random_state(checkpoint['random_state'])
    assert draw() == expected


@pytest.mark.parametrize('rank', [1, 2])
def test_other_ranks_draw_other_numbers(rank, monkeypatch):
    checkpoint = {}
    RandomStateHook().before_save_checkpoint(None, checkpoint)
    expected = draw()
    drawn = []
    for r in (0, rank, rank):
        monkeypatch.setattr(random_state_hook, 'get_rank', lambda r=r: r)
        hook = RandomStateHook()
        hook.after_load_checkpoint(None, checkpoint)
        hook.before_train_epoch(runner(1))
        drawn.append(draw())
    assert drawn[0] == expected
    assert not set(drawn[1]) & set(expected)
    assert drawn[1] == drawn[2]

"""States of all random number generators, to keep and to put back."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's generators.

    Returns:
        dict[str, Any]: ``python``, ``numpy``, ``torch`` and ``cuda``: tensors
        and plain Python objects, so that a file of them is read without
        running code.
    """
    numpy_state: Any = np.random.get_state(legacy=False)
    words = numpy_state['state']['key'].astype(np.int64)
    numpy_state['state']['key'] = torch.from_numpy(words)
    return dict(
        python=random.getstate(),
        numpy=numpy_state,
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all(),
    )


def set_random_state(state: dict[str, Any]) -> None:
    """Undo :func:`get_random_state`.

    Args:
        state (dict): A state from there. That of the GPUs is left out where
            their number differs.
    """
    random.setstate(state['python'])
    numpy_state = copy.deepcopy(state['numpy'])
    words = numpy_state['state']['key'].cpu().numpy().astype(np.uint32)
    numpy_state['state']['key'] = words
    np.random.set_state(numpy_state)
    torch.set_rng_state(state['torch'].cpu())
    if len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])


@contextmanager
def drawing_from(state: dict[str, Any]) -> Iterator[None]:
    """Draw random numbers from a state; afterwards go on as before.

    Args:
        state (dict): Result of :func:`get_random_state`.
    """
    before = get_random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)

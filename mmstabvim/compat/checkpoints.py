"""Checkpoints are read without running their code, except one's own."""

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log
from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmstabvim.checkpoint import load_everything, load_tensors

_full_load: ContextVar[bool] = ContextVar('full_load', default=False)
"""True between the start of a resume and the load of its file."""


def load_checkpoints_safely() -> None:
    """Make mmengine load tensors only, except to resume one's own run.

    mmengine 0.10.7 calls ``torch.load`` with PyTorch's default (up to 2.5 it
    runs code, from 2.6 it fails on mmengine's own files), 0.11.0rc3 always
    with ``weights_only=False``, both ``load_url`` likewise. Ends when
    mmengine loads ``load_from`` and ``init_cfg`` with ``weights_only=True``.
    """
    if isinstance(mmengine_checkpoint.torch, SafeTorch):
        return
    mmengine_checkpoint.torch = SafeTorch()
    mmengine_checkpoint.load_url = _load_url
    for cls in (Runner, FlexibleRunner):
        cls.resume = _with_full_load(cls.resume)


class SafeTorch:
    """Stand-in for ``torch`` in mmengine's checkpoint module."""

    def __getattr__(self, name: str) -> Any:
        """Pass on everything except ``load``."""
        return getattr(torch, name)

    @staticmethod
    def load(
        f: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> Any:
        """Load tensors only; in a resume, everything.

        ``weights_only`` is ignored: mmengine 0.11 sets it to False whatever
        the file's origin.
        """
        if not _full_load.get():
            return load_tensors(f, map_location)
        # Only the resumed file itself is trusted, not one that a hook loads.
        _full_load.set(False)
        print_log(
            'Resume: the checkpoint is loaded in full (weights_only=False), '
            'which can run code in it. Resume only runs of your own.',
            logger='current',
        )
        return load_everything(f, map_location)


def _load_url(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
) -> Any:
    """Download into PyTorch's hub folder, unless there, and load tensors."""
    if _full_load.get():
        raise ValueError(
            f'resume wants a local checkpoint of your own run, got {url}: '
            'download it first, or use `load_from` for its weights'
        )
    folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(urlparse(url).path))
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=progress)
    return load_tensors(path, map_location)


def _with_full_load(resume: Callable) -> Callable:
    """Wrap a runner's ``resume`` so that its file is loaded in full."""

    @functools.wraps(resume)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = _full_load.set(True)
        try:
            return resume(*args, **kwargs)
        finally:
            _full_load.reset(token)

    return wrapped

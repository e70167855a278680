"""Automatic mixed precision on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


class CPUAmpOptimWrapper(OptimWrapper):
    """``AmpOptimWrapper`` for the CPU: the forward runs in bfloat16 autocast.

    Args:
        loss_scale (str | float | dict): Accepted as by ``AmpOptimWrapper``
            and without effect: bfloat16 has the range of float32, so nothing
            is scaled. Defaults to 'dynamic'.
        dtype (str | torch.dtype, optional): ``'bfloat16'`` or None, which
            means the same. Defaults to None.
        **kwargs: For ``OptimWrapper``.

    Raises:
        ValueError: If ``dtype`` is another one.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = 'dynamic',
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if dtype not in (None, 'bfloat16', torch.bfloat16):
            raise ValueError(
                "dtype: on a CPU AmpOptimWrapper wants 'bfloat16' or None, "
                f'got {dtype!r}'
            )
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Enter bfloat16 autocast beside the base class's context."""
        autocast = torch.autocast('cpu', torch.bfloat16)
        with super().optim_context(model), autocast:
            yield


def register_cpu_amp() -> None:
    """Make ``type='AmpOptimWrapper'`` work where there is no accelerator.

    mmengine 0.10.7 and 0.11.0rc3 assert a GPU. Ends when mmengine's own
    ``AmpOptimWrapper`` runs on a CPU.
    """
    if get_device() == 'cpu':
        OPTIM_WRAPPERS.register_module(
            name='AmpOptimWrapper', module=CPUAmpOptimWrapper, force=True
        )

"""Handles of PyTorch's hooks, removed together."""

from contextlib import ExitStack
from typing import Protocol


class Handle(Protocol):
    """Handle that PyTorch returns for a hook."""

    def remove(self) -> None:
        """Take the hook away."""


class HookHandles(ExitStack):
    """Remove hooks at the end of a ``with`` block, or by :meth:`close`.

    Where registering fails half-way, or the block raises, nothing is left
    behind. After :meth:`close` handles may be added again.

    Example:
        >>> import torch
        >>> from mmstabvim.hook_handles import HookHandles
        >>> layer, shapes = torch.nn.Linear(3, 2), []
        >>> def note(module, args, output):
        ...     shapes.append(tuple(output.shape))
        >>> with HookHandles() as handles:
        ...     handles.add(layer.register_forward_hook(note))
        ...     _ = layer(torch.zeros(4, 3))
        >>> _ = layer(torch.zeros(5, 3))
        >>> shapes
        [(4, 2)]
    """

    def add(self, *handles: Handle) -> None:
        """Take charge of handles.

        Args:
            *handles (Handle): As returned by ``register_forward_hook`` and
                its relatives.
        """
        for handle in handles:
            self.callback(handle.remove)

"""One policy for all operators: which backend runs, and who decides.

The argument ``backend`` beats the environment variable MMSTABVIM_BACKEND,
which beats ``'auto'``, which goes by the device.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmstabvim.log import print_log
from mmstabvim.ops import native

ENVIRONMENT_VARIABLE = 'MMSTABVIM_BACKEND'

BACKENDS = ('reference', 'cpu', 'fused', 'triton')
"""From the slowest to the fastest: plain differentiable PyTorch; PyTorch with
a hand-written backward pass; C++ kernels for the CPU; Triton kernels for a
GPU. An operator has the first and some of the others."""

NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Real dtypes that the kernels take: they compute in float32."""

Check = Callable[..., Exception | None]

_operators: dict[str, 'Backends'] = {}
_said: set[tuple[str, ...]] = set()


@dataclass(frozen=True)
class Backends:
    """The backends of one operator, and the choice among them.

    Args:
        operator (str): Name of the operator, for messages.
        checks (Mapping[str, Callable]): For each backend beside
            ``'reference'``, a function of the operator's inputs. It returns
            the exception to raise where the backend cannot run them, else
            None.
        slow_on_gpu (bool): Whether without Triton the operator is so slow on
            a GPU that ``'auto'`` is an error there. Defaults to False.
    """

    operator: str
    checks: Mapping[str, Check]
    slow_on_gpu: bool = False

    def __post_init__(self) -> None:
        """Make the operator known to :func:`nearest`."""
        _operators[self.operator] = self

    @property
    def names(self) -> tuple[str, ...]:
        """Backends of the operator, from the slowest to the fastest."""
        return tuple(filter(self._has, BACKENDS))

    def _has(self, name: str) -> bool:
        return name == 'reference' or name in self.checks

    def choose(self, backend: str, *inputs: Any) -> str:
        """Name the backend that runs, and say once which one it is.

        Args:
            backend (str): ``'auto'``, or the backend that must run.
            *inputs (Any): Inputs of the operator, a tensor first.

        Returns:
            str: One of :attr:`names`.

        Raises:
            NotImplementedError: If the inputs are under a transform of
                ``torch.func`` or carry tangents of forward-mode derivatives,
                and the backend is not ``'reference'``.
            RuntimeError: If the backend cannot run here.
            TypeError: If a dtype does not fit the backend.
            ValueError: If the name is unknown, or the operator or the inputs
                do not fit it.
        """
        device = inputs[0].device
        asked, by_argument = _asked(backend)
        if by_argument:
            chosen, why_not = asked, self._refusal(asked, inputs)
            if why_not is not None:
                raise why_not
        else:
            chosen, why_not = self._fastest(asked, inputs)
            refused = self.slow_on_gpu and device.type == 'cuda'
            if asked == 'auto' and refused and why_not is not None:
                raise why_not
        if chosen != 'reference':
            self._refuse_transforms(chosen, inputs)
        if not torch.compiler.is_compiling():
            self._say(asked, chosen, device.type, why_not)
        return chosen

    def _fastest(
        self, asked: str, inputs: tuple[Any, ...]
    ) -> tuple[str, Exception | None]:
        """The fastest backend up to the one asked for, and what slowed it."""
        slowed = None
        on_gpu = inputs[0].device.type == 'cuda'
        if asked == 'auto':
            asked = 'triton' if on_gpu else 'fused'
        elif not self._has(asked):
            slowed = self._refusal(asked, inputs)
        for name in _downwards(asked):
            if self._has(name):
                why_not = self._refusal(name, inputs)
                if why_not is None:
                    return name, slowed
                slowed = slowed or why_not
        raise AssertionError('reference takes everything')

    def _refusal(self, name: str, inputs: tuple[Any, ...]) -> Exception | None:
        """Why a backend cannot run the inputs here."""
        if not self._has(name):
            return ValueError(
                f'{self.operator} has no backend {name!r}, it has '
                f'{", ".join(self.names)}'
            )
        device = inputs[0].device
        why_not = ''
        if name == 'triton':
            why_not = _without_triton(device.type)
        elif name == 'fused' and device.type != 'cpu':
            why_not = f'it runs on a CPU, got tensors on {device}'
        elif name == 'fused' and not native.enabled():
            why_not = f'{native.ENVIRONMENT_VARIABLE}=0 turns it off'
        if why_not:
            return RuntimeError(
                f'the {name} backend of {self.operator} cannot run: {why_not}'
            )
        return None if name == 'reference' else self.checks[name](*inputs)

    def _refuse_transforms(
        self, backend: str, inputs: tuple[Any, ...]
    ) -> None:
        """Raise where a derivative would be zero without a word."""
        if not _transforming():
            return
        # torch.compile does not show the wrappers of its tensors
        if torch.compiler.is_compiling() or any(map(_is_transformed, inputs)):
            raise NotImplementedError(
                'forward-mode derivatives and the transforms of torch.func '
                '(grad, jvp, vmap, ...) are not implemented for the '
                f'{backend} backend of {self.operator}: use '
                f"backend='reference' or {ENVIRONMENT_VARIABLE}=reference"
            )

    def _say(
        self, asked: str, chosen: str, device: str, slowed: Exception | None
    ) -> None:
        """Log once what runs, and louder what is slower than expected."""
        key = (self.operator, asked, chosen, device)
        if key in _said:
            return
        _said.add(key)
        line = f'{self.operator} uses the {chosen!r} backend on {device}'
        on_gpu, loud = device == 'cuda', False
        if slowed is not None and (asked != 'auto' or on_gpu):
            line, loud = f'{line}: {slowed}', True
        elif on_gpu and chosen != 'triton' and self.slow_on_gpu:
            line, loud = f'{line}: plain operations, slow on a GPU', True
        print_log(line, level=logging.WARNING if loud else logging.INFO)


def nearest(operator: str, backend: str) -> str:
    """Translate a choice made for several operators into one's own backend.

    Args:
        operator (str): Name of a function of :mod:`mmstabvim.ops`.
        backend (str): ``'auto'`` or one of :data:`BACKENDS`.

    Returns:
        str: The same, or the next slower one that the operator has.

    Raises:
        ValueError: If the backend is unknown.

    Example:
        >>> nearest('gated_merge', 'cpu')
        'reference'
    """
    _check_name('backend', backend)
    if backend == 'auto':
        return backend
    names = _operators[operator].names
    return next(name for name in _downwards(backend) if name in names)


def not_narrow(
    backend: str,
    *given: Tensor | torch.dtype | None,
    instead: str = 'reference',
) -> TypeError | None:
    """Return the refusal of a kernel that computes in float32.

    Args:
        backend (str): Name of the kernel's backend.
        *given (Tensor | torch.dtype | None): What it would read and write.
        instead (str): A backend that takes every dtype. Defaults to
            ``'reference'``.

    Returns:
        TypeError | None: None if every dtype is one of :data:`NARROW`, or
        complex64.
    """
    for x in given:
        dtype = x.dtype if isinstance(x, Tensor) else x
        if dtype not in (None, torch.complex64, *NARROW):
            return TypeError(
                f'the {backend} backend computes in float32, got {dtype}; use '
                f'backend={instead!r}'
            )
    return None


def no_derivative(operator: str) -> Callable[..., Any]:
    """Backward pass of a backward pass: an error that says what to do.

    Args:
        operator (str): Name of the operator.

    Returns:
        Callable: What ``register_autograd`` takes.
    """

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f'second derivatives of {operator} are not implemented for this '
            f"backend: use backend='reference' or {ENVIRONMENT_VARIABLE}="
            'reference'
        )

    return refuse


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast on a CPU or a GPU, None where it is off."""
    kind = device.type
    if kind not in ('cpu', 'cuda') or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off for a block of code; a device may not have it."""
    if device.type == 'meta':
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@functools.cache
def has_triton() -> bool:
    """Find out if triton is installed; it is imported where it is used."""
    return importlib.util.find_spec('triton') is not None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any
) -> None:
    """Run a Triton kernel on the GPU that holds its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def _asked(backend: str) -> tuple[str, bool]:
    """The name asked for, and whether by argument."""
    source, name = 'backend', backend
    if backend == 'auto':
        source, name = ENVIRONMENT_VARIABLE, _variable()
    _check_name(source, name)
    return name, backend != 'auto'


def _check_name(source: str, name: str) -> None:
    if name not in ('auto', *BACKENDS):
        raise ValueError(
            f'{source} must be one of {("auto", *BACKENDS)}, got {name!r}'
        )


def _downwards(backend: str) -> tuple[str, ...]:
    """A backend and the slower ones."""
    return BACKENDS[BACKENDS.index(backend) :: -1]


def _is_transformed(x: Any) -> bool:
    """Tell if a tensor is under a transform, or has a tangent."""
    return isinstance(x, Tensor) and (
        torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad.unpack_dual(x).tangent is not None
    )


# torch.compile must not look inside the following: it could not trace it


@torch.compiler.assume_constant_result
def _transforming() -> bool:
    """Tell if any transform, or forward mode, is on."""
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _variable() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, 'auto')


@torch.compiler.assume_constant_result
def _without_triton(device_type: str) -> str:
    """Why Triton kernels cannot run on a device; empty if they can."""
    if not has_triton():
        return 'triton is not installed (pip install triton)'
    if device_type == 'cuda':
        return ''
    if importlib.import_module('triton').knobs.runtime.interpret:
        return ''
    return (
        f'it needs a GPU, got tensors on {device_type}; set '
        'TRITON_INTERPRET=1 before the first import to debug on a CPU'
    )

"""Read checkpoint files without running the code they may carry.

A safetensors file holds tensors only. Any other checkpoint is a pickle, and a
pickle names functions to call. Here a file is first read with
``torch.load(weights_only=True)``. That refuses the log buffers, bound methods
and argument lists which training tools put beside the weights, so such a file
is read a second time with an unpickler that can rebuild tensors and plain
containers and nothing else: every other name in the file becomes an inert
:class:`Placeholder`.
"""

import builtins
import collections
import functools
import os
import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from mmstabvim.file_formats import (
    describe_folder,
    foreign_format,
    is_safetensors,
    read_safetensors,
)

_CODE_MODULES = frozenset([
    'os', 'posix', 'nt', 'sys', 'subprocess', '_posixsubprocess', 'pty',
    'importlib', 'runpy', 'shutil', 'socket', 'ctypes', '_ctypes', 'cffi',
    'code', 'codeop', 'pdb', 'bdb', 'profile', 'cProfile', 'timeit',
    'pickle', '_pickle', 'marshal', '_thread', 'webbrowser', 'pip',
])  # fmt: skip
"""Modules that no honest checkpoint names: naming one refuses the file.
Safety does not rest on this list, since whatever is not on it is inert."""


class Placeholder:
    """Stand-in for an object that is not loaded; it does nothing.

    One subclass is made for each unknown name in a file, so that a printed
    checkpoint shows what was left out.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> 'Placeholder':
        """Make an empty object, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Keep none of the arguments."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> 'Placeholder':
        """Stand for a function too: the result is unknown as well."""
        return Placeholder()

    def _ignore(self, *_args: Any) -> None:
        """Drop the state or the items that the file gives."""

    __setstate__ = __setitem__ = append = extend = add = _ignore

    def __repr__(self) -> str:
        """Name what was not loaded."""
        cls = type(self)
        return f'<not loaded: {cls.__module__}.{cls.__qualname__}>'


class _CodeRefused(pickle.UnpicklingError):
    """The file names a function that runs code; the message is its name."""


def _rebuild_plain(
    function: Any, _subclass: Any, args: tuple, _state: Any
) -> Any:
    """Rebuild a tensor of a subclass, or with attributes, as a plain one."""
    return function(*args)


def _encode_bytes(text: str, encoding: str) -> bytes:
    """Rebuild bytes, which pickle protocol 2 stores as latin-1 text."""
    if encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError(f'unexpected encoding {encoding!r}')
    return text.encode('latin-1')


def _known_globals() -> dict[str, Any]:
    """Map the names that a file may use to objects."""
    known: dict[str, Any] = {
        'collections.OrderedDict': collections.OrderedDict,
        'collections.Counter': collections.Counter,
        'collections.defaultdict': collections.defaultdict,
        '_codecs.encode': _encode_bytes,
        'torch.Size': torch.Size,
        'torch.device': torch.device,
        'torch.Tensor': torch.Tensor,
        'torch._tensor.Tensor': torch.Tensor,
        'torch.nn.parameter.Parameter': torch.nn.Parameter,
        'torch.storage.UntypedStorage': torch.UntypedStorage,
        'torch._tensor._rebuild_from_type_v2': _rebuild_plain,
    }
    for name in (
        'bool', 'int', 'float', 'complex', 'str', 'bytes', 'bytearray',
        'list', 'tuple', 'dict', 'set', 'frozenset', 'slice',
    ):  # fmt: skip
        known[f'builtins.{name}'] = getattr(builtins, name)
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            known[f'torch.{name}'] = value
    for name in (
        '_rebuild_tensor',
        '_rebuild_tensor_v2',
        '_rebuild_tensor_v3',
        '_rebuild_parameter',
        '_rebuild_parameter_with_state',
    ):
        known[f'torch._utils.{name}'] = getattr(torch._utils, name)
    return known


_KNOWN = _known_globals()

_STATEFUL = (
    Placeholder,
    torch.Tensor,
    collections.OrderedDict,
    collections.Counter,
    collections.defaultdict,
)


_NOT_THE_FILE = (PermissionError, torch.cuda.OutOfMemoryError)
"""Errors which say nothing about what is in the file."""


def _runs_code(module: str, name: str) -> bool:
    """Tell if a global is a known way to run code."""
    if module != 'builtins':
        return module.split('.')[0] in _CODE_MODULES
    # Classes such as `object` are harmless; so is `getattr`, which pickled
    # bound methods need and which becomes a placeholder.
    value = getattr(builtins, name.split('.')[0], None)
    return (
        callable(value) and not isinstance(value, type) and name != 'getattr'
    )


_Unpickler: Any = pickle._Unpickler


class _TensorUnpickler(_Unpickler):
    """Unpickler of tensors, plain containers and placeholders.

    The standard library's Python implementation, because the one in C does
    not let BUILD be overridden.
    """

    dispatch: ClassVar[dict] = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return a known global or a new placeholder class."""
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)
        if _runs_code(module, name):
            raise _CodeRefused(f'{module}.{name}')
        known = _KNOWN.get(f'{module}.{name}')
        if known is not None:
            return known
        return type(name, (Placeholder,), {'__module__': module})

    def load_build(self) -> None:
        """Set an object's state, but never that of a class or function.

        Otherwise a file could replace attributes of PyTorch's own classes.
        """
        target = self.stack[-2]
        if not isinstance(target, _STATEFUL):
            raise pickle.UnpicklingError(f'state for a {type(target)}')
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
    # Extension codes are looked up in a cache that bypasses find_class.
    for _opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[_opcode[0]]


def _load(file: Any, **kwargs: Any) -> Any:
    """Do what ``pickle.load`` does, restricted."""
    return _TensorUnpickler(file, **kwargs).load()


_tensor_pickle = SimpleNamespace(
    __name__='mmstabvim.checkpoint', Unpickler=_TensorUnpickler, load=_load
)
"""The ``pickle_module`` for ``torch.load``."""


def load_tensors(file: Any, map_location: Any = 'cpu') -> dict | torch.Tensor:
    """Read the content of a checkpoint file without running its code.

    Args:
        file (str | os.PathLike | BinaryIO): Path, or a seekable binary file.
        map_location: Argument of ``torch.load``. Defaults to 'cpu'.

    Returns:
        dict | Tensor: Objects in it that are neither tensors nor plain
        containers, numbers or text are :class:`Placeholder` objects; tensors
        of a subclass come back as plain tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, is damaged, or names a
            function that runs code.
    """
    loaded = _load_checked(_load_in_two_steps, file, map_location)
    if not isinstance(loaded, (dict, torch.Tensor)):
        raise _wrong_type(file, loaded)
    return loaded


def _load_in_two_steps(file: Any, map_location: Any) -> Any:
    """Load with ``weights_only``, then with the restricted unpickler."""
    if is_safetensors(file):
        return read_safetensors(file, map_location)
    try:
        return torch.load(file, map_location, weights_only=True)
    except pickle.UnpicklingError:
        if hasattr(file, 'seek'):
            file.seek(0)
    return torch.load(
        file, map_location, pickle_module=_tensor_pickle, weights_only=False
    )


def load_checkpoint_tensors(file: Any, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint, a dict, without running its code.

    Args:
        file (str | os.PathLike | BinaryIO): Path, or a seekable binary file.
        map_location: Argument of ``torch.load``. Defaults to 'cpu'.

    Returns:
        dict: See :func:`load_tensors`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, is damaged, or names a
            function that runs code.
    """
    checkpoint = load_tensors(file, map_location)
    if not isinstance(checkpoint, dict):
        raise _wrong_type(file, checkpoint)
    return checkpoint


def load_everything(file: Any, map_location: Any = 'cpu') -> Any:
    """Read a file of one's own with all its objects: this can run code.

    Args:
        file (str | os.PathLike | BinaryIO): Path, or a seekable binary file.
        map_location: Argument of ``torch.load``. Defaults to 'cpu'.

    Returns:
        Any: The saved object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint or is damaged.
    """
    load = functools.partial(torch.load, weights_only=False)
    return _load_checked(load, file, map_location)


def _load_checked(load: Callable, file: Any, map_location: Any) -> Any:
    """Call ``load`` and explain its errors."""
    if not hasattr(file, 'read') and not os.path.isfile(file):
        raise FileNotFoundError(
            f'{_name(file)}: wanted a checkpoint file, got '
            + (
                describe_folder(file)
                if os.path.isdir(file)
                else 'no such file'
            )
        )
    try:
        loaded = load(file, map_location)
        _check_sums(file)
        return loaded
    except _CodeRefused as error:
        raise ValueError(
            f'{_name(file)}: refused, because loading it would call '
            f'{str(error)!r}; wanted a checkpoint that holds tensors'
        ) from None
    except _NOT_THE_FILE:
        raise
    except Exception as error:
        # A damaged pickle can raise nearly anything.
        raise _unreadable(file, error) from error


def _check_sums(file: Any) -> None:
    """Compare the checksums in a zip archive; PyTorch does not for weights."""
    if is_safetensors(file) or not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f'wrong checksum of {damaged}')


def _name(file: Any) -> str:
    """Name a file in a message."""
    if hasattr(file, 'read'):
        return str(getattr(file, 'name', f'<{type(file).__name__}>'))
    return os.fspath(file)


def _wrong_type(file: Any, loaded: Any) -> ValueError:
    """Make the error for a readable file that holds something else."""
    return ValueError(
        f'{_name(file)}: wanted a checkpoint, a dict with tensors, got '
        f'a {type(loaded).__name__}: {loaded!r:.60}'
    )


def _unreadable(file: Any, error: Exception) -> ValueError:
    """Make the error for a file that is damaged or no checkpoint."""
    foreign = foreign_format(file)
    if not hasattr(file, 'read') and os.path.getsize(file) == 0:
        got = 'got an empty file'
    elif foreign is not None:
        got = f'got {foreign}; this format is not read'
    elif is_safetensors(file):
        got = f'got a {error}'
    else:
        reason = (str(error).splitlines() or [''])[0]
        got = (
            'but reading it failed, so it is likely damaged, incomplete or '
            f'of another format ({type(error).__name__}: {reason:.200})'
        )
    return ValueError(
        f'{_name(file)}: wanted a checkpoint written by torch.save, or '
        f'safetensors, {got}'
    )

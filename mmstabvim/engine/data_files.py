"""Datasets and their image files, as the checks before a run see them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine import fileio
from mmengine.fileio import LocalBackend
from PIL import Image, UnidentifiedImageError
from torch import nn

PNG_END = b'IEND'
TAIL = 4096
"""Bytes at the end of a PNG in which its last chunk must begin."""


def leaves(dataset: Any) -> Iterator[Any]:
    """Walk the datasets inside of wrappers that join, repeat or mix.

    Args:
        dataset (Any): Of any toolkit, wrapped or not.

    Yields:
        Any: Datasets that wrap no other one.
    """
    inner = getattr(dataset, 'datasets', None)
    if inner is None and hasattr(dataset, 'dataset'):
        inner = [dataset.dataset]
    if inner is None:
        yield dataset
    for part in inner or ():
        yield from leaves(part)


def spaced(dataset: Any, samples: int) -> Iterator[dict]:
    """Walk evenly spaced entries of a dataset.

    Args:
        dataset (Any): With ``get_data_info``.
        samples (int): Number of entries, all if there are fewer.

    Yields:
        dict: Entry, as of ``get_data_info``.
    """
    count = min(samples, len(dataset))
    for number in range(count):
        yield dataset.get_data_info(number * len(dataset) // count)


def exists(dataset: Any, path: str | None) -> bool:
    """Tell whether a file is there; one that is not local passes."""
    if not path:
        return False
    return not _is_local(dataset, path) or Path(path).is_file()


def _is_local(dataset: Any, path: str) -> bool:
    """Tell whether a file of a dataset is on a local disk."""
    backend = fileio.get_file_backend(
        path,
        backend_args=getattr(dataset, 'backend_args', None),
        enable_singleton=True,
    )
    return isinstance(backend, LocalBackend)


def folders(dataset: Any) -> str:
    """List where a dataset looks for its files, for a message."""
    prefix = getattr(dataset, 'data_prefix', None) or {}
    found = [f'{key}={path!r}' for key, path in prefix.items() if path]
    return ', '.join(found) or 'no folder given'


def open_image(name: str, dataset: Any, path: str) -> Image.Image | None:
    """Read an image's header, and see that its end is there.

    Args:
        name (str): Dataset, for the message.
        dataset (Any): Whose ``backend_args`` tell how files are read.
        path (str): Of the image.

    Returns:
        Image | None: Not decoded; None where Pillow does not know the format.

    Raises:
        ValueError: If the file is empty, damaged or a truncated PNG.
    """
    opened: Any = path
    if not _is_local(dataset, path):
        backend_args = getattr(dataset, 'backend_args', None)
        opened = io.BytesIO(fileio.get(path, backend_args=backend_args))
    try:
        image = Image.open(opened)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        if Path(path).suffix.lower() not in Image.registered_extensions():
            return None
        raise ValueError(
            f'{name}: {path} cannot be read as image ({error})'
        ) from error
    if image.format == 'PNG' and not _has_end(image):
        raise ValueError(
            f'{name}: {path} is truncated: the end of the PNG is missing'
        )
    return image


def _has_end(image: Image.Image) -> bool:
    """Look for a PNG's last chunk; the file's position is kept."""
    file: Any = image.fp
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - TAIL, 0))
    found = PNG_END in file.read()
    file.seek(position)
    return found


def bare_model(model: Any, part: str) -> Any:
    """Find the model that has a part, inside of any wrappers.

    Args:
        model (Any): Wrapped or not.
        part (str): Attribute of the model sought, such as ``'head'``.

    Returns:
        Any: That model; the innermost one where none has the part.
    """
    inner = getattr(model, 'module', None)
    if not hasattr(model, part) and isinstance(inner, nn.Module):
        return bare_model(inner, part)
    return model

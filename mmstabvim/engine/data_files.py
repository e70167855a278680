"""Datasets and their image files, for the checks before a run."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmengine import fileio
from mmengine.fileio import LocalBackend
from PIL import Image

EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
ENDS = {'PNG': b'IEND\xaeB`\x82', 'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9'}
TAIL = 4096
"""Bytes at the end of a file in which its end mark is sought first."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors of Pillow at a file that is no image, or not a whole one."""


class ImageHeader(NamedTuple):
    """Properties of an image that is not decoded.

    Attributes:
        size (tuple[int, int]): Width and height, once the camera's
            orientation is applied.
        bands (int): Number of channels.
        mode (str): Pillow's name of the pixel format.
    """

    size: tuple[int, int]
    bands: int
    mode: str


def leaves(dataset: Any) -> Iterator[Any]:
    """Walk the datasets inside wrappers that join, repeat or mix.

    Args:
        dataset (Any): Dataset of any toolkit, wrapped or not.

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
        dataset (Any): Dataset with ``get_data_info``.
        samples (int): Number of entries, all if there are fewer.

    Yields:
        dict: Entry, as ``get_data_info`` returns it.
    """
    count = min(samples, len(dataset))
    for number in range(count):
        yield dataset.get_data_info(number * len(dataset) // count)


def folders(dataset: Any) -> str:
    """List the folders of a dataset's files, for a message."""
    prefix = getattr(dataset, 'data_prefix', None) or {}
    found = [f'{key}={path!r}' for key, path in prefix.items() if path]
    return ', '.join(found) or 'no folder given'


def exists(dataset: Any, path: str | None) -> bool:
    """Tell if a file is there; one that is not local passes."""
    if not path:
        return False
    return not _is_local(dataset, path) or Path(path).is_file()


def read_header(
    name: str, dataset: Any, info: dict, key: str
) -> ImageHeader | None:
    """Read an image's header and see that its end is there.

    A file that Pillow does not know is loaded by the pipeline of the dataset.

    Args:
        name (str): Dataset, for the message.
        dataset (Any): Its ``backend_args`` choose the file backend.
        info (dict): Entry of the dataset.
        key (str): Key of the file's path in ``info``.

    Returns:
        ImageHeader | None: None where only the pipeline knows the format.

    Raises:
        ValueError: If the file is no image, or a truncated PNG or JPEG.
    """
    path, header = info[key], None
    try:
        with open_image(dataset, path) as image:
            size, bands = _upright_size(image), len(image.getbands())
            header = ImageHeader(size, bands, image.mode)
            _check_end(image)
    except UNREADABLE as error:
        if header is not None:
            raise ValueError(
                f'{name}: {path} is truncated or damaged ({error})'
            ) from error
        _load(name, dataset, info, path)
    return header


def open_image(dataset: Any, path: str) -> Image.Image:
    """Open an image of a dataset without decoding it.

    Args:
        dataset (Any): Its ``backend_args`` choose the file backend.
        path (str): Path of the image.

    Returns:
        Image: To be closed.
    """
    if _is_local(dataset, path):
        return Image.open(path)
    backend_args = getattr(dataset, 'backend_args', None)
    return Image.open(io.BytesIO(fileio.get(path, backend_args=backend_args)))


def _is_local(dataset: Any, path: str) -> bool:
    """Tell if a file of a dataset is on a local disk."""
    backend = fileio.get_file_backend(
        path,
        backend_args=getattr(dataset, 'backend_args', None),
        enable_singleton=True,
    )
    return isinstance(backend, LocalBackend)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height once the camera's orientation is applied."""
    width, height = image.size
    # Exif of a PNG may follow the pixels, which Pillow would decode
    known = image.format != 'PNG' or 'exif' in image.info
    if known and image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS:
        return height, width
    return width, height


def _check_end(image: Image.Image) -> None:
    """Raise OSError where the end of a PNG or JPEG is missing."""
    end = ENDS.get(image.format or '')
    if end is None:
        return
    file: Any = getattr(image, 'fp')  # noqa: B009 - of opened images only
    position = file.tell()
    file.seek(max(file.seek(0, io.SEEK_END) - TAIL, 0))
    found = end in file.read()
    if not found and image.format == 'PNG':
        file.seek(0)
        if end not in file.read():
            raise OSError('its end is missing')
    file.seek(position)
    if not found:  # something follows, or nothing
        image.load()


def _load(name: str, dataset: Any, info: dict, path: str) -> None:
    """Read the files of an entry as the pipeline does.

    Raises:
        ValueError: If that fails.
    """
    results: Any = dict(info)
    pipeline = getattr(dataset, 'pipeline', None)
    try:
        for transform in getattr(pipeline, 'transforms', ()):
            if not type(transform).__name__.startswith('Load'):
                return
            results = transform(results)
    except Exception as error:
        raise ValueError(
            f'{name}: {path} cannot be read as image ({error})'
        ) from error

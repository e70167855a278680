"""Recognition of weight files by their first bytes, and safetensors."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file as load_safetensors_file
from torch import Tensor

_BY_START: tuple[tuple[bytes, str], ...] = (
    (b'\x89HDF\r\n', 'HDF5 (Keras, TensorFlow)'),
    (b'GGUF', 'GGUF (llama.cpp)'),
    (b'\x93NUMPY', 'a NumPy array (.npy)'),
    (b'version https://git-lfs', 'a Git LFS pointer, not the file itself'),
    (b'<!doctype html', 'a web page: the download went wrong'),
    (b'<html', 'a web page: the download went wrong'),
    (b'<?xml', 'XML, not weights'),
    (b'\x1f\x8b', 'a gzip archive: unpack it'),
    (b'\xfd7zXZ', 'an xz archive: unpack it'),
    (b'BZh', 'a bzip2 archive: unpack it'),
    (b'7z\xbc\xaf', 'a 7z archive: unpack it'),
    (b'Rar!', 'a RAR archive: unpack it'),
    (b'ftrt', 'a TensorRT engine'),
    (b'\x89PNG', 'a PNG image'),
    (b'\xff\xd8\xff', 'a JPEG image'),
    (b'%PDF', 'a PDF document'),
)
_BY_SUFFIX = {
    '.onnx': 'ONNX',
    '.engine': 'a TensorRT engine',
    '.plan': 'a TensorRT engine',
    '.msgpack': 'Flax (msgpack)',
    '.tflite': 'TensorFlow Lite',
    '.pb': 'TensorFlow (protobuf)',
    '.mlmodel': 'Core ML',
    '.pdparams': 'PaddlePaddle',
    '.params': 'MXNet',
    '.caffemodel': 'Caffe',
}
"""Formats without a signature, or whose files are plain pickles."""


def is_safetensors(file: Any) -> bool:
    """Tell a safetensors file by its header: a length, then JSON.

    Args:
        file (str | os.PathLike | BinaryIO): Path, or a seekable binary file.
    """
    start = _read_start(file)
    length = int.from_bytes(start[:8], 'little')
    return start[8:9] == b'{' and 2 <= length < 2**32


def read_safetensors(
    file: Any, map_location: Any = 'cpu'
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; it holds nothing else.

    Args:
        file (str | os.PathLike | BinaryIO): Path, or a seekable binary file.
        map_location: Device of the tensors, or any other value for
            the CPU. Defaults to 'cpu'.

    Returns:
        dict[str, Tensor]: Tensors by name.

    Raises:
        ValueError: If the file is damaged or incomplete.
    """
    try:
        if hasattr(file, 'read'):
            file.seek(0)
            tensors = load_safetensors(file.read())
        else:
            tensors = load_safetensors_file(os.fspath(file))
    except SafetensorError as error:
        raise ValueError(f'damaged safetensors file: {error}') from error
    if map_location is None or callable(map_location):
        return tensors
    return {k: v.to(map_location) for k, v in tensors.items()}


def foreign_format(file: Any) -> str | None:
    """Name the format of a file that is known and not read.

    Args:
        file (str | os.PathLike | BinaryIO): Path, or a seekable binary file.

    Returns:
        str | None: Words for a message; None where the format is unknown or
        may be PyTorch's.
    """
    start = _read_start(file)
    for signature, name in _BY_START:
        if start[: len(signature)].lower() == signature.lower():
            return name
    if start[4:8] == b'TFL3':
        return 'TensorFlow Lite'
    if start[:1] == b'{':
        return _name_json(file)
    if start[:2] == b'PK' and zipfile.is_zipfile(file):
        return _name_archive(file)
    suffix = Path(_path(file)).suffix.lower()
    return _BY_SUFFIX.get(suffix)


def describe_folder(folder: str | os.PathLike[str]) -> str:
    """Describe a folder in place of a checkpoint file, with the cure.

    Args:
        folder (str | os.PathLike): An existing folder.
    """
    path = Path(folder)
    if (path / '.metadata').exists():
        return (
            'a folder: a distributed checkpoint, which is not read (turn it '
            'into a file with torch.distributed.checkpoint.format_utils)'
        )
    for pattern in ('last_checkpoint', '*.safetensors', '*.pth', '*.bin'):
        inside = sorted(path.glob(pattern))
        if inside:
            return f'a folder: name a file in it, for instance {inside[-1]}'
    return 'a folder'


def _path(file: Any) -> str:
    """Return the path of a file, empty where it has none."""
    if hasattr(file, 'read'):
        return str(getattr(file, 'name', ''))
    return os.fspath(file)


def _read_start(file: Any) -> bytes:
    """Read the first bytes of a file, leaving its position at the start."""
    if hasattr(file, 'read'):
        file.seek(0)
        start = file.read(64)
        file.seek(0)
        return start
    with open(file, 'rb') as opened:
        return opened.read(64)


def _name_json(file: Any) -> str:
    """Name a JSON file: an index of shards is often taken for weights."""
    content = file.read() if hasattr(file, 'read') else Path(file).read_bytes()
    try:
        parsed = json.load(io.BytesIO(content))
    except ValueError:
        return 'JSON, or text like it, not weights'
    if isinstance(parsed, dict) and 'weight_map' in parsed:
        shards = sorted(set(parsed['weight_map'].values()))
        return f'an index of {len(shards)} files with weights, not weights'
    return 'JSON, not weights'


def _name_archive(file: Any) -> str | None:
    """Name a zip archive; None for PyTorch's own."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    last = {name.rpartition('/')[2] for name in names}
    if 'constants.pkl' in last:
        return 'TorchScript: save its state_dict() in place of it'
    if last & {'archive_format', 'serialized_exported_program.json'}:
        return 'a program of torch.export: save its state_dict in place of it'
    if 'data.pkl' in last:
        return None
    if names and all(name.endswith('.npy') for name in names):
        return 'a NumPy archive (.npz)'
    return f'a zip archive with {names[:3]}: unpack it'

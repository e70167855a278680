"""Files in the folder of a training, which may have been copied or moved."""

import difflib
import re
from pathlib import Path

from mmstabvim.engine.mistakes import MissingFileError

_NUMBERED = re.compile(r'(?:epoch|iter)_(\d+)\.pth')


def check_file(path: str, what: str) -> None:
    """Refuse a path that is no file, listing near names beside it.

    Args:
        path (str): A local path; a URL is not checked.
        what (str): Kind of file, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if '://' in path or Path(path).is_file():
        return
    if path and Path(path).exists():
        raise MissingFileError(f'{what} {path!r} is a folder, wanted a file')
    folder = Path(path).parent
    names = [p.name for p in folder.glob('*')] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names)
    hint = f'; near names there: {", ".join(near)}' if near else ''
    raise MissingFileError(f'{what} {path!r} does not exist{hint}')


def find_checkpoint(place: str | Path) -> str:
    """Find the weights that a tool was pointed at.

    Args:
        place (str | Path): A checkpoint or a URL, returned as they are, or
            the work dir of a training, which means its newest checkpoint.
            ``last_checkpoint`` holds an absolute path: of a copied or moved
            folder its own file of that name is taken.

    Returns:
        str: Path or URL.

    Raises:
        FileNotFoundError: If there is no such file or folder, or the folder
            has no checkpoint of a training.
    """
    folder = Path(place)
    if '://' in str(place) or not folder.is_dir():
        check_file(str(place), 'checkpoint or work dir')
        return str(place)
    noted = _noted(folder)
    if noted is not None and (folder / noted.name).is_file():
        return str(folder / noted.name)
    numbered = [p for p in folder.glob('*.pth') if _number(p) is not None]
    if numbered:
        return str(max(numbered, key=lambda path: _number(path) or 0))
    if noted is not None and noted.is_file():  # the hook's `out_dir`
        return str(noted)
    raise MissingFileError(_describe_missing(folder, noted))


def _noted(folder: Path) -> Path | None:
    """Read the path that mmengine notes with each checkpoint."""
    note = folder / 'last_checkpoint'
    text = note.read_text(encoding='utf-8').strip() if note.is_file() else ''
    return Path(text) if text else None


def _number(path: Path) -> int | None:
    """Read the epoch or iteration in a checkpoint's name."""
    match = _NUMBERED.fullmatch(path.name)
    return int(match[1]) if match else None


def _describe_missing(folder: Path, noted: Path | None) -> str:
    """Explain why a folder has no newest checkpoint."""
    if noted is not None:
        return f'{folder}: its last checkpoint, {noted.name}, is gone'
    others = sorted(path.name for path in folder.glob('*.pth'))
    hint = f'; name one of {", ".join(others)} instead' if others else ''
    return (
        f'{folder} has no file "last_checkpoint", which a training writes '
        f'with its first checkpoint{hint}'
    )

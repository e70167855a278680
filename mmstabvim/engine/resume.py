"""Checkpoints from which a training can go on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.engine.mistakes import MissingFileError, SettingError

_WRITTEN = ('state_dict', 'meta', 'message_hub', 'optimizer')
"""Entries of a checkpoint that mmengine needs to go on with a training."""

_CURE = (
    'to start a new training from its weights use '
    '`--cfg-options load_from={}` instead of --resume'
)


def check_resumable(path: str) -> None:
    """Refuse a file that is not the checkpoint of a training of mmengine.

    It is read without running its code.

    Args:
        path (str): Local path.

    Raises:
        ValueError: If it is a URL, unreadable, or only weights.
    """
    if '://' in path:
        raise SettingError(
            f'--resume wants a checkpoint of your own training, got the URL '
            f'{path}; {_CURE.format(path)}'
        )
    try:
        checkpoint = load_checkpoint_tensors(path)
    except FileNotFoundError as error:
        raise MissingFileError(f'--resume: {error}') from error
    except ValueError as error:
        raise SettingError(f'--resume: {error}') from error
    missing = [name for name in _WRITTEN if name not in checkpoint]
    if missing:
        keys = ', '.join(map(repr, list(checkpoint)[:5]))
        raise SettingError(
            f'--resume: {path} is not a whole checkpoint of a training: it '
            f'has no {", ".join(missing)}, but {keys}'
            f'{", ..." if len(checkpoint) > 5 else ""}; {_CURE.format(path)}'
        )


def explain_resume(runner: Any) -> None:
    """Make a runner name a checkpoint of another training.

    Files of a folder that was copied or moved are taken from the folder.

    Args:
        runner (Runner): Changed in place.
    """
    runner.resume = partial(_resume, runner, runner.resume)


def _resume(
    runner: Any, resume: Callable, filename: str, *args: Any, **kwargs: Any
) -> None:
    """Resume; a checkpoint of another training is the user's mistake."""
    try:
        resume(filename, *args, **kwargs)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise SettingError(
            f'--resume: {filename} is of another training than the one of '
            f'the config: {error}; {_CURE.format(filename)}'
        ) from error
    _own_best(runner, Path(filename).parent)


def _own_best(runner: Any, folder: Path) -> None:
    """Point to the best checkpoint beside the resumed one.

    The path that was saved may lead into the folder that was copied, where
    a better one would delete it.
    """
    info = runner.message_hub.runtime_info
    for name in [name for name in info if name.startswith('best_ckpt')]:
        own = folder / Path(str(info[name])).name
        if own.is_file():
            info[name] = str(own)

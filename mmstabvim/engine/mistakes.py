"""Errors whose message is enough: mistakes in a command line or a config."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Mistake(Exception):
    """Base class of the errors that a user can cure."""


class SettingError(Mistake, ValueError):
    """A setting that has no effect, or a value that cannot work."""


class MissingFileError(Mistake, FileNotFoundError):
    """A file that does not exist."""


class UnknownTypeError(Mistake, KeyError):
    """A ``type`` that is in no registry."""


def run_tool(main: Callable[[], Any]) -> int:
    """Run a tool; print a mistake in one line, without a traceback.

    Args:
        main (Callable): The tool, which reads the command line itself.

    Returns:
        int: Exit code, 1 after a mistake. Other errors are not caught.
    """
    try:
        main()
    except Mistake as error:
        name = Path(sys.argv[0]).name
        sys.stderr.write(f'{name}: error: {error.args[0]}\n')
        return 1
    return 0

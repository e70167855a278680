"""Command line of the tools: options, messages, progress on stderr."""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mmstabvim.engine import launch


@contextmanager
def quiet(level: int = logging.INFO) -> Iterator[None]:
    """Drop log messages of this process, and put the threshold back.

    Args:
        level (int): Highest level that is dropped. Defaults to
            ``logging.INFO``.

    Example:
        >>> with quiet():
        ...     logging.getLogger('any').info('dropped')
    """
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def working() -> Iterator[Progress]:
    """Run a tool's work: quietly, with a bar, and with errors explained.

    Yields:
        Progress: Bars on stderr.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with quiet(), launch.clear_errors(), Progress(console=console) as progress:
        yield progress


def positive(text: str) -> int:
    """Read a whole number of at least 1, as ``type`` of an option.

    Args:
        text (str): What the command line says.

    Returns:
        int: The number.

    Raises:
        argparse.ArgumentTypeError: If it is none.

    Example:
        >>> positive('16')
        16
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return number


def read_options(
    parser: argparse.ArgumentParser,
    words: Sequence[Any],
    options: Mapping[str, Any],
) -> argparse.Namespace:
    """Read the options of a command line that are given by keyword.

    Args:
        parser (argparse.ArgumentParser): With the defaults.
        words (Sequence): Positional arguments.
        options (Mapping): By name, with underscores.

    Returns:
        argparse.Namespace: As from the command line.

    Raises:
        TypeError: If there is no such option.
    """
    args = parser.parse_args([str(word) for word in words])
    unknown = options.keys() - vars(args).keys()
    if unknown:
        raise TypeError(
            f'options must be some of {sorted(vars(args))}, got '
            f'{sorted(unknown)}'
        )
    vars(args).update(options)
    return args

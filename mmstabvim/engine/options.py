"""Options that the command lines of the tools share."""

import argparse

from mmengine.config import DictAction


class _OptionAction(DictAction):
    """``DictAction`` that explains an error in ``--cfg-options``."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Refuse a value without ``=``, and brackets that do not match."""
        for value in values:
            if '=' not in value:
                parser.error(
                    f'{option_string} wants key=value pairs, got {value!r}'
                )
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:
            parser.error(f'{option_string}: {error}')


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument that :func:`find_checkpoint` takes.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
    """
    parser.add_argument(
        'checkpoint',
        metavar='CHECKPOINT|WORK_DIR',
        help='path or URL of the checkpoint, or the work dir of a training '
        'for its newest one',
    )


def add_cfg_options(
    parser: argparse.ArgumentParser, help_text: str | None = None
) -> None:
    """Add ``--cfg-options``; the default is an empty dict.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
        help_text (str, optional): Defaults to None, for settings of one
            config.
    """
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_OptionAction,
        default={},
        metavar='KEY=VALUE',
        help=help_text
        or 'change settings of the config, for instance '
        'optim_wrapper.optimizer.lr=1e-4 or "key=[(a,b),(c,d)]"; one that '
        'nothing reads is refused',
    )


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing have in common.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
    """
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints (default: work_dir of the '
        'config, or work_dirs/ and the name of the config)',
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--no-pin-memory',
        action='store_true',
        help='do not copy batches to pinned memory',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed job were started',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)

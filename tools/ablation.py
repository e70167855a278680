"""Run a matrix of trainings, or report what came out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmstabvim.ablation import command

TRAIN = Path(__file__).with_name('train.py')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return command.make_parser(__doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run or report."""
    return command.carry_out(parse_args(argv), TRAIN)


if __name__ == '__main__':
    sys.exit(main())

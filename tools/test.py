"""Test a classification or segmentation model from a config."""

import argparse
import sys
from collections.abc import Sequence

from mmstabvim.apis import evaluate, testing
from mmstabvim.engine import launch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return testing.make_parser(__doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Test, then write what ``--out`` asks for."""
    evaluate(**vars(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(launch.run_tool(main))

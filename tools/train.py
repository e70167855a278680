"""Train a classification or segmentation model from a config."""

import argparse
import sys
from collections.abc import Sequence

from mmstabvim.apis import train, training
from mmstabvim.engine import launch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return training.make_parser(__doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then say where the results are."""
    runner = train(**vars(parse_args(argv)))
    runner.logger.info(launch.training_summary(runner))


if __name__ == '__main__':
    sys.exit(launch.run_tool(main))

"""Shared by the analysis tools: parser and checks."""

import argparse

from mmstabvim.apis import trained
from mmstabvim.reporting import add_formats


def make_parser(doc: str | None, samples: int) -> argparse.ArgumentParser:
    """Make a parser for tools that look at a trained model.

    Args:
        doc (str | None): Description.
        samples (int): Default of ``--samples``.

    Returns:
        argparse.ArgumentParser: With the common options.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained.add_options(parser, samples)
    add_formats(parser)
    return parser


def check_least(
    parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int
) -> None:
    """Refuse numbers that are too small, and a GPU that is not there.

    Args:
        parser (argparse.ArgumentParser): Prints the error, and exits.
        args (argparse.Namespace): The command line.
        **least (int): Smallest number by option.
    """
    trained.check_samples(parser, args, least.get('samples', 1))
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            option = name.replace('_', '-')
            parser.error(f'--{option} must be at least {bound}, got {value}')


def page_facts(args: argparse.Namespace) -> dict[str, str]:
    """Name config, checkpoint and origin of the images for a page."""
    origin = str(args.images or 'the test set')
    return dict(config=args.config, checkpoint=args.checkpoint, origin=origin)

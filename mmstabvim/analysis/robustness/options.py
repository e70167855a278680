"""Options of a robustness sweep, and their command line."""

import argparse
import dataclasses
import math
from typing import Any

from mmstabvim.engine import launch
from mmstabvim.evaluation.corruptions import CORRUPTIONS, LEVELS


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep.

    Attributes:
        wrapper (dict): Arguments of ``mmstabvim.RobustnessWrapper``.
        samples (int | None): Test images, drawn at random; None for all.
        seed (int): Of that choice, and of what the wrapper draws.
        device (str | None): None for the GPU if there is one.
        amp (bool): Automatic mixed precision.
        cfg_options (dict): Changes of the config.
    """

    wrapper: dict[str, Any]
    samples: int | None = None
    seed: int = 0
    device: str | None = None
    amp: bool = False
    cfg_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self, images: int) -> str:
        """Describe a sweep in words.

        Args:
            images (int): Number of test images.

        Returns:
            str: A sentence.
        """
        given = self.wrapper
        unit = (
            "of the image's contrast"
            if given['relative']
            else 'of the pixel range'
        )
        phases = f'{given["phases"]} drawn'
        if isinstance(given['phases'], list):
            phases = ', '.join(f'{x / math.pi:g} pi' for x in given['phases'])
        return (
            f'{images} test images; root mean square of the perturbation '
            f'{given["amplitude"]:g} {unit}; level {given["level"]}; phases '
            f'{phases}; {"" if given["clip"] else "not "}clipped; seed '
            f'{self.seed}.'
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a sweep.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
    """
    add = parser.add_argument
    kinds = list(CORRUPTIONS)
    add('--frequencies', type=int, help='number, 0 to 1/2 (default: all)')
    add('--phases', type=float, nargs='+', default=[0.0, 0.5], help='over pi')
    add('--random-phases', type=int, help='draw so many for each frequency')
    add('--level', choices=LEVELS, default='token', help='where modes act')
    add('--amplitude', type=float, default=0.1, help='root mean square, share')
    add('--absolute', action='store_true', help='share of the pixel range')
    add('--value-range', type=float, default=255.0, help='largest pixel value')
    add('--clip', action='store_true', help='keep pixels within the range')
    add('--patch-size', type=int, help='of a backbone that does not tell it')
    add('--corruptions', nargs='*', choices=CORRUPTIONS, default=kinds)
    add('--samples', type=int, help='test images, drawn (default: all)')
    add('--seed', type=int, default=0, help='of all that is drawn')
    add('--device', help='default: the GPU if there is one, else the CPU')
    add('--amp', action='store_true', help='automatic mixed precision')
    launch.add_cfg_options(parser)


def make_options(args: argparse.Namespace) -> SweepOptions:
    """Read the options of a sweep from a command line.

    Args:
        args (argparse.Namespace): With those of :func:`add_options`.

    Returns:
        SweepOptions: With all arguments of the wrapper.
    """
    names = 'frequencies level amplitude clip value_range corruptions'
    wrapper = {n: getattr(args, n) for n in (*names.split(), 'patch_size')}
    wrapper['phases'] = args.random_phases or [
        math.pi * p for p in args.phases
    ]
    wrapper['relative'] = not args.absolute
    names = 'samples seed device amp cfg_options'
    return SweepOptions(
        wrapper, **{n: getattr(args, n) for n in names.split()}
    )

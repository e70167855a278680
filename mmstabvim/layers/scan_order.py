"""Orders in which the directions of a layer walk the tokens."""

from typing import NamedTuple


class ScanOrder(NamedTuple):
    """One entry for each direction of a layer.

    Every direction sees the tokens in the order in which they come, row by
    row, and walks them from the first to the last or back.
    """

    reverse: tuple[bool, ...]
    """Walk from the last token to the first."""

    @property
    def directions(self) -> int:
        """Number of directions."""
        return len(self.reverse)


FORWARD = ScanOrder((False,))
"""One walk from the first token to the last."""

BIDIRECTIONAL = ScanOrder((False, True))
"""The two walks of Vision Mamba (arXiv:2401.09417)."""


def direction_name(name: str, number: int, directions: int) -> str:
    """Name a direction of a layer.

    Args:
        name (str): Of the layer, or of its state matrices.
        number (int): Of the direction.
        directions (int): Number of directions.

    Returns:
        str: Such as ``'layers.3.mixer.ssm.1'``; the name itself if there is
        one direction only.

    Example:
        >>> direction_name('ssm', 1, 2)
        'ssm.1'
    """
    return name if directions == 1 else f'{name}.{number}'

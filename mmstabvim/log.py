"""Messages of functions that work with PyTorch alone."""

import logging
import sys


def print_log(message: str, level: int = logging.INFO) -> None:
    """Log through mmengine's current logger, or through ``logging``.

    mmengine is not imported for it: where nobody has, ``logging`` is what the
    caller listens to.

    Args:
        message (str): One line.
        level (int): Level of :mod:`logging`. Defaults to ``logging.INFO``.
    """
    mmengine_logging = sys.modules.get('mmengine.logging')
    if mmengine_logging is None:
        logging.getLogger('mmstabvim').log(level, message)
    else:
        mmengine_logging.print_log(message, logger='current', level=level)

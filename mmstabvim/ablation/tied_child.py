"""Run a command that ends when the process which started it ends.

Usage: ``python tied_child.py PARENT_PID COMMAND...``. Without it a killed
ablation would leave trainings behind that write where its successor writes.
Linux only; elsewhere the command runs untied. It imports nothing heavy.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the tie was there
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == '__main__':
    main()

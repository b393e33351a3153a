# SPDX-License-Identifier: Apache-2.0
"""``python -m vmth`` is the command ``vmth``: ``main`` is the console script.

What is imported here is little. The commands' imports take a moment, and a signal that comes
meanwhile is to end as one that comes later does: with a line and an exit code.
"""

from __future__ import annotations

import signal

from vmth.interrupts import raise_on_sigterm
from vmth.outlet import hold_standard_descriptors

__all__ = ["main"]


def main() -> None:
    hold_standard_descriptors()
    raise_on_sigterm()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    from vmth.cli import main as command

    command(signal_mask=mask)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``vmth relay`` as a process: signals, and what is told meanwhile."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmth.qemu.relay.relay import Relay, RelayOptions
from vmth.qemu.relay.report import RelayReport

__all__ = ["run_relay"]

#: How long a thread that parses may keep one that carries from running.
SWITCH_INTERVAL_S = 0.0005
SIGNAL_POLL_S = 0.2
#: Broken connections are reset within this, else the end of the process does it.
BREAK_S = 5.0


def run_relay(options: RelayOptions, say: Callable[[str], None]) -> RelayReport:
    """Carry until ``--once`` is fulfilled or SIGINT or SIGTERM comes. The first signal ends the
    listening and lets open connections end, the second breaks them. Main thread only."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with _signals() as received:
        relay = Relay(options, say)
        say(f"listening on {relay.endpoint.display}")
        relay.start()
        stopped = False
        while not relay.wait(SIGNAL_POLL_S):
            if received and not stopped:
                stopped = True
                count = relay.stop()
                if count:
                    say(f"{count} connections are carried to their end; again to break them")
            if len(received) > 1:
                relay.break_all("the relay was interrupted", interrupted=True)
                relay.wait(BREAK_S)
                break
        return relay.finish()


@contextmanager
def _signals() -> Iterator[list[int]]:
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: received.append(got)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

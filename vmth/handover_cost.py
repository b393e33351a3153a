# SPDX-License-Identifier: Apache-2.0
"""What a handover takes on these two hosts: learned from the last ones.

    downtime = pages + queue + state + round trips + the rest

The rest is what pausing, sealing and resuming cost in processes that have to wake up, and records
that have to be durable: the same for every move of such a guest between two hosts, and twice as
much on one pair as on another. What it took is kept in the file ``handovers`` of the source's state
directory, and its median is what the next forecast counts with.

    {"<class of the guest> <host>": [ns, ...], ...}     JSON; newest last

The file helps to judge and decides nothing: one that is missing, unreadable or damaged counts as
empty, and one that cannot be written is left.
"""

from __future__ import annotations

import logging
import os
import statistics
from pathlib import Path

import msgspec

from vmth.atomic import AtomicFile
from vmth.errors import VmthError
from vmth.policy.forecast import HURRIED_HANDOVER_NS, first_handover_ns

__all__ = ["FILE_NAME", "HandoverCosts"]

log = logging.getLogger(__name__)

FILE_NAME = "handovers"
#: So many of the last handovers count.
KEPT = 9
#: So many pairs of a class of guests and a host are remembered: the latest ones.
PAIRS = 256
MAX_BYTES = 1 << 20
#: What is below was not a handover's, what is above one that went wrong.
LEAST_NS = 100_000
MOST_NS = 1_000_000_000


class HandoverCosts:
    """Of handovers of a class of guests to a host. One thread; processes that share a state
    directory may lose what another learns at the same moment."""

    def __init__(self, state_dir: Path, guest: object, host: str) -> None:
        kind = f"{type(guest).__module__}.{type(guest).__qualname__}"
        self._path = state_dir / FILE_NAME
        self._kind = f"{kind} "
        self._key = f"{kind} {host}"

    def expected_ns(self, hurried: bool = False, journal_ns: int = 0) -> int:
        """The median of the last ones; of those to all other hosts where there was none to this
        one. Where there was none at all, 0, which counts as the usual; or, with the threads that
        count ``hurried`` (vmth/realtime.py), what is usual then, with records that take
        ``journal_ns`` each."""
        known = self._load()
        took = known.get(self._key) or [
            ns for key, some in known.items() if key.startswith(self._kind) for ns in some
        ]
        if not took:
            return first_handover_ns(HURRIED_HANDOVER_NS, journal_ns) if hurried else 0
        return round(statistics.median(took))

    def learn(self, took_ns: int) -> None:
        """One handover took so long beside what was known beforehand. Never raises."""
        if not LEAST_NS <= took_ns <= MOST_NS:
            return
        known = self._load()
        took = [*known.pop(self._key, ()), took_ns][-KEPT:]
        latest = dict([*known.items(), (self._key, took)][-PAIRS:])
        try:
            with AtomicFile(self._path, replace=True) as file:
                file.write(msgspec.json.encode(latest))
                file.publish()
        except (OSError, VmthError) as error:
            log.debug("what the handover took is not kept: %s", error)

    def _load(self) -> dict[str, list[int]]:
        try:
            with open(self._path, "rb", opener=_without_waiting) as file:
                known = msgspec.json.decode(file.read(MAX_BYTES), type=dict[str, list[int]])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            log.debug("%s is not used: %s", self._path, error)
            return {}
        return {
            key: [ns for ns in took[-KEPT:] if LEAST_NS <= ns <= MOST_NS]
            for key, took in known.items()
        }


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # whatever bears that name

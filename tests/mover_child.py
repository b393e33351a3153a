# SPDX-License-Identifier: Apache-2.0
"""A mover in a process of its own that kills itself at a named step of the handover.

    mover_child.py source HOLDER_SOCKET URI STATE_DIR STEP WHEN
    mover_child.py destination URI STATE_DIR STEP WHEN

STEP is an Action's value ("journal GRANTED"), or "none"; WHEN is "before" or "after" its execution.
The destination prints its endpoint, then the socket path of the holder that it made.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vmth
from vmth.destination_record import DestinationRecord
from vmth.guests.client import HolderGuest
from vmth.guests.spawn import attach, find, spawn_destination
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.source_record import SourceRecord
from vmth.uri import parse_endpoint
from vmth.wire.handover import Action

LINGER_S = 60.0


def die_at(record: type[SourceRecord] | type[DestinationRecord], step: str, when: str) -> None:
    """Wrap the places where actions are executed; a destination sends when all else is done."""
    for place in ("_do", "_tell") if record is DestinationRecord else ("_do",):
        _die_in(record, place, step, when)


def _die_in(record: type, place: str, step: str, when: str) -> None:
    execute: Any = getattr(record, place)

    def wrapped(self: object, action: Action, *rest: object) -> object:
        if action.value == step and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = execute(self, action, *rest)
        if action.value == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(record, place, wrapped)


def source(holder: str, uri: str, state_dir: str, step: str, when: str) -> None:
    die_at(SourceRecord, step, when)
    options = MigrateOptions(
        state_dir=Path(state_dir), query_timeout_s=0.5, peer_timeout_s=5, audit=True
    )
    vmth.migrate(attach(holder), uri, options)


def destination(uri: str, state_dir: str, step: str, when: str) -> None:
    die_at(DestinationRecord, step, when)

    def make_guest(incoming: Incoming) -> HolderGuest:
        guest = spawn_destination("process", incoming.blocks, owned=False, linger_s=LINGER_S)
        print(guest.socket_path, flush=True)
        return guest

    options = ReceiveOptions(state_dir=Path(state_dir), peer_timeout_s=5)
    endpoint = parse_endpoint(uri, listening=True)
    with Listener(endpoint, make_guest, options, lambda _, detail: find(detail)) as listener:
        print(listener.endpoint.display, flush=True)
        sys.stdin.read()  # until the test closes it


MOVERS: dict[str, Callable[..., None]] = {"source": source, "destination": destination}

if __name__ == "__main__":
    MOVERS[sys.argv[1]](*sys.argv[2:])

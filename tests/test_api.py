# SPDX-License-Identifier: Apache-2.0
"""The simple API's arguments: what is given stands, and what is none is refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_guest import MemoryGuest

import vmth
from vmth.errors import UsageError
from vmth.events import Connected
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.uri import parse_endpoint


@pytest.fixture
def source() -> Iterator[MemoryGuest]:
    with contextlib.closing(MemoryGuest()) as guest:
        guest.resume()
        yield guest


def test_changes_stand_in_place_of_options(source: MemoryGuest, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:

        def make_guest(incoming: Incoming) -> MemoryGuest:
            made = MemoryGuest(npages=incoming.blocks[0].npages, filled=False)
            return stack.enter_context(contextlib.closing(made))

        where = parse_endpoint("tcp:127.0.0.1:0", listening=True)
        options = ReceiveOptions(state_dir=tmp_path / "there")
        with Listener(where, make_guest, options) as listener:
            given = MigrateOptions(state_dir=tmp_path / "here", digest=False, channels=1)
            job = vmth.start_migration(source, listener.endpoint.display, given, channels=3)
            told = [event for event in job.events() if isinstance(event, Connected)]
            result = job.wait(20)
            listener.wait_for_guest(5)
    assert [event.channels for event in told] == [3]
    assert result.verified_scope == "none"  # the digest is off, as the options say


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channel": 4}, "option: received 'channel', allowed mode, channels"),
        ({"channels": 2.5}, "channels: received 2.5, allowed a whole number"),
        ({"channels": True}, "channels: received True, allowed a whole number"),
        ({"bandwidth_bps": "1Gbit/s"}, "bandwidth_bps: received '1Gbit/s', allowed a whole number"),
        ({"downtime_limit_ns": 0.3}, "downtime_limit_ns: received 0.3, allowed a whole number"),
        ({"on_stall": "cancel"}, "on_stall: received 'cancel', allowed OnStall.PAUSE, "),
        ({"mode": "live"}, "mode: received 'live', allowed Mode.LIVE or Mode.COLD"),
        ({"digest": 0}, "digest: received 0, allowed True or False"),
        ({"peer_timeout_s": "10"}, "peer_timeout_s: received '10', allowed a number"),
        ({"link": None}, "link: received None, allowed a LinkOptions"),
    ],
)
@pytest.mark.parametrize("options", [None, MigrateOptions(channels=2)])
def test_options_that_are_none(
    source: MemoryGuest, options: MigrateOptions | None, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        vmth.start_migration(source, "tcp:127.0.0.1:9", options, **changes)
    assert source.running and not source.released


def test_what_a_listener_refuses() -> None:
    changes: dict[str, Any]
    for changes, said in (
        ({"bogus": 64}, "option: received 'bogus', allowed insecure"),
        ({"max_sessions": 1.5}, "max_sessions: received 1.5, allowed a whole number"),
    ):
        for options in (None, ReceiveOptions()):
            with pytest.raises(UsageError, match=said):
                vmth.receive("tcp:127.0.0.1:0", lambda _: MemoryGuest(), options, **changes)
    with pytest.raises(UsageError, match="URI: received None"):
        vmth.receive(None, lambda _: MemoryGuest())  # type: ignore[arg-type]


def test_numbers_of_numpy_are_whole_numbers() -> None:
    assert MigrateOptions(channels=np.int64(2)).channels == 2  # type: ignore[arg-type]

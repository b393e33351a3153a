# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs through the relay: precopy, multifd, postcopy, and relays that die at bad moments.

Guests are paused where memory is compared; a busy one proves something only from QEMU 9.0 on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from qemu_process import MEMORY_BYTES, Qemu, fill

from vmth.qemu.relay import Peer, Relay, RelayOptions, RelayReport, report_values

pytestmark = pytest.mark.slow

SEED = 20261122
PAGE = 4096
TIMEOUT_S = 60


def content() -> list[tuple[int, bytes]]:
    """8 MiB that do not compress, 4 MiB that do, the rest zero."""
    chance = random.Random(SEED)
    words = b"".join(chance.choice((b"migration ", b"relay ", b"page ")) for _ in range(1 << 19))
    return [(1 << 20, chance.randbytes(8 << 20)), (16 << 20, words[: 4 << 20])]


@contextmanager
def relays(folder: Path, *, two: bool, compress: bool = False) -> Iterator[list[Relay]]:
    """One relay from ``in.sock`` to ``out.sock``, or two with checked frames between them."""
    listen, connect = f"unix:{folder}/in.sock", f"unix:{folder}/out.sock"
    with ExitStack() as stack:
        started: list[Relay] = []

        def start(options: RelayOptions) -> Relay:
            relay = Relay(options)
            stack.callback(end, relay)
            relay.start()
            started.append(relay)
            return relay

        if two:
            far = start(RelayOptions("tcp:127.0.0.1:0", connect, Peer.LISTEN))
            connect = far.endpoint.display
        peer = Peer.CONNECT if two else None
        start(RelayOptions(listen, connect, peer, compress))
        yield started


def end(relay: Relay) -> None:
    relay.break_all("the test is over")
    assert relay.wait(TIMEOUT_S)
    relay.finish()


def reports(started: Sequence[Relay]) -> list[RelayReport]:
    """Of relays that are done by themselves: nothing is left open."""
    found = []
    for relay in reversed(started):
        relay.stop()
        assert relay.wait(TIMEOUT_S)
        found.append(relay.finish())
    return found


def prepare(source: Qemu, destination: Qemu, folder: Path, *capabilities: str) -> None:
    for qemu in (source, destination):
        qemu.capabilities("events", "return-path", *capabilities)
        qemu.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        if "multifd" in capabilities:
            qemu.execute("migrate-set-parameters", **{"multifd-channels": 3})
    destination.execute("migrate-incoming", uri=f"unix:{folder}/out.sock")


@pytest.mark.parametrize("two", [False, True], ids=["one relay", "two with zstd"])
@pytest.mark.parametrize("multifd", [False, True], ids=["plain", "multifd"])
def test_precopy(tmp_path: Path, two: bool, multifd: bool) -> None:
    with (
        relays(tmp_path, two=two, compress=two) as started,
        Qemu(tmp_path, "SRC") as source,
        Qemu(tmp_path, "DST", "-incoming", "defer") as destination,
    ):
        fill(source.memory, content())
        prepare(source, destination, tmp_path, *(["multifd"] if multifd else []))
        source.execute("migrate", uri=f"unix:{tmp_path}/in.sock")
        source.wait_migrated()
        destination.wait_migrated()
        assert destination.status() == "prelaunch"
        assert destination.memory.read_bytes() == source.memory.read_bytes()
        found = [report_values(report) for report in reports(started)]
    for values in found:
        assert values["exit_code"] == 0 and values["broken_connections"] == 0
        assert values["connections"] == (4 if multifd else 1)
        (migration,) = values["last_migrations"]
        assert migration["faults"] == [] and migration["remarks"] == []
        assert migration["machine"].startswith("pc-q35-") and migration["shut"] == 0
        assert sum(migration["pages"].values()) >= MEMORY_BYTES // PAGE
        assert migration["multifd_channels"] == (3 if multifd else 0)
        assert sorted(migration["connections"]) == list(range(1, values["connections"] + 1))
        assert migration["devices"] > 20
    assert {v["forward_bytes"] for v in found} == {found[0]["forward_bytes"]}
    if two:
        near, far = found
        assert near["wire_sent_bytes"] == far["wire_received_bytes"]
        assert near["wire_received_bytes"] == far["wire_sent_bytes"]
        assert near["wire_sent_bytes"] < near["forward_bytes"] - (2 << 20)

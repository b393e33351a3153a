# SPDX-License-Identifier: Apache-2.0
"""A guest that comes back to where its memory was kept is nearly all there already: by counters,
not by time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_guest import PAGE, MemoryGuest
from test_demo import GUESTS, Running, assert_moved, command, run, small
from test_session import World

from vmth.errors import MigrationError
from vmth.reuse.index import index_path
from vmth.reuse.warm import WarmFiles

NPAGES = 2048


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for listener in world.listeners:
        listener.close()
    for guest in world.guests:
        guest.close()


def kept(world: World, path: Path, **options: Any) -> bytes:
    """A guest that left; its memory."""
    source, listener = world.guest(**options), world.listen()
    source.resume()
    world.migrate(source, listener, keep_image=path)
    world.check_moved(source, listener)
    listener.close()
    return path.read_bytes()


def filled(source: MemoryGuest, memory: bytes) -> None:
    source.views[0][:] = np.frombuffer(memory, dtype=np.uint8)


def test_only_what_changed_is_sent(world: World, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    memory = kept(world, path, writing=False)
    source = world.guest(writing=False)
    filled(source, memory)
    changed = np.random.default_rng(5).integers(1, 256, 10 * PAGE, dtype=np.uint8)
    source.views[0][: 10 * PAGE] = changed
    with WarmFiles([path]) as warm:
        listener = world.listen(reuse=warm.sources)
        result = world.migrate(source, listener, audit=True, fixed_forms=True)
        received = listener.wait_for_guest(5)
        there = world.made[-1]  # as paused as the guest that left
        assert there.views[0].tobytes() == source.views[0].tobytes()
        listener.close()
    assert result.verified and result.verified_scope == "memory"
    different = sum(any(memory[at : at + PAGE]) for at in range(0, len(memory), PAGE)) - 10
    (given,) = received.reused
    assert given.path == str(path) and given.pages >= different - 10
    assert result.transfer.forms["reuse"].pages == given.pages
    assert result.wire_bytes < len(memory) // 20


def test_a_file_that_is_not_what_its_index_says_costs_no_page(world: World, tmp_path: Path) -> None:
    """Changed behind the open index: what is read is hashed, and asked for again."""
    path = tmp_path / "kept"
    memory = kept(world, path, writing=False)
    source = world.guest(writing=False)
    filled(source, memory)
    with WarmFiles([path]) as warm:
        with path.open("r+b") as file:
            file.write(os.urandom(100 * PAGE))
        listener = world.listen(reuse=warm.sources)
        result = world.migrate(source, listener, audit=True, fixed_forms=True)
        received = listener.wait_for_guest(5)
        there = world.made[-1]  # as paused as the guest that left
        assert there.views[0].tobytes() == memory
        assert result.verified and 0 < received.reused[0].pages <= NPAGES // 2 - 90
        listener.close()


def test_a_migration_that_fails_reuses_again(world: World, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    memory = kept(world, path, writing=False)
    source = world.guest(writing=False)
    filled(source, memory)
    source.resume()
    source.fail["save_state"] = RuntimeError("no state today")
    with WarmFiles([path]) as warm:
        listener = world.listen(reuse=warm.sources)
        with pytest.raises(MigrationError, match="no state today"):
            world.migrate(source, listener)
        world.check_stayed(source)
        with pytest.raises(MigrationError, match="no state today"):
            listener.wait_for_guest(5)
        result = world.migrate(source, listener, fixed_forms=True)
        received = listener.wait_for_guest(5)
        assert received.reused[0].pages > NPAGES // 3
        assert result.wire_bytes < len(memory) // 20
        listener.close()


@pytest.mark.slow
@pytest.mark.parametrize("guest", GUESTS)
def test_the_demonstration_comes_back(guest: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    still = ("--guest", guest, "--workload", "idle", "--channels", "2")
    first = run(small(*still, "--keep-image", str(path)))
    assert_moved(first)
    told = first.told["kept_image"]
    assert told["error"] == "" and told["memory_bytes"] == 64 << 20 == path.stat().st_size
    assert first.told["reused"] == []
    # A copy of a page that landed already takes dedup: how many do is a matter of time.
    forms = ("--forms", "zero,same,delta,zstd,reuse", "--fixed-forms")
    again = run(small(*still, *forms, "--audit", "--reuse", str(path)))
    assert_moved(again)
    (given,) = again.told["reused"]
    assert given["path"] == str(path) and given["nbytes"] == given["pages"] * PAGE
    assert given["nbytes"] > told["stored_bytes"] * 9 // 10
    assert given["index_bytes"] == 24 * given["contents"]
    assert again.told["wire_bytes"] < first.told["wire_bytes"] // 10
    assert f"{path}: its index was built: there was none" in again.told["notes"]
    assert index_path(path).exists()


@pytest.mark.slow
def test_a_receiver_on_another_host_reuses(tmp_path: Path) -> None:
    path, indexes = tmp_path / "kept", tmp_path / "indexes"
    indexes.mkdir()
    still = ("--guest", "process", "--workload", "idle")
    assert_moved(run(small(*still, "--keep-image", str(path))))
    options = ("--reuse", str(path), "--reuse-index", str(indexes), "--reuse-memory", "1MiB")
    receiver = Running(command("--receive", "tcp:127.0.0.1:0", "--run-on", "50ms", *options))
    try:
        receiver.wait_for("listening at")
        uri = receiver.stderr.split("listening at ")[1].split()[0]
        sent = run(small(*still, "--fixed-forms", "--send", uri))
        received = receiver.end()
    finally:
        receiver.stop()
    assert sent.code == 0 and received.code == 0, received.stderr
    (given,) = received.told["reused"]
    assert given["pages"] > 1000 and len(os.listdir(indexes)) == 1
    assert not index_path(path).exists()
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(b"QFI\xfb".ljust(PAGE, b"\0"))
    for arguments in (small("--reuse", str(disk)), command("--receive", uri, "--reuse", str(disk))):
        refused = run(arguments)
        assert refused.code == 3 and "is a qcow2 image" in refused.told["error"]
    wrong = run(small("--send", uri, "--reuse", str(path)))
    assert wrong.code == 2 and "allowed where a guest arrives" in wrong.stderr

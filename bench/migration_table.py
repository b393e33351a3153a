# SPDX-License-Identifier: Apache-2.0
"""Whole migrations, as an embedder runs them, against bare sockets; downtime and memory of a mover.

    python bench/migration_table.py [--mib 2048] [--channels 1,2] [--rounds 5] [--against-qemu]

Cold: from the first connection to the guest running there, against send and recv of the same bytes
into memory of the same kind and state, interleaved, with the medians' ratio and every run's spread.
Pages hashed: the bare sockets and the page hash at both ends, without which no digest can be.
Own mapping: guest memory that this process has mapped already (Mapping(address=...)); mapped anew:
a memfd that the migration and the baseline map for the run (Mapping(fd=...)) and fault in again.
Against QEMU: its multifd moves an idle guest of as much incompressible memory over as many channels
into memory that is populated (prealloc) or fresh alike, from its "setup" to the guest running
there, in the same rounds; VMTH_QEMU_SRC names another QEMU than the installed one. All ways follow
one another at once: none waits until the machine's host has taken freed memory back, and each
follows each of the others as often.
Idle: a live 1 GiB guest in its holder; what the downtime is beyond its last bytes at the measured
bandwidth. Memory: a mover in a process of its own, above an idle import and without guest mappings.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from qemu_table import IDLE, BenchWorld, by_qemu, idle
from qemu_world import Machine, build
from transfer_table import bare

import vmth
from vmth.guest import DirtySource, StateStream
from vmth.guests.schedule import Workload
from vmth.guests.spawn import choose_guest, spawn_destination, spawn_source
from vmth.handshake import Incoming
from vmth.listener import Listener
from vmth.memory import address_of
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.types import Gpa, Mapping, RamBlock
from vmth.uri import parse_endpoint
from vmth.wire.messages import Mode

Memory = npt.NDArray[np.uint8]
PAGE = 4096


class StillGuest:
    """Memory that nobody writes, in a memfd of this process; ``anew``: handed on by its fd."""

    def __init__(self, nbytes: int, anew: bool) -> None:
        self.fd = os.memfd_create("bench")
        os.ftruncate(self.fd, nbytes)
        self.view: Memory = np.frombuffer(mmap.mmap(self.fd, nbytes), dtype=np.uint8)
        self.anew = anew
        where = Mapping(fd=self.fd) if anew else Mapping(address=address_of(self.view))
        self.blocks: Sequence[RamBlock] = [RamBlock("ram", nbytes, Gpa(0), where)]
        self.dirty: Sequence[DirtySource] = ()

    def mapped(self) -> Memory:
        """What the baseline reads or writes through."""
        if not self.anew:
            return self.view
        mapped: Memory = np.frombuffer(mmap.mmap(self.fd, self.view.nbytes), dtype=np.uint8)
        return mapped

    def pause(self) -> bool:
        return True

    def resume(self) -> None:
        """There is nothing to run."""

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        write(StateStream("none", 1, b""))

    def load_state(self, streams: Iterable[StateStream]) -> None:
        list(streams)

    def release(self) -> None:
        """Kept: the next round moves it again."""

    def close(self) -> None:
        os.close(self.fd)


def target(source: StillGuest, populated: bool) -> StillGuest:
    guest = StillGuest(source.view.nbytes, source.anew)
    if populated:
        guest.view[::PAGE] = 1
    return guest


def move(source: StillGuest, populated: bool, channels: int, digest: bool, state: Path) -> float:
    """Seconds of one cold migration."""
    there = target(source, populated)
    gc.collect()  # or the last run's memory is unmapped in the middle of this one
    endpoint = parse_endpoint("tcp:127.0.0.1:0", listening=True)
    options = ReceiveOptions(state_dir=state / "d")
    with Listener(endpoint, lambda _: there, options) as listener:
        result = vmth.migrate(
            source,
            listener.endpoint.display,
            MigrateOptions(mode=Mode.COLD, channels=channels, digest=digest, state_dir=state / "s"),
        )
        listener.wait_for_guest()
    there.close()
    return result.total_ns / 1e9


def copy(source: StillGuest, populated: bool, channels: int, hashed: bool = False) -> float:
    there = target(source, populated)
    gc.collect()
    seconds = bare(source.mapped(), there.mapped(), channels, hashed)
    there.close()
    return seconds


class QemuGuest:
    """A guest of QEMU's that goes round by multifd."""

    def __init__(self, nbytes: int) -> None:
        self._world = BenchWorld(IDLE, [build("SRC")])
        self._world.memory_bytes = nbytes
        self._nothing = idle()
        self._moves = 0
        self._guest: Machine | None = None

    def move(self, populated: bool, channels: int) -> float:
        """Seconds of one migration."""
        world = self._world
        if self._guest is None:
            self._guest = world.boot("first", build("SRC"))
            world.fill(self._guest, 100)
        world.populated = populated
        self._moves += 1
        previous = self._guest
        self._guest, run = by_qemu(300, channels)(world, previous, f"r{self._moves}", self._nothing)
        previous.close()
        return run.copy_s

    def __enter__(self) -> QemuGuest:
        self._world.__enter__()
        return self

    def __exit__(self, *of: object) -> None:
        self._world.__exit__(*of)  # type: ignore[arg-type]


def in_turns(names: Sequence[str], number: int) -> list[str]:
    """The order of a round. Over the rounds each name follows every other as often: of four in four
    rounds, of five in twenty."""
    n = len(names)
    if n == 4:
        return [names[(number % n + 1) * i % (n + 1) - 1] for i in range(1, n + 1)]
    step = number % (n - 1) + 1
    return [names[(number + i * step) % n] for i in range(n)]


def cold_table(
    nbytes: int,
    anew: bool,
    channel_counts: Sequence[int],
    rounds: int,
    state: Path,
    qemu: QemuGuest | None,
) -> None:
    source = StillGuest(nbytes, anew)
    rng = np.random.default_rng(1)
    for at in range(0, nbytes, 64 << 20):
        piece = source.view[at : at + (64 << 20)]
        piece[:] = np.frombuffer(rng.bytes(piece.nbytes), dtype=np.uint8)
    kind = "mapped anew" if anew else "own mapping"
    print(f"cold, {nbytes >> 20} MiB incompressible, {kind}, loopback TCP, {rounds} rounds")
    for channels in channel_counts:
        for populated in (True, False):
            runs = {
                "bare sockets": partial(copy, source, populated, channels),
                "pages hashed": partial(copy, source, populated, channels, True),
                "digest off": partial(move, source, populated, channels, False, state),
                "digest on": partial(move, source, populated, channels, True, state),
            }
            if qemu is not None:
                runs["QEMU multifd"] = partial(qemu.move, populated, channels)
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for number in range(rounds):
                for name in in_turns(list(runs), number):
                    seconds[name].append(runs[name]())
            base = statistics.median(seconds["bare sockets"])
            for name, values in seconds.items():
                middle = statistics.median(values)
                print(
                    f"  {channels} channels, {'populated' if populated else 'fresh':<9} {name:<13}"
                    f"{nbytes / middle / 1e9:6.2f} GB/s  ratio {base / middle:5.2f}  "
                    f"(runs {min(values):.2f} to {max(values):.2f} s)"
                )
    source.close()


def idle_table(rounds: int, state: Path) -> None:
    kind, _ = choose_guest(None)
    print(f"\nidle 1 GiB guest ({kind}), live, {rounds} rounds")
    for _ in range(rounds):
        gc.collect()
        source, _ = spawn_source(kind, 1 << 30, workload=Workload("idle", seed=1))
        made: list[object] = []

        def make_guest(incoming: Incoming, made: list[object] = made) -> object:
            made.append(spawn_destination(kind, incoming.blocks))
            return made[-1]

        endpoint = parse_endpoint("tcp:127.0.0.1:0", listening=True)
        options = ReceiveOptions(state_dir=state / "d")
        with Listener(endpoint, make_guest, options) as listener:  # type: ignore[arg-type]
            result = vmth.migrate(
                source, listener.endpoint.display, MigrateOptions(state_dir=state / "s")
            )
            listener.wait_for_guest().guest.release()
        last = result.rounds[-1]
        best_bps = max(one.bandwidth_bps for one in result.rounds)
        beyond_ms = result.downtime_ns / 1e6 - last.bytes / best_bps * 1e3
        parts = result.downtime_parts
        print(
            f"  downtime {result.downtime_ns / 1e6:6.2f} ms, {beyond_ms:6.2f} ms beyond last bytes "
            f"(pause {parts.pause_ns / 1e6:.2f}, last pages {parts.last_pages_ns / 1e6:.2f}, state "
            f"{parts.state_ns / 1e6:.2f}, seal {parts.seal_ns / 1e6:.2f}, grant "
            f"{parts.grant_ns / 1e6:.2f}, resume {parts.resume_ns / 1e6:.2f})"
        )


def memory_table() -> None:
    print("\nmemory of each mover, from its own report")
    command = [
        sys.executable,
        "-P",
        "-m",
        "vmth",
        "demo",
        "--memory",
        "4GiB",
        "--content",
        "random=100",
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in output.splitlines():
        if "mover" in line and "memory" in line:
            print("  4GiB random:", line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--channels", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against-qemu", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmth-bench-") as directory:
        state = Path(directory)
        channels = [int(text) for text in arguments.channels.split(",")]
        nbytes = arguments.mib << 20
        with contextlib.ExitStack() as until_cold:
            qemu = None
            if arguments.against_qemu:
                qemu = until_cold.enter_context(QemuGuest(nbytes))
            for anew in (False, True):
                cold_table(nbytes, anew, channels, arguments.rounds, state, None if anew else qemu)
        idle_table(arguments.rounds, state)
    memory_table()


if __name__ == "__main__":
    main()

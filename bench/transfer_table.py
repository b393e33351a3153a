# SPDX-License-Identifier: Apache-2.0
"""The page channels against bare sockets: the same bytes over the same number of loopback sockets.

    python bench/transfer_table.py [--mib 2048] [--channels 1,2] [--rounds 5]

Baseline: one sendall() a socket out of populated memory, recv_into(256 KiB, MSG_WAITALL) into
memory of the same kind and state as the migration's. "Pages hashed": the same in C with the page
hash at both ends and nothing else (bench/hashed_loop.c, compiled with csrc/core), which a digest
cannot do without. Runs are interleaved, every figure is a median
of its rounds, and the ratio is that of the medians. Also a populated all-zero guest against one
core's zero scan of it, and holes in pages/s.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import mmap
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmth import kernels
from vmth.channel.congestion import set_congestion_control
from vmth.channel.pages import FAST_PACKET_BYTES, NativeReceiver, NativeSender
from vmth.memory import MappedBlock, address_of
from vmth.types import Mapping, RamBlock

__all__ = ["Run", "bare", "filled", "fresh", "holes", "transfer", "zero_scan"]

PAGE = 4096
CHUNK = 256 << 10
MAP_NORESERVE = 0x4000  # Python's mmap does not name it everywhere
FLAGS = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE

Memory = npt.NDArray[np.uint8]
Run = Callable[[], float]  #: seconds


def fresh(nbytes: int) -> Memory:
    """Shared memory that nobody has touched."""
    view: Memory = np.frombuffer(mmap.mmap(-1, nbytes, FLAGS), dtype=np.uint8)
    return view


def filled(nbytes: int, *, random: bool) -> Memory:
    memory = fresh(nbytes)
    if random:
        rng = np.random.default_rng(1)
        for at in range(0, nbytes, 64 << 20):
            piece = memory[at : at + (64 << 20)]
            piece[:] = np.frombuffer(rng.bytes(piece.nbytes), dtype=np.uint8)
    else:
        memory[::PAGE] = 0
    return memory


@contextlib.contextmanager
def sockets(channels: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Connected over loopback, with the congestion control that vmth chooses there and without
    Nagle's delay, as its connections are: bare sockets have the same."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(channels):
            near = stack.enter_context(socket.socket())
            with socket.create_server(("127.0.0.1", 0)) as listener:
                set_congestion_control(near, listener.getsockname(), "")
                near.connect(listener.getsockname())
                far, _ = listener.accept()
            for end in (near, stack.enter_context(far)):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs.append((near, far))
        yield pairs


@functools.cache
def _hashed_loop() -> ctypes.CDLL:
    csrc = Path(__file__).parents[1] / "csrc"
    sources = [path for path in csrc.glob("core/**/*.c") if path.name != "codec.c"]  # needs libzstd
    sources.append(Path(__file__).with_name("hashed_loop.c"))
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "hashed_loop.so"
        options = ["-std=gnu11", "-O2", "-shared", "-fPIC", f"-I{csrc}", f"-I{csrc / 'include'}"]
        subprocess.run(["cc", *options, *map(str, sources), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))


def _all_hashed(function: str, sock: socket.socket, memory: Memory) -> None:
    call = getattr(_hashed_loop(), function)
    result = call(sock.fileno(), ctypes.c_void_p(address_of(memory)), ctypes.c_size_t(len(memory)))
    if result != 0:
        raise OSError(-result, f"{function}: {os.strerror(-result)}")


def bare(source: Memory, destination: Memory, channels: int, hashed: bool = False) -> float:
    """Seconds for send and recv alone; ``hashed``: and for every page's hash at both ends."""
    share = len(source) // channels // CHUNK * CHUNK

    if hashed:
        _hashed_loop()  # compiled before the time counts

    def send(sock: socket.socket, at: int, end: int) -> None:
        if hashed:
            _all_hashed("send_hashed", sock, source[at:end])
        else:
            sock.sendall(memoryview(source.data)[at:end])

    def receive(sock: socket.socket, at: int, end: int) -> None:
        if hashed:
            _all_hashed("receive_hashed", sock, destination[at:end])
            return
        view = memoryview(destination.data)
        while at < end:
            at += sock.recv_into(view[at : min(at + CHUNK, end)], 0, socket.MSG_WAITALL)

    with sockets(channels) as pairs:
        work: list[tuple[Callable[..., None], socket.socket, int, int]] = []
        for index, (near, far) in enumerate(pairs):
            start = index * share
            end = len(source) if index == channels - 1 else start + share
            work.append((receive, far, start, end))
            work.append((send, near, start, end))
        with ThreadPoolExecutor(len(work)) as threads:
            began = time.perf_counter()
            for done in [threads.submit(run, *where) for run, *where in work]:
                done.result()
            return time.perf_counter() - began


def _mapped(memory: Memory) -> list[MappedBlock]:
    address = address_of(memory)
    block = RamBlock("ram", memory.nbytes, 0, Mapping(address=address))
    return [MappedBlock(block, address, memory)]


@contextlib.contextmanager
def _ends(
    source: Memory, destination: Memory, channels: int, digest: bool, holes_known: bool
) -> Iterator[NativeSender]:
    words = (len(source) // PAGE + 63) // 64
    maybe = np.full(words, 0 if holes_known else 2**64 - 1, dtype=np.uint64)
    with (
        NativeSender(
            _mapped(source),
            PAGE,
            hash_seed=1,
            digest=digest,
            fast_packet_bytes=FAST_PACKET_BYTES,
        ) as sender,
        NativeReceiver(
            _mapped(destination),
            PAGE,
            hash_seed=1,
            digest=digest,
            maybe_nonzero=[maybe],
            channels=channels,
        ) as receiver,
        sockets(channels) as pairs,
    ):
        for index, (near, far) in enumerate(pairs):
            sender.add_channel(near.fileno(), index)
            receiver.attach(far.fileno(), index)
        yield sender
        sender.finish()
        receiver.wait()
        if sender.digest() != receiver.digest():
            raise SystemExit("digests differ")


def transfer(
    source: Memory, destination: Memory, channels: int, *, digest: bool, holes_known: bool = False
) -> float:
    """Seconds for one cold round, from the first send to the barrier."""
    npages = len(source) // PAGE
    bits = np.full((npages + 63) // 64, 2**64 - 1, dtype=np.uint64)
    with _ends(source, destination, channels, digest, holes_known) as sender:
        began = time.perf_counter()
        sender.send(0, 0, npages, bits, 0)
        sender.barrier(0)
        return time.perf_counter() - began


def holes(npages: int, channels: int, *, digest: bool) -> float:
    """Seconds to tell ``npages`` never-populated pages."""
    source, destination = fresh(npages * PAGE), fresh(npages * PAGE)
    with _ends(source, destination, channels, digest, True) as sender:
        began = time.perf_counter()
        sender.send_holes(0, np.array([[0, npages]], dtype=np.uint64), 0)
        sender.barrier(0)
        return time.perf_counter() - began


def zero_scan(memory: Memory) -> float:
    """Seconds for one core to test every page."""
    began = time.perf_counter()
    for at in range(0, len(memory), 1 << 20):
        kernels.zero_scan(memory[at : at + (1 << 20)], PAGE)
    return time.perf_counter() - began


def medians(rounds: int, runs: dict[str, Run]) -> dict[str, float]:
    """Interleaved, so that what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}


def _bare_into(source: Memory, target: Callable[[], Memory], channels: int, hashed: bool) -> float:
    return bare(source, target(), channels, hashed)


def _transfer_into(
    source: Memory, target: Callable[[], Memory], channels: int, digest: bool
) -> float:
    return transfer(source, target(), channels, digest=digest)


def _row(name: str, seconds: float, nbytes: int, ratio: float) -> str:
    return f"{name:<44} {nbytes / seconds / 1e9:8.2f} GB/s {ratio:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--channels", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    nbytes = args.mib << 20
    source = filled(nbytes, random=True)
    populated = filled(nbytes, random=False)
    populated[::PAGE] = 1
    print(
        f"{args.mib} MiB incompressible, loopback TCP, {args.rounds} rounds; ratio to bare sockets"
    )
    for channels in (int(text) for text in args.channels.split(",")):
        for state in ("populated", "fresh"):

            def target(state: str = state) -> Memory:
                return populated if state == "populated" else fresh(nbytes)

            runs: dict[str, Run] = {
                "bare": partial(_bare_into, source, target, channels, False),
                "hashed": partial(_bare_into, source, target, channels, True),
                "off": partial(_transfer_into, source, target, channels, False),
                "on": partial(_transfer_into, source, target, channels, True),
            }
            found = medians(args.rounds, runs)
            for name, label in (
                ("bare", "bare sockets"),
                ("hashed", "bare, pages hashed"),
                ("off", "digest off"),
                ("on", "digest on"),
            ):
                title = f"{channels} channels, into {state} memory, {label}"
                print(_row(title, found[name], nbytes, found["bare"] / found[name]))
    zeros = filled(nbytes, random=False)
    empty = fresh(nbytes)
    print("\npopulated zero pages; ratio to one core's zero scan")
    found = medians(
        args.rounds,
        {
            "scan": lambda: zero_scan(zeros),
            "off": lambda: transfer(zeros, empty, 2, digest=False, holes_known=True),
            "on": lambda: transfer(zeros, empty, 2, digest=True, holes_known=True),
        },
    )
    for name, seconds in found.items():
        print(_row(name, seconds, nbytes, found["scan"] / seconds))
    npages = 1 << 26
    print(f"\n{npages} never-populated pages")
    for digest in (False, True):
        seconds = holes(npages, 2, digest=digest)
        print(f"digest {'on' if digest else 'off':<37} {npages / seconds / 1e6:8.0f} M pages/s")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What a warm destination saves: a guest that comes back with some of its pages changed.

    python bench/reuse_table.py [MiB] [changed percent ...]

A memory of 30 % zeros, 50 % programs (this machine's shared libraries and Python files) and 20 %
random is sent through the page channels, both ends in this process over a socket pair, one channel:
cold (same, dedup, delta and zstd 1), and warm (reuse besides) with the earlier memory in a raw file
at the destination. Bytes count both directions' payload: packets, and the filter that the
destination tells before the first one. CPU is that of all threads, for each page that is not zero.
Asserts nothing about time; that both memories end equal is checked.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from kernels_forms import files

from vmth import kernels
from vmth.channel.forms import forms_mask
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.channel.reuse import KEY_BYTES, ReuseSource, filter_messages, hear_filter
from vmth.memory import MappedBlock, address_of
from vmth.stats import TransferCounters
from vmth.types import Gpa, Mapping, RamBlock
from vmth.wire.framing import FrameEncoder
from vmth.wire.messages import Message

PAGE = 4096
KEY = bytes(range(KEY_BYTES))
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sent:
    wire_bytes: int
    filter_bytes: int
    filter_s: float
    seconds: float
    cpu_s: float
    counters: TransferCounters


def memory_of(nbytes: int) -> U8:
    memory = np.zeros(nbytes, dtype=np.uint8)
    half, fifth = nbytes // 2 // PAGE * PAGE, nbytes // 5 // PAGE * PAGE
    memory[:half] = files(half)
    memory[half : half + fifth] = np.random.default_rng(1).integers(0, 256, fifth, dtype=np.uint8)
    return memory


def changed(memory: U8, percent: float) -> U8:
    """A copy, in which so many of its pages were written to: eight times 64 random bytes each."""
    now = memory.copy()
    pages = now.reshape(-1, PAGE)
    rng = np.random.default_rng(2)
    for page in rng.permutation(len(pages))[: int(len(pages) * percent / 100)]:
        for start in rng.integers(0, PAGE - 64, 8):
            pages[page, start : start + 64] = rng.integers(0, 256, 64, dtype=np.uint8)
    return now


def indexed(path: str, memory: U8) -> ReuseSource:
    npages = len(memory) // PAGE
    hashes = np.zeros((npages, 2), dtype=np.uint64)
    kernels.content_hash(memory, PAGE, KEY, hashes)
    _, first = np.unique(hashes, axis=0, return_index=True)
    order = first[np.lexsort((hashes[first, 1], hashes[first, 0]))]
    return ReuseSource(
        path=path,
        fd=os.open(path, os.O_RDONLY),
        page_bytes=PAGE,
        key=KEY,
        hashes=np.ascontiguousarray(hashes[order]),
        places=order.astype(np.uint64),
        frames=np.array([[0, npages, 0, len(memory)]], dtype=np.uint64),
    )


def mapped(memory: U8) -> list[MappedBlock]:
    block = RamBlock("ram", memory.nbytes, Gpa(0), Mapping(address=address_of(memory)))
    return [MappedBlock(block, address_of(memory), memory)]


def send(source: U8, reuse: Sequence[ReuseSource]) -> Sent:
    there = np.zeros_like(source)
    npages = len(source) // PAGE
    bits = np.full(-(-npages // 64), 2**64 - 1, dtype=np.uint64)
    mask = forms_mask(["same", "dedup", "delta", "zstd", *(["reuse"] if reuse else [])])
    with (
        NativeSender(mapped(source), PAGE, hash_seed=1, forms=mask) as sender,
        NativeReceiver(
            mapped(there),
            PAGE,
            hash_seed=1,
            maybe_nonzero=[np.zeros_like(bits)],
            channels=1,
            forms=mask,
            reuse=reuse,
        ) as receiver,
    ):
        began, cpu = time.monotonic(), time.process_time()
        filter_bytes = 0
        if reuse:
            encoder, messages = FrameEncoder(), filter_messages(reuse)

            def told() -> Message:
                nonlocal filter_bytes
                message = next(messages)
                filter_bytes += len(encoder.encode(message))
                return message

            hear_filter(told, sender)
        filter_s = time.monotonic() - began
        near, far = socket.socketpair()
        with near, far:
            sender.add_channel(near.fileno(), 0)
            receiver.attach(far.fileno(), 0)
        sender.set_forms(mask)
        sender.send(0, 0, npages, bits, 0)
        sender.barrier(0)
        seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu
        counters = sender.counters()
        if sender.digest() != receiver.digest() or not np.array_equal(source, there):
            raise SystemExit("the two memories differ")
    return Sent(counters.wire_bytes, filter_bytes, filter_s, seconds, cpu_s, counters)


def show(what: str, sent: Sent, nonzero: int, cold: Sent) -> None:
    total = sent.wire_bytes + sent.filter_bytes
    share = total / cold.wire_bytes
    reuse = sent.counters.forms["reuse"]
    each = reuse.cpu_ns / max(1, reuse.tried_pages) / 1e3
    print(
        f"{what:14}{total / 1e6:10.2f}{share:8.1%}{sent.filter_bytes / 1e6:9.2f}"
        f"{sent.filter_s * 1e3:11.1f}{reuse.pages:10}{sent.counters.missed_pages:8}"
        f"{each:10.2f}{sent.cpu_s / nonzero * 1e6:11.2f}{sent.seconds:8.2f}"
    )


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    percents = [float(text) for text in sys.argv[2:]] or [0.0, 1.0, 5.0, 20.0]
    earlier = memory_of(mib << 20)
    nonzero = int(earlier.reshape(-1, PAGE).any(axis=1).sum())
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    kernel = kernels.selected("content")
    print(
        f"{platform.machine()}, {mib} MiB, {nonzero} pages not zero, content={kernel}, load {load}"
    )
    print(
        f"{'':14}{'MB':>10}{'of cold':>8}{'filter':>9}{'filter ms':>11}{'reused':>10}{'missed':>8}"
        f"{'us/look':>10}{'CPU us/pg':>11}{'s':>8}"
    )
    with tempfile.NamedTemporaryFile(suffix=".raw") as file:
        file.write(earlier.tobytes())
        file.flush()
        source = indexed(file.name, earlier)
        for percent in percents:
            now = changed(earlier, percent)
            cold = send(now, [])
            show(f"{percent:g} %, cold", cold, nonzero, cold)
            show(f"{percent:g} %, warm", send(now, [source]), nonzero, cold)
        os.close(source.fd)


if __name__ == "__main__":
    main()

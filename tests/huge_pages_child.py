# SPDX-License-Identifier: Apache-2.0
"""Sends random pages into a file of the folder given, in this process, and tells as JSON how they
landed. A program of its own: the folder's mount is one that only it sees."""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
from contextlib import suppress

import numpy as np

from vmth._native import _sys
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.errors import ChannelError
from vmth.memory import MappedBlock, address_of, map_blocks
from vmth.types import Mapping, RamBlock

PAGE = mmap.PAGESIZE
NPAGES = 8 * 512


def main(folder: str) -> None:
    content = np.random.default_rng(1).integers(0, 256, NPAGES * PAGE, dtype=np.uint8)
    content[600 * PAGE : 700 * PAGE] = 0
    address = address_of(content)
    source = MappedBlock(
        RamBlock("ram", len(content), 0, Mapping(address=address)), address, content
    )
    fd = os.open(f"{folder}/ram", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, len(content))
    block = RamBlock("ram", len(content), 0, Mapping(fd=fd))
    bits = np.full(NPAGES // 64, 2**64 - 1, dtype=np.uint64)
    near, far = socket.socketpair()
    with (
        map_blocks([block], writable=True) as mapped,
        NativeSender([source], PAGE, hash_seed=1) as sender,
        NativeReceiver(
            mapped, PAGE, hash_seed=1, maybe_nonzero=[np.zeros_like(bits)], channels=1
        ) as receiver,
    ):
        sender.add_channel(near.fileno(), 0)
        receiver.attach(far.fileno(), 0)
        with suppress(ChannelError):  # the other end's, which says why, comes below
            sender.send(0, 0, NPAGES, bits, 0)
            sender.barrier(0)
            sender.finish()
        try:
            receiver.wait()
        except ChannelError as error:
            print(json.dumps({"error": str(error)}))
            return
        told = {
            "equal": bool(np.array_equal(mapped[0].view, content)),
            "digests": sender.digest() == receiver.digest(),
            "written": receiver.counters().written_pages,
            "huge": _sys.huge_pages(mapped[0].address, NPAGES),
            "fallbacks": list(receiver.fallbacks()),
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])

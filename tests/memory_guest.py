# SPDX-License-Identifier: Apache-2.0
"""A small guest in this process for session tests: a memfd, a thread that writes it, a counter.

The writer increments the first 8 bytes of pages in a seeded order, and a total. After a move the
sum of all page counters must equal the total that travelled in the state stream: no write was lost.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from vmth.dirty.uffd import UffdWpSource
from vmth.guest import DirtySource, StateStream
from vmth.memory import address_of
from vmth.types import Gpa, Mapping, RamBlock

PAGE = 4096


class MemoryGuest:
    """``fail``: names of callbacks that raise once. ``calls`` records what was called."""

    def __init__(
        self,
        npages: int = 2048,
        *,
        seed: int = 1,
        filled: bool = True,
        writing: bool = True,
        idstrs: Sequence[str] = ("ram",),
        working_set: int = 64,
        pace_s: float = 0.0002,
    ) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.on_call: dict[str, Callable[[], None]] = {}
        self.total = 0
        self.working_set = working_set
        self.running = False
        self.released = False
        self.writing = writing
        self._pace_s = pace_s
        self._random = random.Random(seed)
        self._fds = [
            os.memfd_create(f"guest-{idstr}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            for idstr in idstrs
        ]
        self._maps: list[mmap.mmap] = []
        self.views: list[npt.NDArray[np.uint8]] = []
        for fd in self._fds:
            os.ftruncate(fd, npages * PAGE)
            mapped = mmap.mmap(fd, npages * PAGE, mmap.MAP_SHARED)
            self._maps.append(mapped)
            self.views.append(np.frombuffer(mapped, dtype=np.uint8))
        self._blocks = [
            RamBlock(idstr, npages * PAGE, Gpa(index * npages * PAGE), Mapping(fd=fd))
            for index, (idstr, fd) in enumerate(zip(idstrs, self._fds, strict=True))
        ]
        self._source = UffdWpSource(self._blocks, [address_of(view) for view in self.views])
        if filled:
            self._fill(seed)
        self._wake = threading.Condition()
        self._stop = False
        self._busy = False
        self._thread = threading.Thread(target=self._write, name="guest-writer", daemon=True)
        self._thread.start()

    def _fill(self, seed: int) -> None:
        """Half random, a quarter written zeros, a quarter never touched."""
        generator = np.random.default_rng(seed)
        for view in self.views:
            half = len(view) // 2
            view[:half] = generator.integers(0, 256, half, dtype=np.uint8)
            view[half : half + len(view) // 4] = 0
            view.reshape(-1, PAGE)[: len(view) // PAGE * 3 // 4, :8] = 0

    def _write(self) -> None:
        while True:
            with self._wake:
                while not (self.running and self.writing) and not self._stop:
                    self._wake.wait()
                if self._stop:
                    return
                view = self._random.choice(self.views).view(np.uint64)
                page = self._random.randrange(min(self.working_set, len(view) // 512))
                view[page * 512] += np.uint64(1)
                self.total += 1
                self._wake.wait(self._pace_s)

    def counted(self) -> int:
        """The sum of all page counters: equals ``total`` when no write was lost."""
        return int(
            sum(
                view.view(np.uint64).reshape(-1, 512)[: self.working_set, 0].sum()
                for view in self.views
            )
        )

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.on_call:
            self.on_call[name]()
        if name in self.fail:
            raise self.fail.pop(name)

    # -- the Guest protocol ------------------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self._blocks

    @property
    def dirty(self) -> Sequence[DirtySource]:
        return [self._source]

    def pause(self) -> bool:
        self._called("pause")
        with self._wake:
            was, self.running = self.running, False
        return was

    def resume(self) -> None:
        self._called("resume")
        with self._wake:
            self.running = True
            self._wake.notify_all()

    def hold(self) -> None:
        self._called("hold")

    def save_state(self, write: Callable[[StateStream], None]) -> None:
        self._called("save_state")
        write(StateStream("counter", 1, struct.pack("<Q", self.total)))
        write(StateStream("empty", 3, b""))
        write(StateStream("large", 2, random.Random(self.total).randbytes(700_000)))

    def load_state(self, streams: Iterable[StateStream]) -> None:
        self._called("load_state")
        loaded = {stream.name: stream for stream in streams}
        (self.total,) = struct.unpack("<Q", loaded["counter"].data)
        assert loaded["large"].data == random.Random(self.total).randbytes(700_000)
        assert loaded["empty"].version == 3

    def is_running(self) -> bool:
        self._called("is_running")
        return self.running

    def release(self) -> None:
        self._called("release")
        self.released = True
        with self._wake:
            self.running = False

    def close(self) -> None:
        with self._wake:
            self._stop = True
            self._wake.notify_all()
        self._thread.join()
        self._source.stop()
        self.views.clear()
        self._maps.clear()  # a Python mmap holds a duplicate of its descriptor
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

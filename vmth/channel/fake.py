# SPDX-License-Identifier: Apache-2.0
"""An in-memory pair of page channels in pure NumPy, for tests of what drives them.

``FakeLink`` couples a ``FakeSender`` and a ``FakeReceiver`` over two sets of arrays. Everything
moves inside ``barrier()`` (what was lent by ``send_pages()``: in ``wait_read()``, if that comes
first), the latest moment that the contract allows, so a loop that relies on pages being read
earlier fails with it. Faults are asked for on the link: pages damaged on the way,
barriers that do not come in time, a connection that breaks.

The hash is keyed BLAKE2b, not the wire's: digests are equal between the two ends, not to the native
ones. Slow (some 5 us a page) and not for data.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vmth.channel.interface import Digest, PageContent, PageRuns
from vmth.errors import CancelledError, UsageError, VmthError
from vmth.stats import TransferCounters
from vmth.types import Bitmap, Bitmaps, bitmap_words

__all__ = ["FakeLink", "FakeReceiver", "FakeSender"]

_HEADER_BYTES = 64
_DESC_BYTES = 16
_MASK = (1 << 128) - 1
#: ``kind`` of lent runs
_ZERO, _PAGE = 1, 2

Pages = npt.NDArray[np.uint8]  #: one ramblock, (npages, page_bytes)


class _Hashes:
    """The page hashes of one end and their sum, as ``vmth/memory_digest.h`` has them."""

    def __init__(self, npages: Sequence[int], seed: int, enabled: bool) -> None:
        self.enabled = enabled
        self._key = seed.to_bytes(8, "little")
        self._tables = [np.zeros((n, 2), dtype=np.uint64) for n in npages] if enabled else []

    def of(self, page: Pages) -> npt.NDArray[np.uint64]:
        raw = hashlib.blake2b(page.tobytes(), digest_size=16, key=self._key).digest()
        return np.frombuffer(raw, dtype="<u8").astype(np.uint64)

    def set(self, block: int, page: int, content: Pages | None) -> None:
        """``content`` None: the page has no valid hash."""
        if self.enabled:
            self._tables[block][page] = 0 if content is None else self.of(content)

    def _sum(self, block: int, page: int, npages: int) -> tuple[int, int]:
        total = valid = 0
        for index in range(page, page + npages):
            entry = self._tables[block][index]
            if entry.any():
                place = block.to_bytes(4, "little") + index.to_bytes(8, "little")
                term = hashlib.blake2b(place + entry.tobytes(), digest_size=16).digest()
                total += int.from_bytes(term, "little")
                valid += 1
        return total & _MASK, valid

    def digest(self) -> Digest:
        parts = [self._sum(block, 0, len(table)) for block, table in enumerate(self._tables)]
        total = sum(part for part, _ in parts) & _MASK
        return total & (2**64 - 1), total >> 64, sum(valid for _, valid in parts)

    def copy(self, block: int, page: int, npages: int) -> npt.NDArray[np.uint64]:
        if not self.enabled:
            raise UsageError("the digest is off: there are no page hashes")
        if not 0 <= block < len(self._tables):
            raise UsageError(f"block {block}, allowed 0 to {len(self._tables) - 1}")
        if page + npages > len(self._tables[block]):
            raise UsageError(f"pages {page} + {npages}, allowed up to {len(self._tables[block])}")
        return self._tables[block][page : page + npages].copy()

    def subdigests(self, block: int, page: int, npages: int, step: int) -> npt.NDArray[np.uint64]:
        if step < 1:
            raise UsageError(f"step {step}, allowed 1 or more")
        hashes = self.copy(block, page, npages)
        if step == 1:
            return hashes
        starts = range(page, page + npages, step)
        sums = [self._sum(block, at, min(step, page + npages - at))[0] for at in starts]
        return np.array([[s & (2**64 - 1), s >> 64] for s in sums], dtype=np.uint64).reshape(-1, 2)


@dataclass(slots=True)
class _Job:
    form: str
    block: int
    pages: npt.NDArray[np.uint64]
    lent: list[Pages] | None = None  #: content of each page; None: it is in guest memory
    ticket: int = 0


@dataclass
class _Counts:
    values: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, n: int) -> None:
        self.values[name] = self.values.get(name, 0) + n

    def snapshot(self) -> TransferCounters:
        values: dict[str, Any] = dict(self.values)
        return TransferCounters(**values)


class FakeLink:
    """What both ends share, and where tests ask for faults."""

    def __init__(
        self,
        source: Sequence[Pages],
        destination: Sequence[Pages],
        *,
        hash_seed: int = 0,
        digest: bool = True,
        maybe_nonzero: Bitmaps | None = None,
        hostless: frozenset[int] = frozenset(),
    ) -> None:
        """Arrays are (npages, page_bytes), one a ramblock. ``maybe_nonzero``: as for the native
        receiver; None means that any page may hold bytes. ``hostless``: blocks whose pages can only
        be lent; the source's array is not read, the destination's is the other program's memory."""
        if [array.shape for array in source] != [array.shape for array in destination]:
            raise UsageError("source and destination have different shapes")
        npages = [len(array) for array in source]
        self.changed = threading.Condition()
        self.error: VmthError | None = None
        self.ended = False
        self.landed_barriers = 0
        self.hostless = hostless
        #: (block, page) whose next transfer is damaged on the way, once
        self.damage: set[tuple[int, int]] = set()
        #: how many times barrier() with a timeout returns False first
        self.late_barriers = 0
        self.sender = FakeSender(self, source, _Hashes(npages, hash_seed, digest))
        self.receiver = FakeReceiver(
            self, destination, _Hashes(npages, hash_seed, digest), maybe_nonzero
        )

    def fail(self, error: VmthError) -> None:
        """Break the link: the first error is what every later and every blocked call raises."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class FakeSender:
    """``PageSender`` of a ``FakeLink``."""

    def __init__(self, link: FakeLink, memory: Sequence[Pages], hashes: _Hashes) -> None:
        self._link = link
        self._memory = memory
        self._hashes = hashes
        self._counts = _Counts()
        self._jobs: list[_Job] = []
        self._claimed = [np.zeros(len(array), dtype=np.bool_) for array in memory]
        self._differing: list[tuple[int, list[int]]] = []  # pages of packets with a wrong digest
        self._pending: int | None = None
        self._barriers = 0
        self._tickets = 0
        self._read = 0
        self.bandwidth_bps = 0  #: last value set
        self.forms, self.zstd_level = 0, 1  #: last values set
        self.window_bytes = 0  #: last value set

    def _check(self) -> None:
        self._link.check()
        if self._link.ended:
            raise UsageError("the sender has finished")
        if self._pending is not None:
            raise UsageError(f"the barrier of round {self._pending} is not acknowledged yet")

    def _check_range(self, block: int, page: int, npages: int) -> None:
        if not 0 <= block < len(self._memory):
            raise UsageError(f"block {block}, allowed 0 to {len(self._memory) - 1}")
        if page + npages > len(self._memory[block]):
            raise UsageError(f"pages {page} + {npages}, allowed up to {len(self._memory[block])}")

    def _queue(self, form: str, block: int, pages: npt.NDArray[np.uint64]) -> None:
        if self._claimed[block][pages].any() or len(np.unique(pages)) != len(pages):
            raise UsageError(f"block {block}: a page was already sent since the last barrier")
        self._claimed[block][pages] = True
        self._jobs.append(_Job(form, block, pages))

    def send(self, block: int, page: int, npages: int, bitmap: Bitmap, round_: int) -> None:
        self._check()
        self._check_range(block, page, npages)
        if block in self._link.hostless:
            raise UsageError(f"block {block} has no memory here, allowed send_pages")
        need = bitmap_words(len(self._memory[block]))
        if len(bitmap) < need:
            raise UsageError(f"bitmap of {len(bitmap)} words, allowed {need}")
        bits = np.unpackbits(bitmap.view(np.uint8), bitorder="little")[page : page + npages]
        self._queue("normal", block, np.flatnonzero(bits).astype(np.uint64) + np.uint64(page))

    def send_pages(self, runs: PageRuns, data: PageContent, round_: int) -> tuple[int, int]:
        self._check()
        content = np.frombuffer(data, dtype=np.uint8)
        jobs = [self._lent_job(run, content) for run in runs]
        queued = 0
        for job in jobs:
            if self._claimed[job.block][job.pages].any():
                break
            self._queue(job.form, job.block, job.pages)
            self._jobs[-1].lent = job.lent
            self._jobs[-1].ticket = self._tickets + 1
            queued += 1
        self._tickets += queued > 0
        return queued, self._tickets

    def _lent_job(self, run: PageRuns, content: Pages) -> _Job:
        block, page, npages = int(run["block"]), int(run["page"]), int(run["npages"])
        at, stride, kind = int(run["at"]), int(run["stride"]), int(run["kind"])
        self._check_range(block, page, npages)
        if kind not in (_ZERO, _PAGE):
            raise UsageError(f"run.kind {kind}, allowed {_ZERO} (zero) and {_PAGE} (page)")
        nbytes = self._memory[block].shape[1]
        pages = np.arange(page, page + npages, dtype=np.uint64)
        if kind == _ZERO:
            return _Job("normal", block, pages, [np.zeros(nbytes, dtype=np.uint8)] * npages)
        end = at + (npages - 1) * stride + nbytes
        if int(run["nbytes"]) != nbytes or end > len(content):
            raise UsageError(f"run.at {at}, allowed whole pages within {len(content)} bytes")
        starts = range(at, at + npages * stride, stride) if npages > 1 else [at]
        return _Job("normal", block, pages, [content[i : i + nbytes] for i in starts])

    def pages_read(self) -> int:
        return self._read

    def wait_read(self, ticket: int, timeout_ns: int = 0) -> bool:
        self._link.check()
        if ticket > self._tickets:
            raise UsageError(f"ticket {ticket}, allowed up to {self._tickets}")
        while self._read < ticket:
            self._transfer_next()
        return True

    def _transfer_next(self) -> None:
        """The oldest job; its ticket is read when no job of it is left."""
        job = self._jobs.pop(0)
        self._transfer(job)
        if job.ticket and not any(left.ticket == job.ticket for left in self._jobs):
            self._read = job.ticket

    def send_holes(self, block: int, runs: npt.NDArray[np.uint64], round_: int) -> None:
        self._send_told("hole", block, runs)

    def send_free(self, block: int, runs: npt.NDArray[np.uint64], round_: int) -> None:
        self._send_told("free", block, runs)

    def _send_told(self, form: str, block: int, runs: npt.NDArray[np.uint64]) -> None:
        self._check()
        for page, npages in runs.tolist():
            self._check_range(block, page, npages)
        pages = [np.arange(page, page + npages, dtype=np.uint64) for page, npages in runs.tolist()]
        self._queue(form, block, np.concatenate([np.empty(0, dtype=np.uint64), *pages]))

    def _begin_barrier(self, round_: int) -> None:
        self._link.check()
        if self._pending is None:
            self._check()
            self._pending = round_
            self._barriers += 1
        if self._pending != round_:
            raise UsageError(f"barrier of round {round_}, allowed {self._pending}")

    def sent(self, round_: int, timeout_ns: int = 0) -> bool:
        self._begin_barrier(round_)
        while self._jobs:
            self._transfer_next()
        if self._link.late_barriers == 0:
            self._landed()
        return True

    def barriers(self) -> int:
        return self._barriers

    def _landed(self) -> None:
        with self._link.changed:
            self._link.landed_barriers = self._barriers
            self._link.changed.notify_all()

    def barrier(self, round_: int, timeout_ns: int = 0) -> bool:
        self._begin_barrier(round_)
        if timeout_ns > 0 and self._link.late_barriers > 0:
            self._link.late_barriers -= 1
            return False
        while self._jobs:
            self._transfer_next()
        self._landed()
        for claimed in self._claimed:
            claimed[:] = False
        self._pending = None
        return True

    def _transfer(self, job: _Job) -> None:
        """One packet. If a page of it was damaged the packet's digest is wrong."""
        damaged = False
        sent: list[int] = []
        payload_bytes = 0
        for index, page in enumerate(job.pages.tolist()):
            content = self._content(job, index, page)
            form = job.form if content is None or content.any() else "zero"
            if form == "free":
                self._hashes.set(job.block, page, None)
            else:
                known = (
                    content if content is not None else np.zeros_like(self._memory[job.block][0])
                )
                self._hashes.set(job.block, page, known)
            self._counts.add(f"{form}_pages", 1)
            if form == "normal" and content is not None:
                payload_bytes += content.nbytes
                sent.append(page)
                if (job.block, page) in self._link.damage:
                    self._link.damage.discard((job.block, page))
                    content[0] ^= 0x55
                    damaged = True
            self._link.receiver.land(form, job.block, page, content)
        nbytes = _HEADER_BYTES + _DESC_BYTES * len(job.pages) + payload_bytes
        for name in ("wire_bytes", "acked_bytes"):
            self._counts.add(name, nbytes)
        self._counts.add("packets", 1)
        if damaged and self._hashes.enabled:
            self._counts.add("torn_packets", 1)
            self._differing.append((job.block, sent))

    def _content(self, job: _Job, index: int, page: int) -> Pages | None:
        if job.lent is not None:
            return job.lent[index].copy()
        return self._memory[job.block][page].copy() if job.form == "normal" else None

    def take_missed(self, bitmaps: Bitmaps) -> int:
        if len(bitmaps) != len(self._memory):
            raise UsageError(f"{len(bitmaps)} bitmaps, allowed {len(self._memory)}")
        dirty = [np.unpackbits(bitmap.view(np.uint8), bitorder="little") for bitmap in bitmaps]
        taken = 0
        for block, pages in self._differing:
            if dirty[block][pages].any():
                continue  # torn by a write while it was sent
            taken += len(pages)
            for page in pages:
                bitmaps[block][page // 64] |= np.uint64(1 << page % 64)
        self._differing.clear()
        self._counts.add("missed_pages", taken)
        return taken

    def take_missed_pages(self) -> Sequence[tuple[int, int, bytes]]:
        """Nothing refers to anything here: no page is missed for that."""
        return []

    def digest(self) -> Digest:
        return self._hashes.digest()

    def hashes(self, block: int, page: int, npages: int) -> npt.NDArray[np.uint64]:
        return self._hashes.copy(block, page, npages)

    def subdigests(self, block: int, page: int, npages: int, step: int) -> npt.NDArray[np.uint64]:
        return self._hashes.subdigests(block, page, npages, step)

    def counters(self) -> TransferCounters:
        return self._counts.snapshot()

    def set_forms(self, mask: int, zstd_level: int = 1) -> None:
        """Remembered only: every page goes as it is."""
        self.forms, self.zstd_level = mask, zstd_level

    def forget(self, block: int, page: int, npages: int) -> None:
        self._check_range(block, page, npages)

    def set_bandwidth(self, bytes_per_second: int) -> None:
        self.bandwidth_bps = bytes_per_second

    def set_window(self, nbytes: int) -> None:
        self.window_bytes = nbytes

    def in_flight(self) -> int:
        return 0

    def fallbacks(self) -> Sequence[str]:
        return ()

    def cancel(self, reason: str) -> None:
        if not self._link.ended:
            self._link.fail(CancelledError(reason))

    def finish(self) -> None:
        self._check()
        while self._jobs:
            self._transfer_next()
        with self._link.changed:
            self._link.ended = True
            self._link.changed.notify_all()

    def close(self) -> None:
        self.cancel("closed")


class FakeReceiver:
    """``PageReceiver`` of a ``FakeLink``."""

    def __init__(
        self,
        link: FakeLink,
        memory: Sequence[Pages],
        hashes: _Hashes,
        maybe_nonzero: Bitmaps | None,
    ) -> None:
        self._link = link
        self._memory = memory
        self._hashes = hashes
        self._counts = _Counts()
        self._maybe_nonzero = [np.ones(len(array), dtype=np.bool_) for array in memory]
        for ours, given in zip(self._maybe_nonzero, maybe_nonzero or (), strict=False):
            ours[:] = np.unpackbits(given.view(np.uint8), bitorder="little")[: len(ours)]

    def attach(self, fd: int, index: int) -> None:
        raise UsageError("a fake receiver has no sockets to attach")

    def land(self, form: str, block: int, page: int, content: Pages | None) -> None:
        """Called by the sender, for each page."""
        self._counts.add(f"{form}_pages", 1)
        ours = self._memory[block][page]
        if form == "normal" and content is not None:
            self._maybe_nonzero[block][page] = True
            ours[:] = content
        elif form in ("zero", "hole") and self._maybe_nonzero[block][page]:
            ours[:] = 0
        self._hashes.set(block, page, None if form == "free" else ours)

    def wait(self, timeout_ns: int = 0) -> bool:
        timeout = timeout_ns / 1e9 if timeout_ns > 0 else None
        with self._link.changed:
            self._link.changed.wait_for(
                lambda: self._link.ended or self._link.error is not None, timeout
            )
            self._link.check()
            return self._link.ended

    def wait_barriers(self, count: int, timeout_ns: int = 0) -> bool:
        timeout = timeout_ns / 1e9 if timeout_ns > 0 else None
        with self._link.changed:
            landed = self._link.changed.wait_for(
                lambda: self._link.landed_barriers >= count or self._link.error is not None, timeout
            )
            self._link.check()
            return landed

    def digest(self) -> Digest:
        return self._hashes.digest()

    def hashes(self, block: int, page: int, npages: int) -> npt.NDArray[np.uint64]:
        return self._hashes.copy(block, page, npages)

    def subdigests(self, block: int, page: int, npages: int, step: int) -> npt.NDArray[np.uint64]:
        return self._hashes.subdigests(block, page, npages, step)

    def counters(self) -> TransferCounters:
        return self._counts.snapshot()

    def fallbacks(self) -> Sequence[str]:
        return ()

    def cancel(self, reason: str) -> None:
        if not self._link.ended:
            self._link.fail(CancelledError(reason))

    def close(self) -> None:
        self.cancel("closed")

"""pybind11 over csrc/xfer: the page channels. Every blocking call releases the GIL.

Threads: send*/barrier/close come from one thread; cancel, set_bandwidth, set_window, wait_read,
counters and digest from any. Once a channel has failed every blocking call raises
TransferError(kind, message); ``kind`` is one of "closed", "io", "protocol", "timeout", "cancelled",
"usage".
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
ReuseFile = tuple[int, U64, U64, U64]  # fd, hashes, places, frames (vmth.channel.reuse)
Content = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

class TransferError(Exception):
    kind: str
    errno: int

class Sender:
    def __init__(
        self,
        blocks: Sequence[
            tuple[int, int, bool]
        ],  # (address of page 0, npages, mapped anew) a block; the owner keeps it mapped. What was
        # mapped for this transfer is populated ahead of its use; of other memory only the
        # receiver's holes are. Address 0: hostless, its pages come by send_pages().
        page_bytes: int,
        *,
        hash_seed: int,
        digest: bool = True,
        zerocopy: bool = True,
        packet_bytes: int = 262144,  # payload of a full packet; shrinks with the window
        fast_packet_bytes: int = 0,  # what it grows to on a channel that carries it in 0.5 ms
        queue_jobs: int = 2,  # send() calls that may wait unfinished before send() blocks
        forms: int = 0,  # bit f: both ends agreed on form f; none of them is on at first
        dedup_index_bytes: int = 64 << 20,  # at most; 32 bytes a page of the guest are enough
        delta_cache_bytes: int = 256 << 20,  # at most; taken as pages are sent
        kept_copies_bytes: int = 64 << 20,  # at most; of lent pages on their way as a reference
        handed_on: Sequence[int] = (),  # blocks whose pages the destination does not keep
    ) -> None: ...
    def begin_reuse(self, key: bytes, entries: int) -> None:
        """What the destination says it has, before the first channel; the parts follow."""

    def add_reuse(self, base: int, count: int, data: bytes, last: bool) -> None: ...
    def add_channel(self, fd: int, index: int, trip_ns: int = 0) -> None:
        """A connected stream socket past its preamble; the sender duplicates it. Starts its
        threads."""

    def send(self, block: int, page: int, npages: int, bitmap: U64, round_: int) -> None:
        """Queue the pages of [page, page + npages) whose bit is set in the whole-block ``bitmap``
        (copied). Blocks while the queue is full. Memory is read later, any time before barrier()
        returns."""

    def send_pages(self, runs: npt.NDArray[Any], data: Content, round_: int) -> tuple[int, int]:
        """Queue pages whose content lies in ``data``: ``runs`` is an array of vmth.qemu.ram.RUN,
        kinds ZERO and PAGE. Whole runs in order, up to the first that has a page already sent since
        the last barrier: the caller then ends the round and calls again with the rest. Returns
        (runs queued, ticket). ``data`` is not copied: the caller keeps it, unchanged, until
        pages_read() has reached the ticket, or, after a failure, until close() has returned."""

    def pages_read(self) -> int:
        """The last ticket of which, and of all before it, no page is read any more."""

    def wait_read(self, ticket: int, timeout_ns: int) -> bool:
        """Until pages_read() has reached ``ticket``; False at the timeout (0: none)."""

    def send_holes(self, block: int, runs: U64, round_: int) -> None:
        """(n, 2) runs {page, npages} that were never populated: nothing is read."""

    def send_free(self, block: int, runs: U64, round_: int) -> None: ...
    def sent(self, round_: int, timeout_ns: int) -> bool:
        """Begins the round's barrier; True when every channel has given all before it, and it, to
        its socket: digest() is then of all that was queued. False at the timeout (0: none)."""

    def barriers(self) -> int:
        """How many were begun."""

    def barrier(self, round_: int, timeout_ns: int) -> bool:
        """End the round on every channel; True when everything before it has landed. False when the
        timeout (0: none) came first: call again with the same round to go on waiting."""

    def take_missed_pages(self) -> list[tuple[int, int, bytes]]: ...
    def take_missed(self, bitmaps: Sequence[U64]) -> int:
        """OR in the pages to send again: missed by the peer, or of a packet that landed with
        another digest than was read, unless a page of it is set in ``bitmaps`` already: those hold
        what was dirtied since (fetched after the barrier), and a write while it was sent explains
        it. Clears them here; returns how many."""

    def digest(self) -> tuple[int, int, int]:
        """(lo, hi, valid pages). Stable between sent() or barrier() and the next send()."""

    def hashes(self, block: int, page: int, npages: int) -> U64:
        """A copy of the table: (npages, 2)."""

    def subdigests(self, block: int, page: int, npages: int, step: int) -> U64: ...
    def counters(self) -> dict[str, Any]:
        """Numbers; ``forms``: by name, (pages, tried, content bytes, wire bytes, CPU ns);
        ``channels``: (index, pages, packets, wire bytes, acknowledged bytes, and bytes/s, opening)
        each, none after close()."""

    def set_bandwidth(self, bytes_per_second: int) -> None:
        """Of all channels together, headers included; 0: none. Takes effect within 50 ms."""

    def set_forms(self, mask: int, zstd_level: int) -> None:
        """Bit f of ``mask``: form f is on, from the next packet of each channel on. Raises "usage",
        with nothing changed, for a form that was not agreed on, one that compares hashes where the
        digest is off, and a level outside -10 to 19 or 0."""

    def forget(self, block: int, page: int, npages: int) -> None:
        """The peer may not hold what it acknowledged of these pages: they go again in full, even
        if they are the same. Before they are queued."""

    def set_window(self, nbytes: int) -> None:
        """Most bytes in flight (sent, not acknowledged) over all channels, shared among them by
        what each is acknowledged; 0: no limit."""

    def in_flight(self) -> int: ...
    def fallbacks(self) -> list[str]: ...
    def cancel(self, reason: str) -> None:
        """Wake every blocked call with "cancelled"; sockets are shut down. Idempotent, any
        thread."""

    def finish(self) -> None:
        """Send END on every channel and join the workers."""

    def close(self) -> None:
        """cancel() and join; frees sockets and threads. Idempotent."""

class StreamPump:
    def __init__(
        self,
        sender: Sender,  # kept
        fd: int,  # duplicated
        lengths: Sequence[int],
        names: bytes,
        page_bytes: int,
        piece_bytes: int,
        npieces: int,
    ) -> None: ...
    def run(
        self,
        first: bytes,
        block: int,
        round_: int,
        *,
        time_ns: int,
        patience_ns: int,
        pages: int,
        ahead_bytes: int,
        piece_bytes: int,
    ) -> tuple[int, int, int, int, int, int, int, bytes]:
        """(why it came back, block, bytes read, bytes used, pages, bytes ahead, ticket, what is
        left): ``vmth.channel.pump``. From the sender's thread."""

class Receiver:
    def __init__(
        self,
        blocks: Sequence[tuple[int, int, bool]],
        page_bytes: int,
        *,
        hash_seed: int,
        digest: bool = True,
        maybe_nonzero: Sequence[U64],  # bit set: our page may hold non-zero bytes now (copied)
        channels: int,
        sink: tuple[int, int, Sequence[bytes]] | None = None,  # (fd of a connected stream socket,
        # duplicated; id of the ram section; idstr of every block): where the pages of hostless
        # blocks are handed on, as PART sections of QEMU's stream
        forms: int = 0,  # bit f: both ends agreed on form f
        reuse: Sequence[ReuseFile] = (),  # read until close(); the owner keeps arrays and files
        reuse_key: bytes = b"",  # 32 bytes, where there are such files
        memory_files: Sequence[tuple[int, int]] = (),  # (fd, offset of page 0) of the file that is
        # mapped shared at each block's address, fd -1: none; duplicated until close(). Holes are
        # filled by writing to it. Empty: no block has one
    ) -> None: ...
    def attach(self, fd: int, index: int) -> None:
        """A connected socket past its preamble; duplicated. Starts its thread."""

    def wait(self, timeout_ns: int) -> bool:
        """True when every channel has ended with END; raises at the first failure; False at the
        timeout."""

    def wait_barriers(self, count: int, timeout_ns: int) -> bool:
        """True when so many barriers have come on every channel, and all before them has landed;
        False at the timeout (0: none). Raises at the first failure, and when all channels have
        ended before."""

    def digest(self) -> tuple[int, int, int]: ...
    def hashes(self, block: int, page: int, npages: int) -> U64: ...
    def subdigests(self, block: int, page: int, npages: int, step: int) -> U64: ...
    def counters(self) -> dict[str, Any]: ...
    def reused(self) -> list[int]:
        """Pages that each file gave."""

    def fallbacks(self) -> list[str]: ...
    def cancel(self, reason: str) -> None: ...
    def close(self) -> None: ...

class FilterWriter:
    """The fingerprints of what files have, for the wire. One thread; keeps ``files``."""

    def __init__(self, files: Sequence[ReuseFile]) -> None: ...
    @property
    def entries(self) -> int: ...
    def next(self) -> tuple[int, int, bytes, bool]:
        """(base, count, data, last)"""

def connect_options(
    fd: int,
    *,
    dscp: int = -1,
    keepalive_s: int = 0,
    user_timeout_ms: int = 0,
    send_buffer_bytes: int = 0,
    receive_buffer_bytes: int = 0,
) -> None: ...
def tcp_info(fd: int) -> dict[str, Any]: ...
def select_kernel(family: str, name: str) -> None:
    """As ``_kernels.select``, for the copy of the core that the page channels run. Raises
    TransferError("usage"); then nothing has changed."""

def selected_kernel(family: str) -> str: ...

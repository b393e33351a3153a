# SPDX-License-Identifier: Apache-2.0
"""The native page channels behind the Protocols of ``vmth.channel.interface``.

Only translation happens here: errors of ``vmth._native._xfer`` become the classes of
``vmth.errors``, counters become ``TransferCounters``. Threading and blocking rules are the stub's.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from vmth._native import _xfer
from vmth.channel.interface import Digest
from vmth.errors import CancelledError, ChannelError, StreamError, UsageError, VmthError
from vmth.memory import MappedBlock
from vmth.stats import TransferCounters
from vmth.types import Bitmap, Bitmaps

__all__ = ["NativeReceiver", "NativeSender"]


def _translated(error: _xfer.TransferError) -> VmthError:
    message = str(error)
    match error.kind:
        case "protocol":
            return StreamError(message)
        case "cancelled":
            return CancelledError(message)
        case "usage":
            return UsageError(message)
        case _:
            return ChannelError(message)


class _Translate:
    """Context manager that turns a native error into ours. Stateless: one serves every call."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if isinstance(error, _xfer.TransferError):
            raise _translated(error) from error


_translate = _Translate()


def _areas(memory: Sequence[MappedBlock], page_bytes: int) -> list[tuple[int, int, bool]]:
    for index, block in enumerate(memory):
        if page_bytes <= 0 or block.view.nbytes % page_bytes:
            raise UsageError(
                f"block {index}: {block.view.nbytes} bytes, allowed multiples of {page_bytes}"
            )
    # A file was mapped for this transfer; at an address the owner's pages are there already.
    return [
        (area.address, area.view.nbytes // page_bytes, area.block.mapping.fd is not None)
        for area in memory
    ]


class _NativeEnd:
    """What both ends have. A context manager: leaving it closes."""

    _native: _xfer.Sender | _xfer.Receiver

    def digest(self) -> Digest:
        with _translate:
            return self._native.digest()

    def hashes(self, block: int, page: int, npages: int) -> npt.NDArray[np.uint64]:
        with _translate:
            return self._native.hashes(block, page, npages)

    def subdigests(self, block: int, page: int, npages: int, step: int) -> npt.NDArray[np.uint64]:
        with _translate:
            return self._native.subdigests(block, page, npages, step)

    def counters(self) -> TransferCounters:
        with _translate:
            return TransferCounters(**self._native.counters())

    def fallbacks(self) -> Sequence[str]:
        with _translate:
            return self._native.fallbacks()

    def cancel(self, reason: str) -> None:
        with _translate:
            self._native.cancel(reason)

    def close(self) -> None:
        with _translate:
            self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NativeSender(_NativeEnd):
    """``PageSender`` over sockets. A context manager: leaving it closes.

    Every method may raise ChannelError, StreamError (the peer broke the protocol), CancelledError
    or UsageError. After any but UsageError all channels are down and every later call raises the
    same; the guest is untouched.
    """

    def __init__(
        self,
        memory: Sequence[MappedBlock],
        page_bytes: int,
        *,
        hash_seed: int,
        digest: bool = True,
        zerocopy: bool = True,
        packet_bytes: int = 262144,
        queue_jobs: int = 2,
    ) -> None:
        self._memory = memory  # stays mapped as long as its views live
        with _translate:
            native = _xfer.Sender(
                _areas(memory, page_bytes),
                page_bytes,
                hash_seed=hash_seed,
                digest=digest,
                zerocopy=zerocopy,
                packet_bytes=packet_bytes,
                queue_jobs=queue_jobs,
            )
        self._native: _xfer.Sender = native

    def add_channel(self, fd: int, index: int) -> None:
        """A connected stream socket past its preamble, duplicated. Before the first barrier."""
        with _translate:
            self._native.add_channel(fd, index)

    def send(self, block: int, page: int, npages: int, bitmap: Bitmap, round_: int) -> None:
        with _translate:
            self._native.send(block, page, npages, bitmap, round_)

    def send_holes(self, block: int, runs: npt.NDArray[np.uint64], round_: int) -> None:
        with _translate:
            self._native.send_holes(block, runs, round_)

    def send_free(self, block: int, runs: npt.NDArray[np.uint64], round_: int) -> None:
        """(n, 2) runs that the guest calls free: no content, left out of the digest."""
        with _translate:
            self._native.send_free(block, runs, round_)

    def barrier(self, round_: int, timeout_ns: int = 0) -> bool:
        with _translate:
            return self._native.barrier(round_, timeout_ns)

    def take_missed(self, bitmaps: Bitmaps) -> int:
        with _translate:
            return self._native.take_missed(bitmaps)

    def set_bandwidth(self, bytes_per_second: int) -> None:
        with _translate:
            self._native.set_bandwidth(bytes_per_second)

    def set_window(self, nbytes: int) -> None:
        with _translate:
            self._native.set_window(nbytes)

    def in_flight(self) -> int:
        """Bytes sent and not yet acknowledged, over all channels."""
        with _translate:
            return self._native.in_flight()

    def finish(self) -> None:
        with _translate:
            self._native.finish()


class NativeReceiver(_NativeEnd):
    """``PageReceiver`` over sockets. A context manager: leaving it closes. Errors: the sender's."""

    def __init__(
        self,
        memory: Sequence[MappedBlock],
        page_bytes: int,
        *,
        hash_seed: int,
        digest: bool = True,
        maybe_nonzero: Sequence[Bitmap],
        channels: int,
    ) -> None:
        self._memory = memory  # stays mapped as long as its views live
        with _translate:
            native = _xfer.Receiver(
                _areas(memory, page_bytes),
                page_bytes,
                hash_seed=hash_seed,
                digest=digest,
                maybe_nonzero=maybe_nonzero,
                channels=channels,
            )
        self._native: _xfer.Receiver = native

    def attach(self, fd: int, index: int) -> None:
        with _translate:
            self._native.attach(fd, index)

    def wait(self, timeout_ns: int = 0) -> bool:
        with _translate:
            return self._native.wait(timeout_ns)

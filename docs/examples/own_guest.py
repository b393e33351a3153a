# SPDX-License-Identifier: Apache-2.0
"""An own guest in under 100 lines: a counter that lives in 16 MiB, moved while it counts.

python docs/examples/own_guest.py
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import vmth
from vmth.dirty.uffd import UffdWpSource

NBYTES, PAGE = 16 << 20, 4096


class CounterGuest:
    """Its memory is a memfd, its vCPU a thread, its state one number: how far it has counted."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("counter")
        os.ftruncate(self._fd, NBYTES)
        self.memory = np.frombuffer(mmap.mmap(self._fd, NBYTES), dtype=np.uint64)
        self.blocks = [vmth.RamBlock("ram", NBYTES, 0, vmth.Mapping(fd=self._fd))]
        # The thread writes through this mapping, so this is where its writes are seen.
        self.dirty = [UffdWpSource(self.blocks, [self.memory.ctypes.data])]
        self.count = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _run(self) -> None:
        while not self._stop.wait(0.0001):
            page = self.count * 31 % (NBYTES // PAGE)
            self.memory[page * PAGE // 8] += 1
            self.count += 1

    def pause(self) -> bool:
        thread, self._thread = self._thread, None
        if thread is None:
            return False
        self._stop.set()
        thread.join()
        return True

    def resume(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="vcpu", daemon=True)
        self._thread.start()

    def save_state(self, write: Callable[[vmth.StateStream], None]) -> None:
        write(vmth.StateStream("counter", 1, self.count.to_bytes(8, "little")))

    def load_state(self, streams: Iterable[vmth.StateStream]) -> None:
        for stream in streams:
            if (stream.name, stream.version, len(stream.data)) != ("counter", 1, 8):
                raise ValueError(f"{stream.name} version {stream.version}: allowed counter 1")
            self.count = int.from_bytes(stream.data, "little")

    def release(self) -> None:
        self.pause()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def move(folder: Path) -> tuple[vmth.MigrationResult, CounterGuest]:
    """Move a counting guest over loopback; it counts on afterwards."""

    def make_guest(incoming: vmth.Incoming) -> CounterGuest:
        if incoming.memory_bytes != NBYTES:
            raise vmth.RefusedError(f"received {incoming.memory_bytes} bytes, allowed {NBYTES}")
        return CounterGuest()

    source = CounterGuest()
    source.resume()
    there = vmth.ReceiveOptions(state_dir=folder / "destination")
    with vmth.Listener("tcp:127.0.0.1:0", make_guest, there) as listener:
        uri = listener.endpoint.display
        result = vmth.migrate(source, uri, state_dir=folder / "source", audit=True)
        arrived = listener.wait_for_guest().guest
    assert isinstance(arrived, CounterGuest)
    return result, arrived


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result, guest = move(Path(folder))
    guest.pause()
    kept = int(guest.memory[:: PAGE // 8].sum())
    print(f"{result.downtime_ns / 1e6:.1f} ms of downtime, verified: {result.verified}")
    print(f"counted {guest.count}, and {kept} of that is in its memory")
    guest.release()

# SPDX-License-Identifier: Apache-2.0
"""KVM's dirty log and ring on the real /dev/kvm: the conformance suite, and a running walker."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from dirty_conformance import DirtyHarness, DirtySourceConformance
from kvm_walker import BEAT_TIMEOUT_NS, POOL, UNPACED, machine, make_memory, write_control

from vmth._native import _kvm
from vmth.dirty.kvm import KvmDirtyLog, KvmDirtyRing
from vmth.errors import GuestError, UsageError
from vmth.guest import DirtySource
from vmth.guests.kvm_machine import DIRTY_SOURCES, probe
from vmth.guests.machine import BEAT_PORT
from vmth.guests.memory import BlockPlan, GuestMemory
from vmth.types import Bitmap, RamBlock, bitmap_words, new_bitmaps

RUNS_KVM, REASON = probe()
pytestmark = pytest.mark.skipif(not RUNS_KVM, reason=f"no KVM guest here: {REASON}")

PAGE_BYTES = 4096


class CommandedGuest:
    """A vCPU that writes one page per command. The command comes in a register, so that the only
    writes to memory are those under test."""

    #: write: inc dword [edi]; out dx, eax; jmp write; stand: jmp stand
    CODE = bytes.fromhex("ff07 ef ebfb ebfe")
    STAND = 5
    WRITTEN_OFFSET = 2048
    REGISTERS = struct.Struct("<18Q")  #: rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags
    PLANS = (BlockPlan("low", 0, 203 * PAGE_BYTES), BlockPlan("next", 1 << 20, 70 * PAGE_BYTES))

    def __init__(self, tracker: str) -> None:
        self._memory = GuestMemory(self.PLANS)
        self._memory.views[0][: len(self.CODE)] = np.frombuffer(self.CODE, np.uint8)
        self.blocks: Sequence[RamBlock] = tuple(self._memory.blocks)
        slots = [(block.gpa, block.npages, block.mapping.address or 0) for block in self.blocks]
        self.vm = _kvm.MicroVm(slots, tracker)
        kind = KvmDirtyLog if tracker == "log" else KvmDirtyRing
        self.source: DirtySource = kind(self.vm, self.blocks)
        self.vm.start_fresh(self.STAND, [])
        self.vm.pause()

    def write(self, block: int, page: int) -> None:
        gpa = self.blocks[block].gpa + page * PAGE_BYTES + self.WRITTEN_OFFSET
        state = self.vm.get_state()
        registers = list(self.REGISTERS.unpack(state["regs"]))
        registers[3], registers[5], registers[16] = BEAT_PORT, gpa, 0
        state["regs"] = self.REGISTERS.pack(*registers)
        state["at_beat"] = False
        self.vm.set_state(state)
        self.vm.resume()
        assert self.vm.pause_at_beat(BEAT_TIMEOUT_NS), self.vm.crash()

    def settle(self) -> None:
        pass

    def read(self, block: int, page: int) -> bytes:
        return self._memory.views[block][page * PAGE_BYTES : (page + 1) * PAGE_BYTES].tobytes()


class KvmConformance(DirtySourceConformance):
    tracker = ""

    @pytest.fixture
    def harness(self) -> Iterator[DirtyHarness]:
        guest = CommandedGuest(self.tracker)
        try:
            yield guest
        finally:
            guest.vm.close()


class TestKvmLogConforms(KvmConformance):
    tracker = "log"


class TestKvmRingConforms(KvmConformance):
    tracker = "ring"


class WalkerMover:
    """Fetches, re-arms and copies pages of a running walker, as a migration does."""

    def __init__(self, memory: GuestMemory, source: DirtySource) -> None:
        self.source = source
        self.live = memory.views[0].reshape(-1, PAGE_BYTES)
        self.landed = np.zeros_like(self.live)
        self.bitmaps = new_bitmaps(memory.blocks)

    def reported(self) -> npt.NDArray[np.intp]:
        bits = np.unpackbits(self.bitmaps[0].view(np.uint8), bitorder="little")
        return np.flatnonzero(bits[: len(self.live)])

    def take(self, page: int, npages: int) -> None:
        """Re-arm, then copy; a page counts as read afterwards."""
        self.source.rearm(0, page, npages)
        self.landed[page : page + npages] = self.live[page : page + npages]
        for taken in range(page, page + npages):
            self.bitmaps[0][taken // 64] &= ~np.uint64(1 << taken % 64)

    def unreported(self) -> set[int]:
        """Pages whose copy is stale though nobody said so. The guest is paused and fetched."""
        stale = np.flatnonzero((self.live != self.landed).any(axis=1))
        return {int(page) for page in stale} - {int(page) for page in self.reported()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dirty", DIRTY_SOURCES)
def test_no_write_of_a_running_walker_goes_unreported(dirty: str, seed: int) -> None:
    dice = random.Random(seed)
    dwords, pool = dice.choice((1, 20)), POOL if seed % 2 else {}
    memory = make_memory(seed, entries=400, writes_per_beat=50, store_dwords=dwords, **pool)
    with machine(memory, dirty) as kvm:
        kvm.start_fresh(UNPACED)
        source = kvm.dirty_source(dirty)
        source.start()
        mover = WalkerMover(memory, source)
        npages = len(mover.live)
        for page in range(0, npages, 100):
            mover.take(page, min(100, npages - page))
        for _ in range(10):
            if dice.random() < 0.5:
                assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
            if dice.random() < 0.8:
                source.fetch(mover.bitmaps)
            kvm.resume()
            for _ in range(dice.randrange(12)):
                page = dice.randrange(npages)
                mover.take(page, min(dice.choice((1, 3, 64, 200)), npages - page))
        kvm.pause()
        source.fetch(mover.bitmaps)
        assert mover.unreported() == set()
        kvm.resume()
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        source.fetch(mover.bitmaps)
        assert mover.unreported() == set()
        for page in mover.reported():
            mover.take(int(page), 1)
        assert np.array_equal(mover.landed, mover.live)


def test_log_says_how_it_rearms() -> None:
    with machine(make_memory(1)) as kvm:
        source = kvm.dirty_source("kvm-log")
        assert isinstance(source, KvmDirtyLog)
        assert source.mode in {"manual-all-set", "manual", "fetch-clears"}
        source.start()
        bitmaps = new_bitmaps(kvm.blocks)
        source.fetch(bitmaps)
        everything = sum(int(word).bit_count() for word in bitmaps[0]) == kvm.blocks[0].npages
        assert everything is (source.mode == "manual-all-set")


def test_more_writes_than_the_ring_holds_are_all_reported() -> None:
    """One beat appends 70,000 entries to a ring of 65,536, without an exit of its own."""
    memory = make_memory(2, entries=300, writes_per_beat=350, store_dwords=200)
    with machine(memory, "kvm-ring") as kvm:
        source = kvm.dirty_source("kvm-ring")
        assert isinstance(source, KvmDirtyRing) and source.mode == "ring"
        source.start()
        mover = WalkerMover(memory, source)
        mover.take(0, len(mover.live))
        kvm.start_fresh(UNPACED)
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)
        source.fetch(mover.bitmaps)
        assert mover.unreported() == {2}  # the code, which the host put there after it was copied
        assert 0 < len(mover.reported()) <= 302
        assert source.overflows == 0
        kvm.resume()
        assert kvm.pause_at_beat(BEAT_TIMEOUT_NS)


@pytest.mark.parametrize("dirty", DIRTY_SOURCES)
def test_tracking_can_be_restarted_under_a_running_guest(dirty: str) -> None:
    memory = make_memory(3)
    with machine(memory, dirty) as kvm:
        kvm.start_fresh(UNPACED)
        source = kvm.dirty_source(dirty)
        for _ in range(3):
            source.start()
            mover = WalkerMover(memory, source)
            mover.take(0, len(mover.live))
            kvm.pause()
            source.fetch(mover.bitmaps)
            assert mover.unreported() == set()
            kvm.resume()
            source.stop()


@pytest.mark.parametrize("dirty", DIRTY_SOURCES)
def test_host_writes_are_not_seen(dirty: str) -> None:
    """As the docstring says: a source beside it is needed for those."""
    memory = make_memory(4)
    with machine(memory, dirty) as kvm:
        source = kvm.dirty_source(dirty)
        source.start()
        source.rearm(0, 0, kvm.blocks[0].npages)
        write_control(memory, writes_per_beat=1)
        bitmaps = new_bitmaps(kvm.blocks)
        source.fetch(bitmaps)
        assert not bitmaps[0].any()


def wrong_bitmaps(blocks: Sequence[RamBlock]) -> list[tuple[str, list[Bitmap]]]:
    words = bitmap_words(blocks[0].npages)
    return [
        ("0 bitmaps given", []),
        ("2 bitmaps given", [np.zeros(words, np.uint64)] * 2),
        (f"bitmap of {words - 1} words", [np.zeros(words - 1, np.uint64)]),
        (f"bitmap of {words + 1} words", [np.zeros(words + 1, np.uint64)]),
    ]


@pytest.mark.parametrize("dirty", DIRTY_SOURCES)
def test_misuse_is_named(dirty: str) -> None:
    with machine(make_memory(5), dirty) as kvm:
        source = kvm.dirty_source(dirty)
        npages = kvm.blocks[0].npages
        with pytest.raises(UsageError, match=f"{dirty} is not started"):
            source.fetch(new_bitmaps(kvm.blocks))
        with pytest.raises(UsageError, match=f"{dirty} is not started"):
            source.rearm(0, 0, 1)
        source.start()
        with pytest.raises(UsageError, match="started already"):
            source.start()
        for message, bitmaps in wrong_bitmaps(kvm.blocks):
            with pytest.raises(UsageError, match=message):
                source.fetch(bitmaps)
        with pytest.raises(UsageError, match="block 1 given, 1 blocks tracked"):
            source.rearm(1, 0, 1)
        with pytest.raises(UsageError, match=f"block has {npages}"):
            source.rearm(0, npages - 1, 2)
        source.rearm(0, npages, 0)


def test_the_kernel_refusing_is_a_guest_error() -> None:
    guest = CommandedGuest("log")
    guest.vm.dirty_start()  # behind the source's back
    with pytest.raises(GuestError, match="could not start"):
        guest.source.start()
    guest.vm.close()

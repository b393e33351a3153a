# SPDX-License-Identifier: Apache-2.0
"""The guest inside a holder: its phase, what each request does to it, what a lost mover does to it.

No sockets here: ``Hosted.handle()`` takes a request and gives a reply, ``mover_gone()`` is called
when the mover's connection drops. One thread.

    EMPTY --Prepare--> PREPARED --Start--> RUNNING <--Resume-- LOADED <--LoadState-- EMPTY
                                           |     ^
                                       Pause     Resume, or the mover vanished
                                           v     |
                                           PAUSED --Hold--> HELD --Resume--> RUNNING

A guest that never ran here is never started by a lost mover: its memory may be half a guest's.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np

from vmth.errors import GuestError, StreamError, UsageError, VmthError
from vmth.guest import CanNote, CanPeek, DirtySource
from vmth.guests import bystander
from vmth.guests import requests as rq
from vmth.guests.content import ContentSpec, fill
from vmth.guests.machine import Machine
from vmth.guests.memory import BlockPlan, GuestMemory
from vmth.guests.schedule import Program, Workload, install, plan
from vmth.types import Bitmap, bitmap_words

__all__ = ["Hosted", "MakeMachine", "Phase", "make_machine"]

MakeMachine = Callable[[str, GuestMemory, str, int], Machine]

#: Dirty sources whose fetch re-arms: the mover is told that it need not ask.
REARMED_BY_FETCH = frozenset({"uffd-wp"})


class Phase(enum.Enum):
    EMPTY = "empty"
    PREPARED = "prepared"
    LOADED = "loaded"
    RUNNING = "running"
    PAUSED = "paused"
    HELD = "held"


def make_machine(kind: str, memory: GuestMemory, dirty_source: str, vcpus: int = 1) -> Machine:
    """UsageError for an unknown kind or dirty source, or too many vCPUs for it; GuestError where
    this host cannot run it."""
    if kind == "process":
        from vmth.guests.process_machine import ProcessMachine

        if vcpus != 1:
            raise UsageError(f"{vcpus} vCPUs: the process guest has one")
        return ProcessMachine(memory)
    if kind == "kvm":
        from vmth.guests.kvm_machine import KvmMachine

        machine: Machine = KvmMachine(memory, dirty=dirty_source, vcpus=vcpus)
        return machine
    raise UsageError(f"guest kind {kind!r}: kvm or process")


class _SharedBitmaps:
    """One memfd a block: the holder ORs dirty pages in, the mover takes them out."""

    def __init__(self, page_counts: list[int]) -> None:
        self.fds: list[int] = []
        self.arrays: list[Bitmap] = []
        for npages in page_counts:
            nbytes = max(1, bitmap_words(npages)) * 8
            fd = os.memfd_create("vmth-dirty", os.MFD_CLOEXEC)
            self.fds.append(fd)
            os.ftruncate(fd, nbytes)
            self.arrays.append(np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint64))

    def clear(self) -> None:
        for array in self.arrays:
            array[:] = 0

    def close(self) -> None:
        self.arrays.clear()
        while self.fds:
            os.close(self.fds.pop())


class Hosted:
    """One guest, its memory and its dirty tracking. Raises what making the machine raises; then
    nothing is left behind."""

    def __init__(self, setup: rq.Setup, factory: MakeMachine = make_machine) -> None:
        self.kind = setup.kind
        self.dirty_source = setup.dirty_source
        self.phase = Phase.EMPTY
        self.ever_ran = False
        self.arrived = False
        self._program: Program | None = None
        self._source: DirtySource | None = None
        self._bitmaps: _SharedBitmaps | None = None
        self._memory = GuestMemory(
            [BlockPlan(row.idstr, row.gpa, row.length_bytes) for row in setup.blocks]
        )
        try:
            self._machine = factory(setup.kind, self._memory, setup.dirty_source, setup.vcpus)
        except BaseException:
            self._memory.close()
            raise
        self._handlers: dict[type, Callable[..., tuple[rq.Reply, list[int]]]] = {
            rq.Prepare: self._prepare,
            rq.Start: self._start,
            rq.Pause: self._pause,
            rq.Resume: self._resume,
            rq.PauseAtBeat: self._pause_at_beat,
            rq.SaveState: self._save_state,
            rq.LoadState: self._load_state,
            rq.Report: self._report,
            rq.Throttle: self._throttle,
            rq.VcpuDirty: self._vcpu_dirty,
            rq.Hold: self._hold,
            rq.Memory: self._hand_out_memory,
            rq.DirtyStart: self._dirty_start,
            rq.DirtyFetch: self._dirty_fetch,
            rq.DirtyPeek: self._dirty_peek,
            rq.DirtyRearm: self._dirty_rearm,
            rq.DirtyStop: self._dirty_stop,
        }

    @property
    def running(self) -> bool:
        """Was it last told to run? (It may have crashed since: ``status()`` knows.)"""
        return self.phase is Phase.RUNNING

    @property
    def rows(self) -> list[rq.BlockRow]:
        return [
            rq.BlockRow(block.idstr, block.gpa, block.used_length) for block in self._machine.blocks
        ]

    @property
    def vcpus(self) -> int:
        return self._machine.vcpus

    def handle(self, request: rq.Request) -> tuple[rq.Reply, list[int]]:
        """The reply, and the file descriptors that go with it (they stay the holder's). Never
        raises: what fails becomes ``Failed`` and the guest is as it was, unless the text says
        otherwise."""
        handler = self._handlers.get(type(request))
        if handler is None:
            return rq.Failed("usage", f"{type(request).__name__} is not for a guest"), []
        try:
            return handler(request)
        except UsageError as error:
            return rq.Failed("usage", str(error)), []
        except StreamError as error:
            return rq.Failed("stream", str(error)), []
        except VmthError as error:
            return rq.Failed("guest", str(error)), []
        except Exception as error:
            return rq.Failed("guest", f"{type(error).__name__}: {error}"), []

    def status(self, mover_attached: bool) -> rq.StatusReport:
        beats, problem = 0, ""
        try:
            beats = self._machine.beat_report().beats
        except VmthError as error:
            problem = str(error)
        return rq.StatusReport(
            kind=self.kind,
            phase=self.phase.value,
            running=self.running and not problem,
            problem=problem,
            ever_ran=self.ever_ran,
            arrived=self.arrived,
            beats=beats,
            mover_attached=mover_attached,
            memory_bytes=self._memory.total_bytes,
            pid=os.getpid(),
        )

    def mover_gone(self) -> None:
        """Dirty tracking ends, the throttle is let go, a guest that was paused but not held runs
        again. What fails is said on stderr: nobody else is there to be told."""
        self._end_tracking()
        if self.phase in (Phase.RUNNING, Phase.PAUSED):
            with self._complaining("throttle"):
                self._machine.throttle(0)
        if self.phase is Phase.PAUSED:
            with self._complaining("resume"):
                self._run(self._machine.resume)

    def close(self) -> None:
        """End the guest and free everything. Idempotent."""
        self._end_tracking()
        with self._complaining("close"):
            self._machine.close()
        if self._bitmaps is not None:
            self._bitmaps.close()
        self._memory.close()

    # ---- requests, in the order of a guest's life ----------------------------------------------

    def _prepare(self, request: rq.Prepare) -> tuple[rq.Reply, list[int]]:
        self._require("prepare", Phase.EMPTY)
        content = ContentSpec.parse(request.content)
        program = plan(
            Workload(
                kind=request.workload,
                rate_bps=request.rate_bps,
                working_set_bytes=request.working_set_bytes,
                seed=request.seed,
                jump=request.jump,
            ),
            self._memory.blocks[0].used_length,
        )
        report = fill(
            self._memory,
            content,
            request.seed,
            first_byte=program.data_gpa,
            counter_pages=program.counter_pages(self._memory.blocks[0].npages),
        )
        install(program, self._memory.views[0])
        bystander.install(self._memory.views[0], self._machine.vcpus)
        self._program = program
        self.phase = Phase.PREPARED
        return rq.Prepared(
            pages=report.pages,
            dup_distance_bytes=report.dup_distance_bytes,
            files_read=report.files_read,
            file_pages_repeated=report.file_pages_repeated,
            rate_asked_bps=program.rate_asked_bps,
            writes_per_beat=program.control.writes_per_beat,
            working_set_pages=program.working_set_pages,
        ), []

    def _start(self, request: rq.Start) -> tuple[rq.Reply, list[int]]:
        self._require("start", Phase.PREPARED)
        assert self._program is not None
        paces = self._program.paces
        self._run(lambda: self._machine.start_fresh(paces))
        return rq.Ack(), []

    def _load_state(self, request: rq.LoadState) -> tuple[rq.Reply, list[int]]:
        self._require("load a state", Phase.EMPTY, Phase.LOADED)
        self._machine.load_state(request.version, request.data)
        self.phase = Phase.LOADED
        self.arrived = True
        return rq.Ack(), []

    def _resume(self, request: rq.Resume) -> tuple[rq.Reply, list[int]]:
        self._require("resume", Phase.LOADED, Phase.PAUSED, Phase.HELD, Phase.RUNNING)
        if not self.running:
            self._run(self._machine.resume)
        return rq.Ack(), []

    def _pause(self, request: rq.Pause) -> tuple[rq.Reply, list[int]]:
        if not self.running:
            return rq.Was(False), []
        was_running = self._machine.pause()
        self.phase = Phase.PAUSED
        return rq.Was(was_running), []

    def _pause_at_beat(self, request: rq.PauseAtBeat) -> tuple[rq.Reply, list[int]]:
        self._require("pause at a beat", Phase.RUNNING, Phase.PAUSED, Phase.HELD)
        stands = self._machine.pause_at_beat(request.timeout_ns)
        if stands and self.running:
            self.phase = Phase.PAUSED
        return rq.Was(stands), []

    def _hold(self, request: rq.Hold) -> tuple[rq.Reply, list[int]]:
        self._require("hold", Phase.PAUSED, Phase.HELD)
        self.phase = Phase.HELD
        return rq.Ack(), []

    def _save_state(self, request: rq.SaveState) -> tuple[rq.Reply, list[int]]:
        self._require("save the state", Phase.PAUSED, Phase.HELD)
        version, data = self._machine.save_state()
        return rq.Saved(version, data), []

    def _report(self, request: rq.Report) -> tuple[rq.Reply, list[int]]:
        report = self._machine.beat_report()
        return rq.Reported(
            beats=report.beats,
            first_beat_at_ns=report.first_beat_at_ns,
            last_beat_at_ns=report.last_beat_at_ns,
            max_gap_ns=report.max_gap_ns,
            running_ns=report.running_ns,
            out_of_order=report.out_of_order,
            other_beats=list(report.other_beats),
        ), []

    def _throttle(self, request: rq.Throttle) -> tuple[rq.Reply, list[int]]:
        if len(request.percents) == 1:
            self._machine.throttle(request.percents[0])
        else:
            self._machine.throttle_vcpus(request.percents)
        return rq.Ack(), []

    def _vcpu_dirty(self, request: rq.VcpuDirty) -> tuple[rq.Reply, list[int]]:
        return rq.VcpuPages(list(self._machine.vcpu_dirty_pages())), []

    def _hand_out_memory(self, request: rq.Memory) -> tuple[rq.Reply, list[int]]:
        return rq.Ack(), list(self._memory.fds)

    # ---- dirty tracking ------------------------------------------------------------------------

    def _dirty_start(self, request: rq.DirtyStart) -> tuple[rq.Reply, list[int]]:
        if self._source is not None:
            raise UsageError("dirty tracking is already on: stop it first")
        if self._bitmaps is None:
            self._bitmaps = _SharedBitmaps([block.npages for block in self._machine.blocks])
        self._bitmaps.clear()
        source = self._machine.dirty_source(self.dirty_source)
        try:
            source.start()
        except BaseException:
            source.stop()
            raise
        self._source = source
        rearm = self.dirty_source not in REARMED_BY_FETCH
        return rq.DirtyStarted(rearm=rearm), list(self._bitmaps.fds)

    def _dirty_fetch(self, request: rq.DirtyFetch) -> tuple[rq.Reply, list[int]]:
        source = self._tracking()
        assert self._bitmaps is not None
        source.fetch(self._bitmaps.arrays)
        notes = list(source.notes()) if isinstance(source, CanNote) else []
        return rq.DirtyFetched(notes), []

    def _dirty_peek(self, request: rq.DirtyPeek) -> tuple[rq.Reply, list[int]]:
        source = self._tracking()
        assert self._bitmaps is not None
        known = isinstance(source, CanPeek) and source.peek(self._bitmaps.arrays)
        return rq.DirtyPeeked(known), []

    def _dirty_rearm(self, request: rq.DirtyRearm) -> tuple[rq.Reply, list[int]]:
        source = self._tracking()
        blocks = self._machine.blocks
        if request.block >= len(blocks):
            raise UsageError(f"block {request.block}: this guest has {len(blocks)}")
        npages = blocks[request.block].npages
        if request.page + request.npages > npages:
            raise UsageError(
                f"pages {request.page} + {request.npages} of block {request.block}: it has {npages}"
            )
        source.rearm(request.block, request.page, request.npages)
        return rq.Ack(), []

    def _dirty_stop(self, request: rq.DirtyStop) -> tuple[rq.Reply, list[int]]:
        source, self._source = self._source, None
        if source is not None:
            source.stop()
        return rq.Ack(), []

    # ---- helpers -------------------------------------------------------------------------------

    def _require(self, verb: str, *phases: Phase) -> None:
        if self.phase not in phases:
            allowed = " or ".join(phase.value for phase in phases)
            raise UsageError(f"cannot {verb}: the guest is {self.phase.value}, not {allowed}")

    def _run(self, begin: Callable[[], None]) -> None:
        """``begin`` lets the vCPUs run. If it raises, the guest is paused as it was, and whether a
        vCPU ran nevertheless is what the machine says."""
        try:
            begin()
        except BaseException:
            self.ever_ran = self._was_running() or self.ever_ran
            raise
        self.ever_ran = True
        self.phase = Phase.RUNNING

    def _was_running(self) -> bool:
        """Pause; True also when that cannot be known."""
        try:
            return self._machine.pause()
        except VmthError:
            return True

    def _tracking(self) -> DirtySource:
        if self._source is None:
            raise GuestError("dirty tracking is not on")
        return self._source

    def _end_tracking(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with self._complaining("stop dirty tracking"):
                source.stop()

    @contextlib.contextmanager
    def _complaining(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            print(f"vmth holder {os.getpid()}: {what}: {error}", file=sys.stderr, flush=True)

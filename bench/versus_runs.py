# SPDX-License-Identifier: Apache-2.0
"""One move of one guest, by QEMU itself or by vmth, over a given link: what it took."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from versus_guest import VersusQemu, firmware, make_memory
from versus_link import Link

from vmth.errors import VmthError
from vmth.guests.schedule import Workload
from vmth.qemu.qmp import Qmp, QmpEvent

#: A guest runs so long before it is moved: its working set has then been written once or more.
WARM_S = 3.0
DOWNTIME_LIMIT_MS = 300
#: Memory that a run takes, times the guest's: both ends, and something to spare.
TAKEN = 3
#: Another guest with as many files as the standard mix has.
SIBLING = "zero=25,files=35,random=40"
#: More than any guest here can dirty.
UNPACED_BPS = 1_600_000_000
PORT = 47440


@dataclass(frozen=True, slots=True)
class Case:
    """What is moved. ``rate_bps`` is of dirtied pages; times out after ``limit_s``."""

    name: str
    memory_bytes: int
    content: str
    workload: str = "idle"
    rate_bps: int = 0
    working_set_bytes: int = 0
    jump_s: float = 0.0  #: from then on it writes as fast as it can; of the migration's time
    limit_s: float = 60.0
    seed: int = 20260101

    def guest_workload(self) -> Workload:
        return Workload(
            kind=self.workload,
            rate_bps=self.rate_bps,
            working_set_bytes=self.working_set_bytes,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times in seconds; ``wire_bytes`` as the link's device counted them, by the mover's own count
    on loopback; CPU seconds of both ends together, without the guest's vCPU."""

    converged: bool
    total_s: float
    downtime_s: float
    wire_bytes: int
    cpu_s: float
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QemuMode:
    """Capabilities and parameters of one way of QEMU's own."""

    name: str
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


def device_bytes(link: Link) -> int:
    """Bytes sent by the source host's device so far; 0 on loopback."""
    if not link.source:
        return 0
    told = subprocess.run(
        [*link.source, "cat", "/sys/class/net/va/statistics/tx_bytes"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(told.stdout)


def touch(case: Case) -> None:
    """Write to as much memory as a run will take, and free it: or a hypervisor below this machine
    gives it out page by page while the run is timed. After all that is made ready beforehand, which
    takes memory too."""
    nbytes = TAKEN * case.memory_bytes
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for at in range(0, nbytes, mmap.PAGESIZE):
            memory[at] = 1


# -- QEMU itself


@contextlib.contextmanager
def _pair(
    case: Case, link: Link, binary: Sequence[str], shared: bool = False
) -> Iterator[tuple[VersusQemu, VersusQemu]]:
    """``shared``: the destination's memory can be written from outside."""
    touch(case)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="versus-rom-")))
        rom = firmware(folder)
        ends = []
        for inside, incoming in ((link.source, False), (link.destination, True)):
            end = VersusQemu(
                binary,
                case.memory_bytes,
                rom,
                inside=inside,
                incoming=incoming,
                shared=shared and incoming,
            )
            stack.callback(end.close)
            ends.append(end)
        memory = make_memory(case.memory_bytes, case.content, case.guest_workload(), case.seed)
        ends[0].write(memory)
        memory.close()
        yield ends[0], ends[1]


def _set(qmp: Qmp, mode: QemuMode, parameters: Mapping[str, Any]) -> None:
    states = [{"capability": name, "state": True} for name in ("events", *mode.capabilities)]
    qmp.execute("migrate-set-capabilities", {"capabilities": states})
    qmp.execute("migrate-set-parameters", {**mode.parameters, **parameters})


def run_qemu(case: Case, link: Link, mode: QemuMode, binary: Sequence[str]) -> Outcome:
    """Precopy with return path and a limit of 300 ms; a guest that does not converge in the case's
    time is cancelled and runs on."""
    with _pair(case, link, binary) as (source, destination):
        common = {"downtime-limit": DOWNTIME_LIMIT_MS, "max-bandwidth": 1 << 34}
        _set(destination.qmp, mode, {})
        _set(
            source.qmp,
            QemuMode(mode.name, ("return-path", *mode.capabilities), mode.parameters),
            common,
        )
        stops: list[float] = []
        resumes: list[float] = []
        source.qmp.on_event(lambda e: stops.append(e.time_ns / 1e9) if e.name == "STOP" else None)
        destination.qmp.on_event(
            lambda e: resumes.append(e.time_ns / 1e9) if e.name == "RESUME" else None
        )
        destination.qmp.execute("migrate-incoming", {"uri": f"tcp:{link.address}:{PORT}"})
        source.qmp.execute("cont")
        time.sleep(WARM_S)
        before = device_bytes(link)
        cpu = source.thread_seconds() + destination.thread_seconds()
        destination.qmp.execute("cont")  # runs as soon as it has everything
        began, began_at = time.monotonic(), time.time()
        source.qmp.execute("migrate", {"uri": f"tcp:{link.address}:{PORT}"})
        with _jump(case, source):
            info = _await_end(source.qmp, began + case.limit_s)
        converged = info["status"] == "completed"
        while converged and not resumes:
            time.sleep(0.001)
        total_s = (resumes[-1] - began_at) if converged else time.monotonic() - began
        ram = info.get("ram", {})
        return Outcome(
            converged=converged,
            total_s=total_s,
            downtime_s=resumes[-1] - stops[-1] if converged else 0.0,
            wire_bytes=device_bytes(link) - before
            if link.source
            else int(ram.get("transferred", 0)),
            cpu_s=source.thread_seconds() + destination.thread_seconds() - cpu,
            detail={
                "passes": ram.get("dirty-sync-count"),
                "dirty_pages_per_s": ram.get("dirty-pages-rate"),
                "throttle_percent": info.get("cpu-throttle-percentage", 0),
            },
        )


@contextlib.contextmanager
def _jump(case: Case, source: VersusQemu) -> Iterator[None]:
    timer = threading.Timer(case.jump_s, source.jump)
    if case.jump_s:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if case.jump_s:
            timer.join()


def _await_end(qmp: Qmp, deadline: float) -> dict[str, Any]:
    cancelled = False
    while True:
        info: dict[str, Any] = qmp.execute("query-migrate")
        if info.get("status") in ("completed", "failed", "cancelled"):
            return info
        if not cancelled and time.monotonic() > deadline:
            with contextlib.suppress(VmthError):
                qmp.execute("migrate_cancel")
            cancelled = True
        time.sleep(0.005)


# -- vmth between two QEMUs


def run_qemu_path(case: Case, link: Link, binary: Sequence[str], land: str) -> Outcome:
    """``vmth migrate`` and ``vmth receive``, timed by the QEMUs' own events as ``run_qemu`` is."""
    vmth = (sys.executable, "-P", "-m", "vmth")
    uri = f"tcp:{link.address}:{PORT}"
    with (
        _pair(case, link, binary, shared=land == "memory") as (source, destination),
        tempfile.TemporaryDirectory(prefix="versus-state-") as state,
    ):
        times: dict[str, float] = {}

        def note(event: QmpEvent, key: str) -> None:
            times.setdefault(key, event.time_ns / 1e9)

        source.qmp.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "events", "state": True}]},
        )
        source.qmp.on_event(
            lambda e: (
                note(e, "setup")
                if e.name == "MIGRATION" and e.data.get("status") == "setup"
                else None
            )
        )
        source.qmp.on_event(lambda e: note(e, "stop") if e.name == "STOP" else None)
        destination.qmp.on_event(lambda e: note(e, "resume") if e.name == "RESUME" else None)
        source.qmp.execute("cont")
        time.sleep(WARM_S)
        receiver = subprocess.Popen(
            [
                *(*link.destination, *vmth, "receive", uri, "--insecure", "--json"),
                *("--qmp", str(destination.vmth_path), "--land", land),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "VMTH_STATE_DIR": f"{state}/b"},
        )
        try:
            _await_listener(link)
            before = device_bytes(link)
            cpu = source.thread_seconds() + destination.thread_seconds()
            with _jump(case, source):
                sender = subprocess.run(
                    [
                        *(*link.source, *vmth, "migrate", uri, "--insecure", "--json"),
                        *("--qmp", str(source.vmth_path), "--channels", "2"),
                        *("--downtime-limit", f"{DOWNTIME_LIMIT_MS}ms", "--on-success", "keep"),
                        *("--timeout", f"{case.limit_s}s", "--on-stall", "cancel"),
                        *("--delta-cache", "256MiB"),  # as xbzrle's: more than is rewritten
                    ],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    check=False,
                    env={**os.environ, "VMTH_STATE_DIR": f"{state}/a"},
                )
            told = json.loads(sender.stdout)
            received, _ = receiver.communicate(timeout=60)
        finally:
            receiver.kill()
            receiver.wait()
        cpu = source.thread_seconds() + destination.thread_seconds() - cpu
        other = json.loads(received) if received.strip() else {}
        converged = told["exit_code"] == 0
        return Outcome(
            converged=converged,
            total_s=times["resume"] - times["setup"] if converged else case.limit_s,
            downtime_s=times["resume"] - times["stop"] if converged else 0.0,
            wire_bytes=device_bytes(link) - before
            if link.source
            else int(told.get("wire_bytes") or 0),
            cpu_s=cpu + _mover_seconds(told, "source") + _mover_seconds(other, "destination"),
            detail=_detail(told),
        )


# -- vmth's core: the guest of the demo, whose memory the mover maps


def run_core(
    case: Case, link: Link, options: Sequence[str], receive_options: Sequence[str] = ()
) -> Outcome:
    """``vmth demo --send`` and ``--receive`` in the two hosts."""
    python = (sys.executable, "-P", "-m", "vmth", "demo", "--json", "--insecure")
    touch(case)
    with tempfile.TemporaryDirectory(prefix="versus-state-") as state:
        uri = f"tcp:{link.address}:{PORT}"
        receiver = subprocess.Popen(
            [
                *(*link.destination, *python, "--receive", uri, "--state-dir", f"{state}/b"),
                *receive_options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        before = device_bytes(link)
        try:
            _await_listener(link)
            sender = subprocess.run(
                [
                    *(*link.source, *python, "--send", uri, "--state-dir", f"{state}/a"),
                    *("--memory", str(case.memory_bytes), "--content", case.content),
                    *("--workload", case.workload, "--seed", str(case.seed)),
                    *("--dirty-rate", f"{case.rate_bps}", "--on-stall", "cancel"),
                    *("--working-set", f"{case.working_set_bytes}"),
                    *("--timeout", f"{case.limit_s}s", "--warm-up", f"{WARM_S}s"),
                    *(
                        ("--phase-jump", f"{WARM_S + case.jump_s}s:{UNPACED_BPS}")
                        if case.jump_s
                        else ()
                    ),
                    *("--downtime-limit", f"{DOWNTIME_LIMIT_MS}ms", *options),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            told = json.loads(sender.stdout)
            received, _ = receiver.communicate(timeout=60)
        finally:
            receiver.kill()
            receiver.wait()
        other = json.loads(received) if received.strip() else {}
        converged = told["exit_code"] == 0
        return Outcome(
            converged=converged,
            total_s=told["total_time_ms"] / 1e3 if converged else case.limit_s,
            downtime_s=(told.get("downtime_ms") or 0) / 1e3,
            wire_bytes=device_bytes(link) - before if link.source else told.get("wire_bytes", 0),
            cpu_s=_mover_seconds(told, "source") + _mover_seconds(other, "destination"),
            detail=_detail(told),
        )


def run_core_warm(case: Case, link: Link, options: Sequence[str]) -> Outcome:
    """The destination has the memory that the same guest, run before, left there: all but what the
    workload has written since is found in that file. Keeping and indexing it is not timed."""
    workload = (
        *("--workload", case.workload, "--dirty-rate", f"{case.rate_bps}"),
        *("--working-set", f"{case.working_set_bytes}"),
    )
    return _run_core_beside(case, link, options, case.content, workload)


def run_core_beside_sibling(case: Case, link: Link, options: Sequence[str]) -> Outcome:
    """The destination has the memory of a guest that has the same files (one seed chooses them and
    their order) at other places, and nothing else in common. Keeping and indexing it is not timed.
    """
    return _run_core_beside(case, link, options, SIBLING, ("--workload", "idle"))


def _run_core_beside(
    case: Case, link: Link, options: Sequence[str], content: str, workload: Sequence[str]
) -> Outcome:
    vmth = (sys.executable, "-P", "-m", "vmth")
    with tempfile.TemporaryDirectory(prefix="versus-warm-", dir="/var/tmp") as folder:
        kept = f"{folder}/memory"
        _quietly(
            *(*vmth, "demo", "--memory", str(case.memory_bytes), "--content", content),
            *("--seed", str(case.seed), "--warm-up", "0s", *workload),
            *("--run-on", "0s", "--mode", "cold", "--forms", "zero", "--keep-image", kept),
        )
        _quietly(*vmth, "index", kept)
        os.sync()  # or the disk is written in the time that is measured
        return run_core(case, link, options, ("--reuse", kept))


def run_core_from_disk(case: Case, link: Link, options: Sequence[str]) -> Outcome:
    """The destination has the disks that the guest's files came from: file systems of which the
    guest's memory has some files, as its page cache would. Making and indexing them is not timed.
    """
    reused = [word for image in _disk_images() for word in ("--reuse", image)]
    return run_core(case, link, options, reused)


@functools.cache
def _disk_images() -> Sequence[str]:
    """Raw ext4 images of the folders that ``files`` content is read from, with their indexes; made
    once, removed at exit."""
    mkfs = shutil.which("mke2fs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if mkfs is None:
        raise RuntimeError("mke2fs (e2fsprogs) is not installed")
    images = tempfile.mkdtemp(prefix="versus-disk-", dir="/var/tmp")
    atexit.register(shutil.rmtree, images, ignore_errors=True)
    made: list[str] = []
    folders = dict.fromkeys(map(os.path.realpath, (sysconfig.get_path("stdlib"), "/usr/lib")))
    for folder in folders:
        told = subprocess.run(
            ("du", "-sk", folder), check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        blocks = int(told.stdout.split()[0]) // 4 * 5 // 4 + 4096  # with room for the inodes
        image = f"{images}/{len(made)}.img"
        _quietly(mkfs, "-q", "-t", "ext4", "-b", "4096", "-d", folder, image, str(blocks))
        made.append(image)
    _quietly(sys.executable, "-P", "-m", "vmth", "index", *made)  # one key for all
    os.sync()  # as in run_core_warm
    return made


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _detail(told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "verified": told.get("verified"),
        "rounds": len(told.get("rounds", ())),
        "exit_code": told["exit_code"],
        "error": told.get("error"),
        "fallbacks": told.get("fallbacks", []),
        "forecast": told.get("forecast"),
        "downtime_parts_ms": told.get("downtime_parts_ms"),
    }


def _mover_seconds(told: Mapping[str, Any], side: str) -> float:
    mover = (told.get("movers") or {}).get(side) or {}  # null: it does not know the other
    return float(mover.get("cpu_seconds", 0.0))


def _await_listener(link: Link) -> None:
    """Until something listens at the destination."""
    command = [*link.destination, shutil.which("ss") or "ss", "-ltn"]
    wanted = f":{PORT} "
    for _ in range(400):
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        if wanted in told.stdout:
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens at port {PORT} of {socket.gethostname()}")

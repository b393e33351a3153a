# SPDX-License-Identifier: Apache-2.0
"""Starts holders and finds them again: the way to a shipped guest.

spawn_source()       a filled, running guest       (the demo's and the tests' source)
spawn_destination()  an empty, stopped one         (what ``make_guest`` of ``vmth.receive`` returns)
attach()             the guest of a holder whose mover went
choose_guest()       "kvm" where /dev/kvm can run it, else "process", and why
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmth.child import module_command
from vmth.errors import GuestError, RefusedError, UsageError
from vmth.guests import requests as rq
from vmth.guests.client import HolderConnection, HolderGoneError, HolderGuest, reap_left_alone
from vmth.guests.content import DEFAULT_CONTENT, ContentSpec
from vmth.guests.machine import VCPUS_MAX
from vmth.guests.memory import BlockPlan, plan_blocks
from vmth.guests.schedule import Workload
from vmth.types import RamBlock

__all__ = [
    "DIRTY_SOURCES",
    "ReadyHolder",
    "attach",
    "available_memory_bytes",
    "check_vcpus",
    "choose_guest",
    "find",
    "spawn_destination",
    "spawn_source",
]

#: The dirty sources of each kind of guest, its default first.
DIRTY_SOURCES = {"kvm": ("kvm-log", "kvm-ring"), "process": ("uffd-wp",)}

SPAWN_S = 60.0
#: What a holder needs beside the guest's memory.
HOLDER_BYTES = 64 << 20
LINGER_S = 600.0
HOLD_LINGER_S = 24 * 3600.0


def choose_guest(asked: str | None) -> tuple[str, str]:
    """(kind, reason). ``asked`` None: kvm where it runs, else process. RefusedError when "kvm" is
    asked for and cannot run; UsageError for another kind."""
    if asked is not None and asked not in DIRTY_SOURCES:
        raise UsageError(f"guest {asked!r}: one of {', '.join(DIRTY_SOURCES)}")
    if asked == "process":
        return "process", "asked for"
    from vmth.guests.kvm_machine import probe

    runs, reason = probe()
    if runs:
        return "kvm", reason
    if asked == "kvm":
        raise RefusedError(f"guest kvm: {reason}")
    return "process", f"no KVM here: {reason}"


def spawn_source(
    kind: str,
    memory_bytes: int,
    *,
    content: str = DEFAULT_CONTENT,
    workload: Workload | None = None,
    dirty_source: str | None = None,
    owned: bool = True,
    linger_s: float = LINGER_S,
    hold_linger_s: float = HOLD_LINGER_S,
    start: bool = True,
    vcpus: int = 1,
) -> tuple[HolderGuest, rq.Prepared]:
    """A guest with that content and workload, running unless ``start`` is False; and how its memory
    was filled. ``workload.seed`` seeds both.

    ``vcpus``: 1, of a KVM guest up to 8: all but the first are bystanders (bystander.py).
    ``owned``: it ends with this process (unless held); else it lives ``linger_s`` without a mover.
    UsageError for values outside their bounds, RefusedError without enough memory, GuestError when
    the holder fails; nothing is left over then.
    """
    workload = workload or Workload()
    blocks = plan_blocks(memory_bytes)
    ContentSpec.parse(content)
    source = _dirty_source(kind, dirty_source)
    _check_memory(memory_bytes)
    guest = _spawn(kind, blocks, source, owned, linger_s, hold_linger_s, vcpus=vcpus)
    try:
        prepared = guest.prepare(content, workload)
        if start:
            guest.start()
    except BaseException:
        guest.shutdown()
        raise
    return guest, prepared


def spawn_destination(
    kind: str,
    blocks: int | Sequence[RamBlock] | Sequence[BlockPlan],
    *,
    dirty_source: str | None = None,
    owned: bool = True,
    linger_s: float = LINGER_S,
    hold_linger_s: float = HOLD_LINGER_S,
    holder: ReadyHolder | None = None,
    vcpus: int = 1,
) -> HolderGuest:
    """An empty, stopped guest: of so many bytes, or with the block table of another. ``holder``: a
    process that is there already; once it holds a guest another one is started.

    RefusedError (its text begins with "memory") when this host or its cgroup has less memory left
    than the guest may need; otherwise as ``spawn_source``.
    """
    plans = plan_blocks(blocks) if isinstance(blocks, int) else [_plan_of(row) for row in blocks]
    source = _dirty_source(kind, dirty_source)
    _check_memory(sum(row.length_bytes for row in plans))
    return _spawn(kind, plans, source, owned, linger_s, hold_linger_s, holder, vcpus)


def attach(socket_path: str) -> HolderGuest:
    """Become the mover of the guest at ``socket_path``. HolderGoneError: nobody is there;
    GuestError: it has a mover already."""
    connection = HolderConnection.open(socket_path)
    try:
        attached, _ = connection.ask(rq.Attach(rq.HOLDER_PROTOCOL), rq.Attached)
    except BaseException:
        connection.close()
        raise
    return HolderGuest(connection, attached)


def find(detail: Mapping[str, str]) -> HolderGuest | None:
    """The guest that a journal's detail describes ("guest.socket", by ``describe()``), with us as
    its mover; None when there is no such holder any more. GuestError: it has a mover already, or
    does not answer."""
    path = detail.get("guest.socket", "")
    if not path:
        return None
    try:
        return attach(path)
    except HolderGoneError:
        if _listens(path):
            raise  # it lives and does not answer: its guest may be the only copy
        return None


def _listens(path: str) -> bool:
    """Does a process have that socket open?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def _plan_of(row: RamBlock | BlockPlan) -> BlockPlan:
    if isinstance(row, BlockPlan):
        return row
    return BlockPlan(row.idstr, row.gpa, row.used_length)


def _dirty_source(kind: str, asked: str | None) -> str:
    if kind not in DIRTY_SOURCES:
        raise UsageError(f"guest {kind!r}: one of {', '.join(DIRTY_SOURCES)}")
    names = DIRTY_SOURCES[kind]
    if asked is None:
        return names[0]
    if asked not in names:
        raise UsageError(f"dirty source {asked!r}: the {kind} guest has {', '.join(names)}")
    return asked


def check_vcpus(kind: str, vcpus: int) -> None:
    """UsageError for a number that this kind of guest cannot have."""
    most = VCPUS_MAX if kind == "kvm" else 1
    if not 1 <= vcpus <= most:
        allowed = f"1 to {most}" if most > 1 else "1"
        raise UsageError(f"vCPUs: received {vcpus} for the {kind} guest, allowed {allowed}")


class ReadyHolder:
    """A holder process that waits to be told what to hold, so that a guest that arrives does not
    wait for it to start. One guest's, or ``close()`` ends it. GuestError when it cannot start."""

    def __init__(self) -> None:
        reap_left_alone()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command, environment = module_command("vmth.guests.holder", str(theirs.fileno()))
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C is the mover's
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.connection = HolderConnection(ours, f"the holder with pid {self.process.pid}")
        self._taken = False

    def hold(self, setup: rq.Setup) -> HolderGuest:
        """Make the guest. Whatever it raises, the process is gone then."""
        self.connection.name = f"{setup.kind} guest's holder (pid {self.process.pid})"
        try:
            attached, _ = self.connection.ask(setup, rq.Attached, SPAWN_S)
            guest = HolderGuest(self.connection, attached, self.process)
        except BaseException:
            self.close()
            raise
        self._taken = True
        return guest

    @property
    def taken(self) -> bool:
        return self._taken

    def close(self) -> None:
        """End it unless it holds a guest. Idempotent."""
        if not self._taken:
            self._taken = True
            self.connection.close()
            self.process.kill()
            self.process.wait()


def _spawn(
    kind: str,
    blocks: Sequence[BlockPlan],
    dirty_source: str,
    owned: bool,
    linger_s: float,
    hold_linger_s: float,
    holder: ReadyHolder | None = None,
    vcpus: int = 1,
) -> HolderGuest:
    check_vcpus(kind, vcpus)
    if holder is None or holder.taken:
        holder = ReadyHolder()
    setup = rq.Setup(
        protocol=rq.HOLDER_PROTOCOL,
        kind=kind,
        dirty_source=dirty_source,
        blocks=[rq.BlockRow(row.idstr, row.gpa, row.length_bytes) for row in blocks],
        owner_pid=os.getpid() if owned else 0,
        linger_s=linger_s,
        hold_linger_s=hold_linger_s,
        vcpus=vcpus,
    )
    return holder.hold(setup)


# ---- memory of this host -------------------------------------------------------------------------


def _check_memory(memory_bytes: int) -> None:
    available, where = available_memory_bytes()
    needed = memory_bytes + HOLDER_BYTES
    if needed > available:
        raise RefusedError(
            f"memory: the guest needs {needed} bytes with its holder, {where} has {available} left"
        )


def available_memory_bytes(root: str = "/") -> tuple[int, str]:
    """(bytes, where): the least of MemAvailable and what each cgroup above us leaves. ``root``
    stands for / in tests."""
    best = _mem_available(Path(root, "proc/meminfo")), "this host"
    for folder in _cgroup_folders(root):
        left = _cgroup_left(folder)
        if left is not None and left < best[0]:
            best = left, f"cgroup {folder.name or '/'}"
    return best


def _mem_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise GuestError(f"{meminfo} has no MemAvailable")


def _cgroup_folders(root: str) -> list[Path]:
    """Our cgroup and those above it (v2, or the memory controller of v1)."""
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = Path(root, "sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            base = Path(root, "sys/fs/cgroup/memory")
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        folders += [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return folders


def _cgroup_left(folder: Path) -> int | None:
    """Limit minus what is used and cannot be reclaimed; None without a limit."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        return max(0, int(limit) - usage + _reclaimable(folder))
    return None


def _reclaimable(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split(None, 1) for line in lines if " " in line)
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))

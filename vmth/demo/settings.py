# SPDX-License-Identifier: Apache-2.0
"""What may be chosen for a demonstration. Plain data, checked where it is made; units in the
names."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from vmth.errors import UsageError
from vmth.guests.content import DEFAULT_CONTENT, ContentSpec
from vmth.guests.memory import plan_blocks
from vmth.guests.schedule import Workload
from vmth.guests.spawn import check_vcpus
from vmth.options import MigrateOptions
from vmth.reuse.warm import ReuseChoice

__all__ = ["DIRTY_SOURCES", "GUEST_KINDS", "ArrivalSettings", "DemoSettings", "new_seed"]

GUEST_KINDS = ("kvm", "process")
DIRTY_SOURCES = ("kvm-log", "kvm-ring", "uffd-wp")
_DEFAULT_RATE_BPS = 50_000_000


def new_seed() -> int:
    """Of a demonstration that was given none; 32 bits, so that it is easy to type again."""
    return secrets.randbits(32)


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The guest and how it is moved. ``guest`` and ``dirty_source`` empty: the best that this
    machine has. ``vcpus``: the first does the work, the others only count and beat.

    ``dirty_rate_bps`` None: 50 MB/s, and unpaced for the workload ``always``. ``warm_up_ns``: how
    long the guest runs before it is moved, ``run_on_ns``: and afterwards, before it is checked.
    """

    memory_bytes: int = 1 << 30
    guest: str = ""
    dirty_source: str = ""
    vcpus: int = 1
    workload: str = "zipf"
    dirty_rate_bps: int | None = None
    working_set_bytes: int = 0
    phase_jump: tuple[int, int] | None = None  #: (ns of guest running time, bytes/s)
    content: str = DEFAULT_CONTENT
    seed: int = field(default_factory=new_seed)
    warm_up_ns: int = 500_000_000
    run_on_ns: int = 500_000_000
    migrate: MigrateOptions = field(default_factory=MigrateOptions)
    reuse: ReuseChoice = field(default_factory=ReuseChoice)  #: at the destination
    job_socket: Path | None = None  #: at which the move is looked at and steered

    def __post_init__(self) -> None:
        plan_blocks(self.memory_bytes)
        ContentSpec.parse(self.content)
        self.guest_workload()
        _check_name("guest", self.guest, GUEST_KINDS)
        _check_name("dirty source", self.dirty_source, DIRTY_SOURCES)
        if self.guest == "process" and self.dirty_source.startswith("kvm"):
            raise UsageError(
                f"dirty source {self.dirty_source!r}: received for the process guest, "
                "allowed for it: uffd-wp"
            )
        if self.guest == "kvm" and self.dirty_source == "uffd-wp":
            raise UsageError(
                f"dirty source {self.dirty_source!r}: received for the kvm guest, allowed for it: "
                "kvm-log, kvm-ring"
            )
        if self.guest or self.vcpus != 1:
            check_vcpus(self.guest or "kvm", self.vcpus)
        _check_run_times(self.warm_up_ns, self.run_on_ns)

    def guest_workload(self) -> Workload:
        """What the guest will do. Raises UsageError."""
        rate_bps = self.dirty_rate_bps
        if rate_bps is None:
            rate_bps = 0 if self.workload == "always" else _DEFAULT_RATE_BPS
        return Workload(
            kind=self.workload,
            rate_bps=rate_bps,
            working_set_bytes=self.working_set_bytes,
            seed=self.seed,
            jump=self.phase_jump,
        )


@dataclass(frozen=True, slots=True)
class ArrivalSettings:
    """The destination's choices. ``guest`` empty: what the source says that it is."""

    guest: str = ""
    run_on_ns: int = 500_000_000
    reuse: ReuseChoice = field(default_factory=ReuseChoice)

    def __post_init__(self) -> None:
        _check_name("guest", self.guest, GUEST_KINDS)
        _check_run_times(self.run_on_ns)


def _check_name(what: str, name: str, allowed: tuple[str, ...]) -> None:
    if name and name not in allowed:
        raise UsageError(f"{what}: received {name!r}, allowed {', '.join(allowed)}")


def _check_run_times(*times_ns: int) -> None:
    for time_ns in times_ns:
        if not 0 <= time_ns <= 86_400_000_000_000:
            raise UsageError(f"run time: received {time_ns} ns, allowed 0 to a day")

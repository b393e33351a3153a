# SPDX-License-Identifier: Apache-2.0
"""How a source QEMU slows its guest down: by its dirty limit where it has one, else auto-converge.

QEMU's dirty limit (8.2 and later, KVM with its dirty ring) holds each vCPU to a rate of dirtied
pages: one that only reads is never slowed down. Auto-converge takes a share of the time of all.

The limits are set one vCPU at a time by QMP commands. QEMU's migration capability of the same name
stays off: with it QEMU sets one limit for all, after two passes that did not converge, and refuses
the commands.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from vmth.errors import RefusedError
from vmth.policy.interface import OnStall
from vmth.qemu.qmp import Qmp, QmpError

__all__ = [
    "Throttle",
    "ThrottleWay",
    "VcpuLimits",
    "choose_throttle",
    "limits_of",
    "put_limits_back",
    "shares",
]

MIB = 1 << 20
#: Before, a vCPU may look at limits while they are freed.
SAFE_FROM = (8, 2)
#: A vCPU that reaches so much of its limit would dirty more.
HUNGRY_FROM = 0.8
#: One that does not is left so much above what it dirties.
ROOM = 1.5
SHARES_ANEW_S = 2.0


class ThrottleWay(enum.Enum):
    """By what a guest is slowed down, if it is."""

    NONE = "none"
    AUTO_CONVERGE = "auto-converge"
    DIRTY_LIMIT = "dirty-limit"


@dataclass(frozen=True, slots=True)
class Throttle:
    way: ThrottleWay
    why_not_limit: str = ""  #: where auto-converge takes the place of the dirty limit


def choose_throttle(
    qmp: Qmp, capabilities: Mapping[str, bool], on_stall: OnStall, auto_converge: bool
) -> Throttle:
    """``auto_converge``: asked for by name. Nothing changes at QEMU. Raises RefusedError for a QEMU
    that cannot throttle although ``on_stall`` asks for it."""
    if auto_converge:
        return Throttle(ThrottleWay.AUTO_CONVERGE)
    if on_stall is not OnStall.THROTTLE:
        return Throttle(ThrottleWay.NONE)
    why_not = _why_no_limit(qmp)
    if not why_not:
        return Throttle(ThrottleWay.DIRTY_LIMIT)
    if "auto-converge" not in capabilities:
        raise RefusedError(
            f"on stall: received throttle, which this QEMU cannot: dirty limit: {why_not}; "
            "auto-converge: it does not know that"
        )
    return Throttle(ThrottleWay.AUTO_CONVERGE, why_not)


def _why_no_limit(qmp: Qmp) -> str:
    """Empty where vCPUs can be limited."""
    version = ".".join(map(str, qmp.version))
    if not qmp.has_command("set-vcpu-dirty-limit"):
        return f"QEMU {version} does not know it"
    if qmp.version < SAFE_FROM:
        return f"QEMU {version} may crash when its dirty limit ends, 8.2 does not"
    if limits_of(qmp):
        return ""
    try:
        # Lets go of limits that are not there; refused without KVM's dirty ring.
        qmp.execute("set-vcpu-dirty-limit", {"dirty-rate": 0})
    except QmpError as error:
        return error.description
    return ""


def limits_of(qmp: Qmp) -> list[tuple[int, int]]:
    """(vCPU, MiB/s) of all that are limited now."""
    return [(index, limit) for index, (limit, _) in _rows(qmp).items()]


def _rows(qmp: Qmp) -> dict[int, tuple[int, int]]:
    """By vCPU: (limit, present rate), MiB/s."""
    try:
        rows = qmp.execute("query-vcpu-dirty-limit")
    except QmpError:
        return {}
    return {
        int(row["cpu-index"]): (int(row["limit-rate"]), int(row["current-rate"])) for row in rows
    }


def put_limits_back(qmp: Qmp, limits: list[tuple[int, int]]) -> None:
    """Let all vCPUs go but those that were limited before us. Raises QmpError."""
    qmp.execute("cancel-vcpu-dirty-limit")
    for index, rate in limits:
        qmp.execute("set-vcpu-dirty-limit", {"cpu-index": index, "dirty-rate": rate})


def shares(total: int, now: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Of ``total`` for each vCPU, in MiB/s, at least 1. ``now``: (limit, rate) of each, limit 0
    where it has none. One that does not use what it has keeps a little more than it uses; the
    others share the rest evenly."""
    even = max(1, total // max(1, len(now)))
    given = {
        index: min(even, max(1, math.ceil(ROOM * rate)))
        for index, (limit, rate) in now.items()
        if limit and rate < HUNGRY_FROM * limit
    }
    hungry = [index for index in now if index not in given]
    if not hungry:  # what is left over is nobody's harm
        return dict.fromkeys(now, even)
    rest = max(1, (total - sum(given.values())) // len(hungry))
    return given | dict.fromkeys(hungry, rest)


class VcpuLimits:
    """The limits that we set at one QEMU. One thread at a time."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._total = 0
        self._before: list[tuple[int, int]] = []
        self._cpus: list[int] = []
        self._shared_s = 0.0

    def hold(self, total_bps: int) -> None:
        """All vCPUs together to so many bytes/s of dirtied pages, in steps of 1 MiB/s and at least
        that each. Raises QmpError."""
        if not self._total:
            self._before = limits_of(self._qmp)
            self._cpus = [int(row["cpu-index"]) for row in self._qmp.execute("query-cpus-fast")]
        rows = _rows(self._qmp) if self._total else {}  # those of others tell nothing of ours
        self._total = max(1, total_bps // MIB)
        self._share(rows)

    def share_anew(self) -> None:
        """By what each dirties now, which QEMU measures once a second; without effect sooner, and
        where nothing is held. Raises QmpError."""
        if self._total and time.monotonic() - self._shared_s >= SHARES_ANEW_S:
            self._share(_rows(self._qmp))

    def _share(self, rows: Mapping[int, tuple[int, int]]) -> None:
        self._shared_s = time.monotonic()
        now = {index: rows.get(index, (0, 0)) for index in self._cpus}
        for index, rate in shares(self._total, now).items():
            if rows.get(index, (0, 0))[0] != rate:
                self._qmp.execute("set-vcpu-dirty-limit", {"cpu-index": index, "dirty-rate": rate})

    def let_go(self) -> None:
        """Idempotent. Raises QmpError."""
        if self._total:
            put_limits_back(self._qmp, self._before)
            self._total = 0  # not before: an order that was not heard is given again

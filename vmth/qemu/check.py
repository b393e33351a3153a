# SPDX-License-Identifier: Apache-2.0
"""Can this QEMU's guest move into that QEMU? ``compare`` judges the facts of both, ``check_pair``
asks two monitors of one host.

Refused is what QEMU would refuse at the end of the migration, after all the bytes, or what would
give the guest another CPU, other devices or another disk than it runs on. A warning is what may
work. Both say the way out.
"""

from __future__ import annotations

import enum
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from vmth.errors import RefusedError
from vmth.qemu.facts import Disk, Facts, gather
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import is_over
from vmth.units import format_size

__all__ = [
    "Finding",
    "Level",
    "check_pair",
    "check_source",
    "check_values",
    "compare",
    "finding_lines",
    "raise_if_refused",
]

#: 5.2, 7.2, 10.0 and 11.1 are tried; those between are taken to be like them.
OLDEST, NEWEST = (5, 2), (11, 99)
#: From this version on, a busy guest under TCG keeps all its writes.
TCG_SOUND = (9, 0)
NIL_UUID = "00000000-0000-0000-0000-000000000000"
#: File systems that several hosts can have mounted at once.
NETWORK_FILESYSTEMS = frozenset(
    """nfs nfs4 cifs smb3 ceph glusterfs fuse.glusterfs fuse.ceph gfs2 ocfs2 gpfs lustre beegfs
    pvfs2 orangefs afs 9p""".split()  # noqa: SIM905
)
#: Names of storage that every host reaches in the same way, and what in them is one host's own.
NETWORK_PROTOCOLS = ("gluster", "http", "iscsi:", "nbd:", "nfs:", "rbd:", "ssh:")
OWN_ADDRESSES = ("localhost", "127.", "[::1]", "unix:")
SHOWN = 6


class Level(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """One subject's judgement: printable text only, since half of it may come from a peer."""

    level: Level
    subject: str
    detail: str
    way_out: str = ""


def check_pair(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> CheckReport:
    """Ask the QEMUs at two monitors of this host, one after the other. Raises as ``Qmp`` does."""
    with Qmp(source) as qmp:
        source_facts = gather(qmp)
    with Qmp(destination) as qmp:
        destination_facts = gather(qmp)
    return CheckReport(source_facts, destination_facts, compare(source_facts, destination_facts))


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What both are, and what that means."""

    source: Facts
    destination: Facts
    findings: list[Finding]

    @property
    def refused(self) -> bool:
        return any(finding.level is Level.REFUSED for finding in self.findings)


def compare(source: Facts, destination: Facts) -> list[Finding]:
    """Every subject, in a fixed order. Pure."""
    return [
        Finding(level, subject, _printable(detail), _printable(way_out))
        for subject, judge in _JUDGES
        for level, detail, way_out in judge(source, destination)
    ]


def check_source(source: Facts) -> list[Finding]:
    """What can be said of the source alone, before anybody is asked. Pure."""
    return [
        Finding(level, subject, _printable(detail), _printable(way_out))
        for subject, judge in (("state", _source_states), ("blockers", _blockers))
        for level, detail, way_out in judge(source)
    ]


def raise_if_refused(findings: Iterable[Finding]) -> None:
    """RefusedError that names every refusal and its way out."""
    refused = [
        f"{finding.subject}: {finding.detail}" + (f" ({finding.way_out})" * bool(finding.way_out))
        for finding in findings
        if finding.level is Level.REFUSED
    ]
    if refused:
        raise RefusedError("; ".join(refused))


def check_values(report: CheckReport) -> dict[str, Any]:
    """The report as the object of ``--json``."""
    return {
        "refused": report.refused,
        "findings": [asdict(finding) for finding in report.findings],
        "source": msgspec.to_builtins(report.source),
        "destination": msgspec.to_builtins(report.destination),
    }


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The findings for people: a table, and the way out below what needs one."""
    width = max((len(finding.subject) for finding in findings), default=0)
    for finding in findings:
        yield f"{finding.level.value:<8} {finding.subject:<{width}}  {finding.detail}"
        if finding.way_out:
            yield f"{'':<8} {'':<{width}}  -> {finding.way_out}"


# ---- the judges ----------------------------------------------------------------------------------

_Row = tuple[Level, str, str]


def _ok(detail: str) -> _Row:
    return Level.OK, detail, ""


def _warning(detail: str, way_out: str) -> _Row:
    return Level.WARNING, detail, way_out


def _refused(detail: str, way_out: str) -> _Row:
    return Level.REFUSED, detail, way_out


def _versions(source: Facts, destination: Facts) -> Iterator[_Row]:
    shown = f"{_version(source)} to {_version(destination)}"
    untried = [facts for facts in (source, destination) if not _tried(facts)]
    if untried:
        yield _warning(
            f"{shown}: {', '.join(_version(facts) for facts in untried)} was never tried",
            "QEMU 5.2, 7.2, 10.0 and 11.1 were",
        )
    elif destination.version < source.version:
        yield _warning(
            f"{shown}: to an older QEMU, which its authors do not test",
            "an equal or newer QEMU at the destination",
        )
    else:
        yield _ok(shown)
    if _breaks_older(source, destination) or _breaks_older(destination, source):
        yield _warning(
            "9.2.0 does not migrate to or from versions before 9.0", "use 9.2.1 or later"
        )


def _breaks_older(one: Facts, other: Facts) -> bool:
    return tuple(one.version) == (9, 2, 0) and tuple(other.version) < (9, 0)


def _states(source: Facts, destination: Facts) -> Iterator[_Row]:
    yield from _source_states(source)
    if destination.status == "inmigrate":
        yield _ok("the destination waits for a guest")
    else:
        yield _refused(
            f"the destination is {destination.status} and waits for no guest",
            "start it with -S -incoming defer; each takes one guest only",
        )


def _source_states(source: Facts) -> Iterator[_Row]:
    if source.status == "postmigrate" and source.migration in ("failed", "cancelled"):
        # What 7.2 does with a guest that was paused when its migration failed.
        yield _refused(
            "the source is in postmigrate after a migration that failed: QEMU migrates it no more",
            "give its monitor `cont`, and `stop` if the guest shall stay paused",
        )
    elif source.status in ("inmigrate", "postmigrate", "finish-migrate"):
        yield _refused(
            f"the source is in {source.status}: its guest is not there, or went elsewhere",
            "name the monitor of the QEMU that has the guest; `cont` takes back one in postmigrate",
        )
    elif source.status in ("internal-error", "io-error", "shutdown", "guest-panicked"):
        yield _warning(
            f"the source's guest is stopped by {source.status}", "it would arrive as it is"
        )
    else:
        yield _ok(f"the source is {source.status}")
    if not is_over(source.migration):
        yield _refused(
            f"the source migrates already ({source.migration})", "wait for it, or migrate_cancel"
        )


def _blocked(source: Facts, destination: Facts) -> Iterator[_Row]:
    yield from _blockers(source)


def _blockers(source: Facts) -> Iterator[_Row]:
    for reason in source.blocked:
        yield _refused(f"the source's QEMU says: {reason}", "remove what blocks, by hot-unplug")
    if not source.blocked:
        yield _ok("nothing at the source blocks a migration")


def _accelerators(source: Facts, destination: Facts) -> Iterator[_Row]:
    one, other = source.accelerator or "unknown", destination.accelerator or "unknown"
    if source.arch != destination.arch:
        yield _refused(
            f"the source is {source.arch}, the destination {destination.arch}",
            "start the destination with the QEMU of the source's architecture",
        )
    elif one == "kvm" and other == "tcg":
        yield _refused(
            "the source runs by kvm, the destination by tcg: there is no clock for its kvmclock",
            "start the destination with -accel kvm",
        )
    elif one != other:
        yield _warning(
            f"the source runs by {one}, the destination by {other}", "use the same at both"
        )
    else:
        yield _ok(f"{one}, {source.arch}")
    if one == "tcg" and tuple(source.version[:2]) < TCG_SOUND:
        yield _warning(
            f"QEMU {_version(source)} can lose a busy guest's writes under tcg",
            f"QEMU {_dotted(TCG_SOUND)} or later at the source, kvm, or a paused guest",
        )


def _machines(source: Facts, destination: Facts) -> Iterator[_Row]:
    if not source.machine or not destination.machine:
        yield _warning("the machine type is not known", "compare the two command lines")
    elif source.machine == destination.machine:
        yield _ok(source.machine)
    elif source.machine in destination.machines:
        yield _refused(
            f"{source.machine} at the source, {destination.machine} at the destination",
            f"start the destination with -machine {source.machine}",
        )
    else:
        common = [name for name in destination.machines if name in source.machines]
        newest = max(common, key=_machine_age, default="")
        yield _refused(
            f"{source.machine} at the source, which the destination's QEMU does not know",
            f"a newer QEMU there; or, from its next start on, the guest as {newest}"
            if newest
            else "a QEMU there that knows it",
        )


def _memory(source: Facts, destination: Facts) -> Iterator[_Row]:
    if source.memory_bytes != destination.memory_bytes:
        yield _refused(
            f"{format_size(source.memory_bytes)} at the source, "
            f"{format_size(destination.memory_bytes)} at the destination",
            f"start the destination with -m {source.memory_bytes >> 20}M, and plug the same DIMMs",
        )
    else:
        yield _ok(format_size(source.memory_bytes))
    needed = max(0, source.memory_bytes - destination.resident_bytes)
    if needed > destination.free_bytes:
        yield _warning(
            f"the guest may need {format_size(needed)} more at the destination, whose host has "
            f"{format_size(destination.free_bytes)} left",
            "free memory there, or move it elsewhere",
        )


def _ram(source: Facts, destination: Facts) -> Iterator[_Row]:
    if not source.ram or not destination.ram:
        yield _warning("the ramblocks are not known", "QEMU itself checks them in the stream")
        return
    there = {row.idstr: row for row in destination.ram}
    faults = 0
    for row in source.ram:
        twin = there.get(row.idstr)
        if twin is None:
            detail, way_out = f"{row.idstr} is not at the destination", "give it the same devices"
        elif row.used_bytes > twin.max_bytes or (
            row.used_bytes != twin.used_bytes and twin.used_bytes == twin.max_bytes
        ):
            detail = (
                f"{row.idstr} uses {row.used_bytes} bytes, at the destination "
                f"{twin.used_bytes} of at most {twin.max_bytes}"
            )
            way_out = "give the destination the same memory, firmware and ROM files"
        else:
            continue
        faults += 1
        yield _refused(detail, way_out)
    if not faults:
        yield _ok(f"{len(source.ram)} fit")


def _cpus(source: Facts, destination: Facts) -> Iterator[_Row]:
    if source.vcpus != destination.vcpus:
        yield _refused(
            f"{source.vcpus} vCPUs at the source, {destination.vcpus} at the destination",
            f"start the destination with -smp {source.vcpus}",
        )
    one, other = source.cpu, destination.cpu
    name = one.type or "of unknown model"
    if not one.features or not other.features:
        level = _ok if one.type == other.type else _warning
        detail = name if one.type == other.type else f"{name}, at the destination {other.type}"
        if level is _ok:
            yield _ok(detail)
        else:
            yield _warning(f"{detail}; its features are not known", "use the same -cpu at both")
        return
    lost = [feature for feature in one.features if feature not in set(other.features)]
    gained = [feature for feature in other.features if feature not in set(one.features)]
    way_out = "the same -cpu at both, of a model that both hosts have: query-cpu-definitions"
    if lost:
        yield _refused(f"{name}: the destination lacks {_some(lost)}", way_out)
    if gained:
        yield _warning(f"{name}: the destination adds {_some(gained)}", way_out)
    differing = [
        f"{trait} {one.traits[trait]} to {other.traits[trait]}"
        for trait in one.traits
        if trait in other.traits and one.traits[trait] != other.traits[trait]
    ]
    if differing:
        yield _warning(f"{name}: the guest would see {', '.join(differing)}", way_out)
    if not lost and not gained and not differing:
        yield _ok(f"{source.vcpus} x {name}, {len(one.features)} features")


def _devices(source: Facts, destination: Facts) -> Iterator[_Row]:
    here = Counter((device.type, device.place) for device in source.devices)
    there = Counter((device.type, device.place) for device in destination.devices)
    missing, more = here - there, there - here
    for kind, place in sorted(missing):
        yield _refused(
            f"{kind} at {place or 'no bus'} is not at the destination",
            "start the destination with the same -device, at the same bus and addr",
        )
    for kind, place in sorted(more):
        yield _refused(
            f"{kind} at {place or 'no bus'} is only at the destination",
            "start the destination without it",
        )
    if not missing and not more:
        yield _ok(f"{sum(here.values())} alike")


def _disks(source: Facts, destination: Facts) -> Iterator[_Row]:
    there = {disk.place: disk for disk in destination.disks}
    for disk in source.disks:
        twin = there.pop(disk.place, None)
        if twin is None:
            yield _refused(
                f"{disk.place}: {_file(disk)} is not at the destination",
                "give the destination the same disk",
            )
        else:
            moves = any(row.idstr == disk.place for row in source.ram)
            same_host = source.host != "" and source.host == destination.host
            yield _disk_pair(disk, twin, same_host, moves)
    for disk in there.values():
        yield _refused(
            f"{disk.place}: {_file(disk)} is only at the destination",
            "start the destination without it",
        )
    if not source.disks and not destination.disks:
        yield _ok("none")


def _disk_pair(disk: Disk, twin: Disk, same_host: bool, moves: bool) -> _Row:
    """``moves``: what it holds is a ramblock, which QEMU writes to its file where it arrives."""
    shown = f"{disk.place}: {_file(disk)}"
    if disk.nbytes != twin.nbytes:
        return _refused(
            f"{shown} has {disk.nbytes} bytes, at the destination {_file(twin)} {twin.nbytes}",
            "give the destination the same disk",
        )
    if twin.read_only and not disk.read_only:
        return _refused(f"{shown} is read-only at the destination", "give it without read-only")
    if disk.mirrored:
        return _ok(f"{shown} is being mirrored")
    if moves:
        return _ok(f"{shown} moves with the guest's memory")
    if disk.identity and twin.identity and same_host:
        if disk.identity == twin.identity:
            return _ok(f"{shown}, the same file")
        if disk.read_only:
            return _warning(
                f"{shown} is another file than {_file(twin)}", "their contents must be equal"
            )
        return _refused(
            f"{shown} is another file than {_file(twin)}: the guest's writes would be lost",
            "the same file at both, or a drive-mirror to the destination that runs meanwhile",
        )
    if disk.file == twin.file and _network(disk) and _network(twin):
        return _ok(f"{shown}, on {disk.filesystem or 'the network'} at both")
    way_out = "storage that both hosts share, or a drive-mirror that runs meanwhile"
    if not same_host and _local(disk) and not disk.read_only:
        return _refused(f"{shown} is on {disk.filesystem}, which one host alone has", way_out)
    return _warning(f"{shown}: whether {_file(twin)} is the same is not known", way_out)


def _uuids(source: Facts, destination: Facts) -> Iterator[_Row]:
    if source.uuid == destination.uuid:
        yield _ok("none" if source.uuid in ("", NIL_UUID) else source.uuid)
        return
    judge = _refused if source.capabilities.get("validate-uuid") else _warning
    yield judge(
        f"{source.uuid} at the source, {destination.uuid} at the destination",
        f"start the destination with -uuid {source.uuid}",
    )


def _capabilities(source: Facts, destination: Facts) -> Iterator[_Row]:
    for side, facts, names in (
        ("source", source, ("events", "return-path")),
        ("destination", destination, ("late-block-activate",)),
    ):
        missing = [name for name in names if name not in facts.capabilities]
        if missing:
            yield _refused(
                f"the {side}'s QEMU has no {', '.join(missing)}",
                f"QEMU {_dotted(OLDEST)} or later",
            )
        else:
            yield _ok(f"{', '.join(names)} at the {side}")
    if source.capabilities.get("xbzrle"):
        yield _warning(
            "xbzrle is on at the source: it is off while vmth migrates", "vmth has its own deltas"
        )


def _landing(source: Facts, destination: Facts) -> Iterator[_Row]:
    if destination.shared_backends:
        yield _ok(f"memory: {_some(destination.shared_backends)} is shared at the destination")
    else:
        yield _ok("stream: no memory backend at the destination is shared (share=on)")


_JUDGES = (
    ("version", _versions),
    ("state", _states),
    ("blockers", _blocked),
    ("accelerator", _accelerators),
    ("machine", _machines),
    ("memory", _memory),
    ("ramblocks", _ram),
    ("cpu", _cpus),
    ("devices", _devices),
    ("disks", _disks),
    ("uuid", _uuids),
    ("capabilities", _capabilities),
    ("landing", _landing),
)


# ---- words ---------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


def _version(facts: Facts) -> str:
    return _dotted(facts.version)


def _tried(facts: Facts) -> bool:
    return OLDEST <= tuple(facts.version[:2]) <= NEWEST


def _machine_age(name: str) -> list[int]:
    """pc-q35-10.0 is newer than pc-q35-9.2."""
    return [int(part) for part in name.rpartition("-")[2].split(".") if part.isdigit()]


def _file(disk: Disk) -> str:
    return disk.file or disk.node or "an unnamed file"


def _network(disk: Disk) -> bool:
    """Is its storage reached by every host in the same way?"""
    by_protocol = disk.file.startswith(NETWORK_PROTOCOLS)
    own = any(address in disk.file for address in OWN_ADDRESSES)
    return disk.filesystem in NETWORK_FILESYSTEMS or (by_protocol and not own)


def _local(disk: Disk) -> bool:
    return disk.identity.startswith("file ") and not _network(disk)

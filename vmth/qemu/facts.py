# SPDX-License-Identifier: Apache-2.0
"""What of a QEMU decides whether a migration can work: asked over QMP, and carried to the other end
in the offer. What it means is decided in vmth/qemu/check.py.

A question that this QEMU does not know leaves its fact empty: the check then says that it is not
known.
"""

from __future__ import annotations

import base64
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vmth.errors import StreamError, UsageError
from vmth.guests.spawn import available_memory_bytes
from vmth.qemu.landing import listed_blocks, memory_backends
from vmth.qemu.qmp import Qmp, QmpError

__all__ = ["Cpu", "Device", "Disk", "Facts", "RamRow", "gather", "refreshed"]

#: Pieces in the offer, whose values hold at most 1024 bytes.
PIECE_CHARACTERS = 1000
MAX_PIECES = 48
PREFIX = "qemu.facts."
#: Of the JSON once unpacked: what a hostile peer can make us read.
MAX_JSON_BYTES = 1 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Names = Annotated[list[Name], msgspec.Meta(max_length=2048)]


class RamRow(msgspec.Struct, frozen=True):
    """One ramblock: what it uses now and what it can grow to."""

    idstr: Name
    used_bytes: Count
    max_bytes: Count


class Cpu(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first vCPU; the others are alike. ``features`` are those that are really on."""

    type: Name = ""
    features: Names = []
    traits: Annotated[dict[Name, Name], msgspec.Meta(max_length=64)] = {}


class Device(msgspec.Struct, frozen=True):
    """One device that somebody asked for. ``place`` is its bus and address from the root on, by
    which QEMU finds its state again; the id is not."""

    type: Name
    place: Name


class Disk(msgspec.Struct, frozen=True, omit_defaults=True):
    """One drive with a medium. ``identity`` is that of the file on its host, "" if unknown."""

    place: Name
    node: Name = ""
    driver: Name = ""
    file: Text = ""
    nbytes: Count = 0
    read_only: bool = False
    mirrored: bool = False
    identity: Name = ""
    filesystem: Name = ""


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one QEMU, at one moment. JSON-able by msgspec; sizes are bytes."""

    version: Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)]
    host: Name  #: its kernel's boot id: equal on one host only
    status: Name
    arch: Name = ""
    accelerator: Name = ""
    machine: Name = ""
    machines: Names = []  #: of the same family, known to this QEMU
    memory_bytes: Count = 0
    free_bytes: Count = 0  #: memory that the host has left
    resident_bytes: Count = 0  #: what this QEMU has of it already
    vcpus: Count = 0
    cpu: Cpu = Cpu()
    ram: Annotated[list[RamRow], msgspec.Meta(max_length=4096)] = []
    shared_backends: Names = []
    devices: Annotated[list[Device], msgspec.Meta(max_length=4096)] = []
    disks: Annotated[list[Disk], msgspec.Meta(max_length=1024)] = []
    capabilities: Annotated[dict[Name, bool], msgspec.Meta(max_length=256)] = {}
    uuid: Name = ""
    migration: Name = ""  #: query-migrate's status
    blocked: Annotated[list[Text], msgspec.Meta(max_length=256)] = []

    def entries(self) -> dict[str, str]:
        """As entries of an offer's ``guest``."""
        packed = base64.b64encode(zlib.compress(msgspec.json.encode(self), 9)).decode()
        pieces = [
            packed[at : at + PIECE_CHARACTERS] for at in range(0, len(packed), PIECE_CHARACTERS)
        ]
        if len(pieces) > MAX_PIECES:
            raise UsageError(
                f"the facts of this QEMU take {len(pieces)} pieces, allowed {MAX_PIECES}: it has "
                f"{len(self.devices)} devices, {len(self.disks)} disks, {len(self.ram)} ramblocks"
            )
        return {f"{PREFIX}{index}": piece for index, piece in enumerate(pieces)}

    @staticmethod
    def from_entries(entries: Mapping[str, str]) -> Facts | None:
        """Out of an offer's ``guest``; None when there are none. StreamError for what is no such
        thing: it comes from the peer."""
        names = [f"{PREFIX}{index}" for index in range(MAX_PIECES)]
        packed = "".join(entries[name] for name in names if name in entries)
        if not packed:
            return None
        try:
            unpacker = zlib.decompressobj()
            text = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_JSON_BYTES)
            if not unpacker.eof:
                raise StreamError(f"facts of the source: more than {MAX_JSON_BYTES} bytes, or torn")
            return _DECODER.decode(text)
        except (ValueError, zlib.error, msgspec.MsgspecError) as error:
            raise StreamError(f"facts of the source: received {error}") from None


#: Made before a source waits for it.
_DECODER = msgspec.json.Decoder(Facts)


def gather(qmp: Qmp) -> Facts:
    """Ask. Takes some tens of milliseconds; the guest does not notice. Raises ChannelError when
    QEMU is gone."""
    machine = str(_ask(qmp, "qom-get", path="/machine", property="type") or "")
    machine = machine.removesuffix("-machine")
    summary = _ask(qmp, "query-memory-size-summary") or {}
    cpus = _ask(qmp, "query-cpus-fast") or []
    migration = _ask(qmp, "query-migrate") or {}
    devices = _devices(qmp)
    free_bytes, _ = available_memory_bytes()
    return Facts(
        version=list(qmp.version),
        host=_boot_id(),
        status=qmp.status(),
        arch=str((_ask(qmp, "query-target") or {}).get("arch", "")),
        accelerator=_accelerator(qmp),
        machine=machine,
        machines=_family(qmp, machine),
        memory_bytes=int(summary.get("base-memory", 0)) + int(summary.get("plugged-memory", 0)),
        free_bytes=free_bytes,
        resident_bytes=_resident_bytes(qmp.pid),
        vcpus=len(cpus),
        cpu=_cpu(qmp, str(cpus[0]["qom-path"])) if cpus else Cpu(),
        ram=_ram(qmp),
        shared_backends=_shared_backends(qmp),
        devices=sorted(
            (Device(kind, place) for kind, place in devices.values()),
            key=lambda device: (device.place, device.type),
        ),
        disks=_disks(qmp, {path: place for path, (_, place) in devices.items()}),
        capabilities={
            str(row["capability"]): bool(row["state"])
            for row in _ask(qmp, "query-migrate-capabilities") or []
        },
        uuid=str((_ask(qmp, "query-uuid") or {}).get("UUID", "")),
        migration=str(migration.get("status", "")),
        blocked=[str(reason) for reason in migration.get("blocked-reasons", [])],
    )


def refreshed(qmp: Qmp, facts: Facts) -> Facts:
    """Facts that were gathered of this QEMU while nobody had given it a guest: what may be another
    now is asked again, which takes a millisecond. Raises ChannelError when QEMU is gone."""
    free_bytes, _ = available_memory_bytes()
    return msgspec.structs.replace(
        facts,
        status=qmp.status(),
        free_bytes=free_bytes,
        resident_bytes=_resident_bytes(qmp.pid),
    )


def _ask(qmp: Qmp, command: str, **arguments: Any) -> Any:
    """The answer, or None where this QEMU has none."""
    try:
        return qmp.execute(command, arguments or None)
    except QmpError:
        return None


def _gets(qmp: Qmp, questions: Iterable[tuple[str, str]]) -> list[Any]:
    """The properties (path, name), None for those that are not there."""
    answers = qmp.execute_many(
        ("qom-get", {"path": path, "property": name}) for path, name in questions
    )
    return [None if isinstance(answer, QmpError) else answer for answer in answers]


# ---- machine and memory --------------------------------------------------------------------------


def _accelerator(qmp: Qmp) -> str:
    kvm = _ask(qmp, "query-kvm")
    if kvm is None:
        return ""
    return "kvm" if kvm.get("enabled") else "tcg"


def _family(qmp: Qmp, machine: str) -> list[str]:
    """pc-q35-7.2 -> every pc-q35-* that this QEMU knows."""
    stem, dash, _ = machine.rpartition("-")
    names = [str(row["name"]) for row in _ask(qmp, "query-machines") or []]
    return sorted(name for name in names if dash and name.startswith(stem + dash))


def _ram(qmp: Qmp) -> list[RamRow]:
    rows = (listed_blocks(qmp) or {}).values()
    return sorted(
        (RamRow(row.idstr, row.used_length, row.max_length) for row in rows),
        key=lambda row: row.idstr,
    )


def _shared_backends(qmp: Qmp) -> list[str]:
    try:
        return [name for name, row in memory_backends(qmp).items() if row["share"]]
    except QmpError:
        return []


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# ---- CPU -----------------------------------------------------------------------------------------

_TRAITS = ("vendor", "family", "model", "stepping", "phys-bits")


def _cpu(qmp: Qmp, path: str) -> Cpu:
    kind = str(_ask(qmp, "qom-get", path=path, property="type") or "")
    # The model's expansion tells which properties are CPU features; what is on is asked of the
    # vCPU itself, since the command line may add to the model and the host may take from it.
    model = kind.rpartition("-cpu")[0].rsplit("-", 1)[0]
    expansion = _ask(qmp, "query-cpu-model-expansion", type="static", model={"name": model}) or {}
    names = sorted(
        name
        for name, value in expansion.get("model", {}).get("props", {}).items()
        if isinstance(value, bool)
    )
    states = _gets(qmp, [(path, name) for name in names])
    traits = _gets(qmp, [(path, name) for name in _TRAITS])
    return Cpu(
        kind,
        [name for name, state in zip(names, states, strict=True) if state is True],
        {
            name: str(value)
            for name, value in zip(_TRAITS, traits, strict=True)
            if value is not None
        },
    )


# ---- devices and disks ---------------------------------------------------------------------------


def _devices(qmp: Qmp) -> dict[str, tuple[str, str]]:
    """QOM path -> (type, place) of every device that the command line or a hotplug made."""
    kinds: dict[str, str] = {}
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for row in _ask(qmp, "qom-list", path=folder) or []:
            kind = str(row["type"])
            if kind.startswith("child<"):
                kinds[f"{folder}/{row['name']}"] = kind[len("child<") : -1]
    answers = iter(_gets(qmp, [(path, name) for path in kinds for name in _SEAT]))
    seats = {path: {name: next(answers) for name in _SEAT} for path in kinds}
    return {path: (kind, _place(path, seats)) for path, kind in kinds.items()}


#: Where a device sits: its bus, and the address there in the words of that bus.
_SEAT = ("parent_bus", "legacy-addr", "addr", "port", "channel", "scsi-id", "lun", "unit", "nr")
_ON_A_BUS = ("port", "channel", "scsi-id", "lun", "unit", "nr")


def _place(path: str, seats: Mapping[str, Mapping[str, Any]]) -> str:
    """Bus and address, from the root on: "pcie.0/02.0/00.0", "pcie.0/05.0:0/0-0-1". Ids are not
    in it, as they are not in what QEMU finds a device's state by."""
    seat = seats[path]
    bus = str(seat["parent_bus"] or "")
    if not bus:
        return f"@{seat['addr']}" if seat["addr"] is not None else ""
    owner, _, name = bus.rpartition("/")
    while owner and owner not in seats:
        owner = owner.rpartition("/")[0]  # a controller's bus may hang on a part of it
    if owner and owner != path:
        number = name.rpartition(".")[2] if "." in name else ""
        name = _place(owner, seats) + (f":{number}" if number else "")
    own = seat["legacy-addr"]
    if own is None and isinstance(seat["addr"], int):  # QEMU 11 gives slot and function only so
        own = f"{seat['addr'] >> 3:02x}.{seat['addr'] & 7:x}"
    if own is None:
        own = "-".join(str(seat[key]) for key in _ON_A_BUS if seat[key] not in (None, ""))
    return f"{name}/{own}" if own else name


def _disks(qmp: Qmp, places: Mapping[str, str]) -> list[Disk]:
    mirrored = {
        str(job.get("device", ""))
        for job in _ask(qmp, "query-block-jobs") or []
        if job.get("type") == "mirror"
    }
    disks = []
    for row in _ask(qmp, "query-block") or []:
        medium = row.get("inserted")
        if not isinstance(medium, dict):
            continue
        file = str(medium.get("file", ""))
        node, device = str(medium.get("node-name", "")), str(row.get("device", ""))
        identity, filesystem = _identify(qmp.pid, file)
        disks.append(
            Disk(
                place=_disk_place(str(row.get("qdev", "")), places) or device or node,
                node=node,
                driver=str(medium.get("drv", "")),
                file=file,
                nbytes=int(medium.get("image", {}).get("virtual-size", 0)),
                read_only=bool(medium.get("ro")),
                mirrored=bool(mirrored & {device, node} - {""}),
                identity=identity,
                filesystem=filesystem,
            )
        )
    return sorted(disks, key=lambda disk: disk.place)


def _disk_place(qdev: str, places: Mapping[str, str]) -> str:
    """``qdev`` is an id, or the path of the device or of a part of it. What the board has by itself
    is known by its name, which is its ramblock's too where it has one (flash)."""
    if qdev and not qdev.startswith("/"):
        qdev = f"/machine/peripheral/{qdev}"
    for path, place in places.items():
        if qdev == path or qdev.startswith(path + "/"):
            return place
    folder, _, name = qdev.rpartition("/")
    return name if folder == "/machine" else ""


def _identify(pid: int, file: str) -> tuple[str, str]:
    """(identity on this host, file system) of a file that the process ``pid`` sees, perhaps in a
    root or a directory of its own; empty where it is no file or cannot be looked at."""
    if not file or "://" in file or file.startswith("json:"):
        return "", ""
    seen = f"/proc/{pid}/root{file}" if file.startswith("/") else f"/proc/{pid}/cwd/{file}"
    for path in (seen, file):
        try:
            found = os.stat(path)
        except OSError:
            continue
        if stat.S_ISBLK(found.st_mode):
            return f"block {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}", "block device"
        number = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
        return f"file {number} {found.st_ino}", _filesystem(number)
    return "", ""


def _filesystem(number: str) -> str:
    """The type of what is mounted from that device, from /proc/self/mountinfo."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [number] and after:
            return after.split()[0]
    return ""

# SPDX-License-Identifier: Apache-2.0
"""What a check refuses, warns of and lets pass: on made-up facts, and on real QEMUs."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from fake_qmp import FakeError, FakeQmp
from qmp_qemu import QmpQemu

from vmth.cli import cli, main
from vmth.errors import RefusedError, StreamError, UsageError
from vmth.qemu.check import (
    Finding,
    Level,
    check_source,
    compare,
    finding_lines,
    raise_if_refused,
)
from vmth.qemu.facts import MAX_JSON_BYTES, Cpu, Device, Disk, Facts, RamRow, gather
from vmth.qemu.qmp import Qmp

CAPABILITIES = {"events": False, "return-path": False, "late-block-activate": False}
SHARED = Disk("pcie.0/04.0", "n0", "raw", "/vm/d.raw", 1 << 30, identity="file 8:1 7")
SOURCE = Facts(
    version=[10, 0, 2],
    host="one",
    status="running",
    arch="x86_64",
    accelerator="kvm",
    machine="pc-q35-9.2",
    machines=["pc-q35-9.2", "pc-q35-10.0"],
    memory_bytes=1 << 30,
    free_bytes=8 << 30,
    vcpus=2,
    cpu=Cpu("Haswell-x86_64-cpu", ["avx2", "sse2"], {"vendor": "GenuineIntel", "model": "60"}),
    ram=[RamRow("pc.ram", 1 << 30, 1 << 30), RamRow("/rom@etc/acpi/tables", 1 << 17, 1 << 21)],
    devices=[Device("virtio-blk-pci", "pcie.0/04.0")],
    disks=[SHARED],
    capabilities=CAPABILITIES,
    uuid="u-1",
)
DESTINATION = msgspec.structs.replace(SOURCE, status="inmigrate")


def changed(facts: Facts, **values: Any) -> Facts:
    return msgspec.structs.replace(facts, **values)


def disk(**values: Any) -> Disk:
    return msgspec.structs.replace(SHARED, **values)


def judged(source: Facts, destination: Facts, subject: str) -> list[Finding]:
    """What is said of the subject; every other subject is ok."""
    findings = compare(source, destination)
    others = [f for f in findings if f.subject != subject and f.level is not Level.OK]
    assert others == []
    return [finding for finding in findings if finding.subject == subject]


def test_equal_qemus_are_ok_in_every_subject() -> None:
    findings = compare(SOURCE, DESTINATION)
    assert {finding.level for finding in findings} == {Level.OK}
    assert len({finding.subject for finding in findings}) == 13
    raise_if_refused(findings)


Case = tuple[str, dict[str, Any], dict[str, Any], Level, str]
CASES: list[Case] = [
    ("version", {}, {"version": [10, 0, 1]}, Level.WARNING, "to an older QEMU"),
    ("version", {}, {"version": [10, 1, 0]}, Level.OK, "10.0.2 to 10.1.0"),
    ("version", {"version": [4, 2, 0]}, {}, Level.WARNING, "4.2.0 was never tried"),
    ("version", {"version": [8, 2, 0]}, {"version": [9, 2, 0]}, Level.WARNING, "before 9.0"),
    ("state", {"status": "postmigrate"}, {}, Level.REFUSED, "is in postmigrate"),
    ("state", {"status": "postmigrate", "migration": "failed"}, {}, Level.REFUSED, "no more"),
    ("state", {"status": "inmigrate"}, {}, Level.REFUSED, "is in inmigrate"),
    ("state", {"status": "guest-panicked"}, {}, Level.WARNING, "stopped by guest-panicked"),
    ("state", {"status": "paused"}, {}, Level.OK, "the source is paused"),
    ("state", {"migration": "active"}, {}, Level.REFUSED, "migrates already"),
    ("state", {}, {"status": "running"}, Level.REFUSED, "is running and waits for no guest"),
    ("blockers", {"blocked": ["VFIO device"]}, {}, Level.REFUSED, "VFIO device"),
    ("accelerator", {}, {"accelerator": "tcg"}, Level.REFUSED, "kvmclock"),
    ("accelerator", {"accelerator": "tcg"}, {}, Level.WARNING, "by tcg, the destination by kvm"),
    ("accelerator", {}, {"arch": "aarch64"}, Level.REFUSED, "the destination aarch64"),
    ("machine", {}, {"machine": "pc-q35-10.0"}, Level.REFUSED, "pc-q35-10.0 at the destination"),
    ("machine", {}, {"machine": ""}, Level.WARNING, "not known"),
    ("memory", {}, {"memory_bytes": 2 << 30}, Level.REFUSED, "1GiB at the source, 2GiB at"),
    ("memory", {}, {"free_bytes": 1 << 29}, Level.WARNING, "has 512MiB left"),
    ("memory", {}, {"free_bytes": 1 << 29, "resident_bytes": 1 << 29}, Level.OK, "1GiB"),
    ("ramblocks", {}, {"ram": SOURCE.ram[:1]}, Level.REFUSED, "/rom@etc/acpi/tables is not at"),
    ("ramblocks", {}, {"ram": []}, Level.WARNING, "not known"),
    ("cpu", {}, {"vcpus": 4}, Level.REFUSED, "2 vCPUs at the source, 4 at"),
    ("cpu", {}, {"cpu": Cpu("qemu64-x86_64-cpu")}, Level.WARNING, "features are not known"),
    ("devices", {}, {"devices": []}, Level.REFUSED, "virtio-blk-pci at pcie.0/04.0 is not at"),
    ("disks", {}, {"disks": []}, Level.REFUSED, "/vm/d.raw is not at the destination"),
    ("disks", {"disks": []}, {}, Level.REFUSED, "is only at the destination"),
    ("disks", {"disks": []}, {"disks": []}, Level.OK, "none"),
    ("uuid", {}, {"uuid": "u-2"}, Level.WARNING, "u-1 at the source, u-2 at"),
    ("capabilities", {"capabilities": {"events": True}}, {}, Level.REFUSED, "no return-path"),
    ("capabilities", {}, {"capabilities": {}}, Level.REFUSED, "no late-block-activate"),
    ("landing", {}, {}, Level.OK, "stream: no memory backend"),
]  # fmt: skip


@pytest.mark.parametrize(("subject", "source", "destination", "level", "detail"), CASES)
def test_a_difference_is_judged_where_it_lies(
    subject: str, source: dict[str, Any], destination: dict[str, Any], level: Level, detail: str
) -> None:
    found = judged(changed(SOURCE, **source), changed(DESTINATION, **destination), subject)
    said = [finding for finding in found if detail in finding.detail]
    assert [finding.level for finding in said] == [level], found
    assert said[0].way_out or level is Level.OK, "no way out is said"


DISKS: list[tuple[dict[str, Any], dict[str, Any], bool, Level, str]] = [
    ({}, {}, True, Level.OK, "the same file"),
    ({}, {"identity": "file 8:1 8"}, True, Level.REFUSED, "writes would be lost"),
    ({"read_only": True}, {"identity": "file 8:1 8"}, True, Level.WARNING, "another file"),
    ({"mirrored": True}, {"identity": "file 8:1 8"}, True, Level.OK, "mirrored"),
    ({}, {"nbytes": 1}, True, Level.REFUSED, "1073741824 bytes, at the destination"),
    ({}, {"read_only": True}, True, Level.REFUSED, "read-only at the destination"),
    ({"filesystem": "nfs4"}, {"filesystem": "nfs4"}, False, Level.OK, "on nfs4 at both"),
    ({"filesystem": "ext4"}, {"filesystem": "ext4"}, False, Level.REFUSED, "one host alone"),
    ({"identity": "block 8:0"}, {"identity": "block 8:0"}, False, Level.WARNING, "not known"),
    ({"file": "rbd:p/i", "identity": ""}, {"file": "rbd:p/i"}, False, Level.OK, "network"),
    ({"file": "nbd://127.0.0.1/x"}, {"file": "nbd://127.0.0.1/x"}, True, Level.OK, "same file"),
    (
        {"file": "nbd://127.0.0.1/x", "identity": ""},
        {"file": "nbd://127.0.0.1/x", "identity": ""},
        False,
        Level.WARNING,
        "not known",
    ),
]


@pytest.mark.parametrize(("here", "there", "same_host", "level", "detail"), DISKS)
def test_a_disk_must_be_the_same_storage(
    here: dict[str, Any], there: dict[str, Any], same_host: bool, level: Level, detail: str
) -> None:
    destination = changed(DESTINATION, disks=[disk(**there)], host="one" if same_host else "two")
    (finding,) = judged(changed(SOURCE, disks=[disk(**here)]), destination, "disks")
    assert finding.level is level and detail in finding.detail, finding


def test_flash_moves_with_the_memory() -> None:
    ram = [*SOURCE.ram, RamRow("system.flash1", 1 << 22, 1 << 22)]
    here = disk(place="system.flash1", file="/one.fd")
    there = disk(place="system.flash1", file="/two.fd", identity="file 8:1 9")
    source = changed(SOURCE, ram=ram, disks=[here])
    (finding,) = judged(source, changed(DESTINATION, ram=ram, disks=[there]), "disks")
    assert finding.level is Level.OK and "moves with the guest's memory" in finding.detail


def test_a_lost_feature_is_refused_and_a_gained_one_is_a_warning() -> None:
    cpu = Cpu("Skylake-x86_64-cpu", ["sse2", "avx512f"], {"vendor": "GenuineIntel", "model": "85"})
    found = judged(SOURCE, changed(DESTINATION, cpu=cpu), "cpu")
    assert [(finding.level, finding.detail) for finding in found] == [
        (Level.REFUSED, "Haswell-x86_64-cpu: the destination lacks avx2"),
        (Level.WARNING, "Haswell-x86_64-cpu: the destination adds avx512f"),
        (Level.WARNING, "Haswell-x86_64-cpu: the guest would see model 60 to 85"),
    ]


def test_many_lost_features_are_counted_not_listed() -> None:
    cpu = Cpu("max-x86_64-cpu", [f"f{i}" for i in range(40)])
    source = changed(SOURCE, cpu=cpu)
    found = judged(source, changed(DESTINATION, cpu=Cpu("max-x86_64-cpu", ["f0"])), "cpu")
    assert (
        found[0].detail
        == "max-x86_64-cpu: the destination lacks f1, f2, f3, f4, f5, f6 and 33 more"
    )


def test_a_machine_unknown_there_names_the_newest_that_both_know() -> None:
    names = ["pc-q35-7.2", "pc-q35-9.0", "pc-q35-8.2"]
    source = changed(SOURCE, machine="pc-q35-10.0", machines=[*names, "pc-q35-10.0"])
    found = judged(source, changed(DESTINATION, machine="pc-q35-9.0", machines=names), "machine")
    assert found[0].level is Level.REFUSED and "as pc-q35-9.0" in found[0].way_out


@pytest.mark.parametrize(
    ("here", "there", "fits"),
    [
        ((1 << 17, 1 << 21), (1 << 16, 1 << 21), True),  # QEMU resizes it
        ((1 << 17, 1 << 21), (1 << 16, 1 << 16), False),  # too long for the twin
        ((1 << 12, 1 << 12), (1 << 16, 1 << 16), False),  # the twin cannot shrink
        ((1 << 16, 1 << 21), (1 << 16, 1 << 16), True),
    ],
)
def test_a_ramblock_must_fit_its_twin(
    here: tuple[int, int], there: tuple[int, int], fits: bool
) -> None:
    source = changed(SOURCE, ram=[RamRow("x.rom", *here)])
    destination = changed(DESTINATION, ram=[RamRow("x.rom", *there)])
    (finding,) = judged(source, destination, "ramblocks")
    assert finding.level is (Level.OK if fits else Level.REFUSED)


def test_landing_in_memory_needs_a_shared_backend() -> None:
    (finding,) = judged(SOURCE, changed(DESTINATION, shared_backends=["pc.ram"]), "landing")
    assert finding.detail == "memory: pc.ram is shared at the destination"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"status": "postmigrate", "migration": "failed"}, "state: .*give its monitor `cont`"),
        ({"status": "postmigrate", "migration": "completed"}, "state: .*went elsewhere"),
        ({"migration": "a-status-of-later"}, "state: .*migrates already"),
        ({"blocked": ["a", "b"]}, "blockers: .*says: a.*blockers: .*says: b"),
    ],
)
def test_the_source_alone_can_be_refused(source: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        raise_if_refused(check_source(changed(SOURCE, **source)))
    raise_if_refused(check_source(SOURCE))


def test_a_refusal_names_every_reason_and_way_out() -> None:
    findings = compare(SOURCE, changed(DESTINATION, vcpus=4, disks=[]))
    with pytest.raises(RefusedError, match=r"cpu: 2 vCPUs.*-smp 2\); disks: .*same disk\)"):
        raise_if_refused(findings)


def test_what_a_peer_says_is_printable() -> None:
    evil = changed(SOURCE, machine="\x1b[2J\nroot#")
    text = "\n".join(finding_lines(compare(evil, DESTINATION)))
    assert "?[2J?root#" in text and "\x1b" not in text


# ---- facts on their way --------------------------------------------------------------------------


def test_facts_survive_the_offer() -> None:
    entries = SOURCE.entries()
    assert all(len(key) <= 64 and len(value) <= 1024 for key, value in entries.items())
    assert Facts.from_entries({"other": "x", **entries}) == SOURCE


def test_many_facts_take_many_entries_and_too_many_are_refused() -> None:
    random = Random(7)
    features = [random.randbytes(12).hex() for _ in range(2000)]
    facts = changed(SOURCE, cpu=Cpu("max", features))
    assert len(facts.entries()) > 8
    assert Facts.from_entries(facts.entries()) == facts
    disks = [disk(file=random.randbytes(40).hex()) for _ in range(1000)]
    with pytest.raises(UsageError, match="1000 disks"):
        changed(SOURCE, disks=disks).entries()


def test_an_offer_without_facts_has_none() -> None:
    assert Facts.from_entries({"qemu.machine": "pc"}) is None


def packed(text: bytes) -> dict[str, str]:
    return {"qemu.facts.0": base64.b64encode(zlib.compress(text)).decode()}


@pytest.mark.parametrize(
    "entries",
    [
        {"qemu.facts.0": "!!"},
        {"qemu.facts.0": "AAAA"},
        packed(b"{}"),
        packed(b'{"version": [1, 2], "host": "", "status": ""}'),
        packed(b'{"version": [1, 2, -3], "host": "", "status": ""}'),
        packed(b'{"version": [1, 2, 3], "host": 7, "status": ""}'),
        packed(b" " * (MAX_JSON_BYTES + 1)),
        {"qemu.facts.0": SOURCE.entries()["qemu.facts.0"][:-8]},
    ],
)
def test_bad_facts_of_a_peer_are_a_stream_error(entries: dict[str, str]) -> None:
    with pytest.raises(StreamError, match="facts of the source"):
        Facts.from_entries(entries)


# ---- the fake ------------------------------------------------------------------------------------

RAMBLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000
  a name with spaces 2 MiB  0x00000000040800 0x000000001000 0x000000200000 0x00007f4723e00000 rw
garbage 0xzz
"""


def test_a_qemu_that_knows_nothing_gives_facts_that_are_not_known(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "qmp") as fake, Qmp(fake.path) as qmp:
        facts = gather(qmp)
    assert facts.version == [7, 2, 22] and facts.machine == "" and facts.ram == []
    findings = compare(facts, changed(facts, status="inmigrate"))
    assert not any(finding.level is Level.REFUSED for finding in findings)


#: How a QEMU tells where a PCI device sits; 11 has no legacy-addr any more.
SEATS = {"up to QEMU 10": {"legacy-addr": "05.0", "addr": 40}, "QEMU 11": {"addr": 40}}


@pytest.mark.parametrize("seat", SEATS.values(), ids=SEATS)
def test_facts_of_the_fake(tmp_path: Path, seat: dict[str, Any]) -> None:
    with FakeQmp(tmp_path / "qmp") as fake, Qmp(fake.path) as qmp:
        fake.answers["human-monitor-command"] = RAMBLOCKS
        fake.answers["query-block-jobs"] = [{"type": "mirror", "device": "n1"}]
        fake.answers["query-block"] = [
            {"device": "d0", "qdev": "", "inserted": {"file": "nbd://h/x", "node-name": "n0"}},
            {"device": "", "qdev": "/machine/peripheral/v/virtio-backend", "inserted": {
                "file": str(tmp_path / "absent"), "node-name": "n1", "ro": True, "drv": "raw"}},
            {"device": "empty"},
        ]  # fmt: skip
        fake.answers["qom-list"] = lambda asked: (
            [{"name": "v", "type": "child<virtio-blk-pci>"}, {"name": "type", "type": "string"}]
            if asked["path"] == "/machine/peripheral"
            else []
        )

        def properties(asked: Any) -> Any:
            found = {"parent_bus": "/machine/q35/pcie.0", "share": True} | seat
            if asked["property"] not in found:
                raise FakeError("GenericError", "no such property")
            return found[asked["property"]]

        fake.answers["qom-get"] = properties
        fake.answers["query-memdev"] = [{"id": "shared before 6.1"}, {"id": "not", "share": False}]
        facts = gather(qmp)
    assert facts.shared_backends == ["shared before 6.1"]
    assert facts.ram == [
        RamRow("a name with spaces", 4096, 1 << 21),
        RamRow("pc.ram", 1 << 30, 1 << 30),
    ]
    assert facts.devices == [Device("virtio-blk-pci", "pcie.0/05.0")]
    assert [(row.place, row.file.split("/")[-1], row.mirrored) for row in facts.disks] == [
        ("d0", "x", False),
        ("pcie.0/05.0", "absent", True),
    ]


# ---- the command ---------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["check", *arguments])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_monitors_are_needed(count: int) -> None:
    result = run(*["--qmp", "x"] * count)
    assert result.exit_code == 2
    assert "--qmp" in result.output


def test_a_monitor_that_is_not_there_is_one_error_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(SystemExit) as ended:
        main(["check", "--qmp", absent, "--qmp", absent])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"vmth: error: {absent}: No such file")


def test_the_command_prints_a_table_and_refuses_by_its_code(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "a") as here, FakeQmp(tmp_path / "b") as there:
        result = run("--qmp", str(here.path), "--qmp", str(there.path))
        assert result.exit_code == 3
        assert "refused  state         the destination is running" in result.output
        assert "-> start it with -S -incoming defer" in result.output
        there.answers["query-status"] = {"status": "inmigrate"}
        result = run("--qmp", str(here.path), "--qmp", str(there.path), "--json")
        values = json.loads(result.output)
        assert (result.exit_code, values["exit_code"], values["refused"]) == (0, 0, False)
        assert values["destination"]["status"] == "inmigrate"
        assert {finding["level"] for finding in values["findings"]} == {"ok", "warning"}


# ---- the real one --------------------------------------------------------------------------------

WAITS = ("-incoming", "defer")


def levels(source: QmpQemu, destination: QmpQemu) -> dict[str, set[str]]:
    result = run("--qmp", str(source.path), "--qmp", str(destination.path), "--json")
    values = json.loads(result.output)
    found: dict[str, set[str]] = {}
    for finding in values["findings"]:
        found.setdefault(finding["subject"], set()).add(finding["level"])
    assert result.exit_code == (3 if any("refused" in said for said in found.values()) else 0)
    return found


@pytest.mark.slow
def test_real_qemus_of_one_command_line_pass(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "flash").write_bytes(bytes(1 << 20))
    same = (
        *("-drive", f"if=pflash,format=raw,file={tmp_path / 'flash'}"),
        *("-device", "pcie-root-port,id=rp0,chassis=1", "-device", "virtio-rng-pci,bus=rp0"),
        *("-device", "qemu-xhci", "-device", "usb-kbd,port=3"),
        *("-device", "virtio-scsi-pci,id=s", "-drive", "if=none,id=c,file.driver=null-co"),
        *("-device", "scsi-hd,drive=c,scsi-id=1,lun=2"),
        *("-blockdev", f"raw,node-name=n0,file.driver=file,file.filename={tmp_path / 'disk'}"),
        *("-device", "virtio-blk-pci,drive=n0"),
    )
    machine = "pc-q35-7.2"
    with QmpQemu(tmp_path, "SRC", *same, machine=machine, name="a") as source:
        with Qmp(source.path) as qmp:
            facts = gather(qmp)
        assert {
            Device("virtio-rng-pci", "pcie.0/01.0/00.0"),
            Device("usb-kbd", "pcie.0/02.0:0/3"),
            Device("scsi-hd", "pcie.0/03.0:0/0-1-2"),
        } <= {*facts.devices}
        assert [disk.place for disk in facts.disks] == [
            "pcie.0/03.0:0/0-1-2",
            "pcie.0/04.0",
            "system.flash0",
        ]
        assert facts.disks[1].identity and facts.disks[1].filesystem
        assert "sse2" in facts.cpu.features and facts.resident_bytes > 1 << 20
        assert {"pc.ram", "system.flash0"} <= {row.idstr for row in facts.ram}
        with QmpQemu(tmp_path, "DST", *same, *WAITS, machine=machine, name="b") as destination:
            found = levels(source, destination)
    assert not any("refused" in said for said in found.values()), found
    assert found["disks"] == {"ok", "warning"}, "what is no file cannot be known"
    for subject in ("machine", "memory", "ramblocks", "cpu", "devices", "state"):
        assert found[subject] == {"ok"}, subject


def other_disk(folder: Path) -> tuple[str, ...]:
    (folder / "other").write_bytes(bytes(1 << 20))
    return "-drive", f"if=virtio,format=raw,file={folder / 'other'}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "there", "options"),
    [
        ("machine", lambda _: (), {"machine": "pc-q35-6.2"}),
        ("memory", lambda _: (), {"memory": "32M"}),
        ("cpu", lambda _: ("-smp", "2"), {}),
        ("cpu", lambda _: ("-cpu", "qemu64,-sse2"), {}),
        ("devices", lambda _: ("-device", "virtio-rng-pci"), {}),
        ("ramblocks", lambda _: ("-device", "VGA,vgamem_mb=8"), {}),
        ("disks", other_disk, {}),
    ],
)
def test_a_real_qemu_that_differs_is_refused_there(
    tmp_path: Path,
    subject: str,
    there: Callable[[Path], tuple[str, ...]],
    options: dict[str, str],
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    here: tuple[str, ...] = ()
    if subject == "disks":
        here = "-drive", f"if=virtio,format=raw,file={tmp_path / 'disk'}"
    if subject == "ramblocks":
        here = "-device", "VGA,vgamem_mb=16"
    machine, memory = options.get("machine", "pc-q35-7.2"), options.get("memory", "16M")
    there_too = (*there(tmp_path), *WAITS)
    with (
        QmpQemu(tmp_path, "SRC", *here, machine="pc-q35-7.2", name="a") as source,
        QmpQemu(
            tmp_path, "DST", *there_too, machine=machine, memory=memory, name="b"
        ) as destination,
    ):
        found = levels(source, destination)
    assert "refused" in found.pop(subject)
    allowed = {"memory": {"ramblocks"}}.get(subject, set())
    assert {name for name, said in found.items() if "refused" in said} <= allowed, found

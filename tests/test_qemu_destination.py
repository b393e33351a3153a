# SPDX-License-Identifier: Apache-2.0
"""A destination QEMU as a guest: prepared, filled, resumed or given up, against a loader that the
test plays."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import FakeError, HangUp
from incoming_world import IncomingWorld
from listener_world import open_files

from vmth.errors import ChannelError, GuestError, MigrationError, RefusedError, StreamError
from vmth.guest import (
    CanAnnounce,
    CanClose,
    CanDescribe,
    CanNote,
    CanTakePages,
    CanTell,
    StateStream,
)
from vmth.handshake import Incoming
from vmth.qemu import destination as module
from vmth.qemu import stream as q
from vmth.qemu.check import Finding, Level
from vmth.qemu.destination import (
    DEVICE_STREAM,
    RAM_SECTION_ID,
    QemuDestination,
    find_qemu,
    make_destination,
    source_head,
)
from vmth.qemu.facts import Facts
from vmth.qemu.landing import LANDING_QUESTIONS, Land, Landing
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import SETTINGS_QUESTIONS
from vmth.qemu.waiting_memory import WaitingMemory
from vmth.types import Gpa, Mapping, RamBlock

MIB = 1 << 20
PING = 0x766D0001
BLOCKS = (
    RamBlock("pc.ram", 2 * MIB, Gpa(0), Mapping()),
    RamBlock("pc.rom", 4096, Gpa(0), Mapping()),
)


def head_bytes(*events: q.Event) -> bytes:
    writer = q.StreamWriter()
    return b"".join(bytes(writer.send(event)) for event in events)


def entries(*more: q.Event) -> dict[str, str]:
    head = head_bytes(q.FileHeader(3), q.Configuration("pc-q35-7.2"), *more)
    return {"qemu.head": base64.b64encode(head).decode()}


def incoming(guest: dict[str, str] | None = None) -> Incoming:
    return Incoming(bytes(16), BLOCKS, entries() if guest is None else guest, 1, "peer")


def state(name: str = DEVICE_STREAM, version: int = 1) -> Iterator[StateStream]:
    return iter([StateStream(name, version, b"devices")])


class World(IncomingWorld):
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder)
        self.waited: list[int] = []
        self.ends = True
        self.on_connect = lambda: self.say(q.Pong(PING))
        monkeypatch.setattr(module, "wait_for_exit", self._wait_for_exit)
        self.fake.answers |= {"quit": {}, "announce-self": {}, "query-memdev": []}

    def _wait_for_exit(self, pid: int, _timeout_s: float) -> bool:
        self.waited.append(pid)
        return self.ends

    def made(self, **options: Any) -> QemuDestination:
        """Prepared: the loader agreed to the block list."""
        guest = make_destination(
            self.qmp, options.get("incoming", incoming()), options.get("land", Land.STREAM)
        )
        self._resources.callback(guest.close)
        return guest

    def loaded(self) -> QemuDestination:
        guest = self.made()
        self.completes("paused")
        guest.load_state(state())
        return guest


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    before = open_files()
    world = World(tmp_path, monkeypatch)
    with world:
        yield world
    assert open_files() == before


def events(data: bytes) -> list[q.Event]:
    reader = q.StreamReader()
    reader.feed(data)
    found: list[q.Event] = []
    while (event := reader.next_event()) is not None:
        found.append(event)
    return found


def test_qemu_agrees_before_a_page_is_sent(world: World) -> None:
    guest = world.made()
    written = events(world.taken())
    assert written[:2] == [q.FileHeader(3), q.Configuration("pc-q35-7.2")]
    assert [event for event in written if isinstance(event, q.BlockListed)] == [
        q.BlockListed("pc.ram", 2 * MIB),
        q.BlockListed("pc.rom", 4096),
    ]
    codes = [event.code for event in written if isinstance(event, q.Command)]
    assert codes == [q.CommandCode.OPEN_RETURN_PATH, q.CommandCode.PING]
    sink = guest.page_sink()
    assert (sink.section_id, sink.idstrs) == (RAM_SECTION_ID, ("pc.ram", "pc.rom"))
    assert guest.blocks == BLOCKS and guest.verified_scope == "stream"
    for protocol in (CanTakePages, CanTell, CanDescribe, CanNote, CanAnnounce, CanClose):
        assert isinstance(guest, protocol)


def test_the_guest_is_loaded_and_runs_when_it_is_told_to(world: World) -> None:
    guest = world.made()
    world.taken()
    world.completes("paused")
    guest.load_state(state())
    assert world.taken() == (
        head_bytes(
            q.SectionStarted(q.SectionKind.END, RAM_SECTION_ID, "ram", 0, 4),
            q.RamEnd(),
            q.SectionFinished(RAM_SECTION_ID),
        )
        + b"devices"
    )
    assert not guest.is_running() and "cont" not in world.fake.commands()
    guest.resume()
    held: list[bool] = []

    def announced(_: object) -> dict[str, Any]:
        held.append(world.place_is_held())
        return {}

    world.fake.answers["announce-self"] = announced
    guest.announce()
    assert guest.is_running()
    assert held == [True] and not world.place_is_held()  # the network waits for no disk
    assert [given for name, given in world.fake.received if name == "announce-self"] == [
        {"initial": 50, "max": 550, "rounds": 5, "step": 100}
    ]
    assert guest.describe()["qmp"] == str(world.fake.path)
    assert "quit" not in world.fake.commands()


@pytest.mark.parametrize("run_state", ["running", "paused"])
def test_images_are_locked_late_for_guests_that_will_run(world: World, run_state: str) -> None:
    """One that stays paused could not move on: an older QEMU aborts without its images."""
    text = run_state.encode() + b"\0"
    section = b"\x04\0\0\0\5\x0bglobalstate" + bytes(8) + len(text).to_bytes(4, "big") + text
    guest = world.made()
    assert world.switched_on() == {"events", "late-block-activate"}
    world.completes("paused")
    guest.load_state(iter([StateStream(DEVICE_STREAM, 1, section)]))
    late = {"late-block-activate"} if run_state == "running" else set()
    assert world.switched_on() == late | {"events"}
    guest.close()
    assert world.switched_on() == set()


def test_other_state_than_a_qemus_is_refused(world: World) -> None:
    guest = world.made()
    for streams in (iter([]), state("kvm/cpu"), state(version=2)):
        with pytest.raises(StreamError, match="allowed one qemu/devices version 1"):
            guest.load_state(streams)


def test_a_load_that_fails_says_why_and_qemu_is_quit(world: World) -> None:
    guest = world.made()
    world.fails("load of migration failed")
    trouble = guest.trouble()
    assert trouble is not None and "load of migration failed" in str(trouble)
    with pytest.raises(MigrationError, match="load of migration failed"):
        guest.load_state(state())
    guest.release()
    guest.release()
    assert world.fake.commands().count("quit") == 1
    assert world.waited == [world.qmp.pid]


def test_a_qemu_that_does_not_end_is_told(world: World) -> None:
    guest = world.made()
    world.ends = False
    with pytest.raises(GuestError, match="has not ended within 10 s of quit"):
        guest.release()


def test_a_lock_that_is_not_given_leaves_it_paused(world: World) -> None:
    guest = world.loaded()
    world.fake.answers["cont"] = FakeError("GenericError", 'Failed to get "write" lock')
    with pytest.raises(GuestError, match='does not resume: Failed to get "write" lock'):
        guest.resume()
    assert not guest.is_running()


def test_a_suspended_guest_counts_as_let_run(world: World) -> None:
    guest = world.loaded()
    world.after_cont = "suspended"
    guest.resume()
    assert guest.is_running()


def test_a_qemu_that_is_gone_never_ran_if_nobody_let_it(world: World) -> None:
    guest = world.loaded()
    world.fake.hang_up()
    assert not guest.is_running()
    with pytest.raises(ChannelError):
        guest.resume()
    assert not guest.is_running()


def test_a_qemu_that_is_gone_after_cont_may_have_run(world: World) -> None:
    guest = world.loaded()
    world.fake.answers["cont"] = HangUp
    with pytest.raises(ChannelError):
        guest.resume()
    with pytest.raises(ChannelError):
        guest.is_running()


def test_a_qemu_that_is_gone_before_it_read_cont_never_ran(world: World) -> None:
    guest = world.loaded()
    world.fake.deaf = True
    with pytest.raises(ChannelError):
        guest.resume()
    assert not guest.is_running()


def test_what_is_refused_before_the_stream_leaves_qemu_as_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(_source: Facts, _destination: Facts) -> list[Finding]:
        return [Finding(Level.REFUSED, "CPU model", "other", "use the same")]

    monkeypatch.setattr(module, "compare", differ)
    source = Facts([7, 2, 0], "host", "running")
    with pytest.raises(RefusedError, match="CPU model: other"):
        make_destination(world.qmp, incoming(entries() | source.entries()), Land.STREAM)
    assert not {"quit", "stop", "migrate-incoming"} & set(world.fake.commands())
    assert world.qmp.lost is not None  # the monitor is free for others


def test_warnings_of_the_comparison_are_notes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(_source: Facts, _destination: Facts) -> list[Finding]:
        return [Finding(Level.OK, "vCPUs", "1"), Finding(Level.WARNING, "versions", "far apart")]

    monkeypatch.setattr(module, "compare", warn)
    source = Facts([7, 2, 0], "host", "running")
    guest = world.made(incoming=incoming(entries() | source.entries()))
    assert guest.notes() == ("versions: far apart",)


@pytest.mark.parametrize("land", [Land.STREAM, Land.AUTO])
def test_a_source_waits_for_no_question_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, land: Land
) -> None:
    """What was asked ahead, all of it together, is what is asked then."""
    ahead: list[tuple[Any, ...]] = []
    ask_ahead = Qmp.ask_ahead

    def observed(qmp: Qmp, *questions: Any) -> None:
        ahead.append(questions)
        ask_ahead(qmp, *questions)

    monkeypatch.setattr(Qmp, "ask_ahead", observed)
    monkeypatch.setattr(module, "compare", lambda _source, _destination: [])
    facts = Facts([7, 2, 0], "host", "inmigrate")
    guest = make_destination(world.qmp, incoming(entries() | facts.entries()), land, facts=facts)
    asked = [name for name in world.fake.commands() if name.startswith("query")]
    guest.close()
    together = [{name for name, _ in questions} for questions in ahead]
    for questions in (LANDING_QUESTIONS, SETTINGS_QUESTIONS):
        assert any({name for name, _ in questions} <= batch for batch in together)
    assert sorted(asked) == sorted(
        [
            *["query-status"] * 2,  # before anything is compared, and before anything is changed
            "query-memdev",
            "query-migrate",
            "query-migrate-capabilities",
            "query-migrate-parameters",
        ]
    )


def test_a_block_list_that_qemu_does_not_take_is_refused_and_qemu_quit(world: World) -> None:
    world.on_connect = lambda: world.fails("Unknown ramblock")
    with pytest.raises(RefusedError, match="Unknown ramblock"):
        make_destination(world.qmp, incoming(), Land.STREAM)
    assert world.fake.commands()[-1] == "quit"
    assert world.waited == [world.qmp.pid]


def test_land_memory_that_is_not_possible_is_refused(world: World) -> None:
    with pytest.raises(RefusedError, match="land memory: no block"):
        make_destination(world.qmp, incoming(), Land.MEMORY)
    assert "migrate-incoming" not in world.fake.commands()


def test_the_landing_is_asked_for_what_is_mapped_already(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def choose(*arguments: object) -> Landing:
        asked.extend(arguments[3:])
        raise RefusedError("seen enough")

    monkeypatch.setattr(module, "choose_landing", choose)
    with WaitingMemory(world.qmp) as memory:
        with pytest.raises(RefusedError, match="seen enough"):
            make_destination(world.qmp, incoming(), Land.MEMORY, memory=memory)
        assert asked == [memory.find]


def test_the_head_keeps_what_both_must_agree_on() -> None:
    uuid = q.ConfigurationField("uuid", 1, bytes(16))
    ignored = b"\0\0\0\1\x0fx-ignore-shared"
    head = source_head(
        entries(
            q.ConfigurationField("capabilities", 1, ignored),
            uuid,
            q.Command(q.CommandCode.OPEN_RETURN_PATH, b""),
            q.Command(q.CommandCode.PING, b"\0\0\0\1"),
        )
    )
    assert head == [
        q.FileHeader(3),
        q.Configuration("pc-q35-7.2"),
        uuid,
        q.Command(q.CommandCode.OPEN_RETURN_PATH, b""),
    ]


@pytest.mark.parametrize(
    ("guest", "why"),
    [
        ({}, "the source is no QEMU"),
        ({"qemu.head": "?"}, "head of the source's stream"),
        ({"qemu.head": ""}, "head of the source's stream"),
        ({"qemu.head": base64.b64encode(b"QEVM\0\0\0\2").decode()}, "head of the source's stream"),
        ({"qemu.head": base64.b64encode(b"\x01" * 40).decode()}, "head of the source's stream"),
    ],
)
def test_a_head_that_is_none_is_refused(guest: dict[str, str], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        source_head(guest)


def test_a_restarted_listener_finds_the_guest_of_its_journal(world: World) -> None:
    detail = {f"guest.{key}": value for key, value in world.made().describe().items()}
    world.qmp.close()
    found = find_qemu("00" * 16, detail)
    assert found is not None and isinstance(found, CanTell) and isinstance(found, CanDescribe)
    assert {f"guest.{key}": value for key, value in found.describe().items()} == detail
    world.status = "running"
    assert found.is_running()
    assert found.pause()
    world.fake.answers["query-status"] = FakeError("GenericError", "no")
    with pytest.raises(MigrationError):
        found.is_running()
    found.release()
    assert world.fake.commands()[-1] == "quit"


def test_another_qemu_at_the_same_path_is_not_taken_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    detail = {f"guest.{key}": value for key, value in world.made().describe().items()}
    world.qmp.close()
    found = find_qemu("00" * 16, detail)
    assert found is not None and isinstance(found, CanTell)
    assert find_qemu("00" * 16, detail | {"guest.process": "1 1"}) is None
    assert find_qemu("00" * 16, {"guest.kind": "kvm"}) is None
    monkeypatch.setattr(module, "process_identity", lambda pid: f"{pid} later")
    asked = len(world.fake.received)
    for ask in (found.is_running, found.resume, found.release):
        with pytest.raises(GuestError, match="another QEMU"):
            ask()
    assert {name for name, _ in world.fake.received[asked:]} == {"qmp_capabilities"}

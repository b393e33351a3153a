# SPDX-License-Identifier: Apache-2.0
"""The monitor's facade: against a fake that misbehaves, and against real QEMUs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import FakeError, FakeQmp, HangUp, Silence
from qmp_qemu import QmpQemu
from waiting import wait_until

from vmth.errors import ChannelError, RefusedError, UsageError
from vmth.qemu.qmp import MAX_EVENTS, THREAD, Qmp, QmpError, QmpEvent, UnreadError

PATIENCE_S = 60.0


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeQmp]:
    with FakeQmp(tmp_path / "qmp") as server:
        yield server


def is_pass(event: QmpEvent) -> bool:
    return event.name == "MIGRATION_PASS"


def test_a_command_is_answered_and_its_dashes_and_underscores_stay(fake: FakeQmp) -> None:
    fake.answers["migrate"] = lambda arguments: {"echo": arguments}
    with Qmp(fake.path) as qmp:
        assert qmp.execute("migrate", {"a-b": 1, "c_d": [2]}) == {"echo": {"a-b": 1, "c_d": [2]}}
        assert qmp.status() == "running"
        assert qmp.version == (7, 2, 22)
        assert qmp.pid == os.getpid()
        assert qmp.has_command("migrate") and not qmp.has_command("migrate-fly")


def test_an_error_keeps_the_words_and_the_class_of_qemu(fake: FakeQmp) -> None:
    fake.answers["migrate"] = FakeError("GenericError", "There's a migration process in progress")
    with Qmp(fake.path) as qmp:
        with pytest.raises(QmpError, match=r"migrate: There's a migration") as caught:
            qmp.execute("migrate", {"uri": "unix:x"})
        assert caught.value.kind == "GenericError"
        assert caught.value.description == "There's a migration process in progress"
        with pytest.raises(QmpError) as unknown:
            qmp.execute("fly")
        assert unknown.value.kind == "CommandNotFound"
        assert qmp.status() == "running", "an error ended the connection"


def test_what_was_asked_ahead_is_answered_once(fake: FakeQmp) -> None:
    numbers = iter(range(100))
    fake.answers["migrate"] = lambda arguments: {"for": arguments, "n": next(numbers)}
    fake.answers["quit"] = FakeError("GenericError", "not now")
    with Qmp(fake.path) as qmp:
        qmp.ask_ahead(("migrate", {"uri": "x"}), ("query-status", None), ("quit", {}))
        wait_until(lambda: fake.commands() == ["migrate", "query-status", "quit"])
        assert qmp.execute("migrate", {"uri": "x"}) == {"for": {"uri": "x"}, "n": 0}
        assert qmp.status() == "running"
        with pytest.raises(QmpError, match="not now"):
            qmp.execute("quit")
        assert fake.commands() == ["migrate", "query-status", "quit"]
        assert qmp.execute("migrate", {"uri": "x"}) == {"for": {"uri": "x"}, "n": 1}


@pytest.mark.parametrize("other", ["execute", "execute_many", "ask_ahead"])
def test_no_answer_is_older_than_what_was_ordered_since(fake: FakeQmp, other: str) -> None:
    with Qmp(fake.path) as qmp:
        qmp.ask_ahead(("query-status", None), ("query-migrate", None))
        wait_until(lambda: "query-migrate" in fake.commands())  # the first is answered as it was
        change = ("migrate-set-parameters", {"downtime-limit": 7})
        if other == "execute":
            qmp.execute(*change)
        elif other == "execute_many":
            qmp.execute_many([change])
        else:
            qmp.ask_ahead(change)
        fake.answers["query-status"] = {"status": "paused"}
        assert qmp.status() == "paused"


def test_the_end_of_qemu_is_the_answer_to_what_was_asked_ahead(fake: FakeQmp) -> None:
    fake.answers["query-status"] = HangUp
    with Qmp(fake.path) as qmp:
        qmp.ask_ahead(("query-status", None))
        with pytest.raises(ChannelError):
            qmp.status()
        with pytest.raises(UnreadError):
            qmp.ask_ahead(("query-status", None))


def test_many_commands_are_answered_in_order_errors_among_them(fake: FakeQmp) -> None:
    def odd_fail(arguments: Any) -> Any:
        if arguments["value"] % 2:
            raise FakeError("GenericError", "odd")
        return arguments["value"]

    fake.answers["echo"] = odd_fail
    with Qmp(fake.path) as qmp:
        answers = qmp.execute_many(("echo", {"value": value}) for value in range(50))
    assert [answer for answer in answers if isinstance(answer, int)] == list(range(0, 50, 2))
    assert all(isinstance(answer, QmpError) for answer in answers[1::2])


def test_many_commands_to_a_qemu_that_ends_are_one_error_and_no_noise(
    fake: FakeQmp, caplog: pytest.LogCaptureFixture
) -> None:
    fake.answers["echo"] = lambda arguments: arguments if arguments["value"] < 20 else hang_up()

    def hang_up() -> Any:
        raise HangUp

    with Qmp(fake.path) as qmp:
        with pytest.raises(ChannelError, match=r"closed the monitor|did it end"):
            qmp.execute_many(("echo", {"value": value}) for value in range(200))
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_many_threads_share_one_monitor(fake: FakeQmp) -> None:
    fake.answers["echo"] = lambda arguments: arguments["value"]
    answers: dict[int, list[int]] = {}

    def ask(first: int) -> None:
        values = range(first, first + 20)
        answers[first] = [qmp.execute("echo", {"value": value}) for value in values]

    with Qmp(fake.path) as qmp:
        threads = [threading.Thread(target=ask, args=(first,)) for first in range(0, 100, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {first: list(range(first, first + 20)) for first in range(0, 100, 20)}


def test_events_wait_in_order_and_only_the_wanted_one_is_taken(fake: FakeQmp) -> None:
    with Qmp(fake.path) as qmp:
        fake.emit("STOP")
        fake.emit("MIGRATION_PASS", **{"pass": 1})
        fake.emit("MIGRATION_PASS", **{"pass": 2})
        for number in (1, 2):
            event = qmp.wait_event(is_pass, PATIENCE_S)
            assert event is not None and event.data["pass"] == number
            assert event.time_ns == 1700000000_000250_000
        assert qmp.wait_event(is_pass, 0) is None
        stop = qmp.wait_event(lambda _: True, 0)
        assert stop is not None and stop.name == "STOP"


def test_forgotten_events_are_not_waited_for(fake: FakeQmp) -> None:
    with Qmp(fake.path) as qmp:
        fake.emit("STOP")
        qmp.status()  # what was sent before its answer has arrived
        qmp.forget_events()
        fake.emit("RESUME")
        event = qmp.wait_event(lambda _: True, PATIENCE_S)
        assert event is not None and event.name == "RESUME"


def test_kept_events_are_bounded_and_the_oldest_goes(fake: FakeQmp) -> None:
    with Qmp(fake.path) as qmp:
        for number in range(MAX_EVENTS + 5):
            fake.emit("MIGRATION_PASS", **{"pass": number})
        qmp.status()
        event = qmp.wait_event(is_pass, 0)
        assert event is not None and event.data["pass"] == 5
        assert qmp._client.events.history == (), "the client keeps them too"


def test_callbacks_see_events_until_taken_back_and_may_fail(
    fake: FakeQmp, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def fails(event: QmpEvent) -> None:
        raise ValueError("oh")

    with Qmp(fake.path) as qmp:
        qmp.on_event(fails)
        forget = qmp.on_event(lambda event: seen.append(event.name))
        fake.emit("STOP")
        qmp.status()
        forget()
        forget()
        fake.emit("RESUME")
        qmp.status()
    assert seen == ["STOP"]
    assert "failed at STOP" in caplog.text


def test_a_callback_may_not_execute(fake: FakeQmp) -> None:
    errors: list[Exception] = []

    def executes(_: QmpEvent) -> None:
        try:
            qmp.status()
        except UsageError as error:
            errors.append(error)

    with Qmp(fake.path) as qmp:
        qmp.on_event(executes)
        fake.emit("STOP")
        qmp.status()
    assert len(errors) == 1 and "from a callback" in str(errors[0])


def test_events_before_the_loss_are_found_and_later_calls_say_so(fake: FakeQmp) -> None:
    fake.answers["quit"] = HangUp
    with Qmp(fake.path) as qmp:
        fake.emit("SHUTDOWN")
        with pytest.raises(ChannelError, match="quit: QEMU closed the monitor"):
            qmp.execute("quit")
        event = qmp.wait_event(lambda event: event.name == "SHUTDOWN", 0)
        assert event is not None
        with pytest.raises(ChannelError, match="did it end"):
            qmp.wait_event(is_pass, None)
        with pytest.raises(ChannelError, match="did it end"):
            qmp.status()
        assert qmp.lost is not None


def test_a_command_that_qemu_took_along_may_have_been_carried_out(fake: FakeQmp) -> None:
    fake.answers["cont"] = HangUp
    with Qmp(fake.path) as qmp:
        with pytest.raises(ChannelError, match="cont: QEMU closed the monitor") as lost:
            qmp.execute("cont")
        assert not isinstance(lost.value, UnreadError)
        with pytest.raises(UnreadError, match="did it end"):  # not sent any more
            qmp.execute("cont")


def test_a_command_that_qemu_never_read_was_not_carried_out(fake: FakeQmp) -> None:
    for _ in range(20):
        fake.deaf = False
        with Qmp(fake.path) as qmp:
            qmp.status()
            fake.deaf = True
            with pytest.raises(UnreadError, match=r"cont: QEMU .*closed the monitor"):
                qmp.execute("cont")
            assert qmp.lost is not None
    assert set(fake.commands()) == {"query-status"}


def test_a_command_to_a_qemu_that_had_closed_was_not_read(fake: FakeQmp) -> None:
    """Its end waits to be seen while the command waits to be sent: either may come first."""
    for _ in range(20):
        entered, go = threading.Event(), threading.Event()

        def hold(_event: QmpEvent, entered: threading.Event = entered) -> None:
            entered.set()
            assert go.wait(PATIENCE_S)  # noqa: B023 - of this round

        with Qmp(fake.path) as qmp, ThreadPoolExecutor() as pool:
            qmp.on_event(hold)
            fake.emit("STOP")
            assert entered.wait(PATIENCE_S)
            fake.hang_up()
            cont = pool.submit(qmp.execute, "cont")
            wait_until(lambda: qmp._calls == 1)
            go.set()
            with pytest.raises(UnreadError):
                cont.result(PATIENCE_S)
    assert fake.commands() == []


class OtherLoop(asyncio.SelectorEventLoop):
    """As uvloop: of a socket it takes only the descriptor, and sends by that."""

    async def create_connection(self, *arguments: Any, sock: Any = None, **rest: Any) -> Any:
        plain = None if sock is None else socket.socket(fileno=sock.detach())
        return await super().create_connection(*arguments, sock=plain, **rest)


@pytest.mark.parametrize("forced", [False, True])
def test_what_qemu_read_counts_as_read_in_any_loop(
    fake: FakeQmp, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    """A guest that was told to run would run twice."""

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return OtherLoop()

    if forced:  # whatever is done to have a loop that tells
        monkeypatch.setattr(asyncio, "SelectorEventLoop", OtherLoop)
    fake.answers["cont"] = HangUp
    asyncio.set_event_loop_policy(Policy())
    try:
        with Qmp(fake.path) as qmp:
            with pytest.raises(ChannelError) as lost:
                qmp.execute("cont")
            assert not isinstance(lost.value, UnreadError)
            assert (qmp._socket.sent_bytes == 0) == forced
    finally:
        asyncio.set_event_loop_policy(None)
    assert fake.commands() == ["cont"]


def test_a_callback_is_refused_what_was_asked_ahead_too(fake: FakeQmp) -> None:
    said: list[Exception] = []
    with Qmp(fake.path) as qmp:

        def ask(_event: QmpEvent) -> None:
            try:
                qmp.status()
            except UsageError as error:
                said.append(error)

        fake.answers["query-status"] = Silence
        qmp.ask_ahead(("query-status", None))
        qmp.on_event(ask)
        fake.emit("STOP")
        wait_until(lambda: len(said) == 1)


def test_only_of_the_last_command_is_it_known_that_it_was_not_read(fake: FakeQmp) -> None:
    with Qmp(fake.path) as qmp:
        qmp.status()
        fake.deaf = True
        with pytest.raises(ChannelError) as lost:
            qmp.execute_many([("stop", None), ("cont", None)])
        assert not isinstance(lost.value, UnreadError)


def test_a_waiting_thread_hears_of_the_loss(fake: FakeQmp) -> None:
    with Qmp(fake.path) as qmp:
        qmp.status()
        timer = threading.Thread(target=fake.hang_up)
        timer.start()
        with pytest.raises(ChannelError, match="did it end"):
            qmp.wait_event(is_pass, None)
        timer.join()


def test_garbage_from_the_monitor_ends_the_connection_not_the_process(fake: FakeQmp) -> None:
    with Qmp(fake.path) as qmp:
        qmp.status()
        fake.send(b"\x00\xff[")
        wait_until(lambda: qmp.lost is not None)
        with pytest.raises(ChannelError):
            qmp.status()


def test_a_late_answer_is_dropped_and_the_next_command_works(fake: FakeQmp) -> None:
    fake.answers["query-cpus-fast"] = Silence
    with Qmp(fake.path) as qmp:
        with pytest.raises(ChannelError, match=r"no answer to query-cpus-fast within 0\.01s"):
            qmp.execute("query-cpus-fast", timeout_s=0.01)
        fake.send(b'{"return": [], "id": "__qmp#00000"}')
        assert qmp.status() == "running"


def test_close_is_idempotent_ends_the_thread_and_frees_the_monitor(fake: FakeQmp) -> None:
    for _ in range(3):
        qmp = Qmp(fake.path)
        qmp.status()
        qmp.close()
        qmp.close()
        assert THREAD not in [thread.name for thread in threading.enumerate()]
        with pytest.raises(ChannelError, match="this end closed"):
            qmp.status()
    assert fake.commands() == ["query-status"] * 3


def test_close_wakes_who_waits(fake: FakeQmp) -> None:
    fake.answers["query-cpus-fast"] = Silence
    errors: list[ChannelError] = []
    qmp = Qmp(fake.path)

    def run(call: str) -> None:
        try:
            qmp.wait_event(is_pass, None) if call == "wait" else qmp.execute("query-cpus-fast")
        except ChannelError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in ("wait", "execute")]
    for thread in threads:
        thread.start()
    wait_until(lambda: "query-cpus-fast" in fake.commands())
    qmp.close()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(errors) == 2


# ---- paths that do not work ----------------------------------------------------------------------


def test_a_monitor_that_another_client_holds_is_refused_as_busy(fake: FakeQmp) -> None:
    with Qmp(fake.path) as first:
        with pytest.raises(RefusedError, match="QMP serves one client at a time"):
            Qmp(fake.path, timeout_s=0.05)
        assert first.status() == "running"


def test_a_monitor_with_a_full_queue_is_refused_as_busy(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        waiting.connect(str(tmp_path / "qmp"))
        with pytest.raises(RefusedError, match="QMP serves one client at a time"):
            Qmp(tmp_path / "qmp", timeout_s=0.05)


def test_what_is_no_monitor_is_said_with_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    for name, reason in (
        ("absent", "No such file"),
        ("file", "is no socket"),
        ("dead", "Connection refused"),
        ("a" * 120, "No such file"),
    ):
        with pytest.raises(UsageError, match=f"{reason}.*allowed: the socket of a running QEMU"):
            Qmp(tmp_path / name)


def test_a_human_monitor_is_told_from_qmp(tmp_path: Path) -> None:
    hmp = b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "
    with FakeQmp(tmp_path / "hmp", greeting=hmp) as fake:
        with pytest.raises(UsageError, match=r"is no QMP socket.*mode=control"):
            Qmp(fake.path)


def test_a_monitor_that_closes_at_once_is_a_channel_error(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "qmp") as fake:
        fake.answers["qmp_capabilities"] = HangUp
        with pytest.raises(ChannelError, match="does not greet"):
            Qmp(fake.path)


def test_without_the_package_the_extra_is_named(fake: FakeQmp) -> None:
    code = (
        "import sys; sys.modules['qemu'] = None\n"
        "from vmth.errors import UsageError\n"
        "from vmth.qemu.qmp import Qmp\n"
        f"try:\n    Qmp({str(fake.path)!r})\n"
        "except UsageError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pip install 'vmth[qemu]'" in done.stdout


# ---- the real one --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
def test_a_real_qemu_answers_tells_events_and_quits(tmp_path: Path, side: str) -> None:
    with QmpQemu(tmp_path, side) as qemu:
        with Qmp(qemu.path) as qmp:
            assert qmp.status() == "prelaunch"
            assert Path(f"/proc/{qmp.pid}/comm").read_text().startswith("qemu-system")
            assert qmp.version >= (5, 2, 0)
            assert qmp.has_command("migrate")
            with pytest.raises(QmpError, match="no-such-type"):
                qmp.execute("object-add", {"qom-type": "no-such-type", "id": "x"})
            with pytest.raises(RefusedError, match="one client at a time"):
                Qmp(qemu.path, timeout_s=0.2)
            qmp.execute("cont")
            resumed = qmp.wait_event(lambda event: event.name == "RESUME", PATIENCE_S)
            assert resumed is not None
            assert qmp.status() == "running"
        with Qmp(qemu.path) as again:
            assert again.status() == "running"
            again.execute("quit")
            ended = again.wait_event(lambda event: event.name == "SHUTDOWN", PATIENCE_S)
            assert ended is not None
            with pytest.raises(ChannelError, match="did it end"):
                again.wait_event(is_pass, PATIENCE_S)
        assert qemu.process.wait(PATIENCE_S) == 0


@pytest.mark.slow
@pytest.mark.parametrize("side", ["SRC", "DST"])
def test_a_real_qemu_that_is_killed_with_a_command_unread(tmp_path: Path, side: str) -> None:
    with QmpQemu(tmp_path, side) as qemu, Qmp(qemu.path) as qmp:
        qemu.process.send_signal(signal.SIGSTOP)
        killer = threading.Timer(0.2, qemu.process.kill)
        killer.start()
        with pytest.raises(UnreadError):
            qmp.execute("cont")
        killer.join()

# SPDX-License-Identifier: Apache-2.0
"""The destination's mover of a local demonstration: a process of its own, so that each end's costs
show.

``python -m vmth.demo.mover`` reads one line ``Begin`` from stdin and writes lines to stdout:
``Listening``, then ``Arrived`` or ``Failed``. It ends when stdin does, so it never outlives the
demonstration, whatever becomes of that; its guest's holder in turn ends with it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import msgspec

from vmth.child import module_command
from vmth.demo.arrival import Arrival, receive_one
from vmth.demo.settings import ArrivalSettings
from vmth.errors import CancelledError, ExitCode, MigrationError, VmthError
from vmth.listener import Listener
from vmth.options import ReceiveOptions
from vmth.reuse.warm import ReuseChoice

__all__ = ["DestinationMover", "main"]

_START_S = 60.0
_END_S = 15.0


class Begin(msgspec.Struct, frozen=True):
    """``source_memory``: inherited memfds to compare with."""

    uri: str
    guest: str
    run_on_ns: int
    state_dir: str
    peer_timeout_s: float
    realtime: bool
    source_memory: list[int]
    reuse: list[str]
    reuse_index: str | None
    reuse_memory: int


class Listening(msgspec.Struct, frozen=True, tag=True):
    uri: str


class Arrived(msgspec.Struct, frozen=True, tag=True):
    arrival: Arrival


class Failed(msgspec.Struct, frozen=True, tag=True):
    error: str
    exit_code: int


Message: TypeAlias = Listening | Arrived | Failed

_begin = msgspec.json.Decoder(Begin)
_message = msgspec.json.Decoder(Message)


class DestinationMover:
    """The spawned process, seen from the demonstration. Context manager: its end ends the process
    and with it the destination guest. Raises MigrationError when it does not start."""

    def __init__(
        self,
        settings: ArrivalSettings,
        options: ReceiveOptions,
        source_memory: Sequence[int] = (),
        uri: str = "tcp:127.0.0.1:0",
    ) -> None:
        command, environment = module_command("vmth.demo.mover")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=source_memory,
            env=environment,
            process_group=0,  # the terminal's Ctrl-C is the demonstration's
        )
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="vmth-mover", daemon=True)
        self._reader.start()
        begin = Begin(
            uri=uri,
            guest=settings.guest,
            run_on_ns=settings.run_on_ns,
            state_dir=str(options.state_dir),
            peer_timeout_s=options.peer_timeout_s,
            realtime=options.realtime,
            source_memory=list(source_memory),
            reuse=[str(path.absolute()) for path in settings.reuse.paths],
            reuse_index=str(settings.reuse.folder.absolute()) if settings.reuse.folder else None,
            reuse_memory=settings.reuse.memory_bytes,
        )
        try:
            self._send(begin)
            message = self._receive(_START_S)
            if not isinstance(message, Listening):
                raise MigrationError(f"the destination's mover did not listen: {message}")
            self.uri = message.uri
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def outcome(self, timeout_s: float) -> Arrival:
        """The guest that arrived. Raises MigrationError when there is none: the mover said why,
        ended, or did not answer."""
        message = self._receive(timeout_s)
        if isinstance(message, Arrived):
            return message.arrival
        text = message.error if isinstance(message, Failed) else str(message)
        raise MigrationError(f"the destination reports: {text}")

    def close(self) -> None:
        """Idempotent."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def __enter__(self) -> DestinationMover:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, begin: Begin) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(begin) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise MigrationError("the destination's mover ended at once") from error

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(_message.decode(line))
        self._messages.put(None)

    def _receive(self, timeout_s: float) -> Message:
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise MigrationError(
                f"the destination's mover (pid {self.pid}) said nothing for {timeout_s:g} s"
            ) from None
        if message is None:
            raise MigrationError(f"the destination's mover (pid {self.pid}) ended without a word")
        return message


def main() -> int:
    """The process's body. Returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin = _begin.decode(sys.stdin.buffer.readline())
    ended = threading.Event()
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")

    def on_listening(listener: Listener) -> None:
        watch = threading.Thread(
            target=_watch, args=(listener, ended), name="vmth-watch", daemon=True
        )
        watch.start()
        _tell(sink, Listening(listener.endpoint.display))

    try:
        arrival = receive_one(
            begin.uri,
            ArrivalSettings(begin.guest, begin.run_on_ns, _choice(begin)),
            ReceiveOptions(
                state_dir=Path(begin.state_dir),
                peer_timeout_s=begin.peer_timeout_s,
                realtime=begin.realtime,
            ),
            source_memory=begin.source_memory,
            on_listening=on_listening,
            ended=ended,
        )
    except VmthError as error:
        _tell(sink, Failed(str(error), int(error.exit_code)))
        return int(error.exit_code)
    _tell(sink, Arrived(arrival))
    return int(ExitCode.OK)


def _choice(begin: Begin) -> ReuseChoice:
    return ReuseChoice(
        tuple(Path(path) for path in begin.reuse),
        Path(begin.reuse_index) if begin.reuse_index else None,
        begin.reuse_memory,
    )


def _watch(listener: Listener, ended: threading.Event) -> None:
    """Until the demonstration closes its end: then there is nothing left to wait for."""
    # Not through sys.stdin: a thread that waits inside it cannot be left behind at the exit.
    while os.read(0, 4096):
        pass
    ended.set()
    listener.outcomes.put(CancelledError("the demonstration has ended"))


def _tell(sink: BinaryIO, message: Message) -> None:
    with contextlib.suppress(BrokenPipeError):
        sink.write(msgspec.json.encode(message) + b"\n")
        sink.flush()


if __name__ == "__main__":
    sys.exit(main())

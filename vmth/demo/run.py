# SPDX-License-Identifier: Apache-2.0
"""The three ways to run a demonstration: here, to another host, from another host.

Each returns an ``Outcome`` whatever happens; nothing of what it started is left behind, except a
source guest whose fate is in doubt: it stays paused in its holder until ``vmth recover`` or an
operator decides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vmth.api import start_migration
from vmth.demo.arrival import receive_one
from vmth.demo.check import check_at_home
from vmth.demo.guests import DepartingGuest, duplicate_memory, guest_info
from vmth.demo.mover import DestinationMover
from vmth.demo.outcome import Outcome
from vmth.demo.settings import ArrivalSettings, DemoSettings
from vmth.errors import ExitCode, InDoubtError, UsageError, VerificationError, VmthError
from vmth.events import RoundFinished, Throttled
from vmth.guests.spawn import DIRTY_SOURCES, choose_guest, spawn_source
from vmth.interrupts import Interrupted, Interrupts
from vmth.job_socket import JobSocket
from vmth.listener import Listener
from vmth.meter import MoverMeter
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.progress import Console
from vmth.received import ReceiveResult
from vmth.reuse.report import index_progress
from vmth.units import format_duration, format_size
from vmth.uri import parse_endpoint

__all__ = ["account_for_signal", "run_local", "run_receive", "run_send"]

#: The destination checks its guest after the move: how long that may take beyond the guest's run.
_CHECK_S = 120.0


def run_local(settings: DemoSettings, console: Console) -> Outcome:
    """Both ends on this machine, over loopback, each with a mover and a holder of its own."""
    outcome = Outcome("local", settings)
    with _filling(outcome) as (interrupts, resources):
        options = settings.migrate
        if options.state_dir is None:
            options = replace(options, state_dir=_state_dir(outcome, resources))
        options.link.check_here()  # before a guest is started for nothing
        steered = _job_socket(settings, resources)
        _index(outcome, settings, console)
        guest = _spawn_guest(outcome, settings, console, resources)
        mover = _spawn_mover(outcome, settings, options, guest, resources)
        console.say(f"destination mover (pid {mover.pid}) listens at {mover.uri}")
        _warm_up(settings.warm_up_ns)
        _migrate(outcome, guest, mover.uri, options, console, interrupts, steered)
        if outcome.result is not None:
            console.say("the guest runs at the destination, and was freed at the source")
            outcome.arrival = mover.outcome(settings.run_on_ns / 1e9 + _CHECK_S)
            _judge_arrival(outcome)
    return outcome


def run_send(settings: DemoSettings, uri: str, console: Console) -> Outcome:
    """A new guest from here to the ``vmth demo --receive`` that listens at ``uri``."""
    outcome = Outcome("send", settings)
    with _filling(outcome) as (interrupts, resources):
        settings.migrate.check_for(parse_endpoint(uri))
        steered = _job_socket(settings, resources)
        guest = _spawn_guest(outcome, settings, console, resources)
        _warm_up(settings.warm_up_ns)
        _migrate(outcome, guest, uri, settings.migrate, console, interrupts, steered)
        if outcome.result is not None:
            outcome.notes.append(
                "the heartbeat gap and the guest's own counters are reported there"
            )
            if settings.migrate.audit:
                outcome.notes.append("bytes are compared only where both ends are on one machine")
    return outcome


def run_receive(
    settings: ArrivalSettings, options: ReceiveOptions, uri: str, console: Console
) -> Outcome:
    """One guest of a ``vmth demo --send`` into this host; it is checked, and ended with this
    process."""
    outcome = Outcome("receive")

    def on_listening(listener: Listener) -> None:
        outcome.fallbacks += listener.fallbacks
        console.say(f"listening at {listener.endpoint.display} for one guest")

    def on_running(result: ReceiveResult) -> None:
        console.say(f"a guest of {format_size(result.memory_bytes)} from {result.peer} runs here")
        console.say(f"it runs on for {format_duration(settings.run_on_ns)} and is then checked")

    with _filling(outcome):
        outcome.arrival = receive_one(
            uri,
            settings,
            options,
            on_listening=on_listening,
            on_running=on_running,
            on_indexing=index_progress(console.say),
        )
        outcome.guest, outcome.guest_reason = outcome.arrival.guest, outcome.arrival.guest_reason
        outcome.notes.append(
            "the heartbeat gap is the difference of two hosts' clocks (CLOCK_REALTIME), and as "
            "right as they agree"
        )
        outcome.source_runs = False
        _judge_arrival(outcome)
    return outcome


# -- the parts -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _filling(outcome: Outcome) -> Iterator[tuple[Interrupts, contextlib.ExitStack]]:
    """Signals are watched; whatever ends the body early stands in the outcome, and everything that
    the body took is freed before the handlers go."""
    with Interrupts() as interrupts:
        try:
            with contextlib.ExitStack() as resources:
                yield interrupts, resources
        except Interrupted:
            outcome.error = outcome.error or "interrupted"
        except VmthError as error:
            outcome.fail(error)
        except OSError as error:
            outcome.fail(error)
        account_for_signal(outcome, interrupts.exit_code)


def account_for_signal(outcome: Outcome, exit_code: ExitCode | None) -> None:
    """A signal explains a failure, but not one that leaves the guest in doubt; and what was
    complete when it came stays complete."""
    if exit_code is None or outcome.in_doubt:
        return
    if outcome.error:
        outcome.exit_code = exit_code
    else:
        outcome.notes.append("a signal came when the guest had been moved already")


def _spawn_guest(
    outcome: Outcome,
    settings: DemoSettings,
    console: Console,
    resources: contextlib.ExitStack,
) -> DepartingGuest:
    kind, reason = _choose(settings)
    outcome.guest, outcome.guest_reason = kind, reason
    if not settings.guest and kind == "process":
        outcome.fallbacks.append(f"process guest: {reason}")
    outcome.dirty_source = settings.dirty_source or DIRTY_SOURCES[kind][0]
    console.say(
        f"guest: {kind} ({reason}), {format_size(settings.memory_bytes)}, seed {settings.seed}"
    )
    console.say(f"filling its memory: {settings.content}")
    workload = settings.guest_workload()
    holder, outcome.prepared = spawn_source(
        kind,
        settings.memory_bytes,
        content=settings.content,
        workload=workload,
        dirty_source=outcome.dirty_source,
        vcpus=settings.vcpus,
    )
    guest = DepartingGuest(holder, workload, settings.content, outcome.prepared)
    outcome.source_runs = True
    resources.callback(_end_source, outcome, guest)
    console.say(f"it runs in its holder (pid {holder.status().pid}): {settings.workload}")
    return guest


def _index(outcome: Outcome, settings: DemoSettings, console: Console) -> None:
    """Here, where it is shown and may take its time; the destination's mover finds it done."""
    with settings.reuse.open(index_progress(console.say)) as warm:
        outcome.notes += warm.notes


def _choose(settings: DemoSettings) -> tuple[str, str]:
    """(kind, reason); a dirty source that was asked for decides where no guest was."""
    if not settings.guest and settings.dirty_source:
        for kind, sources in DIRTY_SOURCES.items():
            if settings.dirty_source in sources:
                return kind, f"asked for by --dirty-source {settings.dirty_source}"
        raise UsageError(f"dirty source: received {settings.dirty_source!r}, unknown")
    return choose_guest(settings.guest or None)


def _end_source(outcome: Outcome, guest: DepartingGuest) -> None:
    """The demonstration is over: its guest goes, unless nobody knows whether it runs elsewhere."""
    if outcome.in_doubt:
        guest.holder.close()
    else:
        guest.holder.shutdown()


def _spawn_mover(
    outcome: Outcome,
    settings: DemoSettings,
    options: MigrateOptions,
    guest: DepartingGuest,
    resources: contextlib.ExitStack,
) -> DestinationMover:
    memory: Sequence[int] = duplicate_memory(guest) if options.audit else ()
    try:
        return resources.enter_context(
            DestinationMover(
                ArrivalSettings(guest.holder.kind, settings.run_on_ns, settings.reuse),
                ReceiveOptions(
                    state_dir=_state_dir(outcome, resources),
                    peer_timeout_s=options.peer_timeout_s,
                    realtime=options.realtime,
                ),
                memory,
            )
        )
    finally:
        for fd in memory:
            os.close(fd)


def _state_dir(outcome: Outcome, resources: contextlib.ExitStack) -> Path:
    """A private one that goes with the demonstration, unless its records may still be needed."""
    path = Path(tempfile.mkdtemp(prefix="vmth-demo-"))

    def remove() -> None:
        if not outcome.in_doubt:
            shutil.rmtree(path, ignore_errors=True)

    resources.callback(remove)
    return path


def _job_socket(settings: DemoSettings, resources: contextlib.ExitStack) -> JobSocket | None:
    if settings.job_socket is None:
        return None
    return resources.enter_context(JobSocket(settings.job_socket))


def _warm_up(time_ns: int) -> None:
    """Let the guest run before it is moved, so that there is something to lose."""
    threading.Event().wait(time_ns / 1e9)


def _migrate(
    outcome: Outcome,
    guest: DepartingGuest,
    uri: str,
    options: MigrateOptions,
    console: Console,
    interrupts: Interrupts,
    steered: JobSocket | None,
) -> None:
    """Fills in how it went; a failed migration is followed by a look at the source guest."""
    options = replace(options, guest_info=guest_info(guest.holder))
    try:
        with MoverMeter() as meter:
            job = start_migration(guest, uri, options)
            if steered is not None:
                steered.serve(job)
            with interrupts.cancelling(job.cancel), console.live(job.stats):
                for event in job.events():
                    console.show(event)
                    if isinstance(event, RoundFinished):
                        outcome.rounds.append(event.stats)
                    elif isinstance(event, Throttled):
                        outcome.throttles.append(event)
                outcome.result = job.wait()
        outcome.source_runs = False
        if outcome.result.downtime_ns > options.downtime_limit_ns:
            outcome.notes.append(
                f"the downtime of {format_duration(outcome.result.downtime_ns)} exceeds the limit "
                f"of {format_duration(options.downtime_limit_ns)}"
            )
    except InDoubtError as error:
        outcome.source_runs, outcome.in_doubt = None, True
        outcome.notes.append(f"in doubt: the source guest stays paused; {_recover_hint(options)}")
        outcome.fail(error)
    except VmthError as error:
        outcome.fail(error)
        _look_at_source(outcome, guest)
    outcome.record = guest.record or outcome.record
    outcome.source_cost = meter.cost


def _recover_hint(options: MigrateOptions) -> str:
    where = f" --state-dir {options.state_dir}" if options.state_dir else ""
    return f"ask again with: vmth recover{where}"


def _look_at_source(outcome: Outcome, guest: DepartingGuest) -> None:
    """Does it run on, and was nothing lost? Its state afterwards: paused, about to be ended."""
    try:
        outcome.source_runs = guest.is_running()
        outcome.record = guest.take_record()
        outcome.source_check = check_at_home(guest)
    except VmthError as error:
        outcome.source_runs = False
        outcome.notes.append(f"the source guest: {error}")
        return
    if not outcome.source_check.passed:
        outcome.notes.append(f"the source guest: {'; '.join(outcome.source_check.failures)}")


def _judge_arrival(outcome: Outcome) -> None:
    """A guest that lost something was not moved, whatever the digests say."""
    arrival = outcome.arrival
    assert arrival is not None
    outcome.notes += (note for note in arrival.notes if note not in outcome.notes)
    if not arrival.check.passed:
        failures = "; ".join(arrival.check.failures)
        outcome.fail(VerificationError(f"after the move: {failures}"))

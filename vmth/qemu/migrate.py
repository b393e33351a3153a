# SPDX-License-Identifier: Apache-2.0
"""Move the guest of a source QEMU to a ``vmth receive``: prepare QEMU, and put it back after.

look at QEMU -> settings -> watchdog -> QEMU's stream -> the session (vmth/source_session.py)
any failure before the grant: the guest runs here as before, the settings are as they were
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmth.channel.sockets import LinkOptions
from vmth.errors import (
    ChannelError,
    GuestError,
    InDoubtError,
    MigrationError,
    NotResumedError,
    OptionError,
    RefusedError,
    UsageError,
    VmthError,
)
from vmth.events import EventLog, FellBack, ThrottleChosen
from vmth.guest import Guest
from vmth.handshake import SCOPE_STREAM
from vmth.job import MigrationJob
from vmth.journal import default_state_dir
from vmth.options import ALL_FORMS, MigrateOptions, check_types
from vmth.policy.interface import OnStall
from vmth.qemu.check import check_source, raise_if_refused
from vmth.qemu.dirty_limit import Throttle, ThrottleWay, choose_throttle
from vmth.qemu.facts import gather
from vmth.qemu.outgoing import MAX_CHANNELS
from vmth.qemu.qmp import Qmp
from vmth.qemu.settings import MigrationSettings, parameters_of
from vmth.qemu.source import QemuSource
from vmth.qemu.steering import HELD_DOWNTIME_MS, Steering
from vmth.qemu.watchdog import Watchdog
from vmth.rounds import RoundEngine, RoundTools
from vmth.source_session import SourceSession
from vmth.stats import JobStats, MigrationResult
from vmth.tuning import Tuning
from vmth.uri import Endpoint, parse_endpoint

__all__ = ["ON_SUCCESS", "QemuMigrateOptions", "QemuMigration", "start_qemu_migration"]

log = logging.getLogger(__name__)

#: What becomes of a source QEMU whose guest runs elsewhere.
ON_SUCCESS = ("quit", "keep")
#: Versions from here on keep through a migration that somebody has stopped the guest.
KEEPS_RUN_STATE = (8, 2)
#: QEMU paces nothing: the socket that we read is the measure of its bandwidth.
UNBOUNDED_BPS = 1 << 44
#: Ways of multifd to compress that are read here; a source that uses another one is set to none.
READ_COMPRESSIONS = ("none", "zlib", "zstd")
#: What would make a stream that cannot be carried, or that says less than all of memory.
_OFF = (
    "background-snapshot",
    "block",
    "compress",
    "dirty-bitmaps",
    "dirty-limit",
    "mapped-ram",
    "pause-before-switchover",
    "postcopy-preempt",
    "postcopy-ram",
    "release-ram",
    "switchover-ack",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "zero-copy-send",
)


@dataclass(frozen=True, slots=True)
class QemuMigrateOptions:
    """The source's choices; units are in the names, 0 means none where that makes sense."""

    channels: int = 1  #: page channels of vmth
    multifd_channels: int = 0  #: of QEMU; 0: it sends one plain stream
    bandwidth_bps: int = 0
    downtime_limit_ns: int = 300_000_000
    timeout_ns: int = 0
    on_stall: OnStall = OnStall.PAUSE
    auto_converge: bool = False  #: True: QEMU's own; else on_stall=throttle chooses by itself
    on_success: str = "quit"
    digest: bool = True
    forms: tuple[str, ...] = ALL_FORMS
    fixed_forms: bool = False
    zstd_level: int = 0
    dedup_index_bytes: int = 64 << 20
    delta_cache_bytes: int = 64 << 20  #: less than a session's: beside a QEMU a mover is small
    kept_copies_bytes: int = 64 << 20  #: of pages sent as dedup or reuse, until they have landed
    zerocopy: bool = True
    insecure: bool = False
    peer_timeout_s: float = 10.0
    query_timeout_s: float = 10.0
    realtime: bool = True  #: what a paused guest waits for runs first, where that is permitted
    state_dir: Path | None = None
    keep_image: Path | None = None  #: where the guest's memory is kept once it has left
    link: LinkOptions = field(default_factory=LinkOptions)

    def __post_init__(self) -> None:
        check_types(self)
        if self.on_success not in ON_SUCCESS:
            raise OptionError(
                "on_success", f"received {self.on_success!r}, allowed {', '.join(ON_SUCCESS)}"
            )
        if not 0 <= self.multifd_channels <= MAX_CHANNELS:
            raise OptionError(
                "multifd_channels",
                f"received {self.multifd_channels}, allowed 0 to {MAX_CHANNELS}",
            )
        self.session_options()

    def session_options(self) -> MigrateOptions:
        """The session's part. Raises UsageError for what is not allowed."""
        return MigrateOptions(
            channels=self.channels,
            bandwidth_bps=self.bandwidth_bps,
            downtime_limit_ns=self.downtime_limit_ns,
            timeout_ns=self.timeout_ns,
            on_stall=self.on_stall,
            digest=self.digest,
            forms=self.forms,
            fixed_forms=self.fixed_forms,
            zstd_level=self.zstd_level,
            dedup_index_bytes=self.dedup_index_bytes,
            delta_cache_bytes=self.delta_cache_bytes,
            kept_copies_bytes=self.kept_copies_bytes,
            zerocopy=self.zerocopy,
            insecure=self.insecure,
            peer_timeout_s=self.peer_timeout_s,
            query_timeout_s=self.query_timeout_s,
            realtime=self.realtime,
            state_dir=self.state_dir,
            keep_image=self.keep_image,
            link=self.link,
        )


def start_qemu_migration(
    qmp_path: str | os.PathLike[str], uri: str, options: QemuMigrateOptions | None = None
) -> MigrationJob:
    """Begin to move the guest of the QEMU with that monitor to the ``vmth receive`` at ``uri``;
    returns when QEMU was looked at. Raises UsageError and RefusedError, before anything is touched;
    everything later comes from ``job.wait()``.
    """
    chosen = options or QemuMigrateOptions()
    endpoint = parse_endpoint(uri)
    chosen.session_options().check_for(endpoint)
    return MigrationJob(QemuMigration(qmp_path, endpoint, chosen))


class QemuMigration:
    """One attempt: a session with a QEMU around it (``JobSession``). ``run()`` once, from one
    thread; ``cancel``, ``retune`` and ``stats`` from any."""

    def __init__(
        self,
        qmp_path: str | os.PathLike[str],
        endpoint: Endpoint,
        options: QemuMigrateOptions,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._options = options
        self._clock = clock
        self._guest_info: dict[str, str] = {}
        self._notes: list[str] = []
        self._steering: Steering | None = None
        self._throttle = Throttle(ThrottleWay.NONE)
        self._qmp = Qmp(qmp_path)
        try:
            self._look_at_qemu()
            self._settings = MigrationSettings(self._qmp)
            self._guest = QemuSource(
                self._qmp,
                self._settings,
                options.on_success,
                multifd_channels=options.multifd_channels,
                throttle=self._throttle.way,
            )
            self._session = SourceSession(
                self._guest,
                endpoint,
                replace(options.session_options(), guest_info=self._guest_info),
                clock,
                make_engine=self._make_engine,
                features=[SCOPE_STREAM],
            )
        except BaseException:
            self._qmp.close()
            raise

    @property
    def session_id(self) -> bytes:
        return self._session.session_id

    @property
    def events(self) -> EventLog:
        return self._session.events

    @property
    def tuning(self) -> Tuning:
        return self._session.tuning

    def cancel(self, reason: str) -> None:
        self._guest.cancel()
        self._session.cancel(reason)

    def retune(
        self, bandwidth_bps: int | None, downtime_limit_ns: int | None, timeout_ns: int | None
    ) -> None:
        self._session.retune(bandwidth_bps, downtime_limit_ns, timeout_ns)

    def stats(self) -> JobStats:
        return self._session.stats()

    def run(self) -> MigrationResult:
        """As ``SourceSession.run()``; the settings are as they were when it ends."""
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._guest.close)
                self._prepare(stack)
                try:
                    self._guest.open()
                    self._guest_info.update(self._guest.entries())
                    return self._session.run()
                except (InDoubtError, NotResumedError):
                    raise
                except BaseException as error:
                    self._give_up(error)
                    raise
        except (MigrationError, UsageError):
            raise
        except VmthError as error:
            raise MigrationError(str(error)) from error

    # -- before ------------------------------------------------------------------------------------

    def _look_at_qemu(self) -> None:
        """Raises RefusedError for a QEMU that cannot migrate now; nothing is touched yet."""
        facts = gather(self._qmp)
        raise_if_refused(check_source(facts))
        options = self._options
        self._throttle = choose_throttle(
            self._qmp, facts.capabilities, options.on_stall, options.auto_converge
        )
        if self._throttle.why_not_limit:
            self._notes.append(
                "throttle by auto-converge, which takes time of all vCPUs alike; no dirty limit: "
                + self._throttle.why_not_limit
            )
        if facts.capabilities.get("dirty-bitmaps"):
            self._notes.append("dirty-bitmaps switched off: block dirty bitmaps stay behind")
        try:
            self._guest_info.update(facts.entries())
        except UsageError as error:
            self._notes.append(f"the two QEMUs were not compared: {error}")

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Settings, watchdog, steering; undone in the other order."""
        unknown = self._settings.apply(self._capabilities(), self._parameters())
        stack.callback(self._restore)
        self._settings.remember("avail-switchover-bandwidth", "downtime-limit")
        if self._throttle.way is ThrottleWay.DIRTY_LIMIT:
            self._settings.remember_limits()
        wanted = [name for name in unknown if self._capabilities().get(name)]
        if wanted:
            raise RefusedError(f"this QEMU does not know {', '.join(wanted)}")
        watchdog = Watchdog(
            self._qmp.path,
            self._settings.saved(),
            self.session_id,
            state_dir=self._options.state_dir or default_state_dir(),
            was_running=self._guest.was_running,
        )
        stack.callback(watchdog.done)
        # Put back while the watchdog still watches.
        stack.callback(self._restore)

        def stopped(elsewhere: bool) -> None:
            self._guest.left_stopped = elsewhere
            watchdog.stopped_elsewhere(elsewhere)

        keeps_run_state = self._qmp.version[:2] >= KEEPS_RUN_STATE
        self._steering = stack.enter_context(
            Steering(self._qmp, self._settings, self._clock, None if keeps_run_state else stopped)
        )

    def _capabilities(self) -> dict[str, bool]:
        return {
            "return-path": True,
            "events": True,
            "multifd": bool(self._options.multifd_channels),
            "auto-converge": self._throttle.way is ThrottleWay.AUTO_CONVERGE,
            **dict.fromkeys(_OFF, False),
        }

    def _parameters(self) -> dict[str, object]:
        parameters: dict[str, object] = {
            "downtime-limit": HELD_DOWNTIME_MS,
            "max-bandwidth": UNBOUNDED_BPS,
            "avail-switchover-bandwidth": 0,
            "tls-creds": "",
        }
        if self._options.multifd_channels:
            parameters["multifd-channels"] = self._options.multifd_channels
            known = parameters_of(self._qmp).get("multifd-compression")
            if known not in READ_COMPRESSIONS:
                parameters["multifd-compression"] = "none"
        return parameters

    def _make_engine(self, guest: Guest, tools: RoundTools) -> RoundEngine:
        assert self._steering is not None
        engine = self._guest.make_engine(tools, self._steering)
        engine.notes += self._notes
        tools.emit(ThrottleChosen(self._clock(), self._throttle.way.value))
        for note in self._notes:
            tools.emit(FellBack(self._clock(), note))
        return engine

    # -- after -------------------------------------------------------------------------------------

    def _give_up(self, error: BaseException) -> None:
        """The guest runs here as before, or NotResumedError says why not."""
        try:
            self._guest.give_up()
        except ChannelError as trouble:
            raise NotResumedError(
                f"{error}; and the source QEMU is gone with its guest: {trouble}"
            ) from error
        except GuestError as trouble:
            raise NotResumedError(f"{error}; and then {trouble}: it is paused here") from error

    def _restore(self) -> None:
        for problem in self._settings.restore():
            log.warning("%s: %s", self._qmp.path, problem)

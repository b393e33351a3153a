# SPDX-License-Identifier: Apache-2.0
"""The simple API: ``migrate`` and ``receive``, and the job and listener below them.

source                                          destination
vmth.migrate(guest, "tcp:host:4444")            vmth.receive("tcp:0.0.0.0:4444", make_guest)
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any, TypeVar

from vmth.destination_session import MakeGuest
from vmth.errors import UsageError
from vmth.guest import Guest
from vmth.job import MigrationJob
from vmth.listener import Listener
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.received import ReceiveResult
from vmth.source_session import SourceSession
from vmth.stats import MigrationResult
from vmth.uri import parse_endpoint

__all__ = ["migrate", "receive", "start_migration"]

log = logging.getLogger(__name__)

_Options = TypeVar("_Options", MigrateOptions, ReceiveOptions)


def _changed(options: _Options, changes: dict[str, Any]) -> _Options:
    known = [field.name for field in fields(options)]
    for name in changes:
        if name not in known:
            raise UsageError(f"option: received {name!r}, allowed {', '.join(known)}")
    return replace(options, **changes)


def start_migration(
    guest: Guest, uri: str, options: MigrateOptions | None = None, /, **changes: Any
) -> MigrationJob:
    """Begin to move ``guest`` to the destination that listens at ``uri``; returns at once.

    ``changes`` are fields of ``MigrateOptions`` (``channels=4, downtime_limit_ns=...``), in place
    of those of ``options``. Raises UsageError for a URI or option that is not allowed; everything
    later comes from ``job.wait()``.
    The guest belongs to the job until that has ended.
    """
    chosen = _changed(options or MigrateOptions(), changes)
    return MigrationJob(SourceSession(guest, parse_endpoint(uri), chosen))


def migrate(
    guest: Guest, uri: str, options: MigrateOptions | None = None, /, **changes: Any
) -> MigrationResult:
    """Move ``guest`` and wait for the end. Afterwards it runs at the destination and has been
    released here. On KeyboardInterrupt the migration is cancelled and the guest runs on here.

    Raises a MigrationError: after RefusedError, CancelledError, NotConvergedError,
    VerificationError and MigrationError itself the guest runs here as before; after InDoubtError it
    is paused here and may run there, after NotResumedError it is paused here and runs nowhere; the
    message says what to do.
    """
    job = start_migration(guest, uri, options, **changes)
    try:
        return job.wait()
    except KeyboardInterrupt:
        job.cancel()
        try:
            job.wait()
        except Exception:
            raise KeyboardInterrupt from None
        raise


def receive(
    uri: str,
    make_guest: MakeGuest,
    options: ReceiveOptions | None = None,
    /,
    **changes: Any,
) -> ReceiveResult:
    """Listen at ``uri``, take in one guest and return when it is here and the source knows; the
    listener is closed then. A source that lost its connection asks again on another one: it is
    answered for up to ``linger_s``, while the guest runs already. After that a warning is logged,
    and the source is in doubt until a ``Listener`` with the same ``state_dir`` answers it.

    ``make_guest`` gets an ``Incoming`` and returns a stopped guest with the same block table, or
    raises to refuse. Raises the MigrationError of the first session that fails. To serve many
    sessions at once, or to keep answering a source's queries after a restart, use ``Listener``.
    """
    chosen = _changed(options or ReceiveOptions(), changes)
    with Listener(parse_endpoint(uri, listening=True), make_guest, chosen) as listener:
        result = listener.wait_for_guest()
        if not listener.wait_for_release(result.session_id, chosen.linger_s):
            log.warning(
                "session %s: the guest is here, but its source has not said in %g s that it knows: "
                "it may stay in doubt until a listener with this state directory answers it",
                result.session_id,
                chosen.linger_s,
            )
        return result

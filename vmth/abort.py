# SPDX-License-Identifier: Apache-2.0
"""How the other end is told why a session ended, and what a source makes of what it is told."""

from __future__ import annotations

from vmth.errors import (
    CancelledError,
    GuestError,
    MigrationError,
    NotConvergedError,
    StreamError,
    VerificationError,
)
from vmth.wire.messages import Abort, AbortCode

__all__ = ["abort_code", "abort_error"]

_ABORT_CODES: tuple[tuple[type[BaseException], AbortCode], ...] = (
    (CancelledError, AbortCode.CANCELLED),
    (NotConvergedError, AbortCode.NOT_CONVERGED),
    (VerificationError, AbortCode.VERIFICATION),
    (StreamError, AbortCode.PROTOCOL),
    (GuestError, AbortCode.GUEST),
)


def abort_code(error: BaseException) -> AbortCode:
    """What ``Abort`` gives as the reason for this error."""
    for kind, code in _ABORT_CODES:
        if isinstance(error, kind):
            return code
    return AbortCode.FAILED


def abort_error(abort: Abort) -> MigrationError:
    """What a migration ends with that the destination has ended."""
    kind = {
        AbortCode.VERIFICATION: VerificationError,
        AbortCode.CANCELLED: CancelledError,
    }.get(AbortCode(abort.code), MigrationError)
    return kind(f"the destination ended the migration: {abort.reason}")

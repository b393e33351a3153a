# SPDX-License-Identifier: Apache-2.0
"""The exception tree and the exit codes.

Whose fault it is decides the class: ``UsageError`` ours (the caller's), ``StreamError`` the peer's
bytes, ``ChannelError`` the connection's. ``MigrationError`` and its children are outcomes of a job;
each says in ``source_runs`` whether the source guest runs afterwards.
"""

from __future__ import annotations

import enum
import traceback

__all__ = [
    "CancelledError",
    "ChannelError",
    "ExitCode",
    "GuestError",
    "InDoubtError",
    "MigrationError",
    "NotConvergedError",
    "NotResumedError",
    "OptionError",
    "RefusedError",
    "StreamError",
    "UsageError",
    "VerificationError",
    "VmthError",
    "let_frames_go",
]


class ExitCode(enum.IntEnum):
    """Exit codes of every command; stable."""

    OK = 0
    FAILED = 1  #: failed, the source guest runs
    USAGE = 2
    REFUSED = 3  #: refused before the start
    CANCELLED = 4
    NOT_CONVERGED = 5  #: did not converge or timed out, the source guest runs
    VERIFICATION_FAILED = 6  #: digests differ and could not be repaired, the source guest runs
    IN_DOUBT = 7  #: the guest is paused and an operator must decide
    INTERRUPTED = 130


class VmthError(Exception):
    """Base of all."""

    exit_code: ExitCode = ExitCode.FAILED


class UsageError(VmthError, ValueError):
    """The caller's mistake: a value outside what is allowed. The message names both."""

    exit_code = ExitCode.USAGE


class OptionError(UsageError):
    """A field of an options class has a value that is not allowed. ``field`` is its name there;
    the command line names its own option instead. ``problem``: what was received, what is
    allowed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class StreamError(VmthError):
    """The peer sent something that the protocol does not allow. The message names both."""


class ChannelError(VmthError, OSError):
    """A connection could not be made, was lost, or went silent."""


class GuestError(VmthError):
    """A guest's callback failed. Which one, and what state then holds, is in the message."""


class MigrationError(VmthError):
    """A migration ended without the guest at the destination; the source guest runs."""

    source_runs: bool = True


class RefusedError(MigrationError):
    """Refused before the first page: version, block table, page size, resources, compatibility."""

    exit_code = ExitCode.REFUSED


class CancelledError(MigrationError):
    """Cancelled by the caller."""

    exit_code = ExitCode.CANCELLED


class NotConvergedError(MigrationError):
    """The dirty rate stayed above what the link carries, or the timeout came first."""

    exit_code = ExitCode.NOT_CONVERGED


class VerificationError(MigrationError):
    """The digests differ and could not be repaired in time, or an audit, or the guest, found
    damage."""

    exit_code = ExitCode.VERIFICATION_FAILED


class NotResumedError(MigrationError):
    """The migration failed, and then the source guest could not be resumed: it is paused here, and
    runs nowhere. An operator must look at it; the message has both reasons."""

    exit_code = ExitCode.IN_DOUBT
    source_runs = False


class InDoubtError(MigrationError):
    """The grant was given and its outcome is not known: the source stays paused."""

    exit_code = ExitCode.IN_DOUBT
    source_runs = False


def let_frames_go(error: BaseException | None) -> None:
    """Drop the local variables that a kept exception's traceback holds on to: mappings of guest
    memory and their descriptors would live as long as the error. The lines stay readable."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

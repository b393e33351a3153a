# SPDX-License-Identifier: Apache-2.0
"""vmth: the page-transfer core that moves running virtual machines between hosts.

The simple API is ``migrate`` and ``receive``; ``start_migration`` returns a job to steer,
``Listener`` serves many sessions. What an embedder implements is ``Guest`` (vmth/guest.py,
docs/embedding.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vmth.api import migrate, receive, start_migration
    from vmth.errors import (
        CancelledError,
        ChannelError,
        GuestError,
        InDoubtError,
        MigrationError,
        NotConvergedError,
        NotResumedError,
        RefusedError,
        StreamError,
        UsageError,
        VerificationError,
        VmthError,
    )
    from vmth.guest import DirtySource, Guest, StateStream
    from vmth.handshake import Incoming
    from vmth.job import MigrationJob
    from vmth.listener import Listener
    from vmth.options import MigrateOptions, ReceiveOptions
    from vmth.received import ReceiveResult
    from vmth.recovery import recover
    from vmth.stats import JobStats, MigrationResult, RoundStats
    from vmth.types import Mapping, RamBlock

__all__ = [
    "CancelledError",
    "ChannelError",
    "DirtySource",
    "Guest",
    "GuestError",
    "InDoubtError",
    "Incoming",
    "JobStats",
    "Listener",
    "Mapping",
    "MigrateOptions",
    "MigrationError",
    "MigrationJob",
    "MigrationResult",
    "NotConvergedError",
    "NotResumedError",
    "RamBlock",
    "ReceiveOptions",
    "ReceiveResult",
    "RefusedError",
    "RoundStats",
    "StateStream",
    "StreamError",
    "UsageError",
    "VerificationError",
    "VmthError",
    "__version__",
    "migrate",
    "receive",
    "recover",
    "start_migration",
]

_HOMES = {
    "vmth.api": ("migrate", "receive", "start_migration"),
    "vmth.destination_session": ("ReceiveResult",),
    "vmth.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "vmth.guest": ("DirtySource", "Guest", "StateStream"),
    "vmth.handshake": ("Incoming",),
    "vmth.job": ("MigrationJob",),
    "vmth.listener": ("Listener",),
    "vmth.options": ("MigrateOptions", "ReceiveOptions"),
    "vmth.recovery": ("recover",),
    "vmth.stats": ("JobStats", "MigrationResult", "RoundStats"),
    "vmth.types": ("Mapping", "RamBlock"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a checker sees the imports above, and every submodule

    def __getattr__(name: str) -> Any:
        # Loaded on first use: a kernel or a wire message must not pull in the transfer's modules.
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value

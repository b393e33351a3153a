# SPDX-License-Identifier: Apache-2.0
"""How the commands call the fields of the options classes, in what they tell people."""

from __future__ import annotations

from vmth.errors import OptionError

__all__ = ["OPTIONS", "for_users"]

#: By the name of a field.
OPTIONS = {
    "audit": "--audit",
    "bandwidth_bps": "--bandwidth",
    "channels": "--channels",
    "congestion_control": "--congestion-control",
    "dedup_index_bytes": "--dedup-index",
    "delta_cache_bytes": "--delta-cache",
    "downtime_limit_ns": "--downtime-limit",
    "dscp": "--dscp",
    "folder": "--reuse-index",
    "forms": "--forms",
    "interfaces": "--interface",
    "kept_copies_bytes": "--kept-copies",
    "memory_bytes": "--reuse-memory",
    "multifd_channels": "--parallel-connections",
    "on_success": "--on-success",
    "paths": "--reuse",
    "source_addresses": "--bind",
    "timeout_ns": "--timeout",
    "timeout_s": "--timeout",
    "zstd_level": "--zstd-level",
}


def for_users(error: BaseException) -> str:
    """The message of ``error``, with the option that the user gave instead of the field. A field
    that no option sets keeps its name."""
    if isinstance(error, OptionError):
        return f"{OPTIONS.get(error.field, error.field)}: {error.problem}"
    return str(error)

# SPDX-License-Identifier: Apache-2.0
"""What a caller may choose for a migration. Plain data, checked where it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from vmth.channel.forms import FORM_NAMES
from vmth.channel.reuse import ReuseSource, check_sources
from vmth.channel.sockets import LinkOptions
from vmth.errors import OptionError, UsageError
from vmth.policy.interface import OnStall, Policy
from vmth.uri import Endpoint, Scheme
from vmth.wire.messages import Mode

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "ALL_FORMS",
    "MAX_CHANNELS",
    "WIRE_PAGE_BYTES",
    "MigrateOptions",
    "ReceiveOptions",
    "check_plaintext",
    "check_types",
]

MAX_CHANNELS = 64
#: One size a session; the two ends' backing pages may differ.
WIRE_PAGE_BYTES = 4096
#: Zero pages are always told from others; the rest are the features that two ends agree on.
ALL_FORMS = ("zero", *FORM_NAMES)


#: By the annotation of a field: what it takes, and how that is called. Others are not checked.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "int": ((Integral,), "a whole number"),
    "float": ((Real,), "a number"),
    "Mode": ((Mode,), "Mode.LIVE or Mode.COLD"),
    "OnStall": ((OnStall,), ", ".join(f"OnStall.{choice.name}" for choice in OnStall)),
    "LinkOptions": ((LinkOptions,), "a LinkOptions"),
}


def check_types(options: DataclassInstance) -> None:
    """UsageError for the first field with a value of another type than its annotation says: a float
    of seconds is not taken for nanoseconds, nor a text for a choice."""
    for field_ in fields(options):
        value = getattr(options, field_.name)
        allowed, what = _TYPES.get(str(field_.type), ((object,), ""))
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise OptionError(field_.name, f"received {value!r}, allowed {what}")


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """The source's choices. Units are in the names; 0 means none where that makes sense."""

    mode: Mode = Mode.LIVE
    channels: int = 1
    bandwidth_bps: int = 0  #: bytes/s over all channels
    downtime_limit_ns: int = 300_000_000
    timeout_ns: int = 0  #: of the rounds, from the first page on
    on_stall: OnStall = OnStall.PAUSE
    policy: Policy | None = None  #: None: StandardPolicy
    digest: bool = True
    audit: bool = False
    forms: tuple[str, ...] = ALL_FORMS  #: that pages may take, where the destination knows them
    fixed_forms: bool = False  #: all of them from start to end, instead of choosing by cost
    zstd_level: int = 0  #: with fixed forms; 0: 1
    dedup_index_bytes: int = 64 << 20  #: memory of the source, at most
    delta_cache_bytes: int = 256 << 20  #: the same; pays up to the size of what is rewritten
    kept_copies_bytes: int = 64 << 20  #: the same; of pages that cannot be read again (a QEMU's)
    zerocopy: bool = True
    insecure: bool = False  #: plaintext beyond loopback and unix sockets is allowed
    peer_timeout_s: float = 10.0
    realtime: bool = True  #: what a paused guest waits for runs first, on cores that are awake
    query_timeout_s: float = 10.0  #: how long a granted source asks before it is in doubt
    state_dir: Path | None = None
    keep_image: Path | None = None  #: where the guest's memory is kept once it has left
    guest_info: Mapping[str, str] = field(default_factory=dict)  #: ``Incoming.guest`` over there
    link: LinkOptions = field(default_factory=LinkOptions)

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise OptionError("channels", f"received {self.channels}, allowed 1 to {MAX_CHANNELS}")
        for name in ("source_addresses", "interfaces"):
            given = len(getattr(self.link, name))
            if given > self.channels:
                raise OptionError(
                    name,
                    f"received {given} for {self.channels} channels, allowed at most one a channel",
                )
        for name in (
            "bandwidth_bps",
            "downtime_limit_ns",
            "timeout_ns",
            "dedup_index_bytes",
            "delta_cache_bytes",
            "kept_copies_bytes",
        ):
            if getattr(self, name) < 0:
                raise OptionError(name, f"received {getattr(self, name)}, allowed 0 and more")
        if self.downtime_limit_ns == 0:
            raise OptionError("downtime_limit_ns", "received 0, allowed 1 and more")
        if not 0.1 <= self.peer_timeout_s <= 3600:
            raise OptionError(
                "peer_timeout_s", f"received {self.peer_timeout_s}, allowed 0.1 to 3600"
            )
        for name in self.forms:
            if name not in ALL_FORMS:
                raise OptionError("forms", f"received {name!r}, allowed {', '.join(ALL_FORMS)}")
        if self.zstd_level and not self.fixed_forms:
            raise OptionError(
                "zstd_level", f"received {self.zstd_level}, allowed with fixed forms only"
            )
        if not -10 <= self.zstd_level <= 19:
            raise OptionError("zstd_level", f"received {self.zstd_level}, allowed -10 to 19")
        if self.audit and not self.digest:
            raise OptionError("audit", "received on with the digest off, allowed only with it on")

    def check_for(self, endpoint: Endpoint) -> str | None:
        """What to report of a migration to ``endpoint``, as ``check_plaintext``; UsageError also
        where its connections cannot be made as ``link`` says."""
        self.link.check_for(endpoint)
        return check_plaintext(endpoint, self.insecure)


@dataclass(frozen=True, slots=True)
class ReceiveOptions:
    """The destination's choices."""

    insecure: bool = False
    max_sessions: int = 8
    max_records: int = 1024  #: sessions that must be remembered; beyond it new ones are refused
    max_memory_bytes: int = 0  #: of one session's guest; 0: what make_guest allows
    peer_timeout_s: float = 10.0
    idle_timeout_s: float = 600.0  #: a session in which nothing but pings happens is ended
    linger_s: float = 30.0  #: how long ``receive`` answers a source that has not said Released
    realtime: bool = True  #: what a paused guest waits for runs first, on cores that are awake
    state_dir: Path | None = None
    link: LinkOptions = field(default_factory=LinkOptions)
    reuse: Sequence[ReuseSource] = ()  #: files with pages, asked in their order; kept by the caller

    def __post_init__(self) -> None:
        check_types(self)
        check_sources(self.reuse, WIRE_PAGE_BYTES)
        for name, least in (
            ("peer_timeout_s", 0.1),
            ("idle_timeout_s", 0.1),
            ("linger_s", 0.0),
        ):
            if not least <= getattr(self, name) <= 86400:
                raise OptionError(
                    name, f"received {getattr(self, name)}, allowed {least:g} to 86400"
                )
        if not 1 <= self.max_sessions <= 1024:
            raise OptionError("max_sessions", f"received {self.max_sessions}, allowed 1 to 1024")
        if self.max_records < 1:
            raise OptionError("max_records", f"received {self.max_records}, allowed 1 and more")


def check_plaintext(endpoint: Endpoint, insecure: bool) -> str | None:
    """What to report when pages travel unencrypted beyond this machine; UsageError unless
    allowed."""
    if endpoint.is_loopback() or endpoint.scheme is Scheme.FD:
        return None  # a descriptor that the caller passes is the caller's to judge
    if not insecure:
        raise UsageError(
            f"{endpoint.display} is beyond loopback and the connection is not encrypted: "
            "allow that with --insecure (insecure=True)"
        )
    return f"plaintext: {endpoint.display} is not encrypted"

# SPDX-License-Identifier: Apache-2.0
"""How a demonstration went, filled in as it goes: whatever is known stands here, also after a
failure."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmth.demo.arrival import Arrival
from vmth.demo.check import GuestCheckReport
from vmth.demo.record import TravelRecord
from vmth.demo.settings import DemoSettings
from vmth.errors import ExitCode, VmthError
from vmth.events import Throttled
from vmth.guests.requests import Prepared
from vmth.meter import MoverCost
from vmth.option_names import for_users
from vmth.stats import MigrationResult, RoundStats

__all__ = ["Outcome"]


@dataclass(slots=True)
class Outcome:
    """One demonstration. Fields that were never reached stay None or empty.

    ``source_runs``: does the source guest run here when all is over? None: there was none, or it
    cannot be known.
    """

    role: str  #: "local", "send", "receive"
    settings: DemoSettings | None = None
    guest: str = ""
    guest_reason: str = ""
    dirty_source: str = ""
    prepared: Prepared | None = None
    rounds: list[RoundStats] = field(default_factory=list)
    throttles: list[Throttled] = field(default_factory=list)
    result: MigrationResult | None = None
    record: TravelRecord | None = None
    arrival: Arrival | None = None
    source_cost: MoverCost | None = None
    source_check: GuestCheckReport | None = None
    source_runs: bool | None = None
    #: Nobody knows whether the guest runs elsewhere: what is left of it must stay as it is.
    in_doubt: bool = False
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    exit_code: ExitCode = ExitCode.OK

    @property
    def verified(self) -> bool:
        """The digests were equal before the guest ran, and nothing that was checked later
        failed."""
        if self.error:
            return False
        if self.result is not None:
            return self.result.verified
        return self.arrival is not None and self.arrival.verified

    def fail(self, error: BaseException, exit_code: ExitCode | None = None) -> None:
        """The first failure is the one that is told."""
        if self.error:
            return
        self.error = for_users(error) or type(error).__name__
        if exit_code is None:
            exit_code = error.exit_code if isinstance(error, VmthError) else ExitCode.FAILED
        self.exit_code = exit_code

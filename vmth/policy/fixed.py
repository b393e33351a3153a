# SPDX-License-Identifier: Apache-2.0
"""A policy in a dozen lines: so many rounds, then switch over, whatever it costs.

For repeatable measurements, and the shortest example of what can be plugged in.
"""

from __future__ import annotations

from vmth.errors import UsageError
from vmth.policy.forecast import forecast_downtime
from vmth.policy.interface import Action, Decision, Forecast, RoundView

__all__ = ["FixedRoundsPolicy"]


class FixedRoundsPolicy:
    """Switch over after ``rounds`` rounds; the downtime limit and the timeout are not looked at."""

    def __init__(self, rounds: int) -> None:
        if rounds < 1:
            raise UsageError(f"{rounds} rounds asked for; allowed: at least 1, the full pass")
        self._rounds = rounds

    def decide(self, view: RoundView) -> Decision:
        done = len(view.rounds)
        enough = done >= self._rounds or view.switchover_requested
        return Decision(
            Action.SWITCH_OVER if enough else Action.CONTINUE,
            f"{done} of {self._rounds} rounds",
            forecast_downtime(view),
        )

    def recheck(self, view: RoundView, forecast: Forecast) -> Decision:
        return Decision(Action.SWITCH_OVER, "the number of rounds decides", forecast)

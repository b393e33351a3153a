# SPDX-License-Identifier: Apache-2.0
"""Pure decisions: when to switch over, throttle, give up. Time is an argument."""

from vmth.policy.fixed import FixedRoundsPolicy
from vmth.policy.forecast import forecast_downtime
from vmth.policy.interface import (
    Action,
    CanForesee,
    Decision,
    Forecast,
    OnStall,
    Policy,
    RoundView,
)
from vmth.policy.standard import StandardPolicy

__all__ = [
    "Action",
    "CanForesee",
    "Decision",
    "FixedRoundsPolicy",
    "Forecast",
    "OnStall",
    "Policy",
    "RoundView",
    "StandardPolicy",
    "forecast_downtime",
]

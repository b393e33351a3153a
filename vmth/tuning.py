# SPDX-License-Identifier: Apache-2.0
"""The settings of a job that may change while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from vmth.guest import USUAL_STATE_BYTES
from vmth.policy.interface import OnStall

__all__ = ["Tuning"]


@dataclass(slots=True)
class Tuning:
    """What may change while the loop runs; written by the job, read once a round."""

    bandwidth_bps: int
    downtime_limit_ns: int
    timeout_ns: int
    on_stall: OnStall
    state_bytes: int = USUAL_STATE_BYTES  #: of CPUs and devices, as far as it is known
    switchover_requested: bool = False

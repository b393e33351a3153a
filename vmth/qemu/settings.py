# SPDX-License-Identifier: Apache-2.0
"""A QEMU's migration capabilities and parameters: set for one migration, put back afterwards.

What was there is remembered for exactly what was changed, so that settings that somebody else
changes meanwhile are left alone. ``saved()`` is JSON-able: the watchdog puts it back when this
process dies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from vmth.errors import ChannelError, RefusedError, UsageError
from vmth.qemu.dirty_limit import limits_of, put_limits_back
from vmth.qemu.qmp import Qmp, QmpError, Question

__all__ = [
    "MIGRATION_OVER",
    "SETTINGS_QUESTIONS",
    "MigrationSettings",
    "capabilities_of",
    "is_over",
    "migration_status",
    "parameters_of",
    "put_back",
]

#: The statuses of ``query-migrate`` in which no migration goes on ("" where there never was one).
#: A status that is not known is taken for a migration under way.
MIGRATION_OVER = frozenset({"", "none", "completed", "failed", "cancelled", "colo"})
PUT_BACK_S = 10.0
_LOOK_AGAIN_S = 0.02


#: What ``capabilities_of`` and ``parameters_of`` ask, for ``Qmp.ask_ahead``.
SETTINGS_QUESTIONS: Final[tuple[Question, ...]] = (
    ("query-migrate-capabilities", None),
    ("query-migrate-parameters", None),
)


def migration_status(qmp: Qmp) -> str:
    """The status of ``query-migrate``; "" where no migration ever began."""
    return str(qmp.execute("query-migrate").get("status", ""))


def is_over(status: str) -> bool:
    """May the capabilities be changed in this status, as far as is known?"""
    return status in MIGRATION_OVER


def capabilities_of(qmp: Qmp) -> dict[str, bool]:
    """Every capability that this QEMU knows, and whether it is on."""
    rows = qmp.execute(*SETTINGS_QUESTIONS[0])
    return {str(row["capability"]): bool(row["state"]) for row in rows}


def parameters_of(qmp: Qmp) -> dict[str, Any]:
    """Every parameter that this QEMU knows, with its value."""
    return dict(qmp.execute(*SETTINGS_QUESTIONS[1]))


class MigrationSettings:
    """The settings of one QEMU. Any thread: changes come one after the other."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._lock = threading.RLock()
        self._capabilities: dict[str, bool] = {}
        self._parameters: dict[str, Any] = {}
        self._limits: list[tuple[int, int]] | None = None

    def remember_limits(self) -> None:
        """Whatever dirty limits the vCPUs will have, those of now are put back."""
        self._limits = limits_of(self._qmp)

    def remember(self, *names: str) -> None:
        """Parameters that are changed later, when nobody hears any more what was there before."""
        with self._lock:
            known = parameters_of(self._qmp)
            found = {name: known[name] for name in names if name in known}
            self._parameters = {**found, **self._parameters}

    def apply(
        self,
        capabilities: Mapping[str, bool] | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Set them, and remember what was there before the first change of each.

        Returns the names that this QEMU does not know, which are left out. When QEMU refuses a
        value or a combination, what this object changed so far is put back and RefusedError has
        QEMU's words.
        """
        with self._lock:
            return self._apply(capabilities, parameters)

    def _apply(
        self, capabilities: Mapping[str, bool] | None, parameters: Mapping[str, Any] | None
    ) -> list[str]:
        known_capabilities = capabilities_of(self._qmp) if capabilities else {}
        known_parameters = parameters_of(self._qmp) if parameters else {}
        switches, switched = _differing(capabilities or {}, known_capabilities)
        values, changed = _differing(parameters or {}, known_parameters)
        try:
            if switches:
                set_capabilities(self._qmp, switches)
                self._capabilities = {**switched, **self._capabilities}
            if values:
                self._qmp.execute("migrate-set-parameters", values)
                self._parameters = {**changed, **self._parameters}
        except QmpError as error:
            asked = ", ".join(f"{name}={value}" for name, value in {**switches, **values}.items())
            self.restore()
            raise RefusedError(
                f"QEMU refused the migration settings {asked}: {error.description}"
            ) from None
        return [
            name
            for names, known in ((capabilities, known_capabilities), (parameters, known_parameters))
            for name in names or ()
            if name not in known
        ]

    def saved(self) -> dict[str, Any]:
        """What ``restore()`` would put back, for ``put_back``: {"capabilities", "parameters"}, and
        "dirty-limits" if they were remembered."""
        saved = {"capabilities": dict(self._capabilities), "parameters": dict(self._parameters)}
        return saved if self._limits is None else {**saved, "dirty-limits": self._limits}

    def restore(self, timeout_s: float = PUT_BACK_S) -> list[str]:
        """Put back what was there. Returns a sentence for what could not be put back, and raises
        nothing for it: a QEMU that is gone has no settings. Idempotent."""
        with self._lock:
            saved = self.saved()
            self._capabilities, self._parameters, self._limits = {}, {}, None
        return put_back(self._qmp, saved, timeout_s)


def set_capabilities(qmp: Qmp, states: Mapping[str, bool]) -> None:
    """In one command, so that QEMU judges the combination that results and not the way to it."""
    rows = [{"capability": name, "state": state} for name, state in states.items()]
    qmp.execute("migrate-set-capabilities", {"capabilities": rows})


def put_back(qmp: Qmp, saved: Mapping[str, Any], timeout_s: float = PUT_BACK_S) -> list[str]:
    """Put back what ``MigrationSettings.saved()`` said. QEMU refuses capabilities while a migration
    is under way: its end is waited for within ``timeout_s``. As ``restore()`` otherwise."""
    capabilities, parameters = saved_settings(saved)
    problems = []
    try:
        if "dirty-limits" in saved:
            try:
                put_limits_back(qmp, [(int(cpu), int(rate)) for cpu, rate in saved["dirty-limits"]])
            except QmpError as error:
                problems.append(f"the vCPUs' dirty limits: {error.description}")
        if capabilities:
            _wait_over(qmp, timeout_s)
            try:
                set_capabilities(qmp, capabilities)
            except QmpError as error:
                problems.append(_not_put_back("capabilities", capabilities, error))
        if parameters:
            try:
                qmp.execute("migrate-set-parameters", parameters)
            except QmpError as error:
                problems.append(_not_put_back("parameters", parameters, error))
    except ChannelError:
        pass  # QEMU is gone, and so are its settings
    return problems


def saved_settings(saved: Mapping[str, Any]) -> tuple[dict[str, bool], dict[str, Any]]:
    """(capabilities, parameters) of ``MigrationSettings.saved()``, checked: it may come from a
    pipe. UsageError for anything else."""
    capabilities, parameters = saved.get("capabilities", {}), saved.get("parameters", {})
    if not isinstance(capabilities, dict) or not isinstance(parameters, dict):
        raise UsageError(f"saved settings {saved!r}: allowed two objects of names and values")
    return {str(name): bool(state) for name, state in capabilities.items()}, dict(parameters)


def _differing(
    wanted: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what to set, what is there instead)."""
    names = [name for name, value in wanted.items() if name in known and known[name] != value]
    return {name: wanted[name] for name in names}, {name: known[name] for name in names}


def _wait_over(qmp: Qmp, timeout_s: float) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not is_over(migration_status(qmp)) and time.monotonic() < give_up_s:
        time.sleep(_LOOK_AGAIN_S)


def _not_put_back(kind: str, values: Mapping[str, Any], error: QmpError) -> str:
    names = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"the migration {kind} {names} could not be put back: {error.description}"

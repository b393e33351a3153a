# SPDX-License-Identifier: Apache-2.0
"""Turns what the sender counts into the forms that its next packets use, some ten times a second.

The decision is ``vmth.policy.forms``; here are the clock, the thread and the counters.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from vmth.channel.forms import forms_mask
from vmth.errors import VmthError
from vmth.events import Event, FormsChosen
from vmth.handshake import WIRE_PAGE_BYTES
from vmth.options import MigrateOptions
from vmth.policy.forms import MIN_PAGES, FormChoice, FormChooser, FormCost, FormsView
from vmth.stats import FormDecision, TransferCounters
from vmth.tuning import Tuning
from vmth.worker_share import WorkerShare

__all__ = ["INTERVAL_NS", "FormSender", "FormTuner", "idle_seconds", "tuner_for"]

log = logging.getLogger(__name__)

INTERVAL_NS = 100_000_000
#: The first intervals are short: until something is known all pages go as they are.
FIRST_INTERVAL_NS = 25_000_000
FIRST_INTERVALS = 8
#: As long as pages go out that might not have to.
GLANCE_NS = 10_000_000
#: Where fewer pages go out than teach something, an interval lasts longer, but not beyond this.
LONGEST_INTERVAL_NS = 300_000_000
#: The first decision and the latest ones are kept.
DECISIONS_KEPT = 256
#: Told from other pages without being agreed on.
_ALWAYS = frozenset({"zero"})


class FormSender(Protocol):
    """What is needed of a page sender."""

    def counters(self) -> TransferCounters: ...
    def set_forms(self, mask: int, zstd_level: int = 1) -> None: ...


def idle_seconds(stat: str = "/proc/stat") -> float:
    """Time that this machine's cores have idled, of those that this process may use; proc(5). What
    ran niced gives way to us, so that counts as well."""
    cpus, ticks = os.sched_getaffinity(0), 0
    with open(stat) as file:
        for line in file:
            name, *values = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cpus:
                ticks += int(values[1]) + int(values[3]) + int(values[4])
    return ticks / os.sysconf("SC_CLK_TCK")


class FormTuner:
    """A context manager: a thread named ``vmth-forms`` looks ten times a second inside it,
    more often at first and when a cap rose, less where few pages go out.
    ``limit_bps`` is asked anew each time, so that a cap that changes changes the choice.

    ``idle`` tells the seconds that cores have idled, ``share`` which part of the time in which the
    workers wanted a core they had one since it was asked last (0: not known). ``fixed_level`` other
    than None: all forms at once, at that zstd level, and no thread.
    """

    def __init__(
        self,
        sender: FormSender,
        allowed: Iterable[str],
        *,
        page_bytes: int,
        workers: int,
        limit_bps: Callable[[], int],
        clock: Callable[[], int],
        emit: Callable[[FormDecision], None],
        fixed_level: int | None = None,
        idle: Callable[[], float] | None = None,
        share: Callable[[], float] | None = None,
    ) -> None:
        self._idle = idle or idle_seconds
        self._share = share or WorkerShare().share
        self.decisions: list[FormDecision] = []
        self._sender = sender
        self._allowed = frozenset(allowed)
        self._chooser = FormChooser(self._allowed, page_bytes)
        self._chosen: FormChoice | None = None
        self._workers = workers
        self._limit_bps = limit_bps
        self._clock = clock
        self._emit = emit
        self._fixed_level = fixed_level
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vmth-forms", daemon=True)
        self._idle_s = self._idle()
        self._before = sender.counters()
        self._began_ns = self._looked_ns = clock()

    def __enter__(self) -> FormTuner:
        if self._fixed_level is not None:
            self._set(self._allowed, self._fixed_level, "as asked for")
        elif self._allowed - _ALWAYS:
            choice = self._chooser.first(self._limit_bps(), self._workers)
            if choice.forms != _ALWAYS or choice.glance:
                self._chosen = choice
                self._set(choice.forms, choice.level, choice.reason)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> FormChoice:
        """One interval's end: measure, choose, set. Raises what the sender raises."""
        now_ns, after = self._clock(), self._sender.counters()
        interval_ns = max(1, now_ns - self._looked_ns)
        choice = self._chooser.choose(self._view(after, interval_ns))
        self._before, self._looked_ns = after, now_ns
        if self._chosen is None or choice.rung != self._chosen.rung:
            self._set(choice.forms, choice.level, choice.reason)
        self._chosen = choice
        return choice

    def next_interval_ns(self, intervals: int) -> int:
        """Until the next look, after so many."""
        if self._chosen is not None and self._chosen.glance:
            return GLANCE_NS
        brief = self._chosen is not None and self._chosen.brief
        return FIRST_INTERVAL_NS if brief or intervals < FIRST_INTERVALS else INTERVAL_NS

    def _view(self, after: TransferCounters, interval_ns: int) -> FormsView:
        before = self._before
        cost = FormCost(
            self._pages(after), after.cpu_ns - before.cpu_ns, after.wire_bytes - before.wire_bytes
        )
        acked_bps = (after.acked_bytes - before.acked_bytes) * 1e9 / interval_ns
        idle_s = self._idle()
        cores = (cost.cpu_ns + (idle_s - self._idle_s) * 1e9) / interval_ns
        self._idle_s = idle_s
        given = self._workers * self._share()
        carrying = (after.carrying_ns - before.carrying_ns) / interval_ns
        return FormsView(
            interval_ns,
            cost,
            acked_bps,
            self._limit_bps(),
            self._workers,
            cores,
            given,
            after.opening,
            min(1.0, carrying) if after.carrying_ns else 1.0,
            (after.starved_ns - before.starved_ns) / interval_ns,
        )

    def _pages(self, after: TransferCounters) -> int:
        before = self._before
        return after.normal_pages + after.formed_pages - before.normal_pages - before.formed_pages

    def _too_early(self) -> bool:
        few = self._pages(self._sender.counters()) < MIN_PAGES
        return few and self._clock() - self._looked_ns < LONGEST_INTERVAL_NS

    def _set(self, forms: frozenset[str], level: int, reason: str) -> None:
        self._sender.set_forms(forms_mask(forms - _ALWAYS), level or 1)
        shown = level or 1 if "zstd" in forms else 0
        after_ns = self._clock() - self._began_ns
        decision = FormDecision(after_ns, tuple(sorted(forms)), shown, reason)
        self.decisions.append(decision)
        if len(self.decisions) > DECISIONS_KEPT:
            del self.decisions[1]
        self._emit(decision)

    def _run(self) -> None:
        intervals = 0
        while not self._ended.wait(self.next_interval_ns(intervals) / 1e9):
            intervals += 1
            try:
                if not self._too_early():
                    self.look()
            except VmthError as error:  # the session hears of it by itself
                log.debug("no more choosing of forms: %s", error)
                return


def tuner_for(
    sender: FormSender,
    options: MigrateOptions,
    features: Iterable[str],
    tuning: Tuning,
    clock: Callable[[], int],
    emit: Callable[[Event], None],
) -> FormTuner:
    """For what both ends speak and the caller allows; without hashes nothing can be compared."""
    allowed = {"zero"} | (set(options.forms) & set(features))
    if not options.digest:
        allowed &= {"zero", "zstd"}
    return FormTuner(
        sender,
        allowed,
        page_bytes=WIRE_PAGE_BYTES,
        workers=options.channels,
        limit_bps=lambda: tuning.bandwidth_bps,
        clock=clock,
        emit=lambda decision: emit(FormsChosen(clock(), decision)),
        fixed_level=options.zstd_level if options.fixed_forms else None,
    )

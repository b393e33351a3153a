# SPDX-License-Identifier: Apache-2.0
"""Machines, links and contents against which the choice of forms is tested: no clock, no socket."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmth.policy.forms import LADDER, FormChooser, FormCost, FormsView

ALL = frozenset({"zero", "same", "dedup", "delta", "zstd"})
INTERVAL_NS = 100_000_000
#: Where the ladder begins to compress, and its zstd 1.
LIGHTEST, ZSTD_1 = 3, 4
#: CPU ns and bytes of a non-zero page on each rung, by content.
MIXED = (
    (900, 4160),
    (1200, 3500),
    (1700, 3500),
    (10_000, 2300),
    (13_000, 1900),
    (20_000, 1800),
    (45_000, 1750),
)
NOISE = (
    (900, 4160),
    (1200, 4170),
    (1700, 4170),
    (3300, 4170),
    (3500, 4170),
    (5000, 4170),
    (9000, 4170),
)


@dataclass
class World:
    """What is true: the costs of each rung, the link and the cap."""

    costs: tuple[tuple[int, int], ...]
    link_bps: float
    cap_bps: int = 0
    workers: int = 2
    cores: int = 2

    def rate(self, at: int) -> float:
        """Pages a second."""
        cpu_ns, wire = self.costs[min(at, len(self.costs) - 1)]
        link = min(self.link_bps, self.cap_bps or self.link_bps)
        return min(min(self.workers, self.cores) * 1e9 / cpu_ns, link / wire)

    def interval(self, at: int) -> FormsView:
        cpu_ns, wire = self.costs[min(at, len(self.costs) - 1)]
        pages = int(self.rate(at) * INTERVAL_NS / 1e9)
        cost = FormCost(pages, pages * cpu_ns, pages * wire)
        acked_bps = pages * wire * 1e9 / INTERVAL_NS
        return FormsView(INTERVAL_NS, cost, acked_bps, self.cap_bps, self.workers, self.cores)


def run(world: World, intervals: int = 60, chooser: FormChooser | None = None) -> list[int]:
    """The rung of each interval."""
    return run_from(0, world, intervals, chooser or FormChooser(ALL))


def run_from(at: int, world: World, intervals: int, chooser: FormChooser) -> list[int]:
    names = [rung.name for rung in chooser.rungs]
    used = []
    for _ in range(intervals):
        used.append(at)
        at = names.index(chooser.choose(world.interval(at)).rung.name)
    return used


def reached(world: World, used: list[int]) -> float:
    """Pages of those intervals against those of the best rung."""
    best = max(world.rate(at) for at in range(len(LADDER)))
    return sum(world.rate(at) for at in used) / (best * len(used))


#: What the content of a long first round costs on each rung, by kind of memory.
FILES = (
    *((900, 4160), (1200, 4100), (1900, 4100)),
    *((11_000, 2200), (14_000, 1700), (22_000, 1600), (50_000, 1500), (80_000, 1480)),
)
STANDARD = (
    *((900, 4160), (1200, 3290), (1900, 3290)),
    *((7500, 2700), (9500, 2300), (13_500, 2200), (30_000, 2130), (45_000, 2110)),
)


#: A guest that comes back: a look costs some CPU, and nearly all pages are there.
RETURNED = (
    (900, 4160),
    (6000, 120),
    (7000, 120),
    (7000, 120),
    (7000, 120),
    (7000, 120),
    (7000, 120),
)


@dataclass
class SlowDestination(World):
    """It takes so many pages/s of each rung."""

    takes: tuple[float, ...] = (500e3, 120e3, 110e3, 60e3)

    def rate(self, at: int) -> float:
        return min(super().rate(at), self.takes[min(at, len(self.takes) - 1)])

    def interval(self, at: int) -> FormsView:
        view = super().interval(at)
        carrying = view.acked_bps / self.link_bps
        return replace(view, carrying=carrying if carrying < 0.9 else 1.0)

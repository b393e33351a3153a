# SPDX-License-Identifier: Apache-2.0
"""Pages out of a QEMU's stream that the destination misses: they were said to be the same as what
it turned out not to hold. QEMU cannot be asked for them again, and still they land. Real page
channels."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import qemu_streams as s
from stream_pass_world import DEVICES, END, World, every_page
from waiting import wait_until
from warm_file import stored

from vmth.channel.forms import forms_mask
from vmth.channel.interface import PageSender
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.channel.reuse import ReuseSource, filter_messages, hear_filter
from vmth.errors import VerificationError
from vmth.memory import map_blocks
from vmth.qemu.pages_again import MOST_MISSES, PagesAgain
from vmth.qemu.stream_pass import StreamPass
from vmth.types import Mapping, RamBlock, new_bitmaps

SEED = 5


class Ends:
    """Channels between ``world``'s pass and memory, which ``views`` shows."""

    def __init__(
        self,
        world: World,
        forms: Sequence[str],
        reuse: Sequence[ReuseSource] = (),
        kept_copies_bytes: int = 64 << 20,
    ) -> None:
        self._stack = contextlib.ExitStack()
        blocks = world.guest.blocks
        there = [replace(block, mapping=Mapping(fd=self._memory(block))) for block in blocks]
        here = self._stack.enter_context(map_blocks(blocks))
        mapped = self._stack.enter_context(map_blocks(there, writable=True))
        self.views = [area.view for area in mapped]
        mask = forms_mask(forms)
        self.sender = self._stack.enter_context(
            NativeSender(
                here, s.PAGE, hash_seed=SEED, forms=mask, kept_copies_bytes=kept_copies_bytes
            )
        )
        self.receiver = self._stack.enter_context(
            NativeReceiver(
                mapped,
                s.PAGE,
                hash_seed=SEED,
                maybe_nonzero=new_bitmaps(there),
                channels=1,
                forms=mask,
                reuse=reuse,
            )
        )
        if reuse:
            told = filter_messages(reuse)
            hear_filter(lambda: next(told), self.sender)
        ours, theirs = (self._stack.enter_context(sock) for sock in socket.socketpair())
        self.sender.add_channel(ours.fileno(), 0)
        self.receiver.attach(theirs.fileno(), 0)
        self.sender.set_forms(mask)
        tools = replace(world.tools, sender=self.sender)
        world.engine = StreamPass(world.guest, tools, world.stream, world.helm)

    def _memory(self, block: RamBlock) -> int:
        fd = os.memfd_create("there", os.MFD_CLOEXEC)
        self._stack.callback(os.close, fd)
        os.ftruncate(fd, block.used_length)
        return fd

    def page(self, block: int, page: int) -> bytes:
        return bytes(self.views[block][page * s.PAGE : (page + 1) * s.PAGE])

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def pages(*seeds: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(map(s.page_of, seeds)), dtype=np.uint8)


@pytest.fixture
def changed_file(tmp_path: Path) -> Iterator[ReuseSource]:
    """It was indexed with pages of both blocks and the last one, and is another one now."""
    held = [*range(20), 1000, 1001, 777]
    source = stored(tmp_path / "file", pages(*held))
    (tmp_path / "file").write_bytes(os.urandom(len(held) * s.PAGE))
    yield source
    os.close(source.fd)


@pytest.mark.parametrize("channel", [None, 0])
def test_a_reused_file_that_has_changed_costs_a_round(
    changed_file: ReuseSource, channel: int | None
) -> None:
    world = World([every_page(), END, DEVICES], channel=channel)
    with Ends(world, ["reuse"], [changed_file]) as ends:
        final = world.engine.run()
        missed = 20 + 2  # page 3 is not looked for a second time
        assert ends.sender.counters().missed_pages == missed
        # Of a channel's page 3 the second copy waits already when the first turns out missed.
        sent_again = missed if channel is None else missed - 1
        assert sum(stats.pages for stats in final.rounds) == 64 + 3 + 1 + sent_again
        for page in range(64):
            assert ends.page(0, page) == s.page_of(777 if page == 3 else page)
        for page in range(3):
            assert ends.page(1, page) == s.page_of(1000 + page)
        assert ends.sender.digest() == ends.receiver.digest()


def test_what_is_missed_last_lands_before_the_state_is_handed_on(
    changed_file: ReuseSource,
) -> None:
    """Its content comes with ram's END only."""
    world = World([s.part(s.zero(3, "pc.ram") + s.eos()), END, DEVICES])
    with Ends(world, ["reuse"], [changed_file]) as ends:
        final = world.engine.run()
        assert ends.sender.counters().missed_pages == 1
        assert ends.page(0, 3) == s.page_of(777)
        assert final.rounds[-1].paused


def test_a_newer_copy_is_what_stays(changed_file: ReuseSource) -> None:
    again = s.part(s.normal(7, "pc.ram", 5555) + s.eos())
    world = World([every_page(), again, every_page(), again, END, DEVICES])
    with Ends(world, ["reuse"], [changed_file]) as ends:
        world.engine.run()
        assert ends.page(0, 7) == s.page_of(5555)
        assert ends.page(0, 8) == s.page_of(8)


def test_a_page_that_is_no_more_what_others_equal_is_missed_and_lands() -> None:
    """As one that a faster channel has overtaken."""

    def before(piece: int) -> None:
        if piece == 2:
            wait_until(lambda: ends.page(1, 2) == s.page_of(1002))
            ends.views[0][7 * s.PAGE : 8 * s.PAGE] = 0x11

    copies = s.part(s.normal(50, "pc.ram", 7) + s.normal(51, None, 8) + s.eos())
    anew = s.part(s.normal(7, "pc.ram", 5555) + s.eos())
    world = World([every_page(), copies, anew, END, DEVICES], before=before)
    with Ends(world, ["same", "dedup"]) as ends:
        world.engine.run()
        counters = ends.sender.counters()
        assert (counters.forms["dedup"].pages, counters.missed_pages) == (2, 1)
        assert ends.page(0, 50) == s.page_of(7) and ends.page(0, 51) == s.page_of(8)
        assert ends.page(0, 7) == s.page_of(5555)


def test_no_more_copies_are_kept_than_allowed() -> None:
    """The others go whole, and nothing is missed."""
    copies = s.part(s.normal(50, "pc.ram", 7) + s.normal(51, None, 8) + s.eos())
    world = World([every_page(), copies, END, DEVICES])
    with Ends(world, ["dedup"], kept_copies_bytes=s.PAGE) as ends:
        world.engine.run()
        counters = ends.sender.counters()
        assert (counters.forms["dedup"].pages, counters.missed_pages) == (1, 0)
        assert ends.page(0, 50) == s.page_of(7) and ends.page(0, 51) == s.page_of(8)


def test_a_page_that_was_zero_in_between_is_no_base() -> None:
    pieces = [
        every_page(),
        *(s.part(record + s.eos()) for record in (s.zero(7, "pc.ram"), s.normal(7, "pc.ram", 555))),
        s.part(s.normal(5, "pc.ram", 7) + s.eos()),
    ]
    world = World([*pieces, END, DEVICES])
    with Ends(world, ["same", "dedup"]) as ends:
        world.engine.run()
        assert ends.sender.counters().missed_pages == 0
        assert ends.page(0, 5) == s.page_of(7) and ends.page(0, 7) == s.page_of(555)


# -- what is kept ----------------------------------------------------------------------------------

BLOCKS = [RamBlock("pc.ram", 64 * s.PAGE, 0, Mapping())]


def missing(npages: int, *kept: tuple[int, int, bytes]) -> PageSender:
    """A sender that has these to tell, every time."""
    told: dict[str, Any] = {
        "take_missed": lambda bitmaps: npages,
        "take_missed_pages": lambda: list(kept),
    }
    return cast(PageSender, SimpleNamespace(**told))


def test_what_was_damaged_is_told_apart_from_what_was_missed() -> None:
    again = PagesAgain(s.PAGE)
    with pytest.raises(VerificationError, match="2 pages arrived damaged: QEMU cannot be asked"):
        again.keep_missed(missing(3, (0, 5, s.page_of(5))), BLOCKS)
    assert len(again) == 0


def test_a_page_that_is_missed_time_and_again_ends_the_attempt() -> None:
    again = PagesAgain(s.PAGE)
    liar = missing(1, (0, 5, s.page_of(5)))
    for _ in range(MOST_MISSES):
        again.keep_missed(liar, BLOCKS)
        runs, data = again.take()
        assert (int(runs["page"][0]), data) == (5, s.page_of(5))
    with pytest.raises(VerificationError, match=r"page 5 of .* was missed more than 8 times"):
        again.keep_missed(liar, BLOCKS)

# SPDX-License-Identifier: Apache-2.0
"""The device state that is kept: a model of bytes, and where its description begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmth.qemu.state_store import FIRST_BYTES, StateStore
from vmth.qemu.stream import description_at_end

MOST_BYTES = 64


@given(st.lists(st.binary(max_size=MOST_BYTES // 2), max_size=20))
def test_the_end_is_kept_and_all_that_is_not_too_much(pieces: list[bytes]) -> None:
    store, everything = StateStore(MOST_BYTES), b""
    for piece in pieces:
        store.add(memoryview(piece))
        everything += piece
        kept = store.copy()
        assert len(kept) == len(store) <= MOST_BYTES
        assert everything.endswith(kept)
        assert len(kept) >= min(len(everything), MOST_BYTES // 2)
        assert store.total_bytes == len(everything)
        for nbytes in (0, 1, 5, MOST_BYTES):
            end = kept[max(0, len(kept) - nbytes) :]
            assert store.last(nbytes) == end
            assert store.ends_with(end)
        assert not store.ends_with(kept + b"x")
    if len(everything) <= MOST_BYTES:
        assert store.copy() == everything


def test_it_grows_beyond_what_it_began_with() -> None:
    store = StateStore(8 * FIRST_BYTES)
    pieces = [bytes([k]) * (FIRST_BYTES // 2 + k) for k in range(9)]
    for piece in pieces:
        store.add(piece)
    assert store.copy() == b"".join(pieces)


JSON = b'{"devices": []}'


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (b"state\0\6" + len(JSON).to_bytes(4, "big") + JSON, True),
        (b"\0\6" + len(JSON).to_bytes(4, "big") + JSON, True),
        (b"state\0\6" + (len(JSON) + 1).to_bytes(4, "big") + JSON, False),
        (b"state\0\6\0\0\0\0", False),
        (JSON, False),
        (b"", False),
    ],
)
def test_the_description_is_found_where_it_lies(state: bytes, found: bool) -> None:
    store = StateStore(FIRST_BYTES)
    store.add(state)
    said = store.description()
    assert (said is not None) == found
    assert description_at_end(state) == (JSON if found else None)
    if said is not None:
        assert bytes(said) == JSON
        said.release()
    store.add(b"more")  # nothing holds the bytes any more
    assert store.description() is None

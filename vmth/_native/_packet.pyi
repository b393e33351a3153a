"""Cython over csrc/core/packet.c, in plain tuples; vmth.packet makes dataclasses of them."""

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

class PacketError(Exception):
    """args: (field, received, allowed)"""

def encode_desc(
    page: int,
    npages: int,
    form: int,
    flags: int,
    payload_bytes: int,
    base_block: int,
    base_page: int,
    lo: int,
    hi: int,
) -> bytes: ...
def decode_desc(
    data: bytes, at: int, block: int, block_npages: U64, page_bytes: int, forms: int
) -> tuple[int, tuple[int, int, int, int, int, int, int, int, int]]: ...
def encode_header(
    kind: int,
    block: int,
    round_: int,
    channel: int,
    seq: int,
    payload_bytes: int,
    ndesc: int,
    npages: int,
    desc: bytes,
    seed: int,
) -> bytes: ...
def decode_header(
    data: bytes, block_npages: U64, page_bytes: int, forms: int, channel: int
) -> tuple[int, int, int, int, int, int, int, int, int, int]: ...
def check_pages(data: bytes, block_npages: U64, page_bytes: int, forms: int, channel: int) -> None:
    """Header and descriptors as a whole: count, sums, zstd frames."""

def verify(raw: bytes, desc: bytes, seed: int) -> None: ...
def encode_ack(seq: int, lo: int, hi: int, status: int, block: int) -> bytes: ...
def decode_ack(data: bytes, at: int) -> tuple[int, int, int, int, int]: ...

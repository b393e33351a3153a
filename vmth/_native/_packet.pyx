# SPDX-License-Identifier: Apache-2.0
"""Cython over csrc/core/packet.c, in plain tuples. vmth.packet is the public face."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vmth._native._core cimport *


class PacketError(Exception):
    """args: (field, received, allowed)"""


cdef object _refused(const vmth_packet_error *error):
    return PacketError(error.field.decode(), error.received, error.allowed)


cdef int _limits(vmth_packet_limits *limits, const uint64_t[::1] block_npages, page_bytes, forms,
                 channel) except -1:
    limits.page_bytes = page_bytes
    limits.nblocks = <uint32_t>block_npages.shape[0]
    limits.block_npages = &block_npages[0] if block_npages.shape[0] else NULL
    limits.forms = forms
    limits.channel = channel
    return 0


def encode_desc(page, npages, form, flags, payload_bytes, base_block, base_page, lo, hi):
    cdef vmth_desc desc
    cdef uint8_t out[VMTH_DESC_REF_BYTES]
    cdef size_t used
    desc.page, desc.npages, desc.form, desc.flags = page, npages, form, flags
    desc.payload_bytes, desc.base_block, desc.base_page = payload_bytes, base_block, base_page
    desc.result.lo, desc.result.hi = lo, hi
    used = vmth_desc_encode(&desc, out, VMTH_DESC_REF_BYTES)
    if used == 0:
        raise PacketError("desc.form", form, 9)
    return (<const char *>out)[:used]


def decode_desc(const uint8_t[::1] data, size_t at, uint16_t block, const uint64_t[::1] block_npages,
                page_bytes, forms):
    cdef vmth_packet_limits limits
    cdef vmth_packet_error error
    cdef vmth_desc desc
    cdef size_t used = 0
    if at >= <size_t>data.shape[0]:
        raise PacketError("desc_bytes", 0, 16)
    _limits(&limits, block_npages, page_bytes, forms, 0)
    if vmth_desc_decode(&data[at], data.shape[0] - at, block, &limits, &desc, &used, &error) != 0:
        raise _refused(&error)
    return used, (desc.page, desc.npages, desc.form, desc.flags, desc.payload_bytes,
                  desc.base_block, desc.base_page, desc.result.lo, desc.result.hi)


def encode_header(kind, block, round_, channel, seq, payload_bytes, ndesc, npages,
                  const uint8_t[::1] desc, uint64_t seed):
    cdef vmth_packet_header header
    cdef uint8_t out[VMTH_PACKET_HEADER_BYTES]
    header.kind, header.flags, header.block, header.round = kind, 0, block, round_
    header.channel, header.seq = channel, seq
    header.desc_bytes, header.payload_bytes = <uint32_t>desc.shape[0], payload_bytes
    header.ndesc, header.npages = ndesc, npages
    vmth_packet_encode_header(&header, &desc[0] if desc.shape[0] else NULL, seed, out)
    return (<const char *>out)[:VMTH_PACKET_HEADER_BYTES]


def decode_header(const uint8_t[::1] data, const uint64_t[::1] block_npages, page_bytes, forms, channel):
    cdef vmth_packet_limits limits
    cdef vmth_packet_error error
    cdef vmth_packet_header header
    if data.shape[0] < VMTH_PACKET_HEADER_BYTES:
        raise PacketError("header", data.shape[0], VMTH_PACKET_HEADER_BYTES)
    _limits(&limits, block_npages, page_bytes, forms, channel)
    if vmth_packet_decode_header(&data[0], &limits, &header, &error) != 0:
        raise _refused(&error)
    return (header.kind, header.block, header.round, header.channel, header.seq,
            header.desc_bytes, header.payload_bytes, header.ndesc, header.npages, header.checksum)


def check_pages(const uint8_t[::1] data, const uint64_t[::1] block_npages, page_bytes, forms, channel):
    cdef vmth_packet_limits limits
    cdef vmth_packet_error error
    cdef vmth_packet_header header
    _limits(&limits, block_npages, page_bytes, forms, channel)
    if data.shape[0] < VMTH_PACKET_HEADER_BYTES:
        raise PacketError("header", data.shape[0], VMTH_PACKET_HEADER_BYTES)
    if vmth_packet_decode_header(&data[0], &limits, &header, &error) != 0:
        raise _refused(&error)
    if data.shape[0] < VMTH_PACKET_HEADER_BYTES + header.desc_bytes:
        raise PacketError("desc_bytes", data.shape[0] - VMTH_PACKET_HEADER_BYTES, header.desc_bytes)
    if vmth_packet_check(&header, &data[VMTH_PACKET_HEADER_BYTES], &limits, &error) != 0:
        raise _refused(&error)


def verify(const uint8_t[::1] raw, const uint8_t[::1] desc, uint64_t seed):
    cdef vmth_packet_error error
    if raw.shape[0] < VMTH_PACKET_HEADER_BYTES:
        raise PacketError("header", raw.shape[0], VMTH_PACKET_HEADER_BYTES)
    if vmth_packet_verify(&raw[0], &desc[0] if desc.shape[0] else NULL, desc.shape[0], seed,
                          &error) != 0:
        raise _refused(&error)


def encode_ack(seq, lo, hi, status, block):
    cdef vmth_ack ack
    cdef uint8_t out[VMTH_ACK_BYTES]
    ack.seq, ack.status, ack.block = seq, status, block
    ack.digest.lo, ack.digest.hi = lo, hi
    vmth_ack_encode(&ack, out)
    return (<const char *>out)[:VMTH_ACK_BYTES]


def decode_ack(const uint8_t[::1] data, size_t at):
    cdef vmth_packet_error error
    cdef vmth_ack ack
    if at + VMTH_ACK_BYTES > <size_t>data.shape[0]:
        raise PacketError("desc_bytes", data.shape[0], at + VMTH_ACK_BYTES)
    if vmth_ack_decode(&data[at], &ack, &error) != 0:
        raise _refused(&error)
    return ack.seq, ack.digest.lo, ack.digest.hi, ack.status, ack.block

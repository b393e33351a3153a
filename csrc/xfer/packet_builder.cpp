// SPDX-License-Identifier: Apache-2.0
// Reading, classifying and listing the pages of a packet.
#include "xfer/packet_builder.hpp"

#include <algorithm>

#include "vmth/zero_page.h"

namespace vmth {

namespace {

// Small enough that what was hashed is still in the cache when it is sent.
constexpr size_t piece_bytes = 256 * 1024;
constexpr size_t max_piece_pages = 64;

void check(int result)
{
    if (result != 0) {
        throw TransferError(ErrorKind::usage, "page kernel refused its arguments", -result);
    }
}

}  // namespace

PacketBuilder::PacketBuilder(const GuestMemory &memory, HashTable &hashes, Prefault &prefault,
                             unsigned channel)
    : memory_(memory), hashes_(hashes), prefault_(prefault), channel_(channel),
      piece_pages_(std::clamp<size_t>(piece_bytes / memory.page_bytes(), 1, max_piece_pages))
{
}

void PacketBuilder::begin(uint32_t block, uint32_t round)
{
    block_ = block;
    round_ = round;
    payload_bytes_ = 0;
    npages_ = 0;
    fresh_ = {};
    counts_ = {};
    descs_.clear();
    runs_.clear();
    payload_.clear();
}

void PacketBuilder::add(const Batch &batch)
{
    for (const LentRun &run : batch.lent) {
        if (run.at != nullptr) {
            read_run(run);
        } else {
            hashes_.fill_zero(channel_, block_, run.page, run.npages, &fresh_);
            append(VMTH_FORM_ZERO, run.page, run.npages);
        }
    }
    for (const vmth_run &run : batch.runs) {
        if (batch.form == VMTH_FORM_NORMAL) {
            prefault_.read(block_, run);
            read_run({run.page, run.npages, memory_.host(block_, run.page), memory_.page_bytes()});
            continue;
        }
        if (batch.form == VMTH_FORM_HOLE) {
            hashes_.fill_zero(channel_, block_, run.page, run.npages, &fresh_);
        } else {
            hashes_.invalidate(channel_, block_, run.page, run.npages);
        }
        append(batch.form, run.page, run.npages);
    }
}

void PacketBuilder::read_run(const LentRun &run)
{
    for (uint64_t done = 0; done < run.npages;) {
        const uint64_t take = std::min<uint64_t>(piece_pages_, run.npages - done);
        classify({run.page + done, take, run.at + done * run.stride, run.stride});
        done += take;
    }
}

// Bit i of *zero_word: page i holds zero bytes only. Without a digest the hashes are not filled.
void PacketBuilder::hash(const LentRun &piece, vmth_u128 *hashes, uint64_t *zero_word) const
{
    const size_t page_bytes = memory_.page_bytes();
    const bool together = piece.stride == page_bytes;
    const size_t at_once = together ? static_cast<size_t>(piece.npages) : 1;
    *zero_word = 0;
    for (size_t i = 0; i < piece.npages; i += at_once) {
        const uint8_t *at = piece.at + i * piece.stride;
        uint64_t zero = 0;
        size_t nzero = 0;
        check(hashes_.enabled()
                  ? vmth_page_hash_zero(&hashes_.key(), at, page_bytes, at_once, hashes + i, &zero,
                                        &nzero)
                  : vmth_zero_scan(at, page_bytes, at_once, &zero, &nzero));
        *zero_word |= zero << i;
    }
}

void PacketBuilder::classify(const LentRun &piece)
{
    uint64_t zero_word = 0;
    vmth_u128 hashes[max_piece_pages];
    const size_t npages = static_cast<size_t>(piece.npages);
    hash(piece, hashes, &zero_word);
    hashes_.replace(channel_, block_, piece.page, npages, hashes, &fresh_);
    for (size_t at = 0; at < npages;) {
        bool zero = ((zero_word >> at) & 1) != 0;
        size_t end = at + 1;
        while (end < npages && (((zero_word >> end) & 1) != 0) == zero) {
            end++;
        }
        append(zero ? VMTH_FORM_ZERO : VMTH_FORM_NORMAL, piece.page + at, end - at);
        if (!zero) {
            append_payload({piece.page + at, end - at, piece.at + at * piece.stride, piece.stride});
        }
        at = end;
    }
}

void PacketBuilder::append(vmth_page_form form, uint64_t page, uint64_t npages)
{
    npages_ += npages;
    bool joins = !descs_.empty() && descs_.back().form == form &&
                 descs_.back().page + descs_.back().npages == page &&
                 descs_.back().npages + npages <= UINT32_MAX;
    if (joins) {
        descs_.back().npages += static_cast<uint32_t>(npages);
    } else {
        vmth_desc desc = {};
        desc.page = page;
        desc.npages = static_cast<uint32_t>(npages);
        desc.form = static_cast<uint8_t>(form);
        descs_.push_back(desc);
    }
    switch (form) {
    case VMTH_FORM_NORMAL:
        counts_.normal += npages;
        if (joins) {
            runs_.back().npages += npages;
        } else {
            runs_.push_back({page, npages});
        }
        break;
    case VMTH_FORM_ZERO:
        counts_.zero += npages;
        break;
    case VMTH_FORM_HOLE:
        counts_.hole += npages;
        break;
    default:
        counts_.free += npages;
        break;
    }
}

void PacketBuilder::append_payload(const LentRun &run)
{
    const size_t page_bytes = memory_.page_bytes();
    const bool together = run.stride == page_bytes;
    const uint64_t at_once = together ? run.npages : 1;
    for (uint64_t i = 0; i < run.npages; i += at_once) {
        // sendmsg does not write through it
        auto *at = const_cast<uint8_t *>(run.at + i * run.stride);
        const size_t nbytes = static_cast<size_t>(at_once) * page_bytes;
        const bool joins = !payload_.empty() && static_cast<uint8_t *>(payload_.back().iov_base) +
                                                        payload_.back().iov_len ==
                                                    at;
        if (joins) {
            payload_.back().iov_len += nbytes;
        } else {
            payload_.push_back({at, nbytes});
        }
        payload_bytes_ += nbytes;
    }
}

SentPacket PacketBuilder::finish(uint64_t seq)
{
    const size_t desc_bytes = descs_.size() * VMTH_DESC_BYTES;
    head_.resize(VMTH_PACKET_HEADER_BYTES + desc_bytes);
    uint8_t *desc_out = head_.data() + VMTH_PACKET_HEADER_BYTES;
    for (const vmth_desc &desc : descs_) {
        desc_out += vmth_desc_encode(&desc, desc_out, VMTH_DESC_BYTES);
    }
    vmth_packet_header header = {};
    header.kind = VMTH_PACKET_PAGES;
    header.block = static_cast<uint16_t>(block_);
    header.round = round_;
    header.channel = static_cast<uint16_t>(channel_);
    header.seq = seq;
    header.desc_bytes = static_cast<uint32_t>(desc_bytes);
    header.payload_bytes = static_cast<uint32_t>(payload_bytes_);
    header.ndesc = static_cast<uint32_t>(descs_.size());
    header.npages = npages_;
    vmth_packet_encode_header(&header, head_.data() + VMTH_PACKET_HEADER_BYTES,
                              hashes_.key().seed, head_.data());
    head_iov_ = {head_.data(), head_.size()};
    SentPacket sent;
    sent.seq = seq;
    sent.kind = VMTH_PACKET_PAGES;
    sent.block = block_;
    sent.bytes = head_.size() + payload_bytes_;
    sent.digest = fresh_.sum;
    sent.runs = runs_;
    return sent;
}

}  // namespace vmth

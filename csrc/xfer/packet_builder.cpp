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
    for (const vmth_run &run : batch.runs) {
        if (batch.form == VMTH_FORM_NORMAL) {
            read_run(run);
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

void PacketBuilder::read_run(const vmth_run &run)
{
    prefault_.read(block_, run);
    for (uint64_t done = 0; done < run.npages;) {
        size_t piece = static_cast<size_t>(std::min<uint64_t>(piece_pages_, run.npages - done));
        classify(run.page + done, piece);
        done += piece;
    }
}

void PacketBuilder::classify(uint64_t page, size_t npages)
{
    uint64_t zero_word = 0;
    size_t nzero = 0;
    const uint8_t *host = memory_.host(block_, page);
    if (hashes_.enabled()) {
        vmth_u128 hashes[max_piece_pages];
        check(vmth_page_hash_zero(&hashes_.key(), host, memory_.page_bytes(), npages, hashes,
                                  &zero_word, &nzero));
        hashes_.replace(channel_, block_, page, npages, hashes, &fresh_);
    } else {
        check(vmth_zero_scan(host, memory_.page_bytes(), npages, &zero_word, &nzero));
    }
    for (size_t at = 0; at < npages;) {
        bool zero = ((zero_word >> at) & 1) != 0;
        size_t end = at + 1;
        while (end < npages && (((zero_word >> end) & 1) != 0) == zero) {
            end++;
        }
        append(zero ? VMTH_FORM_ZERO : VMTH_FORM_NORMAL, page + at, end - at);
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
    case VMTH_FORM_NORMAL: {
        counts_.normal += npages;
        if (joins) {
            runs_.back().npages += npages;
        } else {
            runs_.push_back({page, npages});
        }
        size_t nbytes = static_cast<size_t>(npages) * memory_.page_bytes();
        payload_bytes_ += nbytes;
        if (joins) {
            payload_.back().iov_len += nbytes;
        } else {
            payload_.push_back({memory_.host(block_, page), nbytes});
        }
        break;
    }
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

// SPDX-License-Identifier: Apache-2.0
// Deltas into the packet, packed where that pays.
#include "xfer/delta_encoder.hpp"

#include <cstring>

#include "xfer/failure.hpp"

namespace vmth {

namespace {

// A shorter delta has little to pack: a frame takes some 20 bytes of its own.
constexpr size_t pack_min_bytes = 256;
// Of a page: the longest delta that is sent. A packed one competes with frames of whole pages.
constexpr size_t longest_part = 2;
constexpr size_t longest_packed_part = 4;

}  // namespace

DeltaEncoder::DeltaEncoder(size_t page_bytes, DeltaCache &cache, FormCounters &counters)
    : page_bytes_(page_bytes), cache_(cache), counters_(counters)
{
}

DeltaEncoder::~DeltaEncoder()
{
    vmth_codec_destroy(&codec_);
}

// delta_[0, nbytes) to packed_; 0 where that saves less than an eighth.
size_t DeltaEncoder::pack(size_t nbytes, int level)
{
    if (codec_.compressor == nullptr && vmth_codec_create(&codec_, VMTH_CODEC_COMPRESS) != 0) {
        throw TransferError(ErrorKind::io, "zstd: no memory for a compression context");
    }
    packed_.resize(delta_.size());
    return vmth_codec_compress(&codec_, level, delta_.data(), nbytes, packed_.data(),
                               nbytes - nbytes / 8);
}

size_t DeltaEncoder::exchange(const StagedPage &page, uint32_t round, size_t room)
{
    delta_.resize(page_bytes_ / longest_part);
    return cache_.exchange(
        {page.block, page.page, page.content, page.hash, page.known, page.landed, round},
        delta_.data(), room);
}

void DeltaEncoder::remember(const StagedPage &page, uint32_t round)
{
    (void)exchange(page, round, 0);
}

bool DeltaEncoder::take(const StagedPage &page, uint32_t round, const FormsSetting &forms,
                        PacketParts &parts)
{
    size_t nbytes = exchange(page, round, page_bytes_ / longest_part);
    if (nbytes == 0) {
        return false;
    }
    const uint8_t *payload = delta_.data();
    vmth_desc desc = {};
    if (nbytes >= pack_min_bytes && forms.on(VMTH_FORM_ZSTD)) {
        const size_t packed = pack(nbytes, forms.zstd_level);
        if (packed != 0) {
            desc.flags = VMTH_DESC_PACKED;
            payload = packed_.data();
            nbytes = packed;
        }
        if (nbytes > page_bytes_ / longest_packed_part) {
            return false;
        }
    }
    uint8_t *room = parts.room(nbytes);
    if (room == nullptr) {
        return false;
    }
    memcpy(room, payload, nbytes);
    desc.page = page.page;
    desc.npages = 1;
    desc.form = VMTH_FORM_DELTA;
    desc.payload_bytes = static_cast<uint32_t>(nbytes);
    desc.result = page.hash;
    parts.coded(desc);
    counters_.pages.add(1);
    counters_.content_bytes.add(page_bytes_);
    counters_.wire_bytes.add(VMTH_DESC_REF_BYTES + nbytes);
    return true;
}

}  // namespace vmth

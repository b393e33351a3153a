// SPDX-License-Identifier: Apache-2.0
// Frames of several pages.
#include "xfer/zstd_encoder.hpp"

#include <algorithm>
#include <cstring>

#include "xfer/failure.hpp"
#include "xfer/thread_clock.hpp"

namespace vmth {

namespace {

// Content of a frame. Frames of one page are a tenth larger and slower; larger ones gain little more.
constexpr size_t frame_bytes = 64 * 1024;

}  // namespace

ZstdEncoder::ZstdEncoder(size_t page_bytes, FormCounters &counters)
    : page_bytes_(page_bytes), counters_(counters)
{
}

ZstdEncoder::~ZstdEncoder()
{
    vmth_codec_destroy(&codec_);
}

bool ZstdEncoder::take(const StagedPage &page, int level, PacketParts &parts)
{
    counters_.tried_pages.add(1);
    if (!vmth_codec_promising(page.content, page_bytes_)) {
        return false;
    }
    level_ = level;
    frame_.resize(std::max(frame_bytes, page_bytes_));
    memcpy(frame_.data() + pending_bytes(), page.content, page_bytes_);
    origins_.push_back({page.page, 1, page.origin, page_bytes_});
    if (pending_bytes() + page_bytes_ > frame_.size()) {
        flush(parts);
    }
    return true;
}

// Into the packet's room; 0 where it does not pay.
size_t ZstdEncoder::compress(PacketParts &parts)
{
    if (codec_.compressor == nullptr && vmth_codec_create(&codec_, VMTH_CODEC_COMPRESS) != 0) {
        throw TransferError(ErrorKind::io, "zstd: no memory for a compression context");
    }
    const size_t nbytes = pending_bytes();
    const size_t most = nbytes - nbytes / 16;  // the other side has work with it too
    uint8_t *out = parts.room(most);
    return out == nullptr
               ? 0
               : vmth_codec_compress(&codec_, level_, frame_.data(), nbytes, out, most);
}

void ZstdEncoder::flush(PacketParts &parts)
{
    if (origins_.empty()) {
        return;
    }
    const uint64_t started_ns = thread_cpu_ns();
    const size_t size = compress(parts);
    counters_.cpu_ns.add(thread_cpu_ns() - started_ns);
    if (size == 0) {
        for (const LentRun &origin : origins_) {
            parts.raw(origin);
        }
        origins_.clear();
        return;
    }
    counters_.pages.add(origins_.size());
    counters_.content_bytes.add(pending_bytes());
    vmth_desc desc = {};
    desc.form = VMTH_FORM_ZSTD;
    uint64_t ndesc = 0;
    for (size_t i = 0; i < origins_.size();) {
        desc.page = origins_[i].page;
        desc.npages = 0;
        do {
            desc.npages++;
            i++;
        } while (i < origins_.size() && origins_[i].page == desc.page + desc.npages);
        desc.payload_bytes = i == origins_.size() ? static_cast<uint32_t>(size) : 0;
        parts.coded(desc);
        ndesc++;
    }
    counters_.wire_bytes.add(size + ndesc * VMTH_DESC_ZSTD_BYTES);
    origins_.clear();
}

}  // namespace vmth

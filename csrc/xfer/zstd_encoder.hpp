// SPDX-License-Identifier: Apache-2.0
// Gathers pages of one packet into zstd frames.
//
//   take()   page 3 | page 9 | page 10 | ...     private copies, back to back, up to 64 KiB
//   flush()  one frame, in the packet's buffer; or, where that does not pay, the pages raw
//
// The pages need not be adjacent: a frame's descriptors follow one another and the last has the frame.
// Belongs to one worker thread.
#ifndef VMTH_XFER_ZSTD_ENCODER_HPP
#define VMTH_XFER_ZSTD_ENCODER_HPP

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vmth/codec.h"
#include "xfer/counters.hpp"
#include "xfer/packet_parts.hpp"

namespace vmth {

class ZstdEncoder {
public:
    ZstdEncoder(size_t page_bytes, FormCounters &counters);
    ~ZstdEncoder();
    ZstdEncoder(const ZstdEncoder &) = delete;
    ZstdEncoder &operator=(const ZstdEncoder &) = delete;

    // Takes the page, which is then in `parts` after flush() at the latest; false: it does not look as if
    // compressing it paid.
    bool take(const StagedPage &page, int level, PacketParts &parts);
    void flush(PacketParts &parts);
    // Content taken and not flushed: what it may still add to the packet's payload.
    size_t pending_bytes() const noexcept { return origins_.size() * page_bytes_; }

private:
    size_t compress(PacketParts &parts);

    const size_t page_bytes_;
    FormCounters &counters_;
    vmth_codec codec_ = {};  // made when first used
    int level_ = 1;          // of the frame being gathered
    std::vector<uint8_t> frame_;
    std::vector<LentRun> origins_;  // a page each
};

}  // namespace vmth

#endif

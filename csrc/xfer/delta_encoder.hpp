// SPDX-License-Identifier: Apache-2.0
// Sends what changed of a page since it landed. Belongs to one worker thread.
#ifndef VMTH_XFER_DELTA_ENCODER_HPP
#define VMTH_XFER_DELTA_ENCODER_HPP

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vmth/codec.h"
#include "xfer/counters.hpp"
#include "xfer/delta_cache.hpp"
#include "xfer/packet_parts.hpp"
#include "xfer/page_forms.hpp"

namespace vmth {

class DeltaEncoder {
public:
    DeltaEncoder(size_t page_bytes, DeltaCache &cache, FormCounters &counters);
    ~DeltaEncoder();
    DeltaEncoder(const DeltaEncoder &) = delete;
    DeltaEncoder &operator=(const DeltaEncoder &) = delete;

    // True: the page is in `parts`. Either way its content is remembered as the next base, if it finds room.
    // A long delta is packed where zstd is on too; where it is still long, a frame of whole pages is left
    // to do better.
    bool take(const StagedPage &page, uint32_t round, const FormsSetting &forms, PacketParts &parts);

    // The page goes in another form: only remembers its content.
    void remember(const StagedPage &page, uint32_t round);

private:
    size_t exchange(const StagedPage &page, uint32_t round, size_t room);
    size_t pack(size_t nbytes, int level);

    const size_t page_bytes_;
    DeltaCache &cache_;
    FormCounters &counters_;
    vmth_codec codec_ = {};  // made when first used
    std::vector<uint8_t> delta_;
    std::vector<uint8_t> packed_;
};

}  // namespace vmth

#endif

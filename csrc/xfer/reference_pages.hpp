// SPDX-License-Identifier: Apache-2.0
// Makes pages from what has landed: dedup copies a page, delta changes one. Belongs to one thread.
//
// The base is guest memory, which another channel may be overwriting: all work is done on a private copy,
// and the copy counts only if its hash is the one that the peer named.
#ifndef VMTH_XFER_REFERENCE_PAGES_HPP
#define VMTH_XFER_REFERENCE_PAGES_HPP

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "vmth/packet.h"
#include "vmth/page_hash.h"
#include "xfer/frame_decoder.hpp"
#include "xfer/guest_memory.hpp"

namespace vmth {

class ReferencePages {
public:
    // `name` is the channel's, for errors; `frames` unpacks.
    ReferencePages(const GuestMemory &memory, const vmth_hash_key &key, FrameDecoder &frames,
                   const std::string &name);

    // The page's content, valid until the next call; nullptr: the page is missed. `payload` is the delta's.
    // Throws TransferError: protocol for a base whose content this end does not hold, io without memory.
    const uint8_t *make(uint32_t block, const vmth_desc &desc, const uint8_t *payload);

private:
    bool apply(const vmth_desc &desc, const uint8_t *payload);

    const GuestMemory &memory_;
    const vmth_hash_key &key_;
    FrameDecoder &frames_;
    const std::string name_;
    std::vector<uint8_t> page_;
};

}  // namespace vmth

#endif

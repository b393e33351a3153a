// SPDX-License-Identifier: Apache-2.0
// Copy, change, compare the hash.
#include "xfer/reference_pages.hpp"

#include <cstring>

#include "vmth/delta.h"
#include "xfer/failure.hpp"

namespace vmth {

ReferencePages::ReferencePages(const GuestMemory &memory, const vmth_hash_key &key,
                               FrameDecoder &frames, const std::string &name)
    : memory_(memory), key_(key), frames_(frames), name_(name)
{
}

// False: it was damaged on the way.
bool ReferencePages::apply(const vmth_desc &desc, const uint8_t *payload)
{
    size_t nbytes = desc.payload_bytes;
    if ((desc.flags & VMTH_DESC_PACKED) != 0) {
        payload = frames_.decode_up_to(payload, nbytes, page_.size(), &nbytes);
    }
    return payload != nullptr &&
           vmth_delta_apply(page_.data(), page_.size(), payload, nbytes) == 0;
}

const uint8_t *ReferencePages::make(uint32_t block, const vmth_desc &desc, const uint8_t *payload)
{
    const bool dedup = desc.form == VMTH_FORM_DEDUP;
    const uint32_t base_block = dedup ? desc.base_block : block;
    const uint64_t base_page = dedup ? desc.base_page : desc.page;
    if (memory_.hostless(base_block)) {
        throw TransferError(ErrorKind::protocol,
                            name_ + ": received a page based on block " +
                                std::to_string(base_block) +
                                ", allowed on blocks whose content is held here");
    }
    page_.resize(memory_.page_bytes());
    memcpy(page_.data(), memory_.host(base_block, base_page), page_.size());
    if (!dedup && !apply(desc, payload)) {
        return nullptr;
    }
    vmth_u128 hash;
    if (vmth_page_hash(&key_, page_.data(), page_.size(), 1, &hash) != 0) {
        throw TransferError(ErrorKind::usage, "page kernel refused its arguments");
    }
    const bool right = hash.lo == desc.result.lo && hash.hi == desc.result.hi;
    return right ? page_.data() : nullptr;
}

}  // namespace vmth

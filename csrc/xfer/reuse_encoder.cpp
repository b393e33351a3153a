// SPDX-License-Identifier: Apache-2.0
// Hashing several pages at once, asking the filter, listing.
#include "xfer/reuse_encoder.hpp"

#include "core/endian.h"
#include "xfer/failure.hpp"

namespace vmth {

uint64_t ReuseEncoder::hash(const StagedPage *pages, size_t n, vmth_u128 *hashes) const
{
    const uint8_t *content[most] = {};
    size_t index[most];
    vmth_u128 found[most];
    size_t nhashed = 0;
    for (size_t i = 0; i < n; i++) {
        if (state_.proposable(pages[i].block, pages[i].page)) {
            content[nhashed] = pages[i].content;
            index[nhashed++] = i;
        }
    }
    if (vmth_content_hash(&state_.filter.key(), content, page_bytes_, nhashed, found) != 0) {
        throw TransferError(ErrorKind::usage, "content kernel refused its arguments");
    }
    uint64_t asked = 0;
    for (size_t k = 0; k < nhashed; k++) {
        hashes[index[k]] = found[k];
        asked |= uint64_t{1} << index[k];
    }
    return asked;
}

void ReuseEncoder::propose(const StagedPage &page, const vmth_u128 &hash, uint8_t *payload,
                           PacketParts &parts)
{
    store_le64(payload, hash.lo);
    store_le64(payload + 8, hash.hi);
    vmth_desc desc = {};
    desc.page = page.page;
    desc.npages = 1;
    desc.form = VMTH_FORM_REUSE;
    desc.payload_bytes = VMTH_REUSE_HASH_BYTES;
    const size_t ndesc = parts.ndesc();
    parts.coded(desc);
    counters_.wire_bytes.add(VMTH_REUSE_HASH_BYTES + (parts.ndesc() - ndesc) * VMTH_DESC_BYTES);
}

void ReuseEncoder::count(uint64_t asked, uint64_t taken, uint64_t cpu_ns)
{
    const auto ntaken = static_cast<uint64_t>(__builtin_popcountll(taken));
    counters_.tried_pages.add(static_cast<uint64_t>(__builtin_popcountll(asked)));
    counters_.pages.add(ntaken);
    counters_.content_bytes.add(ntaken * page_bytes_);
    counters_.cpu_ns.add(cpu_ns);
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// What the destination has in files, as the source knows it: a set of fingerprints of content hashes.
//
//   parts from the wire, in order  ->  starts  | 0 | 11 | 19 | ...     one a bucket of the first bits
//                                      rests   | r r r r ...           the last 20 bits, 4 bytes each
//
// Some 4.5 bytes an entry. Filled by one thread before others look; a set that is not complete has nothing.
#ifndef VMTH_XFER_CONTENT_FILTER_HPP
#define VMTH_XFER_CONTENT_FILTER_HPP

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vmth/content_filter.h"
#include "vmth/content_hash.h"

namespace vmth {

class ContentFilter {
public:
    // A set of up to `entries` under this key. Throws TransferError(protocol) for more than
    // VMTH_FILTER_MAX_ENTRIES. Whatever was there is gone.
    void begin(const uint8_t secret[VMTH_CONTENT_KEY_BYTES], uint64_t entries);
    // Throws TransferError(protocol) for a part that does not decode, does not rise above those before,
    // or makes more entries than were announced.
    void add(uint64_t base, uint64_t count, const uint8_t *data, size_t nbytes);
    // No part follows.
    void complete();

    uint64_t entries() const noexcept { return rests_.size(); }
    const vmth_content_key &key() const noexcept { return key_; }
    // Any thread, once it is complete. A hash that is not in the set is found once in 65536 times.
    bool has(const vmth_u128 &hash) const noexcept;

private:
    vmth_content_key key_ = {};
    unsigned bits_ = VMTH_FILTER_MIN_BITS;
    uint64_t announced_ = 0;
    uint64_t next_ = 0;     // the least fingerprint that may follow
    bool complete_ = false;
    std::vector<uint32_t> starts_;
    std::vector<uint32_t> rests_;
    std::vector<uint64_t> prints_;  // of the part being added
};

}  // namespace vmth

#endif

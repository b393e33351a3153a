// SPDX-License-Identifier: Apache-2.0
// The page hashes of one end and their running digest.
//
//   block 0 | h0 | h1 | {0,0} | ...   16 bytes a page, mapped on demand: untouched parts cost nothing
//   parts   | channel 0 | channel 1 | ...   partial digests; D is their sum
//
// Between two barriers an entry has one writer (a page is sent once), so writers share the lock and
// readers of entries or of D exclude them; nothing that waits for a peer happens under the lock.
#ifndef VMTH_XFER_HASH_TABLE_HPP
#define VMTH_XFER_HASH_TABLE_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <shared_mutex>
#include <vector>

#include "vmth/memory_digest.h"
#include "vmth/page_hash.h"
#include "xfer/guest_memory.hpp"

namespace vmth {

class HashTable {
public:
    // `enabled` false: no memory, every call below does nothing and answers zeros.
    HashTable(const GuestMemory &memory, uint64_t seed, bool enabled);
    ~HashTable();
    HashTable(const HashTable &) = delete;
    HashTable &operator=(const HashTable &) = delete;

    bool enabled() const noexcept { return enabled_; }
    const vmth_hash_key &key() const noexcept { return key_; }
    const vmth_u128 &zero_hash() const noexcept { return zero_hash_; }

    // Writers: `part` is the calling channel's index. `fresh` as in vmth_digest_replace.
    void replace(unsigned part, uint32_t block, uint64_t first, size_t n, const vmth_u128 *hashes,
                 vmth_digest *fresh);
    void fill_zero(unsigned part, uint32_t block, uint64_t first, uint64_t n, vmth_digest *fresh);
    void invalidate(unsigned part, uint32_t block, uint64_t first, uint64_t n);
    // The entries of pages whose writer the caller is, or that have none now.
    void entries(uint32_t block, uint64_t first, size_t n, vmth_u128 *out) const;
    // The sum of the terms of such pages, as it is in a packet's digest.
    vmth_u128 sum(uint32_t block, const std::vector<vmth_run> &runs) const;

    // Readers; the range is checked (usage).
    vmth_digest total() const;
    std::vector<vmth_u128> copy(uint32_t block, uint64_t first, uint64_t n) const;
    // One sum every `step` pages; with step 1 the page's hash itself.
    std::vector<vmth_u128> subdigests(uint32_t block, uint64_t first, uint64_t n, uint64_t step) const;

private:
    struct alignas(64) Part {
        vmth_digest digest = {};
    };
    void check_enabled() const;

    const GuestMemory &memory_;
    const bool enabled_;
    vmth_hash_key key_ = {};
    vmth_u128 zero_hash_ = {};
    mutable std::shared_mutex mutex_;
    std::vector<vmth_u128 *> tables_;                // entries: shared + own page, or exclusive
    std::array<Part, VMTH_MAX_CHANNELS> parts_ = {};  // shared + own part, or exclusive
};

}  // namespace vmth

#endif

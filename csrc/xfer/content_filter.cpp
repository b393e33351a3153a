// SPDX-License-Identifier: Apache-2.0
// Taking parts of the set, and looking into it.
#include "xfer/content_filter.hpp"

#include <algorithm>
#include <string>

#include "xfer/failure.hpp"

namespace vmth {

namespace {

constexpr unsigned rest_bits = VMTH_FILTER_MIN_BITS;
constexpr uint32_t rest_mask = (1u << rest_bits) - 1;

TransferError refused(const std::string &what, uint64_t received, uint64_t allowed)
{
    return TransferError(ErrorKind::protocol, "reuse filter: " + what + " received " +
                                                  std::to_string(received) + ", allowed " +
                                                  std::to_string(allowed));
}

}  // namespace

void ContentFilter::begin(const uint8_t secret[VMTH_CONTENT_KEY_BYTES], uint64_t entries)
{
    if (entries > VMTH_FILTER_MAX_ENTRIES) {
        throw refused("entries", entries, VMTH_FILTER_MAX_ENTRIES);
    }
    vmth_content_key_init(&key_, secret);
    bits_ = vmth_filter_bits(entries);
    announced_ = entries;
    next_ = 0;
    complete_ = false;
    rests_.clear();
    // One more than there are buckets: where the last one ends.
    starts_.assign((size_t{1} << (bits_ - rest_bits)) + 1, 0);
    prints_.resize(VMTH_FILTER_PART_ENTRIES);
}

void ContentFilter::add(uint64_t base, uint64_t count, const uint8_t *data, size_t nbytes)
{
    if (count > announced_ - rests_.size()) {
        throw refused("entries", rests_.size() + count, announced_);
    }
    if (base < next_) {
        throw refused("fingerprint", base, next_);
    }
    if (vmth_filter_decode(base, static_cast<size_t>(count), data, nbytes, bits_,
                           prints_.data()) != 0) {
        throw TransferError(ErrorKind::protocol,
                            "reuse filter: received a part of " + std::to_string(nbytes) +
                                " bytes, allowed " + std::to_string(count) + " fingerprints of " +
                                std::to_string(bits_) + " bits");
    }
    for (size_t i = 0; i < count; i++) {
        rests_.push_back(static_cast<uint32_t>(prints_[i]) & rest_mask);
        starts_[static_cast<size_t>(prints_[i] >> rest_bits) + 1]++;  // a number, until complete()
    }
    next_ = prints_[count - 1] + 1;
}

void ContentFilter::complete()
{
    for (size_t i = 1; i < starts_.size(); i++) {
        starts_[i] += starts_[i - 1];
    }
    std::vector<uint64_t>().swap(prints_);
    complete_ = true;
}

bool ContentFilter::has(const vmth_u128 &hash) const noexcept
{
    if (!complete_) {
        return false;
    }
    const uint64_t print = hash.lo >> (64 - bits_);
    const size_t bucket = static_cast<size_t>(print >> rest_bits);
    const auto first = rests_.begin() + starts_[bucket];
    const auto last = rests_.begin() + starts_[bucket + 1];
    return std::binary_search(first, last, static_cast<uint32_t>(print) & rest_mask);
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// Finding, replacing and comparing remembered pages.
#include "xfer/delta_cache.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "vmth/delta.h"
#include "xfer/failure.hpp"

namespace vmth {

namespace {

constexpr size_t none = SIZE_MAX;

uint64_t owner_of(const DeltaPage &page)
{
    return (uint64_t{page.block} + 1) << 48 | page.page;
}

// Neighbours go to sets far apart.
uint64_t mix(uint64_t owner)
{
    owner *= 0x9e3779b97f4a7c15u;
    return owner ^ owner >> 32;
}

}  // namespace

DeltaCache::DeltaCache(size_t page_bytes, uint64_t nbytes, uint64_t guest_pages)
    : page_bytes_(page_bytes)
{
    const uint64_t fit = nbytes / (page_bytes + sizeof(Slot));
    // Twice the pages, so that hardly a set overflows: what is never used costs no memory.
    nsets_ = static_cast<size_t>(std::min(fit, 2 * guest_pages + ways) / ways);
    if (nsets_ == 0) {
        return;
    }
    slots_.resize(nsets_ * ways);
    filled_ = std::vector<std::atomic<uint8_t>>(nsets_);
    void *contents = mmap(nullptr, slots_.size() * page_bytes_, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (contents == MAP_FAILED) {
        throw system_error("delta cache of " + std::to_string(nbytes) + " bytes", errno);
    }
    contents_ = static_cast<uint8_t *>(contents);
}

DeltaCache::~DeltaCache()
{
    if (contents_ != nullptr) {
        munmap(contents_, slots_.size() * page_bytes_);
    }
}

size_t DeltaCache::find_locked(size_t set, uint64_t owner) const
{
    for (size_t i = set * ways; i < (set + 1) * ways; i++) {
        if (slots_[i].owner == owner) {
            return i;
        }
    }
    return none;
}

// An empty slot; else, for a page that is rewritten, the one that was rewritten longest ago, if that is
// neither this round nor the last: what is rewritten round after round stays.
size_t DeltaCache::victim_locked(size_t set, const DeltaPage &page) const
{
    size_t oldest = set * ways;
    for (size_t i = set * ways; i < (set + 1) * ways; i++) {
        if (slots_[i].owner == 0) {
            return i;
        }
        if (slots_[i].rewritten < slots_[oldest].rewritten) {
            oldest = i;
        }
    }
    return page.known && slots_[oldest].rewritten < page.round ? oldest : none;
}

size_t DeltaCache::exchange(const DeltaPage &page, uint8_t *out, size_t room)
{
    if (nsets_ == 0) {
        return 0;
    }
    const uint64_t owner = owner_of(page);
    const size_t set = static_cast<size_t>(mix(owner) % nsets_);
    if (page.round == 0 && filled_[set].load(std::memory_order_relaxed) == ways) {
        return 0;  // it was never sent before and takes nobody's place: most pages of a large guest
    }
    std::lock_guard<std::mutex> lock(mutexes_[set % locks]);
    size_t at = find_locked(set, owner);
    size_t nbytes = 0;
    if (at == none) {
        at = victim_locked(set, page);
    } else if (page.known && slots_[at].hash.lo == page.landed.lo &&
               slots_[at].hash.hi == page.landed.hi) {
        const uint8_t *base = contents_ + at * page_bytes_;
        if (vmth_delta_encode(base, page.content, page_bytes_, out, room, &nbytes) != 0) {
            nbytes = 0;
        }
    }
    if (at != none) {
        if (slots_[at].owner == 0) {
            filled_[set].fetch_add(1, std::memory_order_relaxed);
        }
        memcpy(contents_ + at * page_bytes_, page.content, page_bytes_);
        slots_[at].owner = owner;
        slots_[at].hash = page.hash;
        slots_[at].rewritten = page.known ? page.round + 1 : 0;
    }
    return nbytes;
}

}  // namespace vmth

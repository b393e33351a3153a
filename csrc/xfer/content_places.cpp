// SPDX-License-Identifier: Apache-2.0
// Keeping the content index in step with what has landed.
#include "xfer/content_places.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "xfer/failure.hpp"

namespace vmth {

namespace {

constexpr size_t entries_at_once = 64;
// A huge page of most machines: whoever else changes mappings waits for no more than one.
constexpr size_t ready_at_once = 2u << 20;

// The largest power of two of bytes that is allowed, or the smallest that has two entries a page: then
// one content in thirty is lost to a full bucket.
size_t index_bytes(uint64_t allowed, uint64_t npages)
{
    uint64_t nbytes = VMTH_CONTENT_BUCKET_BYTES;
    while (2 * nbytes <= allowed && nbytes < 2 * npages * VMTH_CONTENT_ENTRY_BYTES) {
        nbytes *= 2;
    }
    return npages != 0 && nbytes <= allowed ? static_cast<size_t>(nbytes) : 0;
}

// Pages that the destination only hands on are no place to copy from.
uint64_t pages_kept(const GuestMemory &memory)
{
    uint64_t npages = 0;
    for (size_t block = 0; block < memory.nblocks(); block++) {
        npages += memory.handed_on(block) ? 0 : memory.npages(block);
    }
    return npages;
}

}  // namespace

ContentPlaces::ContentPlaces(const GuestMemory &memory, const HashTable &hashes,
                             const KnownLanded &known, uint64_t nbytes)
    : memory_(memory), hashes_(hashes), known_(known), nbytes_(index_bytes(nbytes, pages_kept(memory)))
{
    if (nbytes_ == 0) {
        return;
    }
    for (size_t block = 0; block < memory.nblocks(); block++) {
        queued_.emplace_back(memory.npages(block));
    }
    entries_ = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (entries_ == MAP_FAILED) {
        throw system_error("dedup index of " + std::to_string(nbytes_) + " bytes", errno);
    }
    (void)madvise(entries_, nbytes_, MADV_HUGEPAGE);  // each look-up is another page; advice only
    if (vmth_content_index_init(&index_, entries_, nbytes_) != 0) {
        munmap(entries_, nbytes_);
        throw TransferError(ErrorKind::usage,
                            "dedup index of " + std::to_string(nbytes_) + " bytes");
    }
}

ContentPlaces::~ContentPlaces()
{
    if (entries_ != nullptr) {
        munmap(entries_, nbytes_);
    }
}

void ContentPlaces::make_ready(const vmth_populate_ops *ops) noexcept
{
    if (!enabled() || ready_.exchange(true, std::memory_order_relaxed)) {
        return;
    }
    const vmth_populate_ops *const with = ops != nullptr ? ops : vmth_populate_system_ops();
    for (size_t done = 0; done < nbytes_; done += ready_at_once) {
        const size_t take = std::min(ready_at_once, nbytes_ - done);
        if (with->populate(with->ctx, static_cast<uint8_t *>(entries_) + done, take,
                           VMTH_POPULATE_WRITE) != 0) {
            return;  // allocated as it is used
        }
    }
}

void ContentPlaces::queued(uint32_t block, uint64_t base, const std::vector<uint64_t> &words) noexcept
{
    if (enabled()) {
        queued_[block].set_words(base, words.data(), words.size());
    }
}

void ContentPlaces::queued(uint32_t block, const vmth_run &run) noexcept
{
    if (enabled()) {
        queued_[block].set_range(run.page, run.npages);
    }
}

// The entries have no writer: a page is not read again before the barrier behind its packet.
void ContentPlaces::landed(uint32_t block, const std::vector<vmth_run> &runs)
{
    if (memory_.handed_on(block)) {
        return;
    }
    if (enabled()) {
        used_.store(true, std::memory_order_relaxed);
    }
    for (const vmth_run &run : runs) {
        for (uint64_t done = 0; enabled() && done < run.npages;) {
            vmth_u128 hashes[entries_at_once];
            const size_t take =
                static_cast<size_t>(std::min<uint64_t>(entries_at_once, run.npages - done));
            hashes_.entries(block, run.page + done, take, hashes);
            for (size_t i = 0; i < take; i++) {
                vmth_content_index_insert(&index_, &hashes[i], static_cast<uint16_t>(block),
                                          run.page + done + i);
            }
            queued_[block].clear_range(run.page + done, take);
            done += take;
        }
    }
}

void ContentPlaces::replaced(uint32_t block, uint64_t page, const vmth_u128 &hash) noexcept
{
    if (used()) {
        vmth_content_index_forget(&index_, &hash, static_cast<uint16_t>(block), page);
    }
}

void ContentPlaces::replaced(uint32_t block, const vmth_run &run) noexcept
{
    for (uint64_t done = 0; used() && done < run.npages;) {
        vmth_u128 hashes[entries_at_once];
        const size_t take =
            static_cast<size_t>(std::min<uint64_t>(entries_at_once, run.npages - done));
        const uint64_t known = known_.known(block, run.page + done, take);
        if (known != 0) {
            hashes_.entries(block, run.page + done, take, hashes);
        }
        for (uint64_t rest = known; rest != 0; rest &= rest - 1) {
            const auto i = static_cast<size_t>(__builtin_ctzll(rest));
            replaced(block, run.page + done + i, hashes[i]);
        }
        done += take;
    }
}

void ContentPlaces::unchanged(uint32_t block, const vmth_run &run) noexcept
{
    if (enabled()) {
        queued_[block].clear_range(run.page, run.npages);
    }
}

void ContentPlaces::missed(uint32_t block, const std::vector<vmth_run> &runs) noexcept
{
    for (const vmth_run &run : runs) {
        for (uint64_t i = 0; used() && i < run.npages; i++) {
            vmth_u128 hash;
            ContentPlace place = {};
            hashes_.entries(block, run.page + i, 1, &hash);
            if (vmth_content_index_find(&index_, &hash, &place.block, &place.page)) {
                vmth_content_index_forget(&index_, &hash, place.block, place.page);
            }
        }
    }
}

std::optional<ContentPlace> ContentPlaces::find(const vmth_u128 &hash) const noexcept
{
    ContentPlace place = {};
    if (!used() || !vmth_content_index_find(&index_, &hash, &place.block, &place.page) ||
        known_.known(place.block, place.page, 1) == 0 ||
        queued_[place.block].bits(place.page, 1) != 0) {
        return std::nullopt;
    }
    return place;
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// The page hashes of one end and their running digest.
#include "xfer/hash_table.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <mutex>

namespace vmth {

namespace {

// Long runs are taken in steps, so that a reader never waits for more than some milliseconds.
constexpr uint64_t step_pages = 1u << 20;

size_t table_bytes(uint64_t npages)
{
    return static_cast<size_t>(std::max<uint64_t>(npages, 1)) * sizeof(vmth_u128);
}

}  // namespace

HashTable::HashTable(const GuestMemory &memory, uint64_t seed, bool enabled)
    : memory_(memory), enabled_(enabled)
{
    vmth_hash_key_init(&key_, seed);
    if (!enabled_) {
        return;
    }
    std::vector<uint8_t> zeros(memory.page_bytes());
    if (vmth_page_hash(&key_, zeros.data(), zeros.size(), 1, &zero_hash_) != 0) {
        throw TransferError(ErrorKind::usage, "page size " + std::to_string(zeros.size()));
    }
    tables_.reserve(memory.nblocks());
    for (size_t block = 0; block < memory.nblocks(); block++) {
        void *table = mmap(nullptr, table_bytes(memory.npages(block)), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (table == MAP_FAILED) {
            int error = errno;
            for (size_t i = 0; i < tables_.size(); i++) {
                munmap(tables_[i], table_bytes(memory.npages(i)));
            }
            throw system_error("hash table of block " + std::to_string(block), error);
        }
        // Faults in small pages would take most of the time of a run of holes. Advice only: a kernel
        // without huge pages answers an error and changes nothing.
        (void)madvise(table, table_bytes(memory.npages(block)), MADV_HUGEPAGE);
        tables_.push_back(static_cast<vmth_u128 *>(table));
    }
}

HashTable::~HashTable()
{
    for (size_t block = 0; block < tables_.size(); block++) {
        munmap(tables_[block], table_bytes(memory_.npages(block)));
    }
}

void HashTable::replace(unsigned part, uint32_t block, uint64_t first, size_t n,
                        const vmth_u128 *hashes, vmth_digest *fresh)
{
    if (!enabled_) {
        return;
    }
    std::shared_lock<std::shared_mutex> lock(mutex_);
    vmth_digest_replace(&parts_[part].digest, block, first, n, tables_[block], hashes, fresh);
}

void HashTable::fill_zero(unsigned part, uint32_t block, uint64_t first, uint64_t n,
                          vmth_digest *fresh)
{
    while (enabled_ && n > 0) {
        uint64_t step = std::min(n, step_pages);
        std::shared_lock<std::shared_mutex> lock(mutex_);
        vmth_digest_fill(&parts_[part].digest, block, first, static_cast<size_t>(step),
                         tables_[block], &zero_hash_, fresh);
        first += step;
        n -= step;
    }
}

void HashTable::invalidate(unsigned part, uint32_t block, uint64_t first, uint64_t n)
{
    while (enabled_ && n > 0) {
        uint64_t step = std::min(n, step_pages);
        std::shared_lock<std::shared_mutex> lock(mutex_);
        vmth_digest_invalidate(&parts_[part].digest, block, first, static_cast<size_t>(step),
                               tables_[block]);
        first += step;
        n -= step;
    }
}

void HashTable::entries(uint32_t block, uint64_t first, size_t n, vmth_u128 *out) const
{
    std::shared_lock<std::shared_mutex> lock(mutex_);
    std::copy_n(tables_[block] + first, n, out);
}

vmth_u128 HashTable::sum(uint32_t block, const std::vector<vmth_run> &runs) const
{
    vmth_digest total = {};
    std::shared_lock<std::shared_mutex> lock(mutex_);
    for (const vmth_run &run : runs) {
        const vmth_digest part =
            vmth_digest_of(block, run.page, static_cast<size_t>(run.npages), tables_[block]);
        vmth_digest_merge(&total, &part);
    }
    return total.sum;
}

vmth_digest HashTable::total() const
{
    std::unique_lock<std::shared_mutex> lock(mutex_);
    vmth_digest total = {};
    for (const Part &part : parts_) {
        vmth_digest_merge(&total, &part.digest);
    }
    return total;
}

void HashTable::check_enabled() const
{
    if (!enabled_) {
        throw TransferError(ErrorKind::usage, "the digest is off: there are no page hashes");
    }
}

std::vector<vmth_u128> HashTable::copy(uint32_t block, uint64_t first, uint64_t n) const
{
    check_enabled();
    memory_.check_range(block, first, n);
    std::unique_lock<std::shared_mutex> lock(mutex_);
    const vmth_u128 *table = tables_[block] + first;
    return std::vector<vmth_u128>(table, table + n);
}

std::vector<vmth_u128> HashTable::subdigests(uint32_t block, uint64_t first, uint64_t n,
                                             uint64_t step) const
{
    if (step == 0) {
        throw TransferError(ErrorKind::usage, "step 0, allowed 1 or more");
    }
    if (step == 1) {
        return copy(block, first, n);
    }
    check_enabled();
    memory_.check_range(block, first, n);
    std::vector<vmth_u128> sums;
    sums.reserve(static_cast<size_t>(n / step + 1));
    for (uint64_t end = first + n; first < end;) {
        uint64_t count = std::min(step, end - first);
        std::unique_lock<std::shared_mutex> lock(mutex_);
        sums.push_back(
            vmth_digest_of(block, first, static_cast<size_t>(count), tables_[block]).sum);
        first += count;
    }
    return sums;
}

}  // namespace vmth

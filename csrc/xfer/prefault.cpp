// SPDX-License-Identifier: Apache-2.0
// Populating ranges of guest memory, each page once.
#include "xfer/prefault.hpp"

#include <cstring>

namespace vmth {

Prefault::Prefault(const GuestMemory &memory, const vmth_populate_ops *ops)
    : memory_(memory), ops_(ops != nullptr ? ops : vmth_populate_system_ops())
{
    for (size_t block = 0; block < memory.nblocks(); block++) {
        done_.emplace_back(memory.npages(block));
    }
}

// A run of which a part was asked for is not asked for again: the rest costs a fault a page.
bool Prefault::wanted(uint32_t block, const vmth_run &run) noexcept
{
    return error_.load(std::memory_order_relaxed) == 0 &&
           done_[block].claim_range(run.page, run.npages);
}

void Prefault::populate(uint32_t block, uint64_t page, uint64_t npages,
                        vmth_populate_kind kind) noexcept
{
    const size_t nbytes = static_cast<size_t>(npages) * memory_.page_bytes();
    const int result = ops_->populate(ops_->ctx, memory_.host(block, page), nbytes, kind);
    if (result != 0) {
        int none = 0;
        error_.compare_exchange_strong(none, -result, std::memory_order_relaxed);
    }
}

void Prefault::read(uint32_t block, const vmth_run &run) noexcept
{
    if (memory_.mapped_anew(block) && wanted(block, run)) {
        populate(block, run.page, run.npages, VMTH_POPULATE_READ);
    }
}

void Prefault::write(uint32_t block, const vmth_run &run, const AtomicBitmap &maybe_nonzero) noexcept
{
    if (!wanted(block, run)) {
        return;
    }
    const uint64_t end = run.page + run.npages;
    for (uint64_t page = run.page; page < end;) {
        const std::optional<vmth_run> present = maybe_nonzero.first_run(page, end - page);
        const uint64_t hole_end = present ? present->page : end;
        if (hole_end > page) {
            populate(block, page, hole_end - page, VMTH_POPULATE_WRITE);
        }
        if (present && memory_.mapped_anew(block)) {
            // Many pages of a shared file are mapped at one fault for reading, one at a time for writing.
            populate(block, present->page, present->npages, VMTH_POPULATE_READ);
        }
        page = present ? present->page + present->npages : end;
    }
}

std::string Prefault::refused() const
{
    const int error = error_.load(std::memory_order_relaxed);
    if (error == 0) {
        return {};
    }
    return std::string("populate: the kernel does not map pages ahead (") + strerror(error) +
           "), so each costs a fault";
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// Populating ranges of guest memory, each page once.
#include "xfer/prefault.hpp"

#include <cstring>

namespace vmth {

namespace {

// What the kernel maps at a fault for reading, aligned, unless it was told otherwise; what it leaves out
// costs a fault later.
constexpr uint64_t around_bytes = 64 * 1024;

}  // namespace

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

// Pages that are in memory already: a fault for reading maps all of them around it, writable where they
// are shared. Asking for each of them would look each up again, and mark it as used.
void Prefault::map_around(uint32_t block, uint64_t page, uint64_t npages) noexcept
{
    const uint64_t page_bytes = memory_.page_bytes();
    const uint64_t end = page + npages;
    while (page < end && error_.load(std::memory_order_relaxed) == 0) {
        populate(block, page, 1, VMTH_POPULATE_READ);
        const auto at = reinterpret_cast<uintptr_t>(memory_.host(block, page));
        page += (around_bytes - at % around_bytes + page_bytes - 1) / page_bytes;
    }
}

void Prefault::read(uint32_t block, const vmth_run &run) noexcept
{
    if (memory_.mapped_anew(block) && wanted(block, run)) {
        map_around(block, run.page, run.npages);
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
            map_around(block, present->page, present->npages);
        }
        page = present ? present->page + present->npages : end;
    }
}

void Prefault::mapped(uint32_t block, const vmth_run &run) noexcept
{
    done_[block].set_range(run.page, run.npages);
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

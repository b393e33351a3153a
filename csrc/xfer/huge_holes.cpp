// SPDX-License-Identifier: Apache-2.0
// Trying what a fault brings.
#include "xfer/huge_holes.hpp"

#include <unistd.h>

namespace vmth {

namespace {

constexpr uint64_t huge_bytes = 2u << 20;  // what the kernel calls PMD-sized, with base pages of 4 KiB
constexpr unsigned most_looks = 64;

}  // namespace

HugeHoles::HugeHoles(const GuestMemory &memory, const vmth_populate_ops *ops)
    : memory_(memory), ops_(ops != nullptr ? ops : vmth_populate_system_ops()),
      blocks_(memory.nblocks())
{
    for (size_t block = 0; block < blocks_.size(); block++) {
        // Private memory is filled by faults anyway, and one page of such a size would be all there is.
        if (memory.fd(block) < 0 || memory.page_bytes() >= huge_bytes) {
            blocks_[block].answer = Answer::no;
        }
    }
}

bool HugeHoles::map(uint32_t block, const vmth_run &hole)
{
    if (!brings_huge_pages(block, hole)) {
        return false;
    }
    // A copy to a file without room would end the process; a write says so.
    const size_t nbytes = static_cast<size_t>(hole.npages) * memory_.page_bytes();
    if (ops_->populate(ops_->ctx, memory_.host(block, hole.page), nbytes, VMTH_POPULATE_WRITE) != 0) {
        blocks_[block].answer.store(Answer::no, std::memory_order_relaxed);
        return false;
    }
    return true;
}

bool HugeHoles::brings_huge_pages(uint32_t block, const vmth_run &hole)
{
    Block &of = blocks_[block];
    Answer answer = of.answer.load(std::memory_order_relaxed);
    if (answer == Answer::unknown) {
        // Who comes meanwhile waits: what it wrote beside the page that is tried would be counted.
        std::lock_guard<std::mutex> lock(of.trying);
        answer = of.answer.load(std::memory_order_relaxed);
        if (answer == Answer::unknown) {
            answer = try_fault(block, hole);
            of.answer.store(answer, std::memory_order_relaxed);
        }
    }
    return answer == Answer::yes;
}

HugeHoles::Answer HugeHoles::try_fault(uint32_t block, const vmth_run &hole)
{
    uint8_t *const page = memory_.host(block, hole.page);
    uint8_t *const begin = page - reinterpret_cast<uintptr_t>(page) % huge_bytes;
    const auto npages = static_cast<int64_t>(huge_bytes / static_cast<uint64_t>(getpagesize()));
    if (begin < memory_.host(block, 0) ||
        begin + huge_bytes > memory_.host(block, memory_.npages(block))) {
        return Answer::unknown;
    }
    if (ops_->resident(ops_->ctx, begin, huge_bytes) != 0) {
        return ++blocks_[block].looks == most_looks ? Answer::no : Answer::unknown;
    }
    if (ops_->populate(ops_->ctx, page, memory_.page_bytes(), VMTH_POPULATE_WRITE) != 0) {
        return Answer::no;
    }
    return ops_->resident(ops_->ctx, begin, huge_bytes) == npages ? Answer::yes : Answer::no;
}

}  // namespace vmth

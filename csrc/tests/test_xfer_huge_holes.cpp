// SPDX-License-Identifier: Apache-2.0
// Holes of a file in which a fault brings a huge page, and those in which it does not: how each is found
// out, what is mapped, what is written, and what happens where mapping fails.
#include "tests/holes_fixture.hpp"

using namespace t;

namespace {

constexpr uint64_t huge_pages = 512;
constexpr uint64_t npages = 6 * huge_pages;
constexpr size_t huge_bytes = huge_pages * page_bytes;

// A kernel whose faults bring `brings` pages: what it says of memory is made up, what it maps is real.
struct Kernel {
    explicit Kernel(const File &memory) : file(memory) {}

    const File &file;
    int64_t brings = huge_pages;
    int64_t before = 0;  // pages that are there before the first fault
    int fails_from = -1;
    std::atomic<int> populates{0};
    std::atomic<int> looks{0};
    std::atomic<bool> faulted{false};
    vmth_populate_ops ops = {
        [](void *ctx, void *address, size_t nbytes, vmth_populate_kind kind) {
            auto *self = static_cast<Kernel *>(ctx);
            if (kind != VMTH_POPULATE_WRITE) {
                return 0;  // maps what is there already
            }
            if (self->fails_from >= 0 && self->populates++ >= self->fails_from) {
                return -EFAULT;  // the file has no room
            }
            self->faulted = true;
            return populating.populate(nullptr, address, nbytes, kind);
        },
        [](void *ctx, void *address, size_t nbytes) {
            auto *self = static_cast<Kernel *>(ctx);
            T_EQUAL(reinterpret_cast<uintptr_t>(address) % huge_bytes, 0);
            T_EQUAL(nbytes, huge_bytes);
            T_CHECK(address >= self->file.page(0));
            T_CHECK(static_cast<uint8_t *>(address) + nbytes <= self->file.page(self->file.npages));
            self->looks++;
            return self->faulted ? self->brings : self->before;
        },
        this};
};

Options over(const Kernel &kernel, unsigned channels = 1)
{
    Options options;
    options.channels = channels;
    options.populate = &kernel.ops;
    return options;
}

void test_huge_pages_are_mapped_and_nothing_is_written()
{
    for (unsigned channels : {1u, 2u}) {
        reset_disk();
        const File file(npages);
        Kernel kernel(file);
        Moved moved(file, over(kernel, channels));
        memset(moved.source.page(700), 0, 50 * page_bytes);
        moved.round(0);
        // What lies at the block's ends has no 2 MiB of the block around it: written until it is known.
        T_CHECK(moved.written() < 2 * huge_pages);
        T_EQUAL(moved.written() + populated - 1, npages - 50);  // one was tried, then mapped
        T_CHECK(file.hole(700) && file.hole(749));
        const uint64_t before = moved.written();
        moved.source.randomize(2);
        moved.round(1);
        T_EQUAL(moved.written(), before);  // also what was zero
        T_CHECK(moved.receiver->fallbacks().empty());
        moved.finish();
    }
}

void test_small_pages_are_written_after_one_try()
{
    for (int64_t brings : {int64_t{1}, int64_t{16}, int64_t{-EPERM}}) {
        reset_disk();
        const File file(npages);
        Kernel kernel(file);
        kernel.brings = brings;
        Moved moved(file, over(kernel, 2));
        moved.round(0);
        T_EQUAL(populated.load(), 1);
        T_EQUAL(kernel.looks.load(), 2);
        T_EQUAL(moved.written(), npages);
        T_CHECK(moved.receiver->fallbacks().empty());
        moved.finish();
    }
}

void test_memory_that_is_nowhere_empty_is_not_tried()
{
    for (int64_t before : {int64_t{1}, int64_t{-ENOSYS}}) {
        reset_disk();
        const File file(npages);
        Kernel kernel(file);
        kernel.before = before;
        Moved moved(file, over(kernel));
        for (uint32_t round = 0; round < 8; round++) {
            std::vector<uint64_t> every_eighth(moved.bits.size());
            for (uint64_t page = round; page < npages; page += 8) {
                vmth_bitmap_set_range(every_eighth.data(), page, 1);
            }
            moved.round(round, every_eighth);
        }
        T_EQUAL(populated.load(), 0);
        T_CHECK(kernel.looks > 1 && kernel.looks <= 64);
        T_EQUAL(moved.written(), npages);
        moved.finish();
    }
}

void test_a_block_without_two_mib_is_not_tried()
{
    reset_disk();
    const File file(huge_pages / 2);
    Kernel kernel(file);
    Moved moved(file, over(kernel));
    moved.round(0);
    T_EQUAL(kernel.looks.load(), 0);
    T_EQUAL(moved.written(), huge_pages / 2);
    moved.finish();
}

// The block begins 3 pages behind a multiple of 2 MiB and ends 3 pages behind one.
void test_what_reaches_out_of_the_block_is_not_tried()
{
    reset_disk();
    const File file(npages);
    Kernel kernel(file);
    Moved moved(file, over(kernel));
    std::vector<uint64_t> ends(moved.bits.size());
    vmth_bitmap_set_range(ends.data(), 0, 1);
    vmth_bitmap_set_range(ends.data(), npages - 1, 1);
    moved.round(0, ends);
    T_EQUAL(kernel.looks.load(), 0);
    T_EQUAL(moved.written(), 2);
    moved.round(1);
    moved.finish();
}

// Where the first fault fails, and where room ends later: the rest is written, or ends with an error.
void test_what_cannot_be_mapped_is_written()
{
    for (int fails_from : {0, 1, 5}) {
        reset_disk();
        const File file(npages);
        Kernel kernel(file);
        kernel.fails_from = fails_from;
        Moved moved(file, over(kernel));
        moved.round(0);
        T_EQUAL(kernel.populates.load(), fails_from + 1);  // none after the one that failed
        T_CHECK(moved.written() > npages / 2);
        T_CHECK(moved.receiver->fallbacks().empty());
        moved.finish();
    }
    reset_disk({ENOSPC, 0, SIZE_MAX});
    const File file(npages);
    Kernel kernel(file);
    kernel.fails_from = 0;
    Moved moved(file, over(kernel));
    (void)expect_error([&] { moved.round(0); });
    const TransferError failed = expect_error([&] { moved.receiver->wait(0); });
    T_EQUAL(failed.error(), ENOSPC);
    reset_disk();
}

void test_system_calls()
{
    const vmth_populate_ops *ops = vmth_populate_system_ops();
    const File file(1200);
    uint8_t *begin = file.page(0);
    T_EQUAL(ops->resident(ops->ctx, begin, 1200 * page_bytes), 0);
    for (uint64_t page : {0u, 511u, 512u, 1199u}) {
        T_EQUAL(pwrite(file.fd(), "x", 1, static_cast<off_t>((first_page + page) * page_bytes)), 1);
    }
    T_CHECK(ops->resident(ops->ctx, begin, 1200 * page_bytes) >= 4);
    T_CHECK(ops->resident(ops->ctx, begin, page_bytes) == 1);
    T_CHECK(ops->resident(ops->ctx, begin + 1, page_bytes) == -EINVAL);
}

}  // namespace

int main()
{
    skip_where_memfds_are_huge();
    test_huge_pages_are_mapped_and_nothing_is_written();
    test_small_pages_are_written_after_one_try();
    test_memory_that_is_nowhere_empty_is_not_tried();
    test_a_block_without_two_mib_is_not_tried();
    test_what_reaches_out_of_the_block_is_not_tried();
    test_what_cannot_be_mapped_is_written();
    test_system_calls();
    return T_PASS;
}

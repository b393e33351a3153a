/* SPDX-License-Identifier: Apache-2.0 */
/* Populated pages on a fake kernel: swapped and zero pages, holes, a hole punched while we look. */
#define _GNU_SOURCE
#include "sys/populated.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "t_fake_memory.h"
#include "vmth/bitmap.h"

#define FILE_FD 7
#define FILE_PAGES 256u
#define FILE_OFFSET (3u * FAKE_PAGE_BYTES)

static struct fake_memory fake;
static uint64_t words[FAKE_PAGES / 64];

/* A file of FILE_PAGES pages: true where there is data. */
static bool file_data[FILE_PAGES];
/* Reserved and never written: counted, and no data. */
static bool file_reserved[FILE_PAGES];
static bool punch_after_seek_data;
static int fail_lseek;
static int fail_stat;
static bool counts_cached; /* is there cachestat(2)? */
static bool write_after_count;
static unsigned counts;
static unsigned questions;    /* by lseek */
static uint64_t pages_walked; /* by SEEK_HOLE and SEEK_DATA, as the kernel walks them */

static int64_t file_lseek(const struct vmth_memory_ops *self, int fd, int64_t offset, int whence)
{
    uint64_t page = (uint64_t)offset / FAKE_PAGE_BYTES;
    bool want = whence == SEEK_DATA;

    (void)self;
    T_EQUAL(fd, FILE_FD);
    questions++;
    if (fail_lseek != 0) {
        return fail_lseek;
    }
    if (page >= FILE_PAGES) {
        return -ENXIO;
    }
    if (file_data[page] != want) {
        while (page < FILE_PAGES && file_data[page] != want) {
            page++;
            pages_walked++;
        }
        if (page == FILE_PAGES && want) {
            return -ENXIO;
        }
        offset = (int64_t)(page * FAKE_PAGE_BYTES);
    }
    if (want && punch_after_seek_data) {
        punch_after_seek_data = false;
        file_data[page] = false;
    }
    return offset;
}

static int file_bytes(const struct vmth_memory_ops *self, int fd, uint64_t *nbytes,
                      uint64_t *allocated)
{
    uint64_t page;

    (void)self;
    T_EQUAL(fd, FILE_FD);
    *nbytes = FILE_PAGES * FAKE_PAGE_BYTES;
    *allocated = 0;
    for (page = 0; page < FILE_PAGES; page++) {
        *allocated += file_data[page] || file_reserved[page] ? FAKE_PAGE_BYTES : 0;
    }
    return fail_stat;
}

static int64_t file_cached(const struct vmth_memory_ops *self, int fd, uint64_t offset,
                           uint64_t nbytes)
{
    int64_t n = 0;
    uint64_t page;

    (void)self;
    T_EQUAL(fd, FILE_FD);
    T_EQUAL(offset % FAKE_PAGE_BYTES + nbytes % FAKE_PAGE_BYTES, 0);
    counts++;
    if (!counts_cached) {
        return -ENOSYS;
    }
    for (page = offset / FAKE_PAGE_BYTES; page < (offset + nbytes) / FAKE_PAGE_BYTES; page++) {
        n += page < FILE_PAGES && (file_data[page] || file_reserved[page]);
    }
    if (write_after_count) {
        memset(file_data, 1, sizeof(file_data));
    }
    return n;
}

static void reset(void)
{
    fake_init(&fake);
    fake.ops.lseek = file_lseek;
    fake.ops.cached_pages = file_cached;
    fake.ops.file_bytes = file_bytes;
    counts_cached = true;
    write_after_count = false;
    pages_walked = 0;
    memset(words, 0, sizeof(words));
    memset(file_data, 0, sizeof(file_data));
    memset(file_reserved, 0, sizeof(file_reserved));
    counts = questions = 0;
    punch_after_seek_data = false;
    fail_lseek = fail_stat = 0;
}

static int ask_file(uint64_t npages, uint64_t page)
{
    return vmth_populated_file(&fake.ops, FILE_FD, FILE_OFFSET, npages, FAKE_PAGE_BYTES, words,
                               page);
}

static void test_swapped_counts_and_the_page_of_zeros_does_not(void)
{
    reset();
    fake.categories[1] = VMTH_PAGE_IS_PRESENT;
    fake.categories[2] = VMTH_PAGE_IS_PRESENT | VMTH_PAGE_IS_PFNZERO;
    fake.categories[3] = VMTH_PAGE_IS_SWAPPED;
    fake.categories[4] = VMTH_PAGE_IS_WRITTEN | VMTH_PAGE_IS_WPALLOWED;
    fake.categories[5] = VMTH_PAGE_IS_PRESENT | VMTH_PAGE_IS_HUGE | VMTH_PAGE_IS_FILE;
    T_EQUAL(vmth_populated_anon(&fake.ops, FAKE_PAGEMAP, FAKE_BASE, FAKE_PAGES, FAKE_PAGE_BYTES,
                                words, 0),
            0);
    T_EQUAL(words[0], 1u << 1 | 1u << 3 | 1u << 5);
    T_EQUAL(vmth_bitmap_count(words, 0, FAKE_PAGES), 3);
}

static void test_bits_are_set_from_the_page_asked_for(void)
{
    reset();
    memset(fake.categories, VMTH_PAGE_IS_PRESENT, sizeof(fake.categories));
    T_EQUAL(vmth_populated_anon(&fake.ops, FAKE_PAGEMAP, FAKE_BASE, 3, FAKE_PAGE_BYTES, words, 62),
            0);
    T_EQUAL(words[0], UINT64_C(3) << 62);
    T_EQUAL(words[1], 1);
}

static void test_data_of_a_file_at_its_offset(void)
{
    reset();
    file_data[2] = true; /* before the block */
    file_data[3] = true;
    file_data[3 + 63] = true;
    file_data[3 + 64] = true;
    file_data[3 + 100] = true; /* behind what is asked */
    T_EQUAL(ask_file(100, 0), 0);
    T_EQUAL(words[0], UINT64_C(1) | UINT64_C(1) << 63);
    T_EQUAL(words[1], 1);
    memset(words, 0, sizeof(words));
    T_EQUAL(ask_file(64, 10), 0);
    T_EQUAL(words[0], UINT64_C(1) << 10);
    T_EQUAL(words[1], UINT64_C(1) << 9);
}

static void test_a_full_file_and_an_empty_one(void)
{
    reset();
    T_EQUAL(ask_file(FILE_PAGES - 3, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FILE_PAGES), 0);
    memset(file_data, 1, sizeof(file_data));
    T_EQUAL(ask_file(FILE_PAGES - 3, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FILE_PAGES), FILE_PAGES - 3);
    T_EQUAL(ask_file(0, 0), 0);
}

static void test_a_file_that_is_allocated_in_full_is_not_walked(void)
{
    unsigned page;

    reset();
    memset(file_data, 1, sizeof(file_data));
    T_EQUAL(ask_file(FILE_PAGES - 3, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FILE_PAGES), FILE_PAGES - 3);
    T_EQUAL(questions, 1);
    T_EQUAL(counts, 0);
    for (page = 0; page < FILE_PAGES; page++) { /* one page is missing, wherever */
        reset();
        memset(file_data, 1, sizeof(file_data));
        file_data[page] = false;
        T_EQUAL(ask_file(FILE_PAGES - 3, 0), 0);
        T_EQUAL(vmth_bitmap_count(words, 0, FILE_PAGES), FILE_PAGES - 3 - (page >= 3));
        T_EQUAL(page < 3 || !vmth_bitmap_test(words, page - 3), 1);
    }
    reset(); /* reserved, and not written at all */
    memset(file_reserved, 1, sizeof(file_reserved));
    T_EQUAL(ask_file(FILE_PAGES - 3, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FILE_PAGES), 0);
    file_data[3 + 10] = true; /* nor up to the first that is */
    T_EQUAL(ask_file(FILE_PAGES - 3, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, 10), 0);
    T_EQUAL(vmth_bitmap_test(words, 10), 1);
    reset(); /* behind the file's end there is nothing */
    memset(file_data, 1, sizeof(file_data));
    T_EQUAL(ask_file(FILE_PAGES + 10, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FILE_PAGES + 20), FILE_PAGES - 3);
    reset();
    memset(file_data, 1, sizeof(file_data));
    fail_stat = -EIO; /* then it is looked at */
    T_EQUAL(ask_file(FILE_PAGES - 3, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FILE_PAGES), FILE_PAGES - 3);
    T_EQUAL(counts, 1);
}

static void test_a_hole_punched_between_two_questions_ends_no_search(void)
{
    reset();
    file_data[3 + 5] = true;
    file_data[3 + 9] = true;
    punch_after_seek_data = true;
    T_EQUAL(ask_file(20, 0), 0);
    T_EQUAL(words[0], 1u << 9);
}

static void test_holes_anywhere_with_and_without_a_count(void)
{
    uint32_t random = 12345;
    unsigned round;

    for (round = 0; round < 400; round++) {
        const uint64_t npages = round % 251;
        unsigned page;

        reset();
        counts_cached = round % 2 == 0;
        for (page = 0; page < FILE_PAGES; page++) {
            random = random * 1664525u + 1013904223u;
            /* From nearly full to nearly empty, in runs. */
            file_data[page] = page > 0 && (random >> 28) > 1 ? file_data[page - 1]
                                                              : (random >> 8) % 8 > round % 8;
        }
        T_EQUAL(ask_file(npages, 1), 0);
        T_EQUAL(vmth_bitmap_test(words, 0), 0);
        for (page = 0; page < npages; page++) {
            T_EQUAL(vmth_bitmap_test(words, page + 1), file_data[3 + page]);
        }
        T_EQUAL(vmth_bitmap_test(words, npages + 1), 0);
    }
}

/* Where nothing was ever allocated, nothing may be read: that would allocate it. */
static void test_reserved_pages_hide_no_hole(void)
{
    unsigned stride;
    unsigned page;

    reset();
    for (page = 0; page < 25; page++) {
        file_data[3 + page] = page < 10 || page >= 20;
        file_reserved[3 + page] = !file_data[3 + page];
    }
    T_EQUAL(ask_file(30, 0), 0);
    T_EQUAL(words[0] & ~UINT64_C(0xffc00), 0x1f003ff); /* 10 to 19 may count */
    for (stride = 2; stride < 9; stride++) {
        reset();
        for (page = 0; page < 240; page++) {
            file_data[3 + page] = page % stride == 0;
            file_reserved[3 + page] = page < 235 && !file_data[3 + page];
        }
        T_EQUAL(ask_file(240, 0), 0);
        for (page = 0; page < 240; page++) {
            const bool set = vmth_bitmap_test(words, page);

            T_CHECK(set ? file_data[3 + page] || file_reserved[3 + page] : !file_data[3 + page]);
        }
        T_CHECK(counts > 1 && counts <= 16);
    }
}

/* Asked piece by piece, as a pass does. */
static void test_a_full_file_is_not_walked_for_each_piece(void)
{
    unsigned round;

    for (round = 0; round < 4; round++) {
        uint64_t page;

        reset();
        counts_cached = round % 2 == 0;
        memset(file_data, 1, sizeof(file_data));
        file_data[3 + 20] = round < 2; /* full, or with one hole */
        for (page = 0; page < 240; page += 16) {
            T_EQUAL(vmth_populated_file(&fake.ops, FILE_FD, FILE_OFFSET + page * FAKE_PAGE_BYTES,
                                        16, FAKE_PAGE_BYTES, words, page),
                    0);
        }
        T_EQUAL(vmth_bitmap_count(words, 0, 240), round < 2 ? 240 : 239);
        T_CHECK(pages_walked <= 16);
        /* One question a piece, and three more for the hole; without a count, one a page. */
        T_CHECK(questions <= (counts_cached ? 18u : 256u));
        T_CHECK(counts <= 16);
    }
    reset();
    for (round = 0; round < FILE_PAGES; round += 2) {
        file_data[round] = true;
    }
    T_EQUAL(ask_file(240, 0), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, 240), 120);
    T_EQUAL(counts, 2); /* again for the last page, which is all that is left */
}

static void test_what_is_written_after_the_count_may_be_missed_and_ends_no_search(void)
{
    reset();
    file_data[3 + 5] = true;
    write_after_count = true;
    T_EQUAL(ask_file(100, 0), 0);
    T_EQUAL(vmth_bitmap_test(words, 5), 1);
    T_EQUAL(vmth_bitmap_count(words, 0, 5), 0);
}

static void test_the_kernels_count(void)
{
    const struct vmth_memory_ops *ops = vmth_memory_ops_kernel();
    const uint64_t page_bytes = (uint64_t)getpagesize();
    const int fd = memfd_create("populated", MFD_CLOEXEC);
    int64_t all;
    uint64_t nbytes;
    uint64_t allocated;
    unsigned page;

    T_CHECK(fd >= 0);
    T_EQUAL(ftruncate(fd, (off_t)(10 * page_bytes)), 0);
    for (page = 2; page < 9; page += 3) {
        T_EQUAL(pwrite(fd, "x", 1, (off_t)(page * page_bytes)), 1);
    }
    all = ops->cached_pages(ops, fd, 0, 10 * page_bytes);
    T_EQUAL(ops->file_bytes(ops, fd, &nbytes, &allocated), 0);
    T_EQUAL(nbytes, 10 * page_bytes);
    T_CHECK(allocated >= 3 * page_bytes); /* more where shared memory is huge */
    if (all == -ENOSYS || all == -EPERM) {
        fprintf(stderr, "this kernel does not count a file's pages\n");
    } else {
        T_CHECK(all == 3 || all == 10); /* 10: shared memory is huge here */
        if (all == 3) {
            T_EQUAL(ops->cached_pages(ops, fd, 5 * page_bytes, page_bytes), 1);
            T_EQUAL(ops->cached_pages(ops, fd, 6 * page_bytes, 4 * page_bytes), 1);
            T_EQUAL(ops->cached_pages(ops, fd, 0, 2 * page_bytes), 0);
        }
    }
    close(fd);
    T_EQUAL(ops->cached_pages(ops, fd, 0, page_bytes) < 0, 1);
    T_EQUAL(ops->file_bytes(ops, fd, &nbytes, &allocated), -EBADF);
}

static void test_errors_are_passed_on(void)
{
    reset();
    fail_lseek = -EINVAL;
    T_EQUAL(ask_file(20, 0), -EINVAL);
    fake.fail_scan = -ENOTTY;
    T_EQUAL(vmth_populated_anon(&fake.ops, FAKE_PAGEMAP, FAKE_BASE, 1, FAKE_PAGE_BYTES, words, 0),
            -ENOTTY);
}

int main(void)
{
    test_swapped_counts_and_the_page_of_zeros_does_not();
    test_bits_are_set_from_the_page_asked_for();
    test_data_of_a_file_at_its_offset();
    test_a_full_file_and_an_empty_one();
    test_a_file_that_is_allocated_in_full_is_not_walked();
    test_a_hole_punched_between_two_questions_ends_no_search();
    test_holes_anywhere_with_and_without_a_count();
    test_reserved_pages_hide_no_hole();
    test_a_full_file_is_not_walked_for_each_piece();
    test_the_kernels_count();
    test_what_is_written_after_the_count_may_be_missed_and_ends_no_search();
    test_errors_are_passed_on();
    return T_PASS;
}

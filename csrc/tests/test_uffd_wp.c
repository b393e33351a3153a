/* SPDX-License-Identifier: Apache-2.0 */
/* Write tracking on a fake kernel: what is missing, what is armed, resuming, no descriptor lost. */
#include "sys/uffd_wp.h"
#include "t_fake_memory.h"
#include "vmth/bitmap.h"

static struct fake_memory fake;
static struct vmth_uffd_wp tracker;
static uint64_t words[FAKE_PAGES / 64];

static void open_on_fake(void)
{
    enum vmth_uffd_missing missing = VMTH_UFFD_SYSCALL;

    fake_init(&fake);
    memset(words, 0, sizeof(words));
    T_EQUAL(vmth_uffd_wp_open(&tracker, &fake.ops, FAKE_PAGE_BYTES, &missing), 0);
    T_EQUAL(missing, VMTH_UFFD_NOTHING_MISSING);
    T_EQUAL(fake.open_fds, 2);
}

static void close_on_fake(void)
{
    vmth_uffd_wp_close(&tracker);
    vmth_uffd_wp_close(&tracker);
    T_EQUAL(fake.open_fds, 0);
}

static void expect_missing(int error, enum vmth_uffd_missing want)
{
    enum vmth_uffd_missing missing = VMTH_UFFD_NOTHING_MISSING;

    T_EQUAL(vmth_uffd_wp_open(&tracker, &fake.ops, FAKE_PAGE_BYTES, &missing), error);
    T_EQUAL(missing, want);
    T_EQUAL(fake.open_fds, 0);
    close_on_fake();
}

static void test_what_is_missing_is_named_and_nothing_stays_open(void)
{
    fake_init(&fake);
    fake.fail_userfaultfd = -EPERM;
    fake.fail_device = -ENOENT;
    expect_missing(-EPERM, VMTH_UFFD_SYSCALL);
    fake_init(&fake);
    fake.features = 0x1fff; /* Linux 6.1 */
    expect_missing(-EINVAL, VMTH_UFFD_WP_ASYNC);
    fake_init(&fake);
    fake.fail_pagemap = -EACCES;
    expect_missing(-EACCES, VMTH_UFFD_PAGEMAP);
    fake_init(&fake);
    fake.fail_scan = -ENOTTY;
    expect_missing(-ENOTTY, VMTH_UFFD_PAGEMAP_SCAN);
}

static void test_the_device_serves_where_the_system_call_is_forbidden(void)
{
    enum vmth_uffd_missing missing;

    fake_init(&fake);
    fake.fail_userfaultfd = -EPERM;
    T_EQUAL(vmth_uffd_wp_open(&tracker, &fake.ops, FAKE_PAGE_BYTES, &missing), 0);
    T_EQUAL(fake.open_fds, 2); /* the device itself was closed */
    close_on_fake();
}

static void test_add_arms_every_page_and_notes_the_populated_ones(void)
{
    open_on_fake();
    memset(fake.categories, VMTH_PAGE_IS_WRITTEN, sizeof(fake.categories));
    fake.categories[3] |= VMTH_PAGE_IS_PRESENT;
    fake.categories[64] |= VMTH_PAGE_IS_PRESENT | VMTH_PAGE_IS_PFNZERO;
    fake.categories[1000] |= VMTH_PAGE_IS_SWAPPED;
    fake.categories[FAKE_PAGES - 1] |= VMTH_PAGE_IS_PRESENT;
    T_EQUAL(vmth_uffd_wp_add(&tracker, FAKE_BASE, FAKE_PAGES, words), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FAKE_PAGES), 3);
    T_CHECK(vmth_bitmap_test(words, 3) && vmth_bitmap_test(words, 1000));
    T_CHECK(vmth_bitmap_test(words, FAKE_PAGES - 1));
    memset(words, 0, sizeof(words));
    T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE, FAKE_PAGES, words), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FAKE_PAGES), 0);
    close_on_fake();
}

/* Every other page is more regions than one answer holds: the scan resumes, and loses none. */
static void test_a_dense_answer_is_fetched_in_parts(void)
{
    int scans;

    open_on_fake();
    for (size_t page = 1; page < FAKE_PAGES; page += 2) {
        fake.categories[page] = VMTH_PAGE_IS_WRITTEN;
    }
    scans = fake.scans;
    T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE, FAKE_PAGES, words), 0);
    T_CHECK(fake.scans - scans > 4);
    for (size_t i = 0; i < FAKE_PAGES / 64; i++) {
        T_EQUAL(words[i], 0xaaaaaaaaaaaaaaaau);
    }
    memset(words, 0, sizeof(words));
    T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE, FAKE_PAGES, words), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FAKE_PAGES), 0);
    close_on_fake();
}

static void test_fetch_keeps_to_its_range_and_adds_to_the_bitmap(void)
{
    open_on_fake();
    memset(fake.categories, VMTH_PAGE_IS_WRITTEN, sizeof(fake.categories));
    words[1] = 2;
    T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE + 10 * FAKE_PAGE_BYTES, 3, words), 0);
    T_EQUAL(words[0], 7);
    T_EQUAL(words[1], 2);
    T_CHECK(fake.categories[9] == VMTH_PAGE_IS_WRITTEN && fake.categories[10] == 0);
    T_CHECK(fake.categories[12] == 0 && fake.categories[13] == VMTH_PAGE_IS_WRITTEN);
    T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE, 0, words), 0);
    close_on_fake();
}

static void test_a_peek_arms_nothing(void)
{
    open_on_fake();
    memset(fake.categories, VMTH_PAGE_IS_WRITTEN, sizeof(fake.categories));
    words[1] = 2;
    for (int looks = 0; looks < 2; looks++) {
        T_EQUAL(vmth_uffd_wp_peek(&tracker, FAKE_BASE + 10 * FAKE_PAGE_BYTES, 3, words), 0);
        T_EQUAL(words[0], 7);
        T_EQUAL(words[1], 2);
        T_EQUAL(fake.categories[11], VMTH_PAGE_IS_WRITTEN);
    }
    T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE + 10 * FAKE_PAGE_BYTES, 3, words), 0);
    words[0] = 0;
    T_EQUAL(vmth_uffd_wp_peek(&tracker, FAKE_BASE + 10 * FAKE_PAGE_BYTES, 3, words), 0);
    T_EQUAL(words[0], 0);
    close_on_fake();
}

static void test_a_failed_add_leaves_nothing_registered(void)
{
    open_on_fake();
    fake.fail_register = -EBUSY;
    T_EQUAL(vmth_uffd_wp_add(&tracker, FAKE_BASE, 8, NULL), -EBUSY);
    T_EQUAL(fake.registrations, 0);
    fake.fail_register = 0;
    fake.fail_scan = -EPERM;
    T_EQUAL(vmth_uffd_wp_add(&tracker, FAKE_BASE, 8, NULL), -EPERM);
    T_EQUAL(fake.registrations, 0);
    fake.fail_scan = 0;
    fake.range_ioctls = ~(UINT64_C(1) << _UFFDIO_ZEROPAGE); /* hugetlb */
    T_EQUAL(vmth_uffd_wp_add(&tracker, FAKE_BASE, 8, NULL), -EOPNOTSUPP);
    T_EQUAL(fake.registrations, 0);
    fake.range_ioctls = UINT64_MAX;
    T_EQUAL(vmth_uffd_wp_add(&tracker, FAKE_BASE, 8, NULL), 0);
    T_EQUAL(fake.registrations, 1);
    T_EQUAL(vmth_uffd_wp_remove(&tracker, FAKE_BASE, 8), 0);
    T_EQUAL(fake.registrations, 0);
    close_on_fake();
}

static void region_before(struct vmth_pm_scan_arg *arg, struct vmth_page_region *regions)
{
    regions[0].start = arg->start - FAKE_PAGE_BYTES;
}

static void region_after(struct vmth_pm_scan_arg *arg, struct vmth_page_region *regions)
{
    regions[0].end = arg->end + FAKE_PAGE_BYTES;
}

static void region_empty(struct vmth_pm_scan_arg *arg, struct vmth_page_region *regions)
{
    (void)arg;
    regions[0].end = regions[0].start;
}

static void region_overlong(struct vmth_pm_scan_arg *arg, struct vmth_page_region *regions)
{
    (void)arg;
    regions[0].end = UINT64_MAX;
}

static void walk_overruns(struct vmth_pm_scan_arg *arg, struct vmth_page_region *regions)
{
    (void)regions;
    arg->walk_end = arg->end + FAKE_PAGE_BYTES;
}

/* An answer outside of the question would set bits outside of the bitmap. */
static void test_an_answer_outside_of_the_question_is_an_error(void)
{
    void (*const lies[])(struct vmth_pm_scan_arg *, struct vmth_page_region *) = {
        region_before, region_after, region_empty, region_overlong, walk_overruns,
    };

    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        open_on_fake();
        fake.categories[5] = VMTH_PAGE_IS_WRITTEN;
        fake.lie = lies[i];
        T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE, 64, words), -EIO);
        close_on_fake();
    }
}

static void stale_walk_end(struct vmth_pm_scan_arg *arg, struct vmth_page_region *regions)
{
    arg->walk_end = regions[0].end;
}

/* The pages past a stale walk_end have been armed: dropping their regions would lose them. */
static void test_regions_past_a_stale_walk_end_count(void)
{
    open_on_fake();
    for (size_t page = 1; page < FAKE_PAGES; page += 2) {
        fake.categories[page] = VMTH_PAGE_IS_WRITTEN;
    }
    fake.lie = stale_walk_end;
    T_EQUAL(vmth_uffd_wp_fetch(&tracker, FAKE_BASE, FAKE_PAGES, words), 0);
    T_EQUAL(vmth_bitmap_count(words, 0, FAKE_PAGES), FAKE_PAGES / 2);
    close_on_fake();
}

static void test_features_are_reported_and_nothing_stays_open(void)
{
    uint64_t features = 0;

    fake_init(&fake);
    fake.features = 0x1fff;
    T_EQUAL(vmth_uffd_features(&fake.ops, &features), 0);
    T_EQUAL(features, 0x1fff);
    T_EQUAL(fake.open_fds, 0);
    fake.fail_userfaultfd = -ENOSYS;
    fake.fail_device = -ENOENT;
    T_EQUAL(vmth_uffd_features(&fake.ops, &features), -ENOSYS);
}

int main(void)
{
    test_what_is_missing_is_named_and_nothing_stays_open();
    test_the_device_serves_where_the_system_call_is_forbidden();
    test_add_arms_every_page_and_notes_the_populated_ones();
    test_a_dense_answer_is_fetched_in_parts();
    test_fetch_keeps_to_its_range_and_adds_to_the_bitmap();
    test_a_peek_arms_nothing();
    test_a_failed_add_leaves_nothing_registered();
    test_an_answer_outside_of_the_question_is_an_error();
    test_regions_past_a_stale_walk_end_count();
    test_features_are_reported_and_nothing_stays_open();
    vmth_uffd_wp_close(NULL);
    return T_PASS;
}

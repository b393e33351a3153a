/* SPDX-License-Identifier: Apache-2.0 */
/* multifd packets of plain pages: golden runs, every cut, everything that is left to others. */
#include <errno.h>
#include <string.h>

#include "vmth/qemu_multifd.h"
#include "t_check.h"

enum {
    PAGE = 65536, /* few pages a packet: short inputs */
    MOST = VMTH_MULTIFD_PACKET_BYTES / PAGE,
    HEADER = VMTH_MULTIFD_HEADER_BYTES(PAGE),
    CAP = 2 * MOST
};

static const uint64_t lengths[2] = {16 * PAGE, 3 * PAGE - 1};
static uint8_t names[2 * VMTH_QEMU_NAME_BYTES];
static const struct vmth_qemu_blocks blocks = {
    .page_bytes = PAGE, .nblocks = 2, .used_length = lengths, .names = names};

static uint8_t input[8 * PAGE];
static size_t input_bytes;
static struct vmth_qemu_run runs[CAP];

static void put_be(uint8_t *to, uint64_t value, unsigned nbytes)
{
    for (unsigned i = 0; i < nbytes; i++) {
        to[i] = (uint8_t)(value >> (8 * (nbytes - 1 - i)));
    }
}

/* A packet behind what is there; its pages in `pages`, the normal ones first. */
static uint8_t *put_packet(const char *block, uint32_t normal, uint32_t zero, const uint64_t *pages)
{
    uint8_t *header = input + input_bytes;

    memset(header, 0, HEADER);
    put_be(header, 0x11223344, 4);
    put_be(header + 4, 1, 4);
    put_be(header + 12, MOST, 4);
    put_be(header + 16, normal, 4);
    put_be(header + 20, (uint64_t)normal * PAGE, 4);
    put_be(header + 32, zero, 4);
    memcpy(header + 64, block, strlen(block));
    for (uint32_t i = 0; i < normal + zero; i++) {
        put_be(header + 320 + 8 * (size_t)i, pages[i] * PAGE, 8);
    }
    memset(header + HEADER, 0x5a, (size_t)normal * PAGE);
    input_bytes += HEADER + (size_t)normal * PAGE;
    return header;
}

static struct vmth_multifd_parsed parse(size_t nbytes)
{
    struct vmth_multifd_parsed parsed = {99, 99, 99};

    T_EQUAL(vmth_multifd_parse(&blocks, input, nbytes, runs, CAP, &parsed), 0);
    return parsed;
}

static void expect_run(size_t i, uint64_t page, uint64_t npages, uint32_t block, uint32_t kind,
                       uint64_t at)
{
    const uint32_t nbytes = kind == VMTH_QEMU_PAGE ? PAGE : 0;

    T_EQUAL(runs[i].page, page);
    T_EQUAL(runs[i].npages, npages);
    T_EQUAL(runs[i].block, block);
    T_EQUAL(runs[i].kind, kind);
    T_EQUAL(runs[i].at, at);
    T_EQUAL(runs[i].stride, nbytes);
    T_EQUAL(runs[i].nbytes, nbytes);
}

static void put_two(void)
{
    static const uint64_t first[] = {3, 4, 9, 12, 5, 6};
    static const uint64_t second[] = {2};

    memcpy(names, "\3ram", 4);
    memcpy(names + VMTH_QEMU_NAME_BYTES, "\4bios", 5);
    input_bytes = 0;
    put_packet("ram", 3, 3, first);
    put_packet("bios", 1, 0, second); /* its last page begins within the block */
}

static void test_packets_are_runs(void)
{
    struct vmth_multifd_parsed parsed;

    put_two();
    parsed = parse(input_bytes);
    T_EQUAL(parsed.stop, VMTH_MULTIFD_SHORT);
    T_EQUAL(parsed.used, input_bytes);
    T_EQUAL(parsed.nruns, 5);
    expect_run(0, 3, 2, 0, VMTH_QEMU_PAGE, HEADER);
    expect_run(1, 9, 1, 0, VMTH_QEMU_PAGE, HEADER + 2 * PAGE);
    expect_run(2, 12, 1, 0, VMTH_QEMU_ZERO, 0);
    expect_run(3, 5, 2, 0, VMTH_QEMU_ZERO, 0);
    expect_run(4, 2, 1, 1, VMTH_QEMU_PAGE, HEADER + 3 * PAGE + HEADER);
}

static void test_every_cut_is_short(void)
{
    const size_t first = HEADER + 3 * PAGE;

    put_two();
    for (size_t nbytes = 0; nbytes <= input_bytes; nbytes += nbytes % 977 == 0 ? 1 : 61) {
        const struct vmth_multifd_parsed parsed = parse(nbytes);

        T_EQUAL(parsed.stop, VMTH_MULTIFD_SHORT);
        T_EQUAL(parsed.used, nbytes < first ? 0 : (nbytes < input_bytes ? first : input_bytes));
        T_EQUAL(parsed.nruns, nbytes < first ? 0 : (nbytes < input_bytes ? 4 : 5));
    }
}

static void test_zeros_have_no_payload_whatever_the_size_says(void)
{
    static const uint64_t pages[] = {1, 2, 3};

    put_two();
    input_bytes = 0;
    put_be(put_packet("ram", 0, 3, pages) + 20, 4096, 4);
    T_EQUAL(parse(input_bytes).used, HEADER);
    expect_run(0, 1, 3, 0, VMTH_QEMU_ZERO, 0);
}

static void test_full_keeps_what_is_whole(void)
{
    static uint64_t apart[MOST];
    struct vmth_multifd_parsed parsed;

    put_two();
    input_bytes = 0;
    for (uint32_t i = 0; i < MOST; i++) {
        apart[i] = 2 * (uint64_t)i % 16;
    }
    put_packet("ram", 0, MOST, apart);
    put_packet("ram", 0, 1, apart);
    put_packet("ram", 0, 1, apart);
    T_EQUAL(vmth_multifd_parse(&blocks, input, input_bytes, runs, CAP, &parsed), 0);
    T_EQUAL(parsed.stop, VMTH_MULTIFD_FULL); /* the third might have MOST runs too */
    T_EQUAL(parsed.used, 2 * HEADER);
    T_EQUAL(parsed.nruns, MOST + 1);
    T_EQUAL(vmth_multifd_parse(&blocks, input, input_bytes, runs, MOST - 1, &parsed), -EINVAL);
    T_EQUAL(parsed.nruns, MOST + 1);
}

/* What makes the second packet another one's: `nbytes` of `value` at `at` of its header. */
static void expect_other(size_t at, uint64_t value, unsigned nbytes)
{
    struct vmth_multifd_parsed parsed;

    put_two();
    put_be(input + HEADER + 3 * PAGE + at, value, nbytes);
    parsed = parse(input_bytes);
    T_EQUAL(parsed.stop, VMTH_MULTIFD_OTHER);
    T_EQUAL(parsed.used, HEADER + 3 * PAGE);
    T_EQUAL(parsed.nruns, 4);
}

static void test_others_are_left(void)
{
    expect_other(0, 0x11223345, 4);
    expect_other(4, 2, 4);
    expect_other(8, 1, 4);       /* SYNC */
    expect_other(8, 2 << 1, 4);  /* zstd */
    expect_other(8, 32 << 1, 4); /* device state */
    expect_other(12, MOST + 1, 4);
    expect_other(16, 0, 4);
    expect_other(16, MOST + 1, 4);
    expect_other(16, UINT32_MAX, 4);
    expect_other(20, PAGE - 1, 4);
    expect_other(32, MOST, 4); /* one more than fit */
    expect_other(32, UINT32_MAX, 4);
    expect_other(64, 'r', 1); /* a name that is not listed, and one that begins as one that is */
    expect_other(64 + 3, 0, 1);
    expect_other(320, 3 * PAGE, 8);
    expect_other(320, PAGE + 1, 8);
    expect_other(320, UINT64_MAX - PAGE + 1, 8);
}

static void test_tables_out_of_bounds(void)
{
    struct vmth_qemu_blocks bad = blocks;
    struct vmth_multifd_parsed parsed = {7, 7, 7};

    bad.page_bytes = 3000;
    T_EQUAL(vmth_multifd_parse(&bad, input, input_bytes, runs, CAP, &parsed), -EINVAL);
    bad.page_bytes = VMTH_QEMU_MIN_PAGE_BYTES / 2;
    T_EQUAL(vmth_multifd_parse(&bad, input, input_bytes, runs, CAP, &parsed), -EINVAL);
    bad.page_bytes = PAGE;
    bad.nblocks = VMTH_QEMU_MAX_BLOCKS + 1;
    T_EQUAL(vmth_multifd_parse(&bad, input, input_bytes, runs, CAP, &parsed), -EINVAL);
    T_EQUAL(parsed.nruns, 7);
}

int main(void)
{
    test_packets_are_runs();
    test_every_cut_is_short();
    test_zeros_have_no_payload_whatever_the_size_says();
    test_full_keeps_what_is_whole();
    test_others_are_left();
    test_tables_out_of_bounds();
    return T_PASS;
}

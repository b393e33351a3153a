/* SPDX-License-Identifier: Apache-2.0 */
/* QEMU's ram records: golden bytes, every cut, every refusal, and the way back. */
#include <errno.h>
#include <string.h>

#include "vmth/qemu_ram.h"
#include "t_check.h"

enum { PAGE = 1024, CAP = 64 };

static const uint64_t lengths[2] = {8 * PAGE, 3 * PAGE - 1};
static uint8_t names[2 * VMTH_QEMU_NAME_BYTES];
static const struct vmth_qemu_blocks blocks = {
    .page_bytes = PAGE, .nblocks = 2, .used_length = lengths, .names = names};

static void name_blocks(void)
{
    memcpy(names, "\3ram", 4);
    memcpy(names + VMTH_QEMU_NAME_BYTES, "\4bios", 5);
}

/* ---- a stream is put together here, independently of the encoder ----------------------------- */

static uint8_t stream[64 * 1024];
static size_t stream_bytes;

static void put(const void *bytes, size_t nbytes)
{
    memcpy(stream + stream_bytes, bytes, nbytes);
    stream_bytes += nbytes;
}

static void put_word(uint64_t value)
{
    uint8_t bytes[8];

    for (unsigned i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(value >> (56 - 8 * i));
    }
    put(bytes, sizeof(bytes));
}

static void put_page(unsigned fill)
{
    uint8_t page[PAGE];

    memset(page, (int)fill, sizeof(page));
    put(page, sizeof(page));
}

static void put_all_kinds(void)
{
    stream_bytes = 0;
    put_word(0 * PAGE | 0x008); /* named page, then two that continue it */
    put("\3ram", 4);
    put_page(1);
    put_word(1 * PAGE | 0x028);
    put_page(2);
    put_word(2 * PAGE | 0x028);
    put_page(3);
    put_word(4 * PAGE | 0x022); /* zero pages 4 and 5 */
    put("", 1);
    put_word(5 * PAGE | 0x022);
    put("", 1);
    put_word(2 * PAGE | 0x008); /* the last page of bios, which is short of a byte */
    put("\4bios", 5);
    put_page(4);
    put_word(0 * PAGE | 0x060);
    put("\1\0\3abc", 6);
    put_word(1 * PAGE | 0x120);
    put("\0\0\0\2zz", 6);
    put_word(0x200);
    put_word(0x010);
    put_word(7 * PAGE | 0x004);
}

/* What all calls found: `at` counts from the stream's first byte. */
struct found {
    struct vmth_qemu_run runs[CAP];
    size_t nruns;
    uint32_t stops[8];
    size_t nstops;
    uint64_t total;
};

/* Feed the stream with `piece` more bytes at each call that was short. */
static void parse_in_pieces(struct found *found, size_t piece, size_t cap)
{
    uint32_t block = VMTH_QEMU_NO_BLOCK;
    size_t used = 0;
    size_t seen = 0;

    memset(found, 0, sizeof(*found));
    while (used < stream_bytes) {
        struct vmth_qemu_parsed parsed;
        struct vmth_qemu_error error;

        T_CHECK(found->nruns + cap <= CAP);
        T_EQUAL(vmth_qemu_ram_parse(&blocks, &block, stream + used, seen - used,
                                    found->runs + found->nruns, cap, &parsed, &error),
                0);
        for (size_t i = 0; i < parsed.nruns; i++) {
            struct vmth_qemu_run *run = &found->runs[found->nruns++];

            run->at += run->kind == VMTH_QEMU_ZERO ? 0 : used;
        }
        used += parsed.used;
        if (parsed.stop == VMTH_QEMU_SHORT) {
            T_CHECK(parsed.need > seen - used);
            T_CHECK(seen < stream_bytes);
            seen = seen + piece < stream_bytes ? seen + piece : stream_bytes;
        } else if (parsed.stop != VMTH_QEMU_FULL) {
            found->stops[found->nstops++] = parsed.stop;
            found->total = parsed.value;
        }
    }
}

static void test_every_kind(void)
{
    static const struct vmth_qemu_run want[] = {
        {0, 3, 12, 8 + PAGE, PAGE, 0, VMTH_QEMU_PAGE},
        {4, 2, 0, 0, 0, 0, VMTH_QEMU_ZERO},
        {2, 1, 12 + 3 * PAGE + 16 + 18 + 13, 8 + PAGE, PAGE, 1, VMTH_QEMU_PAGE},
        {0, 1, 4 * PAGE + 59 + 11, 11, 3, 1, VMTH_QEMU_XBZRLE},
        {1, 1, 4 * PAGE + 59 + 26, 10, 2, 1, VMTH_QEMU_COMPRESS},
    };
    struct found found;

    put_all_kinds();
    parse_in_pieces(&found, stream_bytes, CAP / 2);
    T_EQUAL(found.nruns, 5);
    for (size_t i = 0; i < 5; i++) {
        fprintf(stderr, "run %zu\n", i);
        T_EQUAL(found.runs[i].page, want[i].page);
        T_EQUAL(found.runs[i].npages, want[i].npages);
        T_EQUAL(found.runs[i].at, want[i].at);
        T_EQUAL(found.runs[i].stride, want[i].stride);
        T_EQUAL(found.runs[i].nbytes, want[i].nbytes);
        T_EQUAL(found.runs[i].block, want[i].block);
        T_EQUAL(found.runs[i].kind, want[i].kind);
    }
    T_EQUAL(found.nstops, 3);
    T_EQUAL(found.stops[0], VMTH_QEMU_FLUSH);
    T_EQUAL(found.stops[1], VMTH_QEMU_EOS);
    T_EQUAL(found.stops[2], VMTH_QEMU_MEM_SIZE);
    T_EQUAL(found.total, 7 * PAGE);
}

/* However the bytes are cut and however little room there is, the pages are the same. */
static void test_every_cut(void)
{
    struct found whole;
    struct found cut;

    put_all_kinds();
    parse_in_pieces(&whole, stream_bytes, CAP / 2);
    for (size_t piece = 1; piece < 1100; piece += piece < 40 ? 1 : 97) {
        for (size_t cap = 1; cap < 4; cap++) {
            size_t run = 0;
            uint64_t npages = 0;

            parse_in_pieces(&cut, piece, cap);
            T_EQUAL(cut.nstops, whole.nstops);
            for (size_t i = 0; i < cut.nruns; i++) {
                T_EQUAL(cut.runs[i].page, whole.runs[run].page + npages);
                T_EQUAL(cut.runs[i].at, whole.runs[run].at + npages * whole.runs[run].stride);
                T_EQUAL(cut.runs[i].kind, whole.runs[run].kind);
                T_EQUAL(cut.runs[i].block, whole.runs[run].block);
                npages += cut.runs[i].npages;
                if (npages == whole.runs[run].npages) {
                    npages = 0;
                    run++;
                }
            }
            T_EQUAL(run, whole.nruns);
        }
    }
}

static void test_the_way_back(void)
{
    static uint8_t again[sizeof(stream)];
    struct found found;
    uint32_t block = VMTH_QEMU_NO_BLOCK;
    size_t nbytes;

    put_all_kinds();
    parse_in_pieces(&found, stream_bytes, CAP / 2);
    nbytes = vmth_qemu_ram_encoded_bytes(&blocks, block, found.runs, found.nruns, stream_bytes);
    T_EQUAL(nbytes, stream_bytes - 24); /* all but the records without pages */
    vmth_qemu_ram_encode(&blocks, &block, found.runs, found.nruns, stream, again);
    T_CHECK(memcmp(again, stream, nbytes) == 0);
    T_EQUAL(block, 1);
}

static void test_runs_that_cannot_be_written(void)
{
    static const struct vmth_qemu_run bad[] = {
        {8, 1, 0, 0, 0, 0, VMTH_QEMU_ZERO},                  /* outside the block */
        {7, 2, 0, 0, 0, 0, VMTH_QEMU_ZERO},
        {7, UINT64_MAX, 0, 0, 0, 0, VMTH_QEMU_ZERO},
        {0, 0, 0, 0, 0, 0, VMTH_QEMU_ZERO},
        {0, 1, 0, 0, 0, 2, VMTH_QEMU_ZERO},                  /* no such block */
        {0, 1, 0, 0, 0, 0, 0},                               /* no such kind */
        {0, 1, 0, 0, 0, 0, 5},
        {0, 1, 0, PAGE, PAGE - 1, 0, VMTH_QEMU_PAGE},        /* not a page */
        {0, 1, 1, PAGE, PAGE, 0, VMTH_QEMU_PAGE},            /* outside the data */
        {0, 1, UINT64_MAX, PAGE, PAGE, 0, VMTH_QEMU_PAGE},
        {0, 2, 0, PAGE, PAGE, 0, VMTH_QEMU_PAGE},
        {0, 2, 0, 0, 1, 0, VMTH_QEMU_XBZRLE},                /* pages on top of each other */
        {0, 1, 0, PAGE, PAGE + 1, 0, VMTH_QEMU_XBZRLE},
        {0, 1, 0, 0, 0, 0, VMTH_QEMU_COMPRESS},
    };

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        fprintf(stderr, "bad run %zu\n", i);
        T_EQUAL(vmth_qemu_ram_encoded_bytes(&blocks, 0, &bad[i], 1, PAGE), 0);
    }
}

static void expect_refusal(const char *field, uint64_t received, uint64_t allowed)
{
    struct vmth_qemu_run out[2];
    struct vmth_qemu_parsed parsed;
    struct vmth_qemu_error error;
    uint32_t block = 0;

    fprintf(stderr, "%s\n", field);
    T_EQUAL(vmth_qemu_ram_parse(&blocks, &block, stream, stream_bytes, out, 2, &parsed, &error),
            (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, field) == 0);
    T_EQUAL(error.received, received);
    T_EQUAL(error.allowed, allowed);
    T_EQUAL(block, 0);
}

static void test_refusals(void)
{
    static const struct {
        uint64_t word;
        const char *behind;
        size_t nbytes;
        const char *field;
        uint64_t received;
        uint64_t allowed;
    } cases[] = {
        {0x000, "", 0, "ram record flags", 0, 0x200},
        {0x00a, "", 0, "ram record flags", 0x00a, 0x200},
        {0x001, "", 0, "ram record flags", 0x001, 0x200},
        {0x030, "", 0, "ram record flags", 0x030, 0x200},
        {0x080, "", 0, "ram record flags (RDMA)", 0x080, 0x200},
        {PAGE | 0x010, "", 0, "offset of a record without page", PAGE, 0},
        {0x008, "\3rom", 4, "idstr of no block, its length", 3, 0},
        {0x008, "", 1, "idstr of no block, its length", 0, 0},
        {8 * PAGE | 0x028, "", 0, "offset in block", 8 * PAGE, 8 * PAGE},
        {UINT64_MAX - PAGE + 1 + 0x028, "", 0, "offset in block", UINT64_MAX - PAGE + 1, 8 * PAGE},
        {3 * PAGE | 0x002, "\4bios", 5, "offset in block", 3 * PAGE, 3 * PAGE - 1},
        {0x022, "\1", 1, "zero page's byte", 1, 0},
        {0x060, "\2\0\1x", 4, "xbzrle encoding", 2, 1},
        {0x060, "\1\4\1x", 4, "xbzrle length", PAGE + 1, PAGE},
        {0x060, "\1\0\0", 3, "xbzrle length", 0, PAGE},
        {0x120, "\0\0\10\1", 4, "compressed page's length", 2 * PAGE + 1, 2 * PAGE},
        {0x120, "\377\377\377\377", 4, "compressed page's length", UINT32_MAX, 2 * PAGE},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        stream_bytes = 0;
        put_word(cases[i].word);
        put(cases[i].behind, cases[i].nbytes);
        expect_refusal(cases[i].field, cases[i].received, cases[i].allowed);
    }
}

/* What was good before a bad record is returned first. */
static void test_a_bad_record_waits(void)
{
    struct vmth_qemu_run out[4];
    struct vmth_qemu_parsed parsed;
    struct vmth_qemu_error error;
    uint32_t block = VMTH_QEMU_NO_BLOCK;

    stream_bytes = 0;
    put_word(0x002);
    put("\3ram", 5);
    put_word(0x400);
    T_EQUAL(vmth_qemu_ram_parse(&blocks, &block, stream, stream_bytes, out, 4, &parsed, &error), 0);
    T_EQUAL(parsed.nruns, 1);
    T_EQUAL(parsed.used, 13);
    T_EQUAL(parsed.stop, VMTH_QEMU_FULL);
    T_EQUAL(vmth_qemu_ram_parse(&blocks, &block, stream + 13, 8, out, 4, &parsed, &error),
            (uint64_t)-EPROTO);
}

static void test_tables_outside_their_bounds(void)
{
    struct vmth_qemu_run out[1];
    struct vmth_qemu_parsed parsed;
    struct vmth_qemu_error error;
    struct vmth_qemu_blocks bad = blocks;
    uint32_t block = 0;

    for (uint32_t page_bytes = 0; page_bytes <= 2 * VMTH_QEMU_MAX_PAGE_BYTES; page_bytes += 512) {
        const int valid = page_bytes >= VMTH_QEMU_MIN_PAGE_BYTES &&
                          page_bytes <= VMTH_QEMU_MAX_PAGE_BYTES &&
                          (page_bytes & (page_bytes - 1)) == 0;

        bad.page_bytes = page_bytes;
        T_EQUAL(vmth_qemu_ram_parse(&bad, &block, stream, 0, out, 1, &parsed, &error),
                valid ? 0 : (uint64_t)-EINVAL);
    }
    bad = blocks;
    bad.nblocks = VMTH_QEMU_MAX_BLOCKS + 1;
    T_EQUAL(vmth_qemu_ram_parse(&bad, &block, stream, 0, out, 1, &parsed, &error),
            (uint64_t)-EINVAL);
    T_EQUAL(vmth_qemu_ram_parse(&blocks, &block, stream, 0, out, 0, &parsed, &error),
            (uint64_t)-EINVAL);
    block = 2;
    T_EQUAL(vmth_qemu_ram_parse(&blocks, &block, stream, 0, out, 1, &parsed, &error),
            (uint64_t)-EINVAL);
}

int main(void)
{
    name_blocks();
    test_every_kind();
    test_every_cut();
    test_the_way_back();
    test_runs_that_cannot_be_written();
    test_refusals();
    test_a_bad_record_waits();
    test_tables_outside_their_bounds();
    return T_PASS;
}

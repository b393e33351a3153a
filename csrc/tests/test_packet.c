/* SPDX-License-Identifier: Apache-2.0 */
/* Packets: golden bytes of every form, and a refusal for every field that can be wrong. */
#include <errno.h>
#include <string.h>

#include "t_check.h"
#include "vmth/packet.h"

#define SEED 0x5eed5eed5eed5eedu
#define ALL_FORMS 0x3feu
#define PAGE_BYTES 4096u
#define NDESC 8u

/* These bytes are the protocol (docs/protocol.md): changing one changes the protocol version. The
 * same bytes stand in tests/test_packet.py, made there without this code. */
static const uint8_t golden_header[VMTH_PACKET_HEADER_BYTES] = {
    /* clang-format off */
    0x56, 0x4d, 0x54, 0x50, 0x01, 0x00, 0x02, 0x00, 0x03, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00,
    0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01, 0xd0, 0x00, 0x00, 0x00, 0xb4, 0x44, 0x00, 0x00,
    0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x97, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x24, 0xba, 0x57, 0xc5, 0x3d, 0x78, 0x83, 0x5a,
    /* clang-format on */
};

static const uint8_t golden_desc[208] = {
    /* clang-format off */
    0x05, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00,
    0x64, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x07, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00,
    0xc8, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x84, 0x03, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00,
    0xdc, 0x05, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x04, 0x00, 0x00, 0x00,
    0xdd, 0x05, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x05, 0x00, 0x00, 0x00,
    0xe6, 0x05, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x06, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x4d, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00, 0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99,
    0xe7, 0x05, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x07, 0x00, 0x00, 0x00,
    0x2c, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01, 0x10, 0x0f, 0x0e, 0x0d, 0x0c, 0x0b, 0x0a, 0x09,
    0xe8, 0x05, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0x00, 0x00, 0x00, 0x08, 0x00, 0x00, 0x00,
    0x88, 0x13, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    /* clang-format on */
};

static const uint8_t golden_ack_header[VMTH_PACKET_HEADER_BYTES] = {
    /* clang-format off */
    0x56, 0x4d, 0x54, 0x50, 0x04, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00,
    0x09, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x30, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xaf, 0x12, 0xe9, 0x5b, 0x8e, 0x34, 0xbe, 0x75,
    /* clang-format on */
};

/* One acknowledgement with missed pages, then the missed pages. */
static const uint8_t golden_ack[VMTH_ACK_BYTES + VMTH_DESC_BYTES] = {
    /* clang-format off */
    0x09, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x11, 0x00, 0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa,
    0x99, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x02, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00,
    0x2a, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x05, 0x00, 0x00, 0x00,
    /* clang-format on */
};

static const struct vmth_desc descs[NDESC] = {
    {.page = 5, .npages = 3, .form = VMTH_FORM_NORMAL, .payload_bytes = 3 * PAGE_BYTES},
    {.page = 100, .npages = 7, .form = VMTH_FORM_ZERO},
    {.page = 200, .npages = 900, .form = VMTH_FORM_HOLE},
    {.page = 1500, .npages = 1, .form = VMTH_FORM_FREE},
    {.page = 1501, .npages = 2, .form = VMTH_FORM_SAME},
    {.page = 1510,
     .npages = 1,
     .form = VMTH_FORM_DEDUP,
     .base_block = 1,
     .base_page = 77,
     .result = {0x1122334455667788, 0x99aabbccddeeff00}},
    {.page = 1511,
     .npages = 1,
     .form = VMTH_FORM_DELTA,
     .payload_bytes = 300,
     .result = {0x0102030405060708, 0x090a0b0c0d0e0f10}},
    {.page = 1512, .npages = 4, .form = VMTH_FORM_ZSTD, .payload_bytes = 5000},
};

static const uint64_t block_npages[3] = {10, 78, 1516};

static const struct vmth_packet_limits limits = {
    .page_bytes = PAGE_BYTES,
    .nblocks = 3,
    .block_npages = block_npages,
    .forms = ALL_FORMS,
    .channel = 1,
};

static struct vmth_packet_header pages_header(void)
{
    const struct vmth_packet_header header = {
        .kind = VMTH_PACKET_PAGES,
        .block = 2,
        .round = 3,
        .channel = 1,
        .seq = 0x0102030405060708,
        .desc_bytes = sizeof(golden_desc),
        .payload_bytes = 3 * PAGE_BYTES + 300 + 5000,
        .ndesc = NDESC,
        .npages = 919,
    };
    return header;
}

static void test_encode_gives_the_golden_bytes(void)
{
    uint8_t desc[sizeof(golden_desc)];
    uint8_t out[VMTH_PACKET_HEADER_BYTES];
    const struct vmth_packet_header header = pages_header();
    size_t at = 0;

    for (unsigned i = 0; i < NDESC; i++) {
        T_EQUAL(vmth_desc_encode(&descs[i], desc + at, vmth_desc_bytes(descs[i].form) - 1), 0);
        at += vmth_desc_encode(&descs[i], desc + at, sizeof(desc) - at);
    }
    T_EQUAL(at, sizeof(desc));
    T_CHECK(memcmp(desc, golden_desc, sizeof(desc)) == 0);
    vmth_packet_encode_header(&header, desc, SEED, out);
    T_CHECK(memcmp(out, golden_header, sizeof(out)) == 0);
}

static void test_decode_reads_the_golden_bytes(void)
{
    const struct vmth_packet_header want = pages_header();
    struct vmth_packet_header header;
    struct vmth_packet_error error;
    size_t at = 0;

    T_EQUAL(vmth_packet_decode_header(golden_header, &limits, &header, &error), 0);
    T_EQUAL(vmth_packet_verify(golden_header, golden_desc, sizeof(golden_desc), SEED, &error), 0);
    T_EQUAL(vmth_packet_check(&header, golden_desc, &limits, &error), 0);
    T_EQUAL(header.kind, want.kind);
    T_EQUAL(header.block, want.block);
    T_EQUAL(header.round, want.round);
    T_EQUAL(header.channel, want.channel);
    T_EQUAL(header.seq, want.seq);
    T_EQUAL(header.desc_bytes, want.desc_bytes);
    T_EQUAL(header.payload_bytes, want.payload_bytes);
    T_EQUAL(header.ndesc, want.ndesc);
    T_EQUAL(header.npages, want.npages);
    for (unsigned i = 0; i < NDESC; i++) {
        struct vmth_desc desc;
        size_t used;

        T_EQUAL(vmth_desc_decode(golden_desc + at, sizeof(golden_desc) - at, header.block, &limits,
                                 &desc, &used, &error),
                0);
        at += used;
        T_EQUAL(desc.page, descs[i].page);
        T_EQUAL(desc.npages, descs[i].npages);
        T_EQUAL(desc.form, descs[i].form);
        T_EQUAL(desc.payload_bytes, descs[i].payload_bytes);
        T_EQUAL(desc.base_block, descs[i].base_block);
        T_EQUAL(desc.base_page, descs[i].base_page);
        T_EQUAL(desc.result.lo, descs[i].result.lo);
        T_EQUAL(desc.result.hi, descs[i].result.hi);
    }
    T_EQUAL(at, sizeof(golden_desc));
}

static void test_acknowledgements(void)
{
    const struct vmth_ack ack = {.seq = 9,
                                 .digest = {0xaabbccddeeff0011, 0x2233445566778899},
                                 .status = VMTH_ACK_MISSED,
                                 .block = 2};
    const struct vmth_desc missed = {.page = 42, .npages = 1, .form = VMTH_FORM_SAME};
    const struct vmth_packet_header header = {.kind = VMTH_PACKET_ACK,
                                              .round = 3,
                                              .channel = 1,
                                              .seq = 9,
                                              .desc_bytes = sizeof(golden_ack),
                                              .ndesc = 1,
                                              .npages = 1};
    uint8_t out[sizeof(golden_ack)];
    uint8_t raw[VMTH_PACKET_HEADER_BYTES];
    struct vmth_packet_header read;
    struct vmth_packet_error error;
    struct vmth_ack got;

    vmth_ack_encode(&ack, out);
    T_EQUAL(vmth_desc_encode(&missed, out + VMTH_ACK_BYTES, VMTH_DESC_BYTES), VMTH_DESC_BYTES);
    T_CHECK(memcmp(out, golden_ack, sizeof(out)) == 0);
    vmth_packet_encode_header(&header, out, SEED, raw);
    T_CHECK(memcmp(raw, golden_ack_header, sizeof(raw)) == 0);
    T_EQUAL(vmth_packet_decode_header(raw, &limits, &read, &error), 0);
    T_EQUAL(vmth_ack_decode(golden_ack, &got, &error), 0);
    T_EQUAL(got.seq, ack.seq);
    T_EQUAL(got.digest.lo, ack.digest.lo);
    T_EQUAL(got.digest.hi, ack.digest.hi);
    T_EQUAL(got.status, ack.status);
    T_EQUAL(got.block, ack.block);
}

/* Change `size` bytes at `at` of a golden buffer to `value`, and what must be said about it. */
struct damage {
    const char *field;
    unsigned at;
    unsigned size;
    uint64_t value;
    uint64_t allowed;
};

static void apply(uint8_t *bytes, const struct damage *damage)
{
    for (unsigned i = 0; i < damage->size; i++) {
        bytes[damage->at + i] = (uint8_t)(damage->value >> (8 * i));
    }
}

static void expect_refusal(int result, const struct vmth_packet_error *error,
                           const struct damage *damage)
{
    fprintf(stderr, "%s = %llu: ", damage->field, (unsigned long long)damage->value);
    T_EQUAL(result, (uint64_t)-EPROTO);
    fprintf(stderr, "%s %llu, allowed %llu\n", error->field, (unsigned long long)error->received,
            (unsigned long long)error->allowed);
    T_CHECK(strcmp(error->field, damage->field) == 0);
    T_EQUAL(error->received, damage->value);
    T_EQUAL(error->allowed, damage->allowed);
}

static void test_header_refusals(void)
{
    static const struct damage damages[] = {
        {"magic", 0, 4, 0x50544d57, VMTH_PACKET_MAGIC},
        {"kind", 4, 1, 0, VMTH_PACKET_ACK},
        {"kind", 4, 1, 5, VMTH_PACKET_ACK},
        {"flags", 5, 1, 1, 0},
        {"block", 6, 2, 3, 2},
        {"channel", 12, 2, 2, 1},
        {"reserved", 14, 2, 1, 0},
        {"reserved", 36, 4, 0x80000000, 0},
        {"reserved", 48, 8, 0x8000000000000000, 0},
        {"seq", 16, 8, 0, 1},
        {"desc_bytes", 24, 4, VMTH_PACKET_MAX_DESC_BYTES + 1, VMTH_PACKET_MAX_DESC_BYTES},
        {"desc_bytes", 24, 4, 0xffffffff, VMTH_PACKET_MAX_DESC_BYTES},
        {"payload_bytes", 28, 4, VMTH_PACKET_MAX_PAYLOAD_BYTES + 1, VMTH_PACKET_MAX_PAYLOAD_BYTES},
        {"ndesc", 32, 4, 0, 1},
        {"ndesc", 32, 4, 14, 13},
        {"npages", 40, 8, 7, 8},
    };
    static const struct damage ack_damages[] = {
        {"block", 6, 2, 1, 0},     {"payload_bytes", 28, 4, 1, 0}, {"desc_bytes", 24, 4, 49, 48},
        {"ndesc", 32, 4, 0, 1},    {"ndesc", 32, 4, 2, 1},
    };
    struct vmth_packet_header header;
    struct vmth_packet_error error;
    uint8_t raw[VMTH_PACKET_HEADER_BYTES];

    for (size_t i = 0; i < sizeof(damages) / sizeof(damages[0]); i++) {
        memcpy(raw, golden_header, sizeof(raw));
        apply(raw, &damages[i]);
        expect_refusal(vmth_packet_decode_header(raw, &limits, &header, &error), &error,
                       &damages[i]);
    }
    for (size_t i = 0; i < sizeof(ack_damages) / sizeof(ack_damages[0]); i++) {
        memcpy(raw, golden_ack_header, sizeof(raw));
        apply(raw, &ack_damages[i]);
        expect_refusal(vmth_packet_decode_header(raw, &limits, &header, &error), &error,
                       &ack_damages[i]);
    }
}

static void test_barrier_and_end_carry_nothing(void)
{
    static const struct damage damages[] = {
        {"block", 6, 2, 1, 0},  {"desc_bytes", 24, 4, 16, 0}, {"payload_bytes", 28, 4, 1, 0},
        {"ndesc", 32, 4, 1, 0}, {"npages", 40, 8, 1, 0},
    };
    struct vmth_packet_header header = {.round = 3, .channel = 1, .seq = 7};
    struct vmth_packet_header got;
    struct vmth_packet_error error;
    uint8_t raw[VMTH_PACKET_HEADER_BYTES];

    for (uint8_t kind = VMTH_PACKET_BARRIER; kind <= VMTH_PACKET_END; kind++) {
        header.kind = kind;
        vmth_packet_encode_header(&header, NULL, SEED, raw);
        T_EQUAL(vmth_packet_decode_header(raw, &limits, &got, &error), 0);
        T_EQUAL(vmth_packet_verify(raw, NULL, 0, SEED, &error), 0);
        for (size_t i = 0; i < sizeof(damages) / sizeof(damages[0]); i++) {
            vmth_packet_encode_header(&header, NULL, SEED, raw);
            apply(raw, &damages[i]);
            expect_refusal(vmth_packet_decode_header(raw, &limits, &got, &error), &error,
                           &damages[i]);
        }
    }
}

static void test_descriptor_refusals(void)
{
    enum { NORMAL = 0, ZERO = 16, DEDUP = 80, DELTA = 128, ZSTD = 176 };
    static const struct {
        unsigned start;
        struct damage damage;
    } cases[] = {
        {NORMAL, {"desc.form", 12, 1, 0, VMTH_FORM_REUSE}},
        {NORMAL, {"desc.form", 12, 1, 10, VMTH_FORM_REUSE}},
        {NORMAL, {"desc.flags", 13, 1, 1, 0}},
        {NORMAL, {"desc.reserved", 14, 2, 0x100, 0}},
        {NORMAL, {"desc.npages", 8, 4, 0, 1}},
        {ZERO, {"desc.npages", 8, 4, 1417, 1416}},
        {ZERO, {"desc.npages", 8, 4, 0xffffffff, 1416}},
        {ZERO, {"desc.page", 0, 8, 1516, 1515}},
        {ZERO, {"desc.page", 0, 8, 0xffffffffffffffff, 1515}},
        {DEDUP, {"desc.npages", 8, 4, 2, 1}},
        {DEDUP, {"desc.payload_bytes", 16, 4, 1, 0}},
        {DEDUP, {"desc.base_block", 20, 2, 3, 2}},
        {DEDUP, {"desc.reserved", 22, 2, 1, 0}},
        {DEDUP, {"desc.base_page", 24, 8, 78, 77}},
        {DELTA, {"desc.npages", 8, 4, 2, 1}},
        {DELTA, {"desc.payload_bytes", 16, 4, 0, 1}},
        {DELTA, {"desc.payload_bytes", 16, 4, 4097, 4096}},
        {DELTA, {"desc.base_block", 20, 2, 1, 0}},
        {DELTA, {"desc.base_page", 24, 8, 1, 0}},
        {DELTA, {"desc.flags", 13, 1, 2, 1}},
        {ZSTD, {"desc.flags", 13, 1, 1, 0}},
        {ZSTD, {"desc.base_page", 24, 8, 1, 0}},
    };
    struct vmth_packet_error error;
    struct vmth_desc desc;
    size_t used;
    uint8_t raw[sizeof(golden_desc)];

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        memcpy(raw, golden_desc, sizeof(raw));
        apply(raw + cases[i].start, &cases[i].damage);
        expect_refusal(vmth_desc_decode(raw + cases[i].start, sizeof(raw) - cases[i].start, 2,
                                        &limits, &desc, &used, &error),
                       &error, &cases[i].damage);
    }
    /* A dedup or delta without a result hash could not be checked where it lands. */
    memcpy(raw, golden_desc, sizeof(raw));
    memset(raw + DEDUP + 32, 0, 16);
    T_EQUAL(vmth_desc_decode(raw + DEDUP, 48, 2, &limits, &desc, &used, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc.result") == 0);
}

static void test_descriptor_bounds_of_the_session(void)
{
    static const uint64_t huge[1] = {UINT64_C(1) << 40};
    struct vmth_packet_limits narrow = {
        .page_bytes = 2u << 20, .nblocks = 1, .block_npages = huge, .forms = 1u << VMTH_FORM_NORMAL};
    const struct vmth_desc five = {.page = 0, .npages = 5, .form = VMTH_FORM_NORMAL};
    const struct vmth_desc zero = {.page = 0, .npages = 5, .form = VMTH_FORM_ZERO};
    struct vmth_packet_error error;
    struct vmth_desc desc;
    size_t used;
    uint8_t raw[VMTH_DESC_BYTES];

    /* 5 x 2 MiB do not fit the 8 MiB that a payload may have. */
    T_EQUAL(vmth_desc_encode(&five, raw, sizeof(raw)), sizeof(raw));
    T_EQUAL(vmth_desc_decode(raw, sizeof(raw), 0, &narrow, &desc, &used, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc.npages") == 0);
    T_EQUAL(error.allowed, 4);
    /* A form that was not negotiated, a block that is not there, bytes that are not there. */
    T_EQUAL(vmth_desc_encode(&zero, raw, sizeof(raw)), sizeof(raw));
    T_EQUAL(vmth_desc_decode(raw, sizeof(raw), 0, &narrow, &desc, &used, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc.form (not negotiated)") == 0);
    narrow.forms = ALL_FORMS;
    T_EQUAL(vmth_desc_decode(raw, sizeof(raw), 1, &narrow, &desc, &used, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "block") == 0);
    T_EQUAL(vmth_desc_decode(raw, 15, 0, &narrow, &desc, &used, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc_bytes") == 0);
    T_EQUAL(vmth_desc_decode(golden_desc + 80, 47, 2, &limits, &desc, &used, &error),
            (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc_bytes") == 0);
    T_EQUAL(error.allowed, 48);
}

static void test_sums_of_a_packet(void)
{
    struct vmth_packet_header header = pages_header();
    struct vmth_packet_error error;

    header.npages++;
    T_EQUAL(vmth_packet_check(&header, golden_desc, &limits, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "npages") == 0);
    T_EQUAL(error.allowed, 919);
    header = pages_header();
    header.payload_bytes--;
    T_EQUAL(vmth_packet_check(&header, golden_desc, &limits, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "payload_bytes") == 0);
    header = pages_header();
    header.ndesc--;
    T_EQUAL(vmth_packet_check(&header, golden_desc, &limits, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc_bytes") == 0);
    header = pages_header();
    header.desc_bytes -= 16; /* the last descriptor is cut */
    T_EQUAL(vmth_packet_check(&header, golden_desc, &limits, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc_bytes") == 0);
}

/* Descriptors of 1, 2 and 1 pages of one frame, then of 512 pages of another; what is said of them. */
static void test_zstd_frames(void)
{
    static const struct {
        uint32_t payload_bytes[4];
        const char *field; /* NULL: accepted */
        uint64_t allowed;
    } cases[] = {
        {{0, 0, 16384, 5}, NULL, 0},
        {{0, 0, 16385, 5}, "desc.payload_bytes", 16384},
        {{4096, 0, 12288, 5}, NULL, 0},
        {{1, 8193, 1, 5}, "desc.payload_bytes", 8192},
        {{0, 0, 1, 0}, "desc.payload_bytes", 512 * 4096},
        {{0, 0, 0, 5}, "frame", VMTH_PACKET_MAX_FRAME_BYTES},
    };
    static const uint32_t npages[4] = {1, 2, 1, 512};

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct vmth_packet_header header = {.kind = VMTH_PACKET_PAGES, .block = 2, .npages = 516};
        struct vmth_packet_error error = {0};
        uint8_t raw[4 * VMTH_DESC_ZSTD_BYTES];

        for (unsigned d = 0; d < 4; d++) {
            const struct vmth_desc desc = {.page = 10 * d,
                                           .npages = npages[d],
                                           .form = VMTH_FORM_ZSTD,
                                           .payload_bytes = cases[i].payload_bytes[d]};

            header.desc_bytes += (uint32_t)vmth_desc_encode(&desc, raw + header.desc_bytes,
                                                            sizeof(raw) - header.desc_bytes);
            header.payload_bytes += desc.payload_bytes;
            header.ndesc++;
        }
        const int result = vmth_packet_check(&header, raw, &limits, &error);

        if (cases[i].field == NULL) {
            T_EQUAL(result, 0);
            continue;
        }
        T_EQUAL(result, (uint64_t)-EPROTO);
        T_CHECK(strcmp(error.field, cases[i].field) == 0);
        T_EQUAL(error.allowed, cases[i].allowed);
    }
}

static void test_a_packed_delta_there_and_back(void)
{
    const struct vmth_desc packed = {.page = 4,
                                     .npages = 1,
                                     .form = VMTH_FORM_DELTA,
                                     .flags = VMTH_DESC_PACKED,
                                     .payload_bytes = 9,
                                     .result = {1, 2}};
    struct vmth_packet_error error;
    struct vmth_desc got;
    uint8_t raw[VMTH_DESC_REF_BYTES];
    size_t used;

    T_EQUAL(vmth_desc_encode(&packed, raw, sizeof(raw)), sizeof(raw));
    T_EQUAL(raw[13], 1);
    T_EQUAL(vmth_desc_decode(raw, sizeof(raw), 2, &limits, &got, &used, &error), 0);
    T_EQUAL(got.flags, VMTH_DESC_PACKED);
}

/* The hashes are payload: the descriptor's length on the wire does not depend on them. */
static void test_reuse_says_a_hash_a_page(void)
{
    static const uint8_t golden[VMTH_DESC_BYTES] = {0xdc, 0x05, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 9};
    static const uint64_t huge[1] = {UINT32_MAX};
    const struct vmth_packet_limits wide = {
        .page_bytes = PAGE_BYTES, .nblocks = 1, .block_npages = huge, .forms = 1u << VMTH_FORM_REUSE};
    struct vmth_desc desc = {.page = 1500, .npages = 16, .form = VMTH_FORM_REUSE};
    struct vmth_packet_error error;
    struct vmth_desc got;
    uint8_t raw[VMTH_DESC_BYTES];
    size_t used;

    T_EQUAL(vmth_desc_encode(&desc, raw, sizeof(raw)), sizeof(raw));
    T_CHECK(memcmp(raw, golden, sizeof(raw)) == 0);
    T_EQUAL(vmth_desc_decode(raw, sizeof(raw), 2, &limits, &got, &used, &error), 0);
    T_EQUAL(used, sizeof(raw));
    T_EQUAL(got.payload_bytes, 16 * VMTH_REUSE_HASH_BYTES);
    desc.npages = VMTH_PACKET_MAX_PAYLOAD_BYTES / VMTH_REUSE_HASH_BYTES + 1;
    T_EQUAL(vmth_desc_encode(&desc, raw, sizeof(raw)), sizeof(raw));
    T_EQUAL(vmth_desc_decode(raw, sizeof(raw), 0, &wide, &got, &used, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "desc.npages") == 0);
    T_EQUAL(error.allowed, VMTH_PACKET_MAX_PAYLOAD_BYTES / VMTH_REUSE_HASH_BYTES);
}

static void test_ack_refusals(void)
{
    static const struct damage damages[] = {
        {"ack.seq", 0, 8, 0, 1},
        {"ack.status", 24, 4, 0, VMTH_ACK_MISSED},
        {"ack.status", 24, 4, 3, VMTH_ACK_MISSED},
        {"ack.block", 28, 4, VMTH_MAX_BLOCKS, VMTH_MAX_BLOCKS - 1},
    };
    struct vmth_packet_error error;
    struct vmth_ack ack;
    uint8_t raw[VMTH_ACK_BYTES];

    for (size_t i = 0; i < sizeof(damages) / sizeof(damages[0]); i++) {
        memcpy(raw, golden_ack, sizeof(raw));
        apply(raw, &damages[i]);
        expect_refusal(vmth_ack_decode(raw, &ack, &error), &error, &damages[i]);
    }
    memcpy(raw, golden_ack, sizeof(raw));
    raw[24] = VMTH_ACK_LANDED; /* and a block, which only missed pages have */
    T_EQUAL(vmth_ack_decode(raw, &ack, &error), (uint64_t)-EPROTO);
    T_CHECK(strcmp(error.field, "ack.block") == 0);
}

static void test_every_flipped_bit_shows(void)
{
    uint8_t header[VMTH_PACKET_HEADER_BYTES];
    uint8_t desc[sizeof(golden_desc)];
    struct vmth_packet_error error;

    for (unsigned bit = 0; bit < 8 * (sizeof(header) + sizeof(desc)); bit++) {
        memcpy(header, golden_header, sizeof(header));
        memcpy(desc, golden_desc, sizeof(desc));
        if (bit < 8 * sizeof(header)) {
            header[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        } else {
            desc[bit / 8 - sizeof(header)] ^= (uint8_t)(1u << (bit % 8));
        }
        T_EQUAL(vmth_packet_verify(header, desc, sizeof(desc), SEED, &error), (uint64_t)-EPROTO);
        T_CHECK(strcmp(error.field, "checksum") == 0);
    }
    T_EQUAL(vmth_packet_verify(golden_header, golden_desc, sizeof(golden_desc), SEED + 1, &error),
            (uint64_t)-EPROTO);
}

int main(void)
{
    test_encode_gives_the_golden_bytes();
    test_decode_reads_the_golden_bytes();
    test_acknowledgements();
    test_header_refusals();
    test_barrier_and_end_carry_nothing();
    test_descriptor_refusals();
    test_descriptor_bounds_of_the_session();
    test_sums_of_a_packet();
    test_zstd_frames();
    test_a_packed_delta_there_and_back();
    test_reuse_says_a_hash_a_page();
    test_ack_refusals();
    test_every_flipped_bit_shows();
    return T_PASS;
}

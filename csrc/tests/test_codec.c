/* SPDX-License-Identifier: Apache-2.0 */
/* zstd frames: there and back, what does not pay, what is refused, which pages are promising. */
#include <errno.h>
#include <string.h>

#include "t_check.h"
#include "vmth/codec.h"

#define PAGE_BYTES 4096u
#define NPAGES 16u

static uint8_t pages[NPAGES * PAGE_BYTES];
static uint8_t back[NPAGES * PAGE_BYTES];
static uint8_t frame[NPAGES * PAGE_BYTES];
static uint64_t state = 1;

static void fill_random(uint8_t *to, size_t nbytes)
{
    t_fill(&state, to, nbytes);
}

/* Random letters: no repeats, but five bits a byte. */
static void fill_letters(uint8_t *to, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i++) {
        to[i] = (uint8_t)"abcdefghijklmnopqrstuvwxyz012345"[t_random(&state) % 32];
    }
}

/* All byte values as often, but one random record again and again. */
static void fill_records(uint8_t *to, size_t nbytes)
{
    fill_random(to, 512);
    for (size_t i = 512; i < nbytes; i++) {
        to[i] = to[i - 512];
    }
}

/* Small integers of 32 bits, as counters and lengths are. */
static void fill_integers(uint8_t *to, size_t nbytes)
{
    memset(to, 0, nbytes);
    for (size_t i = 0; i + 4 <= nbytes; i += 4) {
        to[i] = (uint8_t)t_random(&state);
        to[i + 1] = (uint8_t)(t_random(&state) % 16);
    }
}

static void fill_text(uint8_t *to, size_t nbytes)
{
    static const char *words[] = {"page ", "guest ", "the ", "memory ", "of ", "lands,\n", "is "};

    for (size_t at = 0; at < nbytes;) {
        const char *word = words[t_random(&state) % (sizeof(words) / sizeof(words[0]))];

        for (; *word != '\0' && at < nbytes; word++) {
            to[at++] = (uint8_t)*word;
        }
    }
}

static const struct {
    const char *name;
    void (*fill)(uint8_t *to, size_t nbytes);
    bool promising;
} contents[] = {
    {"random", fill_random, false},    {"letters", fill_letters, true}, {"records", fill_records, true},
    {"integers", fill_integers, true}, {"text", fill_text, true},
};
#define NCONTENTS (sizeof(contents) / sizeof(contents[0]))

static void test_there_and_back(void)
{
    static const int levels[] = {-10, -1, 1, 3, 9, 19};
    struct vmth_codec codec;

    T_EQUAL(vmth_codec_create(&codec, VMTH_CODEC_COMPRESS | VMTH_CODEC_DECOMPRESS), 0);
    for (size_t c = 0; c < NCONTENTS; c++) {
        for (size_t l = 0; l < sizeof(levels) / sizeof(levels[0]); l++) {
            for (size_t npages = 1; npages <= NPAGES; npages *= 4) {
                const size_t nbytes = npages * PAGE_BYTES;
                size_t size;

                contents[c].fill(pages, nbytes);
                size = vmth_codec_compress(&codec, levels[l], pages, nbytes, frame,
                                           nbytes - nbytes / 8);
                if (!contents[c].promising) {
                    T_EQUAL(size, 0);
                    continue;
                }
                /* The fastest levels see nothing where words do not repeat. */
                T_CHECK(size > 0 || levels[l] < 0);
                if (size > 0) {
                    memset(back, 0x5a, nbytes);
                    T_EQUAL(vmth_codec_decompress(&codec, frame, size, back, nbytes), 0);
                    T_CHECK(memcmp(back, pages, nbytes) == 0);
                }
            }
        }
    }
    T_CHECK(vmth_codec_bytes(&codec) > 0);
    vmth_codec_destroy(&codec);
    T_EQUAL(vmth_codec_bytes(&codec), 0);
    vmth_codec_destroy(&codec);
}

static void test_room_is_what_pays(void)
{
    struct vmth_codec codec;
    size_t size;

    T_EQUAL(vmth_codec_create(&codec, VMTH_CODEC_COMPRESS), 0);
    fill_text(pages, sizeof(pages));
    size = vmth_codec_compress(&codec, 1, pages, sizeof(pages), frame, sizeof(frame));
    T_CHECK(size > 0 && size < sizeof(pages) / 2);
    memset(frame, 0x77, sizeof(frame));
    T_EQUAL(vmth_codec_compress(&codec, 1, pages, sizeof(pages), frame, size / 2), 0);
    for (size_t i = size / 2; i < sizeof(frame); i++) {
        T_EQUAL(frame[i], 0x77); /* nothing outside the room */
    }
    T_EQUAL(vmth_codec_compress(&codec, 1, pages, sizeof(pages), frame, 0), 0);
    T_EQUAL(vmth_codec_compress(&codec, 1, pages, 0, frame, sizeof(frame)), 0);
    T_EQUAL(vmth_codec_compress(&codec, 0, pages, sizeof(pages), frame, sizeof(frame)), 0);
    T_EQUAL(vmth_codec_compress(&codec, VMTH_CODEC_MAX_LEVEL + 1, pages, sizeof(pages), frame,
                                sizeof(frame)), 0);
    T_EQUAL(vmth_codec_compress(&codec, VMTH_CODEC_MIN_LEVEL - 1, pages, sizeof(pages), frame,
                                sizeof(frame)), 0);
    vmth_codec_destroy(&codec);
}

static void test_refusals(void)
{
    const uint64_t refused = (uint64_t)-EPROTO;
    struct vmth_codec codec;
    size_t size;

    T_EQUAL(vmth_codec_create(&codec, 0), (uint64_t)-EINVAL);
    T_EQUAL(vmth_codec_create(&codec, 4), (uint64_t)-EINVAL);
    T_EQUAL(vmth_codec_create(&codec, VMTH_CODEC_COMPRESS | VMTH_CODEC_DECOMPRESS), 0);
    fill_text(pages, 2 * PAGE_BYTES);
    size = vmth_codec_compress(&codec, 1, pages, 2 * PAGE_BYTES, frame, sizeof(frame) / 2);
    T_CHECK(size > 0);
    T_EQUAL(vmth_codec_decompress(&codec, frame, size, back, PAGE_BYTES), refused);
    T_EQUAL(vmth_codec_decompress(&codec, frame, size, back, 3 * PAGE_BYTES), refused);
    for (size_t cut = 0; cut < size; cut++) {
        T_EQUAL(vmth_codec_decompress(&codec, frame, cut, back, 2 * PAGE_BYTES), refused);
    }
    /* Two frames are not one, nor is a frame with something behind it. */
    memcpy(frame + size, frame, size);
    T_EQUAL(vmth_codec_decompress(&codec, frame, 2 * size, back, 4 * PAGE_BYTES), refused);
    T_EQUAL(vmth_codec_decompress(&codec, frame, 2 * size, back, 2 * PAGE_BYTES), refused);
    T_EQUAL(vmth_codec_decompress(&codec, frame, size + 1, back, 2 * PAGE_BYTES), refused);
    T_EQUAL(vmth_codec_decompress(&codec, frame, size, back, 2 * PAGE_BYTES), 0);
    frame[0] = 0x27; /* the magic of a format that libzstd may still read */
    T_EQUAL(vmth_codec_decompress(&codec, frame, size, back, 2 * PAGE_BYTES), refused);
    vmth_codec_destroy(&codec);
}

static void test_which_pages_are_promising(void)
{
    for (size_t c = 0; c < NCONTENTS; c++) {
        fprintf(stderr, "%s\n", contents[c].name);
        for (size_t page_bytes = PAGE_BYTES; page_bytes <= sizeof(pages); page_bytes *= 4) {
            for (unsigned round = 0; round < 50; round++) {
                contents[c].fill(pages, page_bytes);
                T_EQUAL(vmth_codec_promising(pages, page_bytes), contents[c].promising);
            }
        }
    }
}

int main(void)
{
    test_there_and_back();
    test_room_is_what_pays();
    test_refusals();
    test_which_pages_are_promising();
    return T_PASS;
}

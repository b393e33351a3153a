/* SPDX-License-Identifier: Apache-2.0 */
/* zstd frames through libzstd, and the test that keeps incompressible pages away from it. */
#include "vmth/codec.h"

#include <errno.h>
#include <string.h>

#if !__has_include(<zstd.h>)
#error "zstd.h is missing: install libzstd-dev (Debian, Ubuntu) or libzstd-devel (Fedora)"
#else
#include <zstd.h>
#if ZSTD_VERSION_NUMBER < 10400
#error "vmth needs libzstd 1.4.0 or newer"
#endif
#include <zstd_errors.h>

#include "core/endian.h"

int vmth_codec_create(struct vmth_codec *codec, unsigned uses)
{
    struct vmth_codec made = {NULL, NULL};

    if (uses == 0 || (uses & ~(unsigned)(VMTH_CODEC_COMPRESS | VMTH_CODEC_DECOMPRESS)) != 0) {
        return -EINVAL;
    }
    if ((uses & VMTH_CODEC_COMPRESS) != 0) {
        made.compressor = ZSTD_createCCtx();
        if (made.compressor == NULL) {
            return -ENOMEM;
        }
    }
    if ((uses & VMTH_CODEC_DECOMPRESS) != 0) {
        made.decompressor = ZSTD_createDCtx();
        if (made.decompressor == NULL) {
            vmth_codec_destroy(&made);
            return -ENOMEM;
        }
    }
    *codec = made;
    return 0;
}

void vmth_codec_destroy(struct vmth_codec *codec)
{
    (void)ZSTD_freeCCtx(codec->compressor);
    (void)ZSTD_freeDCtx(codec->decompressor);
    codec->compressor = NULL;
    codec->decompressor = NULL;
}

size_t vmth_codec_bytes(const struct vmth_codec *codec)
{
    return ZSTD_sizeof_CCtx(codec->compressor) + ZSTD_sizeof_DCtx(codec->decompressor);
}

size_t vmth_codec_compress(struct vmth_codec *codec, int level, const uint8_t *in, size_t nbytes,
                           uint8_t *out, size_t room)
{
    size_t size;

    /* Level 0 is another name of libzstd's default: not ours to guess. */
    if (nbytes == 0 || level == 0 || level < VMTH_CODEC_MIN_LEVEL || level > VMTH_CODEC_MAX_LEVEL) {
        return 0;
    }
    size = ZSTD_compressCCtx(codec->compressor, out, room, in, nbytes, level);
    return ZSTD_isError(size) ? 0 : size;
}

int vmth_codec_decompress(struct vmth_codec *codec, const uint8_t *in, size_t nbytes, uint8_t *out,
                          size_t exactly)
{
    size_t size;

    /* One frame of today's format (old ones have decoders of their own), that fills `in` and says the
     * size that is expected: then one call fills `out`. */
    if (nbytes < sizeof(uint32_t) || load_le32(in) != ZSTD_MAGICNUMBER ||
        ZSTD_getFrameContentSize(in, nbytes) != exactly ||
        ZSTD_findFrameCompressedSize(in, nbytes) != nbytes) {
        return -EPROTO;
    }
    size = ZSTD_decompressDCtx(codec->decompressor, out, exactly, in, nbytes);
    if (ZSTD_isError(size)) {
        return ZSTD_getErrorCode(size) == ZSTD_error_memory_allocation ? -ENOMEM : -EPROTO;
    }
    return size == exactly ? 0 : -EPROTO;
}

uint64_t vmth_codec_content_bytes(const uint8_t *in, size_t nbytes)
{
    const unsigned long long size = ZSTD_getFrameContentSize(in, nbytes);

    return size == ZSTD_CONTENTSIZE_UNKNOWN || size == ZSTD_CONTENTSIZE_ERROR ? 0 : size;
}

/* ---- promise ----------------------------------------------------------------------------------- */

enum {
    SAMPLE_WORDS = 16, /* of 8 bytes each, spread evenly over the page */
    /* Sum of the squared counts of the sampled bytes: 192 on average, with deviation 11, where all 256
     * values are as likely; 260 where the bytes carry 7 bits. */
    UNEVEN_SQUARES = 260,
    /* Repeats: the first KNOWN_WORDS set their bits, then every seventh word behind them is asked for. By
     * chance one of these 64 has its bit set. */
    PROBE_WORDS = 512,
    KNOWN_WORDS = 64,
    PROBE_STEP = 7, /* odd: records of a power of two would else show the same field */
    FILTER_BITS = 4096,
    REPEATS = 7
};

static bool bytes_are_uneven(const uint8_t *page, size_t page_bytes)
{
    uint8_t counts[256];
    uint32_t squares = 0;
    const size_t stride = page_bytes / SAMPLE_WORDS;

    memset(counts, 0, sizeof(counts));
    for (unsigned i = 0; i < SAMPLE_WORDS && squares <= UNEVEN_SQUARES; i++) {
        /* Another place of the cache line each time, so that records of one size show all fields. */
        const uint8_t *from = page + i * stride + i % 8 * 8;

        for (unsigned k = 0; k < 8; k++) {
            squares += 2u * counts[from[k]]++ + 1; /* (n + 1)^2 - n^2 */
        }
    }
    return squares > UNEVEN_SQUARES;
}

/* Content that is even in its bytes may still repeat itself. */
static bool words_repeat(const uint8_t *page)
{
    uint64_t filter[FILTER_BITS / 64];
    unsigned repeats = 0;

    memset(filter, 0, sizeof(filter));
    for (unsigned i = 0; i < PROBE_WORDS; i += i < KNOWN_WORDS ? 1 : PROBE_STEP) {
        const uint64_t bit = (load_le64(page + 8 * i) * 0x9e3779b97f4a7c15u) >> 52;
        const uint64_t before = filter[bit / 64] >> (bit % 64) & 1;

        if (i < KNOWN_WORDS) {
            filter[bit / 64] |= UINT64_C(1) << (bit % 64);
        } else {
            repeats += (unsigned)before;
        }
    }
    return repeats >= REPEATS;
}

bool vmth_codec_promising(const uint8_t *page, size_t page_bytes)
{
    return bytes_are_uneven(page, page_bytes) || words_repeat(page);
}

#endif

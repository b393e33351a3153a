/* SPDX-License-Identifier: Apache-2.0 */
/* What bench/kernels_forms.py times: loops over many pages of the forms, and of bare libzstd. */
#include <stdint.h>
#include <stdlib.h>
#include <zstd.h>

#include "vmth/codec.h"
#include "vmth/content_index.h"
#include "vmth/delta.h"

#define PAGE_BYTES 4096u
#define MAX_FRAME_BYTES (1u << 20)

uint64_t bare_zstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level);
uint64_t form_zstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level, int probe);
uint64_t bare_unzstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level, int times);
uint64_t form_unzstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level, int times);
uint64_t promise(const uint8_t *pages, size_t nbytes);
uint64_t delta_encode(const uint8_t *base, const uint8_t *now, size_t nbytes, size_t room);
uint64_t delta_apply(const uint8_t *base, const uint8_t *now, size_t nbytes, int times);
int index_make(struct vmth_content_index *index, void *memory, size_t nbytes);
uint64_t index_insert(struct vmth_content_index *index, const struct vmth_u128 *hashes, size_t n);
uint64_t index_find(struct vmth_content_index *index, const struct vmth_u128 *hashes, size_t n);

static uint8_t out[2 * MAX_FRAME_BYTES];
static uint8_t back[MAX_FRAME_BYTES];

/* One context for the life of the process, as a worker has, that always does the same: one that changes
 * its level or frame size grows and shrinks its memory, and whichever case comes next pays. */
enum { MOST_LEVEL = 22 };

static size_t use_of(size_t frame_bytes, int level)
{
    if (level < 1 || level > MOST_LEVEL) {
        abort();
    }
    return (size_t)level * 2 + (frame_bytes > PAGE_BYTES);
}

/* Returns the bytes of all frames. */
uint64_t bare_zstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level)
{
    static ZSTD_CCtx *contexts[2 * MOST_LEVEL + 2];
    ZSTD_CCtx **context = &contexts[use_of(frame_bytes, level)];
    uint64_t total = 0;

    if (*context == NULL) {
        *context = ZSTD_createCCtx();
    }
    for (size_t at = 0; at < nbytes; at += frame_bytes) {
        total += ZSTD_compressCCtx(*context, out, sizeof(out), pages + at, frame_bytes, level);
    }
    return total;
}

/* As the sender does: what does not pay counts as it is; with `probe`, each page is looked at first. */
uint64_t form_zstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level, int probe)
{
    static struct vmth_codec codecs[2 * MOST_LEVEL + 2];
    struct vmth_codec *codec = &codecs[use_of(frame_bytes, level)];
    uint64_t total = 0;

    if (codec->compressor == NULL && vmth_codec_create(codec, VMTH_CODEC_COMPRESS) != 0) {
        abort();
    }
    for (size_t at = 0; at < nbytes; at += frame_bytes) {
        unsigned worth = !probe;
        size_t size = 0;

        for (size_t page = 0; probe && page < frame_bytes; page += PAGE_BYTES) {
            worth += vmth_codec_promising(pages + at + page, PAGE_BYTES);
        }
        if (worth > 0) {
            size = vmth_codec_compress(codec, level, pages + at, frame_bytes, out, frame_bytes);
        }
        total += size != 0 ? size : frame_bytes;
    }
    return total;
}

/* The first frame of `pages`, `times` over. */
uint64_t bare_unzstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level, int times)
{
    static ZSTD_DCtx *context;
    const size_t size = ZSTD_compress(out, sizeof(out), pages, frame_bytes, level);
    uint64_t total = nbytes;

    if (context == NULL) {
        context = ZSTD_createDCtx();
    }
    for (int i = 0; i < times; i++) {
        total += ZSTD_decompressDCtx(context, back, frame_bytes, out, size);
    }
    return total;
}

uint64_t form_unzstd(const uint8_t *pages, size_t nbytes, size_t frame_bytes, int level, int times)
{
    static struct vmth_codec codec;
    const size_t size = ZSTD_compress(out, sizeof(out), pages, frame_bytes, level);
    uint64_t total = nbytes;

    if (codec.decompressor == NULL && vmth_codec_create(&codec, VMTH_CODEC_DECOMPRESS) != 0) {
        abort();
    }
    for (int i = 0; i < times; i++) {
        if (vmth_codec_decompress(&codec, out, size, back, frame_bytes) != 0) {
            abort();
        }
        total += frame_bytes;
    }
    return total;
}

uint64_t promise(const uint8_t *pages, size_t nbytes)
{
    uint64_t found = 0;

    for (size_t at = 0; at < nbytes; at += PAGE_BYTES) {
        found += vmth_codec_promising(pages + at, PAGE_BYTES);
    }
    return found;
}

/* Returns the bytes of all deltas; a page whose delta takes more than `room` counts whole. */
uint64_t delta_encode(const uint8_t *base, const uint8_t *now, size_t nbytes, size_t room)
{
    uint64_t total = 0;

    for (size_t at = 0; at < nbytes; at += PAGE_BYTES) {
        size_t size;

        if (vmth_delta_encode(base + at, now + at, PAGE_BYTES, out, room, &size) != 0) {
            size = PAGE_BYTES;
        }
        total += size;
    }
    return total;
}

/* The first page's delta, `times` over. */
uint64_t delta_apply(const uint8_t *base, const uint8_t *now, size_t nbytes, int times)
{
    size_t size;

    if (vmth_delta_encode(base, now, PAGE_BYTES, out, sizeof(out), &size) != 0) {
        abort();
    }
    for (int i = 0; i < times; i++) {
        if (vmth_delta_apply(back, PAGE_BYTES, out, size) != 0) {
            abort();
        }
    }
    return nbytes;
}

int index_make(struct vmth_content_index *index, void *memory, size_t nbytes)
{
    return vmth_content_index_init(index, memory, nbytes);
}

uint64_t index_insert(struct vmth_content_index *index, const struct vmth_u128 *hashes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        vmth_content_index_insert(index, &hashes[i], 0, i);
    }
    return n;
}

uint64_t index_find(struct vmth_content_index *index, const struct vmth_u128 *hashes, size_t n)
{
    uint64_t found = 0;

    for (size_t i = 0; i < n; i++) {
        uint16_t block;
        uint64_t page;

        found += vmth_content_index_find(index, &hashes[i], &block, &page);
    }
    return found;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* zstd frames of pages, and a cheap test of whether compressing a page can pay.
 *
 *   pages    | page 0 | page 1 | ... | page n-1 |        whole pages, back to back, from one buffer
 *   frame    | zstd frame, content size inside  |        one independent frame; no checksum: the
 *                                                        pages' hashes cover the content
 *
 * The frames are made by libzstd's one-shot calls with its own parameters of the level: what they cost
 * and what they yield is libzstd's. A frame of several pages is smaller and faster to make than
 * frames of single pages.
 *
 * No I/O, no locks. Contexts allocate (in libzstd) when created and when first used at a level; one
 * thread at a time uses a context. */
#ifndef VMTH_CODEC_H
#define VMTH_CODEC_H

#include <stdbool.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

/* Levels: 1 (fast) to 19 (small), and -1 to -10, faster still but blind to data without repeats. */
#define VMTH_CODEC_MIN_LEVEL (-10)
#define VMTH_CODEC_MAX_LEVEL 19

/* What a codec is made for; OR them for both. */
enum vmth_codec_use {
    VMTH_CODEC_COMPRESS = 1,
    VMTH_CODEC_DECOMPRESS = 2
};

/* One thread's contexts; a side that it was not made for is NULL. */
struct vmth_codec {
    void *compressor;
    void *decompressor;
};

/* Make the contexts named by `uses`. Returns 0; -EINVAL for no known use; -ENOMEM, and then there is
 * nothing to destroy. */
VMTH_MUST_CHECK int vmth_codec_create(struct vmth_codec *codec, unsigned uses);

/* Free the contexts. A zeroed codec, or one already destroyed, is fine. */
void vmth_codec_destroy(struct vmth_codec *codec);

/* Bytes that the contexts hold now. */
size_t vmth_codec_bytes(const struct vmth_codec *codec);

/* Make one frame of in[0, nbytes) at `level`. `room` is the largest frame that would still pay: it need
 * not be enough for any content. Returns the frame's size, or 0 where it does not fit (`out` then holds
 * nothing of meaning), where nbytes is 0, where the level is outside the range or 0, and where libzstd
 * has no memory: in all of them the pages go as they are. */
VMTH_MUST_CHECK size_t vmth_codec_compress(struct vmth_codec *codec, int level, const uint8_t *in,
                                           size_t nbytes, uint8_t *out, size_t room);

/* Fill out[0, exactly) from the one frame in[0, nbytes), which comes from the peer. Returns 0; -EPROTO
 * if it is not one whole zstd frame of exactly that content size, and then `out` holds nothing of
 * meaning; -ENOMEM. Writes nothing outside `out`. */
VMTH_MUST_CHECK int vmth_codec_decompress(struct vmth_codec *codec, const uint8_t *in, size_t nbytes,
                                          uint8_t *out, size_t exactly);

/* What the frame in[0, nbytes), from the peer, says of its content's size; 0 where it does not. */
uint64_t vmth_codec_content_bytes(const uint8_t *in, size_t nbytes);

/* Is one page (page_bytes a multiple of 4096) worth a try? A byte here and there shows whether some
 * values are more frequent than others (text, code, random letters); if none is, whole words are looked
 * at for repeats. False means that zstd would very likely not make it smaller by an eighth: encrypted or
 * compressed content. Costs about a hundredth of compressing the page. */
bool vmth_codec_promising(const uint8_t *page, size_t page_bytes);

VMTH_END_DECLS

#endif

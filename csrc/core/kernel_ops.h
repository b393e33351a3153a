/* SPDX-License-Identifier: Apache-2.0 */
/* What one implementation of a kernel family provides, and how the public functions find it.
 *
 *   family    public file      scalar twin          vector twins
 *   bitmap    bitmap.c         bitmap_scalar.c      x86/bitmap_*.c   aarch64/bitmap_neon.c
 *   zero      zero_page.c      zero_scalar.c        x86/zero_*.c     aarch64/zero_neon.c
 *   hash      page_hash.c      hash_scalar.c        x86/hash_*.c     aarch64/hash_neon.c
 *   delta     delta.c          delta_scalar.c       x86/delta_*.c    aarch64/delta_neon.c
 *   content   content_hash.c   content_scalar.c     x86/content_*.c
 *
 * The scalar twin defines the answer. A public function checks arguments, asks for the selected
 * implementation once a call, and does everything that is not worth a vector itself. */
#ifndef VMTH_CORE_KERNEL_OPS_H
#define VMTH_CORE_KERNEL_OPS_H

#include <stddef.h>
#include <stdint.h>

#include "vmth/common.h"

struct run_sink;

struct bitmap_ops {
    const char *name;
    /* Set bits in n whole words. */
    uint64_t (*count)(const uint64_t *words, size_t n);
    /* into |= from over n whole words; returns the bits that became set. */
    uint64_t (*merge)(uint64_t *into, const uint64_t *from, size_t n);
    /* Walk whole words [from, to) into the sink. Returns `to`, or the first word that was not walked
     * because it is not empty and less than RUN_SINK_ROOM entries are left. */
    size_t (*runs)(const uint64_t *words, size_t from, size_t to, struct run_sink *sink);
};

struct zero_ops {
    const char *name;
    /* nbytes (a multiple of 64) if all are zero; otherwise some multiple of 64 below nbytes, up to
     * which all bytes are zero. Reads at most a few cache lines past the first byte that is not. */
    size_t (*zero_prefix)(const uint8_t *bytes, size_t nbytes);
};

struct hash_ops {
    const char *name;
    /* Run XXH3's long-input accumulation over one page (page_bytes a multiple of 1024) and leave the
     * eight accumulators in acc. The first zero_blocks blocks of 1024 bytes are taken as zero bytes
     * without reading them; zero_blocks is at most all of them. */
    void (*accumulate)(uint64_t acc[8], const uint8_t *secret, const uint8_t *page,
                       size_t page_bytes, size_t zero_blocks);
};

#define DELTA_PIECE_BYTES ((size_t)4096)
#define DELTA_PIECE_LINES 64

struct delta_ops {
    const char *name;
    /* Compare two pieces of DELTA_PIECE_BYTES. Bit i of masks[l] is set exactly if byte i of cache line l
     * differs; the result has bit l set exactly if masks[l] is not zero. */
    uint64_t (*changed)(const uint8_t *base, const uint8_t *now, uint64_t masks[DELTA_PIECE_LINES]);
};

struct content_ops {
    const char *name;
    /* BLAKE2b of each of npages pages (page_bytes a multiple of 128), from the chain `start` that the
     * key's block left; the digest's first 16 bytes go to out. */
    void (*hash)(const uint64_t start[8], const uint8_t *const *pages, size_t page_bytes,
                 size_t npages, struct vmth_u128 *out);
};

/* Each is defined only where it is built: kernel_table.c asks. */
extern const struct bitmap_ops bitmap_scalar;
extern const struct bitmap_ops bitmap_avx2;
extern const struct bitmap_ops bitmap_avx512;
extern const struct bitmap_ops bitmap_neon;
extern const struct zero_ops zero_scalar;
extern const struct zero_ops zero_avx2;
extern const struct zero_ops zero_avx512;
extern const struct zero_ops zero_neon;
extern const struct hash_ops hash_scalar;
extern const struct hash_ops hash_avx2;
extern const struct hash_ops hash_avx512;
extern const struct hash_ops hash_neon;
extern const struct delta_ops delta_scalar;
extern const struct delta_ops delta_avx2;
extern const struct delta_ops delta_avx512;
extern const struct delta_ops delta_neon;
extern const struct content_ops content_scalar;
extern const struct content_ops content_avx2;
extern const struct content_ops content_avx512;

/* The selected implementation; resolved to the default at the first use. Never NULL. */
const struct bitmap_ops *kernel_bitmap(void);
const struct zero_ops *kernel_zero(void);
const struct hash_ops *kernel_hash(void);
const struct delta_ops *kernel_delta(void);
const struct content_ops *kernel_content(void);

#endif

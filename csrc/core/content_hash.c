/* SPDX-License-Identifier: Apache-2.0 */
/* Content hash: the key's expansion and the argument checks. BLAKE2b over pages is a kernel. */
#include "vmth/content_hash.h"

#include <errno.h>
#include <string.h>

#include "core/blake2b.h"
#include "core/kernel_ops.h"
#include "core/page_size.h"

#define RUN_PAGES 64u /* a multiple of every kernel's lanes */

_Static_assert(VMTH_CONTENT_KEY_BYTES == BLAKE2B_KEY_BYTES, "the key's length is a parameter");
_Static_assert(VMTH_CONTENT_HASH_BYTES == BLAKE2B_DIGEST_BYTES, "so is the digest's");
_Static_assert(sizeof(struct vmth_u128) == BLAKE2B_DIGEST_BYTES, "a digest fills one entry");

void vmth_content_key_init(struct vmth_content_key *key,
                           const uint8_t secret[VMTH_CONTENT_KEY_BYTES])
{
    uint8_t block[BLAKE2B_BLOCK_BYTES] = {0};

    memcpy(block, secret, VMTH_CONTENT_KEY_BYTES);
    memcpy(key->chain, blake2b_iv, sizeof(key->chain));
    key->chain[0] ^= BLAKE2B_PARAMETERS;
    blake2b_compress(key->chain, block, BLAKE2B_BLOCK_BYTES, false);
}

int vmth_content_hash(const struct vmth_content_key *key, const uint8_t *const *pages,
                      size_t page_bytes, size_t npages, struct vmth_u128 *out)
{
    if (!page_size_valid(page_bytes)) {
        return -EINVAL;
    }
    kernel_content()->hash(key->chain, pages, page_bytes, npages, out);
    return 0;
}

int vmth_content_hash_run(const struct vmth_content_key *key, const uint8_t *base,
                          size_t page_bytes, size_t npages, struct vmth_u128 *out)
{
    const struct content_ops *content = kernel_content();
    const uint8_t *pages[RUN_PAGES];

    if (!page_size_valid(page_bytes)) {
        return -EINVAL;
    }
    for (size_t done = 0; done < npages;) {
        const size_t n = npages - done < RUN_PAGES ? npages - done : RUN_PAGES;

        for (size_t i = 0; i < n; i++) {
            pages[i] = base + (done + i) * page_bytes;
        }
        content->hash(key->chain, pages, page_bytes, n, out + done);
        done += n;
    }
    return 0;
}

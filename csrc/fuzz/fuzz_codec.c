/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes are one whole frame of two pages or are refused, and nothing outside the room is written. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmth/codec.h"

#define CONTENT_BYTES 8192u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

static void require(int holds)
{
    if (!holds) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static struct vmth_codec codec;
    static uint8_t out[CONTENT_BYTES + 64];
    int result;

    if (codec.decompressor == NULL) {
        require(vmth_codec_create(&codec, VMTH_CODEC_DECOMPRESS) == 0);
    }
    memset(out + CONTENT_BYTES, 0x5a, 64);
    result = vmth_codec_decompress(&codec, data, nbytes, out, CONTENT_BYTES);
    require(result == 0 || result == -EPROTO);
    for (size_t i = CONTENT_BYTES; i < sizeof(out); i++) {
        require(out[i] == 0x5a);
    }
    return 0;
}

// SPDX-License-Identifier: Apache-2.0
// Decoding frames into a buffer of our own.
#include "xfer/frame_decoder.hpp"

#include <cerrno>

#include "xfer/failure.hpp"

namespace vmth {

FrameDecoder::~FrameDecoder()
{
    vmth_codec_destroy(&codec_);
}

const uint8_t *FrameDecoder::decode(const uint8_t *frame, size_t nbytes, size_t content_bytes)
{
    if (codec_.decompressor == nullptr && vmth_codec_create(&codec_, VMTH_CODEC_DECOMPRESS) != 0) {
        throw TransferError(ErrorKind::io, "zstd: no memory for a decompression context");
    }
    if (content_.size() < content_bytes) {
        content_.resize(content_bytes);
    }
    const int result =
        vmth_codec_decompress(&codec_, frame, nbytes, content_.data(), content_bytes);
    if (result == -ENOMEM) {
        throw TransferError(ErrorKind::io, "zstd: no memory to decompress", ENOMEM);
    }
    return result == 0 ? content_.data() : nullptr;
}

const uint8_t *FrameDecoder::decode_up_to(const uint8_t *frame, size_t nbytes, size_t most,
                                          size_t *content_bytes)
{
    const uint64_t said = vmth_codec_content_bytes(frame, nbytes);
    if (said == 0 || said > most) {
        return nullptr;
    }
    *content_bytes = static_cast<size_t>(said);
    return decode(frame, nbytes, *content_bytes);
}

}  // namespace vmth

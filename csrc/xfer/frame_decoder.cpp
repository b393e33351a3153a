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

uint8_t *FrameDecoder::room(size_t nbytes)
{
    if (frame_.size() < nbytes) {
        frame_.resize(nbytes);
    }
    return frame_.data();
}

const uint8_t *FrameDecoder::decode(size_t nbytes, size_t content_bytes)
{
    if (codec_.decompressor == nullptr && vmth_codec_create(&codec_, VMTH_CODEC_DECOMPRESS) != 0) {
        throw TransferError(ErrorKind::io, "zstd: no memory for a decompression context");
    }
    if (content_.size() < content_bytes) {
        content_.resize(content_bytes);
    }
    const int result =
        vmth_codec_decompress(&codec_, frame_.data(), nbytes, content_.data(), content_bytes);
    if (result == -ENOMEM) {
        throw TransferError(ErrorKind::io, "zstd: no memory to decompress", ENOMEM);
    }
    return result == 0 ? content_.data() : nullptr;
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// Zstd frames of the peer, back to pages. Belongs to one thread.
#ifndef VMTH_XFER_FRAME_DECODER_HPP
#define VMTH_XFER_FRAME_DECODER_HPP

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vmth/codec.h"

namespace vmth {

class FrameDecoder {
public:
    FrameDecoder() = default;
    ~FrameDecoder();
    FrameDecoder(const FrameDecoder &) = delete;
    FrameDecoder &operator=(const FrameDecoder &) = delete;

    // The content of the frame, until the next call; nullptr: it is not a frame of exactly
    // `content_bytes`, so it was damaged on the way. Throws TransferError(io) without memory.
    const uint8_t *decode(const uint8_t *frame, size_t nbytes, size_t content_bytes);
    // The same for a frame that says its content's size itself, which must not be over `most`: sets
    // *content_bytes.
    const uint8_t *decode_up_to(const uint8_t *frame, size_t nbytes, size_t most,
                                size_t *content_bytes);

private:
    vmth_codec codec_ = {};  // made when first used
    std::vector<uint8_t> content_;
};

}  // namespace vmth

#endif

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

    // Where the next frame's `nbytes` should be read to; the caller has bounded them.
    uint8_t *room(size_t nbytes);
    // The content of the frame in room(), `nbytes` long, until the next call; nullptr: it is not a frame of
    // exactly `content_bytes`, so it was damaged on the way. Throws TransferError(io) without memory.
    const uint8_t *decode(size_t nbytes, size_t content_bytes);

private:
    vmth_codec codec_ = {};  // made when first used
    std::vector<uint8_t> frame_;
    std::vector<uint8_t> content_;
};

}  // namespace vmth

#endif

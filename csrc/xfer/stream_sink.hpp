// SPDX-License-Identifier: Apache-2.0
// Hands the pages of hostless blocks on to another program as `ram` sections of QEMU's stream.
//
//   02 be32 id | word, idstr, page | word+CONTINUE, page | ... | EOS | 7e be32 id     one PART section
//
// A section is written as a whole, one at a time over all channels, and names its block anew, so it can
// stand anywhere between two other sections. Pages count as landed once the socket has taken them.
// docs/qemu-stream.md has the format. Any thread.
#ifndef VMTH_XFER_STREAM_SINK_HPP
#define VMTH_XFER_STREAM_SINK_HPP

#include <sys/uio.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "vmth/common.h"
#include "xfer/channel.hpp"
#include "xfer/guest_memory.hpp"

namespace vmth {

struct StreamSinkOptions {
    int fd = -1;  // a connected stream socket; duplicated. -1: there is no sink
    uint32_t section_id = 0;
    std::vector<std::string> idstrs;  // of every block, in block-table order
};

class StreamSink {
public:
    // `latch` is looked at while the reader of the socket makes us wait: once it has failed, every call
    // throws. Throws TransferError(usage) for a descriptor that is no connected stream socket, names that
    // do not fit the blocks, or an idstr that is not 1 to 255 bytes long.
    StreamSink(const StreamSinkOptions &options, const GuestMemory &memory,
               const FailureLatch &latch, const vmth_sock_ops *ops);

    // One section with the pages of `runs`, whose content lies back to back at `content`.
    void write_pages(uint32_t block, const std::vector<vmth_run> &runs, const uint8_t *content);
    // As many sections of bounded length as it takes.
    void write_zeros(uint32_t block, const vmth_run &run);

private:
    void begin_locked(uint32_t block, size_t records);
    void record_locked(uint64_t page, uint64_t kind);
    void end_locked();
    void write_locked();

    const FailureLatch &latch_;
    const uint64_t page_bytes_;
    const uint32_t section_id_;
    std::vector<std::string> names_;  // as on the wire: length, then the name
    std::mutex mutex_;
    // Under mutex_:
    Channel channel_;
    const std::string *name_ = nullptr;  // of the section's block, until its first record
    std::vector<uint8_t> heads_;         // everything but content
    std::vector<iovec> iov_;
};

}  // namespace vmth

#endif

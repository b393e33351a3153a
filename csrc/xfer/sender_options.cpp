// SPDX-License-Identifier: Apache-2.0
// Bounds of a sender's options.
#include "xfer/sender_options.hpp"

#include <algorithm>
#include <string>

#include "vmth/packet.h"
#include "xfer/failure.hpp"

namespace vmth {

namespace {

void check_packet_bytes(const std::string &name, uint32_t nbytes, uint32_t least)
{
    if (nbytes < least || nbytes > VMTH_PACKET_MAX_PAYLOAD_BYTES) {
        throw TransferError(ErrorKind::usage, name + " " + std::to_string(nbytes) + ", allowed " +
                                                  std::to_string(least) + " to " +
                                                  std::to_string(VMTH_PACKET_MAX_PAYLOAD_BYTES));
    }
}

}  // namespace

SenderOptions checked(SenderOptions options, size_t page_bytes)
{
    check_packet_bytes("packet_bytes", options.packet_bytes, 4096);
    check_packet_bytes("fast_packet_bytes", options.fast_packet_bytes, 0);
    if (options.queue_jobs == 0) {
        throw TransferError(ErrorKind::usage, "queue_jobs 0, allowed 1 or more");
    }
    options.packet_bytes = std::max(options.packet_bytes, static_cast<uint32_t>(page_bytes));
    options.fast_packet_bytes = std::max(options.fast_packet_bytes, options.packet_bytes);
    if (options.ops == nullptr) {
        options.ops = vmth_sock_system_ops();
    }
    return options;
}

}  // namespace vmth

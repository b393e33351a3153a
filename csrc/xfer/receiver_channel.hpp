// SPDX-License-Identifier: Apache-2.0
// One channel of the receiver: reads packets, lands them, acknowledges.
#ifndef VMTH_XFER_RECEIVER_CHANNEL_HPP
#define VMTH_XFER_RECEIVER_CHANNEL_HPP

#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "xfer/channel.hpp"
#include "xfer/receiver.hpp"

namespace vmth {

class ReceiverChannel {
public:
    ReceiverChannel(ReceiverShared &shared, int fd, unsigned index);

    void start();
    void join();
    Channel &channel() noexcept { return channel_; }

private:
    // All on the channel's thread.
    void run();
    bool step();  // one packet; false after END
    void read_header(vmth_packet_header &header, uint8_t *raw);
    void land(const vmth_packet_header &header);
    void read_descs(const vmth_packet_header &header, const uint8_t *raw);
    void land_told(uint32_t block, const vmth_desc &desc, vmth_digest *fresh);
    void write_zeros(uint32_t block, const vmth_run &zeros);
    void land_payload(uint32_t block, vmth_digest *fresh);
    void land_piece(uint32_t block, const std::vector<vmth_run> &piece, vmth_digest *fresh);
    void hand_on_piece(uint32_t block, const std::vector<vmth_run> &piece, vmth_digest *fresh);
    void set_hashes(uint32_t block, const vmth_run &run, const uint8_t *content,
                    vmth_digest *fresh);
    bool read(void *buffer, size_t nbytes);
    void read_inside(iovec *iov, size_t count);  // throws at an end of stream
    void acknowledge(uint64_t seq, const vmth_u128 &digest);
    void flush_acks();
    const std::function<void()> &flush_hook() const;

    ReceiverShared &shared_;
    Channel channel_;
    std::thread thread_;
    const size_t piece_pages_;
    uint64_t seq_ = 0;    // of the last packet read
    uint32_t round_ = 0;  // of the last packet read
    std::vector<uint8_t> desc_bytes_;
    std::vector<vmth_desc> descs_;
    std::vector<vmth_run> piece_;
    std::vector<iovec> iov_;
    std::vector<uint8_t> scratch_;  // a piece of a hostless block; empty until there is one
    std::vector<vmth_ack> acks_;  // landed, not yet told
    std::chrono::steady_clock::time_point oldest_ack_;
    const std::function<void()> flush_;
    const std::function<void()> nothing_;
};

}  // namespace vmth

#endif

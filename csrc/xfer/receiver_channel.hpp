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
#include "xfer/frame_decoder.hpp"
#include "xfer/page_lander.hpp"
#include "xfer/page_store.hpp"
#include "xfer/receiver.hpp"
#include "xfer/reference_pages.hpp"

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
    void read_descs(const vmth_packet_header &header, const uint8_t *raw);
    void land(const vmth_packet_header &header);
    void land_payload(uint32_t block, vmth_digest *fresh);
    void add_normal(uint32_t block, const vmth_desc &desc, vmth_digest *fresh);
    void land_piece(uint32_t block, vmth_digest *fresh);
    void land_coded(uint32_t block, size_t index, vmth_digest *fresh);
    void land_frame(uint32_t block, const vmth_desc &desc, const uint8_t *frame,
                    vmth_digest *fresh);
    void land_reference(uint32_t block, const vmth_desc &desc, const uint8_t *payload,
                        vmth_digest *fresh);
    void land_reuse(uint32_t block, const vmth_desc &desc, const uint8_t *hashes, vmth_digest *fresh);
    const uint8_t *payload_of(size_t index);
    void count(const vmth_desc &desc);
    bool read(void *buffer, size_t nbytes);
    void read_inside(iovec *iov, size_t count);  // throws at an end of stream
    void acknowledge(uint64_t seq, uint32_t block, const vmth_u128 &digest);
    void flush_acks();
    const std::function<void()> &flush_hook() const;

    ReceiverShared &shared_;
    Channel channel_;
    std::thread thread_;
    const uint32_t forms_;
    PageLander lander_;
    FrameDecoder frames_;
    ReferencePages references_;
    StoredPages stored_;
    uint64_t seq_ = 0;    // of the last packet read
    uint32_t round_ = 0;  // of the last packet read
    std::vector<uint8_t> desc_bytes_;
    std::vector<vmth_desc> descs_;
    std::vector<vmth_run> piece_;       // normal pages whose content is the next in the stream
    size_t piece_npages_ = 0;
    std::vector<vmth_run> one_run_;     // of a page made from others, or found in a file
    std::vector<uint8_t> found_;        // pages from files, until they land
    std::vector<vmth_run> frame_runs_;  // of the frame that is next in the stream
    std::vector<uint8_t> coded_;        // payload of coded descriptors, read together ...
    size_t coded_at_ = 0;               // ... up to here taken
    std::vector<vmth_run> missed_;      // of the packet being landed
    std::vector<vmth_run> told_missed_;  // of the last of acks_
    std::vector<uint8_t> ack_bytes_;
    std::vector<vmth_ack> acks_;  // landed, not yet told
    std::chrono::steady_clock::time_point oldest_ack_;
    const std::function<void()> flush_;
    const std::function<void()> nothing_;
};

}  // namespace vmth

#endif

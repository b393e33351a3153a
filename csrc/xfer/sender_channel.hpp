// SPDX-License-Identifier: Apache-2.0
// One channel of the sender: its worker (sends) and its reader (acknowledgements).
#ifndef VMTH_XFER_SENDER_CHANNEL_HPP
#define VMTH_XFER_SENDER_CHANNEL_HPP

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "xfer/channel.hpp"
#include "xfer/landed_backlog.hpp"
#include "xfer/ledger.hpp"
#include "xfer/packet_builder.hpp"
#include "xfer/sender.hpp"

namespace vmth {

class SenderChannel {
public:
    // `place`: of its worker in the queue.
    SenderChannel(SenderShared &shared, int fd, unsigned index, size_t place, uint64_t trip_ns);

    void start();  // may throw; whoever owns the object joins what was started
    void join_worker();
    void join_reader();
    Channel &channel() noexcept { return channel_; }
    bool drained() const { return ledger_.next() == 0; }
    const ChannelCounters &counters() const noexcept { return counters_; }
    // The least time from a packet's going out to its acknowledgement; 0: none yet. Any thread. It is of
    // the whole way to the peer, where TCP's own round trip may end at a tunnel's near end.
    uint64_t least_trip_ns() const noexcept { return least_trip_ns_.load(std::memory_order_relaxed); }
    size_t place() const noexcept { return place_; }

private:
    // Worker thread.
    void work();
    void send_batch(Batch &batch);
    void add(const Batch &batch);
    uint64_t count_cpu();
    void send_packet();
    void send_portions();
    void send_control(vmth_packet_kind kind, uint32_t round);
    void write_packet(iovec *iov, size_t count, int flags);
    void write_zerocopy(iovec *iov, size_t count);
    bool worth_zerocopy(const PacketParts &parts) const noexcept;
    void reap();
    void wait_completions();
    void stop_zerocopy(const std::string &why);

    // Reader thread.
    void read_acks();
    void read_packet(const uint8_t *raw);
    std::vector<vmth_run> read_missed(const vmth_packet_header &header,
                                      const std::vector<vmth_ack> &acks);
    void take_ack(const vmth_ack &ack, const std::vector<vmth_run> &missed);
    void take_landed(SentPacket &sent);
    void take_missed(SentPacket &sent, const vmth_ack &ack, const std::vector<vmth_run> &missed);

    SenderShared &shared_;
    const size_t place_;
    Channel channel_;
    ChannelCounters counters_;
    Ledger ledger_;  // pushed by the worker, popped by the reader
    std::thread worker_;
    std::thread reader_;
    std::atomic<bool> ending_{false};  // END is being sent: an end of stream is no failure any more
    std::atomic<uint64_t> least_trip_ns_;  // written by the reader
    // Worker:
    PacketBuilder builder_;
    uint64_t seq_ = 0;
    uint32_t round_ = 0;
    std::vector<iovec> portion_;
    uint64_t taken_pages_ = 0;  // to be read for the packet being built
    std::vector<std::pair<uint64_t, uint64_t>> lent_;  // (ticket, pages) of the packet being built
    uint64_t cpu_ns_ = 0;       // of the thread, when it last counted
    bool zerocopy_ = false;
    vmth_zerocopy completions_ = {};
    // Reader:
    std::vector<uint8_t> desc_;
    LandedBacklog backlog_;
};

}  // namespace vmth

#endif

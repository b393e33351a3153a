// SPDX-License-Identifier: Apache-2.0
// One channel of the sender: packets out, acknowledgements in.
#include "xfer/sender_channel.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "xfer/steady_clock.hpp"
#include "xfer/thread_clock.hpp"
#include "xfer/worker_thread.hpp"

namespace vmth {

namespace {

// A packet stops growing at this, or at its share of pages, so that zero-dense memory fills packets
// without delaying acks.
constexpr size_t grow_descs = 4096;
// Each of these is read from a file over there before the packet is acknowledged.
constexpr uint64_t grow_reused = 2048;
// Below this, pinning pages costs more than copying them.
constexpr uint64_t zerocopy_min_bytes = 32 * 1024;
constexpr int completion_poll_ms = 50;

using Clock = std::chrono::steady_clock;

uint64_t most_bytes(uint64_t payload_bytes, uint64_t ndesc, uint64_t desc_bytes)
{
    return VMTH_PACKET_HEADER_BYTES + ndesc * desc_bytes + payload_bytes;
}

template <typename Body> void guarded(SenderShared &shared, const std::string &where, Body body)
{
    try {
        body();
    } catch (const TransferError &error) {
        shared.fail(error);
    } catch (const std::exception &error) {
        shared.fail(TransferError(ErrorKind::io, where + ": " + error.what()));
    }
}

}  // namespace

SenderChannel::SenderChannel(SenderShared &shared, int fd, unsigned index, size_t place,
                             uint64_t trip_ns)
    : shared_(shared), place_(place), channel_(fd, index, shared.options.ops), least_trip_ns_(trip_ns),
      builder_({shared.memory, shared.hashes, shared.prefault, shared.known, shared.places,
                shared.deltas, shared.reuse, shared.copies, shared.forms, shared.counters,
                shared.options.packet_bytes},
               index)
{
    if (trip_ns != 0) {
        shared.flow.took(trip_ns);
    }
    if (!shared.options.zerocopy) {
        return;
    }
    int result = channel_.tcp() ? vmth_zerocopy_enable(channel_.fd()) : -EOPNOTSUPP;
    zerocopy_ = result == 0;
    if (result != 0) {
        stop_zerocopy("not supported by this kind of socket");
    }
}

void SenderChannel::start()
{
    std::string index = std::to_string(channel_.index());
    reader_ = start_thread("vmth-ack-" + index,
                           [this] { guarded(shared_, channel_.name(), [this] { read_acks(); }); });
    worker_ = start_thread("vmth-send-" + index,
                           [this] { guarded(shared_, channel_.name(), [this] { work(); }); });
}

void SenderChannel::join_worker()
{
    if (worker_.joinable()) {
        worker_.join();
    }
}

void SenderChannel::join_reader()
{
    if (reader_.joinable()) {
        reader_.join();
    }
}

// ---- worker ---------------------------------------------------------------------------------------

void SenderChannel::work()
{
    Batch batch;
    uint64_t barriers = 0;
    const auto most_pages = [this](uint64_t rate_bps) {
        return shared_.flow.packet_payload(rate_bps) / shared_.memory.page_bytes();
    };
    for (;;) {
        switch (shared_.queue.pull(place_, batch, most_pages, barriers)) {
        case Pulled::batch:
            send_batch(batch);
            break;
        case Pulled::barrier:
            send_control(VMTH_PACKET_BARRIER, batch.round);
            shared_.barrier_sent();
            wait_completions();
            shared_.barrier_part_done();
            break;
        case Pulled::end:
            wait_completions();
            ending_.store(true, std::memory_order_release);
            send_control(VMTH_PACKET_END, round_);
            return;
        case Pulled::stopped:
            return;
        }
    }
}

void SenderChannel::send_batch(Batch &batch)
{
    const uint64_t page_bytes = shared_.memory.page_bytes();
    const bool read = batch.form == VMTH_FORM_NORMAL;
    const uint64_t limit = std::max(shared_.flow.packet_payload(shared_.queue.rate_bps(place_)),
                                    read ? batch.npages * page_bytes : 0);
    const uint64_t desc_bytes =
        shared_.forms.get().mask == 0 ? VMTH_DESC_BYTES : VMTH_DESC_REF_BYTES;
    const uint64_t reserved = read ? most_bytes(limit, limit / page_bytes, desc_bytes)
                                   : most_bytes(0, batch.runs.size(), VMTH_DESC_BYTES);
    if (!shared_.flow.reserve(reserved)) {
        return;
    }
    round_ = batch.round;
    taken_pages_ = 0;
    builder_.begin(batch.block, batch.round, limit);
    add(batch);
    while (read && builder_.ndesc() < grow_descs &&
           builder_.parts().pages(VMTH_FORM_REUSE) < grow_reused) {
        // Pages in cheap forms take little room: fill up, but only from what is there now.
        uint64_t room = (limit - builder_.payload_bytes()) / page_bytes;
        if (room * 2 * page_bytes < limit || !shared_.queue.pull_more(place_, batch, room)) {
            break;
        }
        add(batch);
    }
    builder_.end();
    const uint64_t built_ns = count_cpu();
    if (builder_.empty()) {
        shared_.flow.settle(reserved, 0);
        shared_.queue.sent(place_, taken_pages_, 0, built_ns);
    } else {
        SentPacket sent = builder_.finish(++seq_);
        shared_.flow.settle(reserved, sent.bytes, sent.made_pages);
        shared_.queue.sent(place_, taken_pages_, sent.bytes, built_ns);
        sent.sent_ns = steady_ns();
        ledger_.push(std::move(sent));
        send_packet();
    }
    count_cpu();
    for (const auto &[ticket, npages] : lent_) {
        shared_.tickets.give_back(ticket, npages);
    }
    lent_.clear();
}

// Of this thread since the last call.
uint64_t SenderChannel::count_cpu()
{
    const uint64_t now_ns = thread_cpu_ns();
    const uint64_t spent_ns = now_ns - cpu_ns_;
    shared_.counters.cpu_ns.add(spent_ns);
    cpu_ns_ = now_ns;
    return spent_ns;
}

void SenderChannel::add(const Batch &batch)
{
    builder_.add(batch);
    taken_pages_ += batch.form == VMTH_FORM_NORMAL ? batch.npages : 0;
    if (batch.ticket != 0) {
        lent_.emplace_back(batch.ticket, batch.npages);
    }
}

void SenderChannel::send_packet()
{
    if (completions_.outstanding > 0) {
        reap();  // of earlier packets, also after zero-copy was switched off
    }
    std::vector<iovec> &payload = builder_.payload();
    const PacketParts &parts = builder_.parts();
    if (worth_zerocopy(parts)) {
        builder_.hash_rest();
        ledger_.complete(seq_, builder_.digest());
        // The header's buffer is reused at once, so it goes by copy.
        write_packet(&builder_.head(), 1, MSG_MORE);
        write_packet(payload.data(), payload.size(), MSG_ZEROCOPY);
    } else if (builder_.unread()) {
        send_portions();
    } else {
        payload.insert(payload.begin(), builder_.head());
        write_packet(payload.data(), payload.size(), 0);
    }
    Counters &counters = shared_.counters;
    counters.packets.add(1);
    counters_.packets.add(1);
    counters_.pages.add(parts.npages());
    counters.normal_pages.add(parts.pages(VMTH_FORM_NORMAL));
    counters.zero_pages.add(parts.pages(VMTH_FORM_ZERO));
    counters.hole_pages.add(parts.pages(VMTH_FORM_HOLE));
    counters.free_pages.add(parts.pages(VMTH_FORM_FREE));
}

// Each portion is sent while it is in the caches of the core that read it.
void SenderChannel::send_portions()
{
    for (bool first = true; builder_.unread(); first = false) {
        builder_.read_portion(portion_);
        if (first) {
            portion_.insert(portion_.begin(), builder_.head());
        }
        const bool last = !builder_.unread();
        if (last) {
            ledger_.complete(seq_, builder_.digest());
        }
        write_packet(portion_.data(), portion_.size(), last ? 0 : MSG_MORE);
    }
}

void SenderChannel::send_control(vmth_packet_kind kind, uint32_t round)
{
    vmth_packet_header header = {};
    header.kind = static_cast<uint8_t>(kind);
    header.round = round;
    header.channel = static_cast<uint16_t>(channel_.index());
    header.seq = ++seq_;
    uint8_t raw[VMTH_PACKET_HEADER_BYTES] = {};
    vmth_packet_encode_header(&header, raw, shared_.hashes.key().seed, raw);
    if (kind == VMTH_PACKET_BARRIER) {
        SentPacket sent;
        sent.seq = seq_;
        sent.kind = kind;
        sent.bytes = sizeof(raw);
        shared_.flow.settle(0, sent.bytes);
        shared_.queue.sent(place_, 0, sent.bytes, 0);
        sent.sent_ns = steady_ns();
        ledger_.push(std::move(sent));
    }
    iovec iov = {raw, sizeof(raw)};
    write_packet(&iov, 1, 0);
}

void SenderChannel::write_packet(iovec *iov, size_t count, int flags)
{
    uint64_t nbytes = 0;
    for (size_t i = 0; i < count; i++) {
        nbytes += iov[i].iov_len;
    }
    if (flags == MSG_ZEROCOPY) {
        write_zerocopy(iov, count);
    } else {
        channel_.write_vec(iov, count, flags);
    }
    shared_.counters.wire_bytes.add(nbytes);
    counters_.wire_bytes.add(nbytes);
}

// ---- zero copy ------------------------------------------------------------------------------------

bool SenderChannel::worth_zerocopy(const PacketParts &parts) const noexcept
{
    // A lent buffer must be free once it was sent, not when the peer has it; and the builder's own is
    // used for the next packet.
    const uint64_t raw_bytes = parts.pages(VMTH_FORM_NORMAL) * shared_.memory.page_bytes();
    return zerocopy_ && lent_.empty() && raw_bytes == parts.payload_bytes() &&
           raw_bytes >= zerocopy_min_bytes;
}

void SenderChannel::write_zerocopy(iovec *iov, size_t count)
{
    while (count > 0) {
        if (!zerocopy_) {
            channel_.write_vec(iov, count);
            return;
        }
        ssize_t sent = channel_.write_some(iov, count, MSG_ZEROCOPY);
        if (sent == -ENOBUFS) {
            // The socket's or the process's limit on pinned memory. Completions may free some; what
            // does not fit goes by copy.
            reap();
            if (completions_.outstanding == 0) {
                stop_zerocopy("no room for pinned pages (optmem_max or RLIMIT_MEMLOCK)");
            } else {
                channel_.wait(POLLOUT, completion_poll_ms);
                reap();
            }
            sent = channel_.write_some(iov, count, 0);
            if (sent == -ENOBUFS) {
                throw system_error(channel_.name() + ": send", ENOBUFS);
            }
        } else if (sent > 0) {
            vmth_zerocopy_sent(&completions_);
            shared_.counters.zerocopy_sends.add(1);
        }
        if (sent > 0) {
            size_t used = advance(iov, count, static_cast<size_t>(sent));
            iov += used;
            count -= used;
        } else {
            channel_.wait(POLLOUT, completion_poll_ms);
        }
        reap();
    }
}

void SenderChannel::reap()
{
    uint32_t reaped = 0;
    const uint64_t copied_before = completions_.copied;
    int result = vmth_zerocopy_reap(&channel_.ops(), channel_.fd(), &completions_, &reaped);
    if (result != 0) {
        throw system_error(channel_.name() + ": zero-copy completion", -result);
    }
    const uint64_t copied = completions_.copied - copied_before;
    if (copied > 0) {
        shared_.counters.zerocopy_copied.add(copied);
        stop_zerocopy("the kernel copied all the same (loopback, or a device without it)");
    }
}

void SenderChannel::wait_completions()
{
    const auto patience = std::chrono::milliseconds(shared_.options.completion_timeout_ms);
    Clock::time_point since = Clock::now();
    while (completions_.outstanding > 0) {
        uint32_t before = completions_.outstanding;
        reap();
        if (completions_.outstanding == 0) {
            return;
        }
        shared_.latch.check();
        // Time counts only once the peer has acknowledged everything: a slow link is not a lost one.
        if (completions_.outstanding != before || !drained()) {
            since = Clock::now();
        } else if (Clock::now() - since > patience) {
            throw TransferError(ErrorKind::timeout,
                                channel_.name() + ": " + std::to_string(completions_.outstanding) +
                                    " zero-copy completions did not come within " +
                                    std::to_string(shared_.options.completion_timeout_ms) + " ms");
        }
        channel_.wait(0, completion_poll_ms);
    }
}

void SenderChannel::stop_zerocopy(const std::string &why)
{
    zerocopy_ = false;
    shared_.fallback("zerocopy: " + why);
}

// ---- reader ---------------------------------------------------------------------------------------

void SenderChannel::read_acks()
{
    uint8_t raw[VMTH_PACKET_HEADER_BYTES];
    try {
        while (channel_.read(raw, sizeof(raw))) {
            read_packet(raw);
        }
    } catch (const TransferError &error) {
        // A peer that has everything may close in any way it likes.
        if (error.kind() == ErrorKind::protocol || !ending_.load(std::memory_order_acquire) ||
            !drained()) {
            throw;
        }
        return;
    }
    if (!ending_.load(std::memory_order_acquire) || !drained()) {
        throw TransferError(ErrorKind::closed, channel_.name() +
                                                   ": the peer closed the connection with " +
                                                   std::to_string(shared_.flow.in_flight()) +
                                                   " bytes not acknowledged");
    }
}

void SenderChannel::read_packet(const uint8_t *raw)
{
    const vmth_packet_limits limits =
        shared_.memory.limits(channel_.index(), 1u << VMTH_FORM_SAME);
    vmth_packet_header header;
    vmth_packet_error error = {};
    if (vmth_packet_decode_header(raw, &limits, &header, &error) != 0) {
        throw packet_error(channel_.name(), error);
    }
    if (header.kind != VMTH_PACKET_ACK) {
        throw packet_error(channel_.name(), {"kind", header.kind, VMTH_PACKET_ACK});
    }
    desc_.resize(header.desc_bytes);
    if (!channel_.read(desc_.data(), desc_.size())) {
        throw TransferError(ErrorKind::closed,
                            channel_.name() + ": the peer closed the connection inside a packet");
    }
    if (vmth_packet_verify(raw, desc_.data(), desc_.size(), shared_.hashes.key().seed, &error) != 0) {
        throw packet_error(channel_.name(), error);
    }
    std::vector<vmth_ack> acks(header.ndesc);
    for (size_t i = 0; i < acks.size(); i++) {
        if (vmth_ack_decode(desc_.data() + i * VMTH_ACK_BYTES, &acks[i], &error) != 0) {
            throw packet_error(channel_.name(), error);
        }
    }
    if (header.seq != acks.back().seq) {
        throw packet_error(channel_.name(), {"seq", header.seq, acks.back().seq});
    }
    const std::vector<vmth_run> missed = read_missed(header, acks);
    for (const vmth_ack &ack : acks) {
        take_ack(ack, missed);
    }
    if (drained()) {
        shared_.ledger_drained();
    }
}

// The list of missed pages belongs to the one acknowledgement with that status.
std::vector<vmth_run> SenderChannel::read_missed(const vmth_packet_header &header,
                                                 const std::vector<vmth_ack> &acks)
{
    const vmth_packet_limits limits =
        shared_.memory.limits(channel_.index(), form_bit(VMTH_FORM_SAME));
    const vmth_ack *missed = nullptr;
    for (const vmth_ack &ack : acks) {
        if (ack.status == VMTH_ACK_MISSED && missed != nullptr) {
            throw packet_error(channel_.name(), {"ack.status", ack.status, VMTH_ACK_LANDED});
        }
        missed = ack.status == VMTH_ACK_MISSED ? &ack : missed;
    }
    const size_t start = acks.size() * VMTH_ACK_BYTES;
    if (missed == nullptr && start != desc_.size()) {
        throw packet_error(channel_.name(), {"desc_bytes", desc_.size(), start});
    }
    uint64_t npages = 0;
    std::vector<vmth_run> runs;
    for (size_t at = start; at < desc_.size();) {
        vmth_desc desc;
        size_t used = 0;
        vmth_packet_error error = {};
        if (vmth_desc_decode(desc_.data() + at, desc_.size() - at,
                             static_cast<uint16_t>(missed->block), &limits, &desc, &used,
                             &error) != 0) {
            throw packet_error(channel_.name(), error);
        }
        npages += desc.npages;
        runs.push_back({desc.page, desc.npages});
        at += used;
    }
    if (npages != header.npages) {
        throw packet_error(channel_.name(), {"npages", header.npages, npages});
    }
    return runs;
}

void SenderChannel::take_ack(const vmth_ack &ack, const std::vector<vmth_run> &missed)
{
    std::optional<SentPacket> sent = ledger_.pop(ack.seq);
    if (!sent) {
        throw packet_error(channel_.name(), {"ack.seq", ack.seq, ledger_.next()});
    }
    if (!sent->whole) {
        throw TransferError(ErrorKind::protocol,
                            channel_.name() + ": received an acknowledgement of packet " +
                                std::to_string(ack.seq) + ", allowed once all of it was sent");
    }
    const auto trip_ns = static_cast<uint64_t>(steady_ns() - sent->sent_ns);
    const uint64_t least_ns = least_trip_ns();
    if (least_ns == 0 || trip_ns < least_ns) {
        least_trip_ns_.store(trip_ns, std::memory_order_relaxed);
        shared_.flow.took(trip_ns);
    }
    shared_.flow.acked(sent->bytes, sent->made_pages);
    shared_.queue.acked(place_, sent->bytes);
    shared_.counters.acked_bytes.add(sent->bytes);
    counters_.acked_bytes.add(sent->bytes);
    if (sent->kind == VMTH_PACKET_BARRIER) {
        backlog_.clear();
        shared_.barrier_part_done();
        return;
    }
    if (ack.status == VMTH_ACK_MISSED) {
        take_missed(*sent, ack, missed);
    }
    for (const KeptCopy &copy : sent->kept) {
        shared_.copies.give_back(copy.content);
    }
    if (ack.digest.lo == sent->digest.lo && ack.digest.hi == sent->digest.hi) {
        take_landed(*sent);
        return;
    }
    shared_.counters.torn_packets.add(1);
    shared_.missed.add_differing(sent->block, std::move(sent->runs));
}

void SenderChannel::take_landed(SentPacket &sent)
{
    shared_.known.landed(sent.block, sent.runs);
    shared_.known.landed(sent.block, sent.zero_runs);
    if (!shared_.places.enabled()) {
        return;
    }
    if (!shared_.forms.get().on(VMTH_FORM_DEDUP)) {
        backlog_.add(sent.block, std::move(sent.runs));
        return;
    }
    backlog_.take([this](uint32_t block, const std::vector<vmth_run> &runs) {
        shared_.places.landed(block, runs);
    });
    shared_.places.landed(sent.block, sent.runs);
}

// The missed pages go again; what is left of the packet is judged as if it had been all of it.
void SenderChannel::take_missed(SentPacket &sent, const vmth_ack &ack,
                                const std::vector<vmth_run> &missed)
{
    if (ack.block != sent.block) {
        throw packet_error(channel_.name(), {"ack.block", ack.block, sent.block});
    }
    if (!remove_runs(sent.runs, missed)) {
        throw packet_error(channel_.name(), {"missed pages", missed.size(), sent.runs.size()});
    }
    const auto is_missed = [&](const KeptCopy &copy) {
        return std::any_of(missed.begin(), missed.end(), [&](const vmth_run &run) {
            return copy.page - run.page < run.npages;
        });
    };
    const auto left = std::partition(sent.kept.begin(), sent.kept.end(),
                                     [&](const KeptCopy &copy) { return !is_missed(copy); });
    std::for_each(left, sent.kept.end(),
                  [&](const KeptCopy &copy) { shared_.missed.keep(sent.block, copy); });
    sent.kept.erase(left, sent.kept.end());
    shared_.missed.add(sent.block, missed);
    shared_.places.missed(sent.block, missed);
    shared_.reuse.missed(sent.block, missed);
    if (shared_.hashes.enabled()) {
        const vmth_u128 sum = shared_.hashes.sum(sent.block, missed);
        const bool borrow = sent.digest.lo < sum.lo;
        sent.digest.lo -= sum.lo;
        sent.digest.hi -= sum.hi + (borrow ? 1 : 0);
    }
}

}  // namespace vmth

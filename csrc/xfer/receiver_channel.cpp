// SPDX-License-Identifier: Apache-2.0
// Landing packets of one channel.
#include "xfer/receiver_channel.hpp"

#include <algorithm>
#include <cstring>

#include "core/endian.h"
#include "xfer/thread_clock.hpp"
#include "xfer/worker_thread.hpp"

namespace vmth {

namespace {

// Acknowledgements are held while more packets are there to read, within these.
constexpr size_t max_held_acks = 16;
constexpr size_t coded_at_once = 256 * 1024;
constexpr std::chrono::milliseconds max_held_time{20};

using Clock = std::chrono::steady_clock;

}  // namespace

ReceiverChannel::ReceiverChannel(ReceiverShared &shared, int fd, unsigned index)
    : shared_(shared), channel_(fd, index, shared.options.ops),
      forms_(plain_forms | (shared.options.forms & ~form_bit(VMTH_FORM_SAME))), lander_(shared, index),
      references_(shared.memory, shared.hashes.key(), frames_, channel_.name()),
      stored_(shared.store), flush_([this] { flush_acks(); })
{
}

void ReceiverChannel::start()
{
    thread_ = start_thread("vmth-recv-" + std::to_string(channel_.index()), [this] { run(); });
}

void ReceiverChannel::join()
{
    if (thread_.joinable()) {
        thread_.join();
    }
}

void ReceiverChannel::run()
{
    try {
        while (step()) {
        }
        shared_.channel_ended();
    } catch (const TransferError &error) {
        shared_.fail(error);
    } catch (const std::exception &error) {
        shared_.fail(TransferError(ErrorKind::io, channel_.name() + ": " + error.what()));
    }
}

// ---- reading --------------------------------------------------------------------------------------

// Before this thread would wait for the peer, the peer hears what has landed.
const std::function<void()> &ReceiverChannel::flush_hook() const
{
    return acks_.empty() ? nothing_ : flush_;
}

bool ReceiverChannel::read(void *buffer, size_t nbytes)
{
    bool got = channel_.read(buffer, nbytes, flush_hook());
    shared_.counters.wire_bytes.add(got ? nbytes : 0);
    return got;
}

void ReceiverChannel::read_inside(iovec *iov, size_t count)
{
    uint64_t nbytes = 0;
    for (size_t i = 0; i < count; i++) {
        nbytes += iov[i].iov_len;
    }
    if (nbytes > 0 && !channel_.read_vec(iov, count, flush_hook())) {
        throw TransferError(ErrorKind::closed,
                            channel_.name() + ": the peer closed the connection inside packet " +
                                std::to_string(seq_));
    }
    shared_.counters.wire_bytes.add(nbytes);
}

void ReceiverChannel::read_header(vmth_packet_header &header, uint8_t *raw)
{
    if (!read(raw, VMTH_PACKET_HEADER_BYTES)) {
        throw TransferError(ErrorKind::closed, channel_.name() +
                                                   ": the peer closed the connection after packet " +
                                                   std::to_string(seq_) + ", without END");
    }
    const vmth_packet_limits limits = shared_.memory.limits(channel_.index(), forms_);
    vmth_packet_error error = {};
    if (vmth_packet_decode_header(raw, &limits, &header, &error) != 0) {
        throw packet_error(channel_.name(), error);
    }
    if (header.kind == VMTH_PACKET_ACK) {
        throw packet_error(channel_.name(), {"kind", header.kind, VMTH_PACKET_END});
    }
    if (header.seq != seq_ + 1) {
        throw packet_error(channel_.name(), {"seq", header.seq, seq_ + 1});
    }
}

bool ReceiverChannel::step()
{
    uint8_t raw[VMTH_PACKET_HEADER_BYTES];
    vmth_packet_header header;
    read_header(header, raw);
    read_descs(header, raw);
    seq_ = header.seq;
    round_ = header.round;
    shared_.gate.check_open(channel_.index(), channel_.name());
    if (header.kind == VMTH_PACKET_END) {
        flush_acks();
        return false;
    }
    if (header.kind == VMTH_PACKET_BARRIER) {
        const bool last = shared_.gate.pass(channel_.index());
        acknowledge(header.seq, 0, {0, 0});
        flush_acks();
        if (last) {
            shared_.barrier_landed();
        }
        return true;
    }
    land(header);
    return true;
}

// The descriptors, checked as a whole and then listed.
void ReceiverChannel::read_descs(const vmth_packet_header &header, const uint8_t *raw)
{
    desc_bytes_.resize(header.desc_bytes);
    iovec iov = {desc_bytes_.data(), desc_bytes_.size()};
    read_inside(&iov, 1);
    const vmth_packet_limits limits = shared_.memory.limits(channel_.index(), forms_);
    vmth_packet_error error = {};
    if (vmth_packet_verify(raw, desc_bytes_.data(), desc_bytes_.size(), shared_.hashes.key().seed,
                           &error) != 0) {
        throw packet_error(channel_.name(), error);
    }
    descs_.clear();
    if (header.kind != VMTH_PACKET_PAGES) {
        return;
    }
    if (vmth_packet_check(&header, desc_bytes_.data(), &limits, &error) != 0) {
        throw packet_error(channel_.name(), error);
    }
    for (size_t at = 0; at < desc_bytes_.size();) {
        vmth_desc desc;
        size_t used = 0;
        if (vmth_desc_decode(desc_bytes_.data() + at, desc_bytes_.size() - at, header.block, &limits,
                             &desc, &used, &error) != 0) {
            throw packet_error(channel_.name(), error);
        }
        descs_.push_back(desc);
        at += used;
    }
}

// ---- landing --------------------------------------------------------------------------------------

void ReceiverChannel::land(const vmth_packet_header &header)
{
    const uint32_t block = header.block;
    for (const vmth_desc &desc : descs_) {
        shared_.gate.claim(block, {desc.page, desc.npages}, channel_.name());
    }
    vmth_digest fresh = {};
    for (const vmth_desc &desc : descs_) {
        count(desc);
        if (desc.form == VMTH_FORM_ZERO || desc.form == VMTH_FORM_HOLE) {
            lander_.zeros(block, {desc.page, desc.npages}, &fresh);
        } else {
            // Out of the digest before the first byte is overwritten.
            lander_.invalidate(block, {desc.page, desc.npages});
        }
    }
    land_payload(block, &fresh);
    shared_.counters.packets.add(1);
    shared_.counters.acked_bytes.add(VMTH_PACKET_HEADER_BYTES + header.desc_bytes +
                                     header.payload_bytes);
    acknowledge(header.seq, block, fresh.sum);
}

void ReceiverChannel::count(const vmth_desc &desc)
{
    Counters &counters = shared_.counters;
    switch (desc.form) {
    case VMTH_FORM_NORMAL:
        counters.normal_pages.add(desc.npages);
        break;
    case VMTH_FORM_ZERO:
        counters.zero_pages.add(desc.npages);
        break;
    case VMTH_FORM_HOLE:
        counters.hole_pages.add(desc.npages);
        break;
    case VMTH_FORM_FREE:
        counters.free_pages.add(desc.npages);
        break;
    default:
        counters.forms[desc.form].pages.add(desc.npages);
        counters.forms[desc.form].wire_bytes.add(vmth_desc_bytes(desc.form) + desc.payload_bytes);
        break;
    }
}

// The payload lies in the order of the descriptors.
void ReceiverChannel::land_payload(uint32_t block, vmth_digest *fresh)
{
    frame_runs_.clear();
    coded_.clear();
    coded_at_ = 0;
    for (size_t i = 0; i < descs_.size(); i++) {
        switch (descs_[i].form) {
        case VMTH_FORM_NORMAL:
            add_normal(block, descs_[i], fresh);
            break;
        case VMTH_FORM_DEDUP:
        case VMTH_FORM_DELTA:
        case VMTH_FORM_ZSTD:
        case VMTH_FORM_REUSE:
            land_coded(block, i, fresh);
            break;
        default:
            break;
        }
    }
    land_piece(block, fresh);
}

void ReceiverChannel::add_normal(uint32_t block, const vmth_desc &desc, vmth_digest *fresh)
{
    for (uint64_t done = 0; done < desc.npages;) {
        const uint64_t room = lander_.piece_pages() - piece_npages_;
        const uint64_t take = std::min<uint64_t>(room, desc.npages - done);
        piece_.push_back({desc.page + done, take});
        piece_npages_ += static_cast<size_t>(take);
        done += take;
        if (piece_npages_ == lander_.piece_pages()) {
            land_piece(block, fresh);
        }
    }
}

void ReceiverChannel::land_piece(uint32_t block, vmth_digest *fresh)
{
    std::vector<iovec> &iov = lander_.direct(block, piece_);
    read_inside(iov.data(), iov.size());
    lander_.landed(block, piece_, fresh);
    piece_.clear();
    piece_npages_ = 0;
}

void ReceiverChannel::land_coded(uint32_t block, size_t index, vmth_digest *fresh)
{
    const vmth_desc &desc = descs_[index];
    const uint8_t *payload = nullptr;
    if (desc.payload_bytes > 0) {
        land_piece(block, fresh);  // its content comes first in the stream
        payload = payload_of(index);
    }
    if (desc.form == VMTH_FORM_REUSE) {
        land_reuse(block, desc, payload, fresh);
        return;
    }
    if (desc.form != VMTH_FORM_ZSTD) {
        land_reference(block, desc, payload, fresh);
        return;
    }
    frame_runs_.push_back({desc.page, desc.npages});
    if (payload != nullptr) {
        land_frame(block, desc, payload, fresh);
        frame_runs_.clear();
    }
}

// The payload of a coded descriptor, in the order of the descriptors. Those that follow up to the next
// normal page are read with it: a delta of some ten bytes is not worth a system call.
const uint8_t *ReceiverChannel::payload_of(size_t index)
{
    const uint32_t nbytes = descs_[index].payload_bytes;
    if (coded_at_ == coded_.size()) {
        size_t together = nbytes;
        for (size_t i = index + 1; i < descs_.size() && descs_[i].form != VMTH_FORM_NORMAL &&
                                   together + descs_[i].payload_bytes <= coded_at_once;
             i++) {
            together += descs_[i].payload_bytes;
        }
        coded_.resize(together);
        iovec iov = {coded_.data(), together};
        read_inside(&iov, 1);
        coded_at_ = 0;
    }
    const uint8_t *payload = coded_.data() + coded_at_;
    coded_at_ += nbytes;
    return payload;
}

// A frame that does not decode was damaged on the way: nobody knows its pages' content.
void ReceiverChannel::land_frame(uint32_t block, const vmth_desc &desc, const uint8_t *frame,
                                 vmth_digest *fresh)
{
    uint64_t npages = 0;
    for (const vmth_run &run : frame_runs_) {
        npages += run.npages;
    }
    const uint64_t started_ns = thread_cpu_ns();
    const uint8_t *content =
        frames_.decode(frame, desc.payload_bytes,
                       static_cast<size_t>(npages) * shared_.memory.page_bytes());
    shared_.counters.forms[VMTH_FORM_ZSTD].cpu_ns.add(thread_cpu_ns() - started_ns);
    if (content == nullptr) {
        missed_.insert(missed_.end(), frame_runs_.begin(), frame_runs_.end());
        return;
    }
    lander_.from_buffer(block, frame_runs_, content, fresh);
}

// Dedup and delta: what does not come out as the peer said is missed.
void ReceiverChannel::land_reference(uint32_t block, const vmth_desc &desc, const uint8_t *payload,
                                     vmth_digest *fresh)
{
    const vmth_run run = {desc.page, 1};
    const uint64_t started_ns = thread_cpu_ns();
    const uint8_t *content = references_.make(block, desc, payload);
    if (content == nullptr) {
        missed_.push_back(run);
    } else {
        one_run_.assign(1, run);
        lander_.from_buffer(block, one_run_, content, fresh);
    }
    shared_.counters.forms[desc.form].cpu_ns.add(thread_cpu_ns() - started_ns);
}

// What no file has, or not any more, is missed.
void ReceiverChannel::land_reuse(uint32_t block, const vmth_desc &desc, const uint8_t *hashes,
                                 vmth_digest *fresh)
{
    const size_t page_bytes = shared_.memory.page_bytes();
    const uint64_t started_ns = thread_cpu_ns();
    const size_t at_once = std::min(StoredPages::most, lander_.piece_pages());
    found_.resize(at_once * page_bytes);
    for (uint64_t done = 0; done < desc.npages;) {
        const size_t n = static_cast<size_t>(std::min<uint64_t>(at_once, desc.npages - done));
        vmth_u128 wanted[StoredPages::most];
        for (size_t i = 0; i < n; i++, hashes += VMTH_REUSE_HASH_BYTES) {
            wanted[i] = {load_le64(hashes), load_le64(hashes + 8)};
        }
        const uint64_t right = stored_.read(wanted, n, found_.data());
        for (size_t first = 0, end; first < n; first = end) {
            const uint64_t is_right = right >> first & 1;
            for (end = first + 1; end < n && (right >> end & 1) == is_right; end++) {
            }
            const vmth_run run = {desc.page + done + first, end - first};
            if (is_right == 0) {
                missed_.push_back(run);
                continue;
            }
            one_run_.assign(1, run);
            lander_.from_buffer(block, one_run_, found_.data() + first * page_bytes, fresh);
        }
        done += n;
    }
    shared_.counters.forms[VMTH_FORM_REUSE].cpu_ns.add(thread_cpu_ns() - started_ns);
}

// ---- acknowledging --------------------------------------------------------------------------------

// An ACK packet has room for the missed pages of one packet, so it goes out at once.
void ReceiverChannel::acknowledge(uint64_t seq, uint32_t block, const vmth_u128 &digest)
{
    const Clock::time_point now = Clock::now();
    if (acks_.empty()) {
        oldest_ack_ = now;
    }
    vmth_ack ack = {};
    ack.seq = seq;
    ack.digest = digest;
    ack.status = missed_.empty() ? VMTH_ACK_LANDED : VMTH_ACK_MISSED;
    ack.block = missed_.empty() ? 0 : block;
    acks_.push_back(ack);
    told_missed_.swap(missed_);
    missed_.clear();
    if (!told_missed_.empty() || acks_.size() >= max_held_acks || now - oldest_ack_ >= max_held_time) {
        flush_acks();
    }
}

void ReceiverChannel::flush_acks()
{
    if (acks_.empty()) {
        return;
    }
    ack_bytes_.resize(VMTH_PACKET_HEADER_BYTES + acks_.size() * VMTH_ACK_BYTES +
                      told_missed_.size() * VMTH_DESC_BYTES);
    uint8_t *const desc = ack_bytes_.data() + VMTH_PACKET_HEADER_BYTES;
    uint8_t *at = desc;
    for (const vmth_ack &ack : acks_) {
        vmth_ack_encode(&ack, at);
        at += VMTH_ACK_BYTES;
    }
    vmth_packet_header header = {};
    for (const vmth_run &run : told_missed_) {
        vmth_desc missed = {};
        missed.page = run.page;
        missed.npages = static_cast<uint32_t>(run.npages);
        missed.form = VMTH_FORM_SAME;
        at += vmth_desc_encode(&missed, at, VMTH_DESC_BYTES);
        header.npages += run.npages;
        shared_.counters.missed_pages.add(run.npages);
    }
    header.kind = VMTH_PACKET_ACK;
    header.round = round_;
    header.channel = static_cast<uint16_t>(channel_.index());
    header.seq = acks_.back().seq;
    header.desc_bytes = static_cast<uint32_t>(at - desc);
    header.ndesc = static_cast<uint32_t>(acks_.size());
    vmth_packet_encode_header(&header, desc, shared_.hashes.key().seed, ack_bytes_.data());
    iovec iov = {ack_bytes_.data(), ack_bytes_.size()};
    acks_.clear();
    told_missed_.clear();
    channel_.write_vec(&iov, 1);
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// Landing packets of one channel.
#include "xfer/receiver_channel.hpp"

#include <algorithm>
#include <cstring>

#include "vmth/zero_page.h"
#include "xfer/worker_thread.hpp"

namespace vmth {

namespace {

constexpr uint32_t forms = 1u << VMTH_FORM_NORMAL | 1u << VMTH_FORM_ZERO | 1u << VMTH_FORM_HOLE |
                           1u << VMTH_FORM_FREE;
// What landed is hashed while it is in the cache.
constexpr size_t piece_bytes = 256 * 1024;
constexpr size_t max_piece_pages = 64;
// Acknowledgements are held while more packets are there to read, within these.
constexpr size_t max_held_acks = 16;
constexpr std::chrono::milliseconds max_held_time{20};

using Clock = std::chrono::steady_clock;

}  // namespace

ReceiverChannel::ReceiverChannel(ReceiverShared &shared, int fd, unsigned index)
    : shared_(shared), channel_(fd, index, shared.options.ops),
      piece_pages_(std::clamp<size_t>(piece_bytes / shared.memory.page_bytes(), 1,
                                      max_piece_pages)),
      flush_([this] { flush_acks(); })
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
    const vmth_packet_limits limits = shared_.memory.limits(channel_.index(), forms);
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
        shared_.gate.pass(channel_.index());
        acknowledge(header.seq, {0, 0});
        flush_acks();
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
    const vmth_packet_limits limits = shared_.memory.limits(channel_.index(), forms);
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
        if (desc.form == VMTH_FORM_NORMAL) {
            // Out of the digest before the first byte is overwritten.
            shared_.hashes.invalidate(channel_.index(), block, desc.page, desc.npages);
            shared_.counters.normal_pages.add(desc.npages);
        } else {
            land_told(block, desc, &fresh);
        }
    }
    land_payload(block, &fresh);
    shared_.counters.packets.add(1);
    shared_.counters.acked_bytes.add(VMTH_PACKET_HEADER_BYTES + header.desc_bytes +
                                     header.payload_bytes);
    acknowledge(header.seq, fresh.sum);
}

void ReceiverChannel::land_told(uint32_t block, const vmth_desc &desc, vmth_digest *fresh)
{
    if (desc.form == VMTH_FORM_FREE) {
        shared_.hashes.invalidate(channel_.index(), block, desc.page, desc.npages);
        shared_.counters.free_pages.add(desc.npages);
        return;
    }
    write_zeros(block, {desc.page, desc.npages});
    shared_.hashes.fill_zero(channel_.index(), block, desc.page, desc.npages, fresh);
    Counter &counter =
        desc.form == VMTH_FORM_ZERO ? shared_.counters.zero_pages : shared_.counters.hole_pages;
    counter.add(desc.npages);
}

// In memory only where not already zero: reading does not populate a hole of private memory. What
// another program holds is not known: it is told of every zero page.
void ReceiverChannel::write_zeros(uint32_t block, const vmth_run &zeros)
{
    if (shared_.memory.hostless(block)) {
        shared_.hashes.invalidate(channel_.index(), block, zeros.page, zeros.npages);
        shared_.sink->write_zeros(block, zeros);
        return;
    }
    const size_t page_bytes = shared_.memory.page_bytes();
    const uint64_t end = zeros.page + zeros.npages;
    for (uint64_t page = zeros.page; page < end;) {
        std::optional<vmth_run> run = shared_.maybe_nonzero[block].first_run(page, end - page);
        if (!run) {
            break;
        }
        shared_.hashes.invalidate(channel_.index(), block, run->page, run->npages);
        for (uint64_t i = 0; i < run->npages; i++) {
            uint8_t *host = shared_.memory.host(block, run->page + i);
            if (!vmth_is_zero(host, page_bytes)) {
                memset(host, 0, page_bytes);
            }
        }
        page = run->page + run->npages;
    }
}

void ReceiverChannel::land_payload(uint32_t block, vmth_digest *fresh)
{
    piece_.clear();
    size_t room = piece_pages_;
    for (const vmth_desc &desc : descs_) {
        if (desc.form != VMTH_FORM_NORMAL) {
            continue;
        }
        for (uint64_t done = 0; done < desc.npages;) {
            uint64_t take = std::min<uint64_t>(room, desc.npages - done);
            piece_.push_back({desc.page + done, take});
            done += take;
            room -= static_cast<size_t>(take);
            if (room == 0) {
                land_piece(block, piece_, fresh);
                piece_.clear();
                room = piece_pages_;
            }
        }
    }
    land_piece(block, piece_, fresh);
}

void ReceiverChannel::land_piece(uint32_t block, const std::vector<vmth_run> &piece,
                                 vmth_digest *fresh)
{
    if (shared_.memory.hostless(block)) {
        hand_on_piece(block, piece, fresh);
        return;
    }
    const size_t page_bytes = shared_.memory.page_bytes();
    iov_.clear();
    for (const vmth_run &run : piece) {
        shared_.prefault.write(block, run, shared_.maybe_nonzero[block]);
        shared_.maybe_nonzero[block].set_range(run.page, run.npages);
        iov_.push_back({shared_.memory.host(block, run.page),
                        static_cast<size_t>(run.npages) * page_bytes});
    }
    read_inside(iov_.data(), iov_.size());
    for (const vmth_run &run : piece) {
        set_hashes(block, run, shared_.memory.host(block, run.page), fresh);
    }
}

// What is hashed is what is handed on: both come from the scratch buffer. An entry is set only after.
void ReceiverChannel::hand_on_piece(uint32_t block, const std::vector<vmth_run> &piece,
                                    vmth_digest *fresh)
{
    const size_t page_bytes = shared_.memory.page_bytes();
    uint64_t npages = 0;
    for (const vmth_run &run : piece) {
        npages += run.npages;
    }
    if (npages == 0) {
        return;
    }
    scratch_.resize(piece_pages_ * page_bytes);
    iovec iov = {scratch_.data(), static_cast<size_t>(npages) * page_bytes};
    read_inside(&iov, 1);
    shared_.sink->write_pages(block, piece, scratch_.data());
    const uint8_t *content = scratch_.data();
    for (const vmth_run &run : piece) {
        set_hashes(block, run, content, fresh);
        content += run.npages * page_bytes;
    }
}

// Of what landed, at `content`: at most a piece.
void ReceiverChannel::set_hashes(uint32_t block, const vmth_run &run, const uint8_t *content,
                                 vmth_digest *fresh)
{
    if (!shared_.hashes.enabled()) {
        return;
    }
    vmth_u128 hashes[max_piece_pages];
    const size_t npages = static_cast<size_t>(run.npages);
    if (vmth_page_hash(&shared_.hashes.key(), content, shared_.memory.page_bytes(), npages,
                       hashes) != 0) {
        throw TransferError(ErrorKind::usage, "page kernel refused its arguments");
    }
    shared_.hashes.replace(channel_.index(), block, run.page, npages, hashes, fresh);
}

// ---- acknowledging --------------------------------------------------------------------------------

void ReceiverChannel::acknowledge(uint64_t seq, const vmth_u128 &digest)
{
    const Clock::time_point now = Clock::now();
    if (acks_.empty()) {
        oldest_ack_ = now;
    }
    vmth_ack ack = {};
    ack.seq = seq;
    ack.digest = digest;
    ack.status = VMTH_ACK_LANDED;
    acks_.push_back(ack);
    if (acks_.size() >= max_held_acks || now - oldest_ack_ >= max_held_time) {
        flush_acks();
    }
}

void ReceiverChannel::flush_acks()
{
    if (acks_.empty()) {
        return;
    }
    uint8_t raw[VMTH_PACKET_HEADER_BYTES + max_held_acks * VMTH_ACK_BYTES];
    uint8_t *desc = raw + VMTH_PACKET_HEADER_BYTES;
    for (size_t i = 0; i < acks_.size(); i++) {
        vmth_ack_encode(&acks_[i], desc + i * VMTH_ACK_BYTES);
    }
    vmth_packet_header header = {};
    header.kind = VMTH_PACKET_ACK;
    header.round = round_;
    header.channel = static_cast<uint16_t>(channel_.index());
    header.seq = acks_.back().seq;
    header.desc_bytes = static_cast<uint32_t>(acks_.size() * VMTH_ACK_BYTES);
    header.ndesc = static_cast<uint32_t>(acks_.size());
    vmth_packet_encode_header(&header, desc, shared_.hashes.key().seed, raw);
    iovec iov = {raw, VMTH_PACKET_HEADER_BYTES + header.desc_bytes};
    acks_.clear();
    channel_.write_vec(&iov, 1);
}

}  // namespace vmth

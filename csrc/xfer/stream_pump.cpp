// SPDX-License-Identifier: Apache-2.0
// Reading pages of a QEMU's stream into a ring, and queueing them for the page channels.
#include "xfer/stream_pump.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "sys/sock_take.h"
#include "xfer/steady_clock.hpp"

namespace vmth {

namespace {

constexpr size_t runs_a_call = 1024;
constexpr size_t record_head_bytes = 8;  // all of a record without pages

TransferError usage(const std::string &message)
{
    return TransferError(ErrorKind::usage, message);
}

}  // namespace

PumpRing::PumpRing(size_t nbytes) : nbytes_(nbytes)
{
    void *memory =
        mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        throw system_error("ring of " + std::to_string(nbytes) + " bytes", errno);
    }
    memory_ = static_cast<uint8_t *>(memory);
    (void)madvise(memory, nbytes, MADV_HUGEPAGE);  // where there are none, small ones do
}

PumpRing::~PumpRing()
{
    munmap(memory_, nbytes_);
}

StreamPump::StreamPump(Sender &sender, int fd, std::vector<uint64_t> used_length, std::string names,
                       size_t page_bytes, size_t piece_bytes, size_t npieces)
    : sender_(sender), fd_(UniqueFd::duplicate(fd)), used_length_(std::move(used_length)), names_(std::move(names)),
      blocks_{static_cast<uint32_t>(page_bytes), static_cast<uint32_t>(used_length_.size()),
              used_length_.data(), reinterpret_cast<const uint8_t *>(names_.data())},
      piece_bytes_(piece_bytes), tickets_(npieces, 0), runs_(runs_a_call)
{
    if (names_.size() != used_length_.size() * VMTH_QEMU_NAME_BYTES ||
        used_length_.size() > VMTH_QEMU_MAX_BLOCKS) {
        throw usage(std::to_string(names_.size()) + " bytes of names for " +
                    std::to_string(used_length_.size()) + " blocks");
    }
    if (page_bytes == 0 || page_bytes > VMTH_QEMU_MAX_PAGE_BYTES || npieces < 2 ||
        piece_bytes < 4 * page_bytes) {
        throw usage(std::to_string(npieces) + " pieces of " + std::to_string(piece_bytes) +
                    " bytes, allowed 2 or more of four pages");
    }
    if (!fd_) {
        throw system_error("the source's stream", errno);
    }
    ring_ = std::make_shared<PumpRing>(npieces * piece_bytes);
    sender_.keep(ring_);
}

Pumped StreamPump::run(const uint8_t *first, size_t first_bytes, uint32_t block, uint32_t round,
                       const PumpLimits &limits)
{
    if (first_bytes > piece_bytes_ / 2) {
        throw usage(std::to_string(first_bytes) + " bytes at first, allowed half a piece");
    }
    const int64_t until_ns = steady_ns() + limits.time_ns;
    const size_t most = std::max(limits.piece_bytes, piece_bytes_ / 8);
    Pumped pumped;
    pumped.block = block;
    pumped.left = first;
    pumped.left_bytes = first_bytes;
    pumped.stop = PumpStop::time;
    while (settle(limits.ahead_bytes, until_ns) && next_piece(until_ns)) {
        uint8_t *const in = ring_->at(at_ * piece_bytes_);
        std::copy_n(pumped.left, pumped.left_bytes, in);
        pumped.left = in;
        uint8_t *const end = in + pumped.left_bytes;
        const size_t room = std::min(most, piece_bytes_ - pumped.left_bytes);
        size_t got = 0;
        bool ended = false;
        int result = vmth_sock_take(fd_.get(), end, room, limits.patience_ns, &got, &ended);
        if (result == 0 && got == 0 && !ended && vmth_sock_wait(fd_.get(), limits.patience_ns) > 0) {
            result = vmth_sock_take(fd_.get(), end, room, limits.patience_ns, &got, &ended);
        }
        if (result != 0 && result != -ECONNRESET) {  // that is an end, which reading tells
            throw system_error("the source's stream", -result);
        }
        if (result != 0 || got == 0) {
            pumped.stop = PumpStop::idle;
            break;
        }
        pumped.read_bytes += got;
        pumped.left_bytes += got;
        if (!use(pumped, round, limits.pages)) {
            pumped.stop = pumped.pages >= limits.pages ? PumpStop::pages : PumpStop::other;
            break;
        }
        if (steady_ns() >= until_ns) {
            break;
        }
    }
    (void)settle(UINT64_MAX, 0);
    pumped.ahead_bytes = lent_bytes_;
    pumped.ticket = lent_.empty() ? 0 : lent_.back().ticket;
    return pumped;
}

// What is left is then in a piece that may be overwritten once the next one was filled.
bool StreamPump::next_piece(int64_t until_ns)
{
    const size_t next = (at_ + 1) % tickets_.size();
    if (!wait_read(tickets_[next], until_ns)) {
        return false;
    }
    tickets_[next] = 0;
    at_ = next;
    return true;
}

// Until no more than so much is queued and not read.
bool StreamPump::settle(uint64_t ahead_bytes, int64_t until_ns)
{
    const uint64_t read = sender_.pages_read();
    size_t done = 0;
    while (done < lent_.size() && (lent_[done].ticket <= read || lent_bytes_ > ahead_bytes)) {
        if (lent_[done].ticket > read && !wait_read(lent_[done].ticket, until_ns)) {
            break;
        }
        lent_bytes_ -= lent_[done].nbytes;
        done++;
    }
    lent_.erase(lent_.begin(), lent_.begin() + static_cast<ptrdiff_t>(done));
    return lent_bytes_ <= ahead_bytes;
}

bool StreamPump::wait_read(uint64_t ticket, int64_t until_ns) const
{
    // A timeout of 0 is none.
    return ticket <= sender_.pages_read() ||
           sender_.wait_read(ticket, std::max<int64_t>(1, until_ns - steady_ns()));
}

// Whole records of what is left; false where something else than pages comes, or so many are queued.
bool StreamPump::use(Pumped &pumped, uint32_t round, uint64_t most_pages)
{
    for (;;) {
        vmth_qemu_parsed parsed;
        vmth_qemu_error error;
        uint32_t block = pumped.block;
        if (vmth_qemu_ram_parse(&blocks_, &block, pumped.left, pumped.left_bytes, runs_.data(),
                                runs_.size(), &parsed, &error) != 0) {
            return false;
        }
        const bool more = parsed.stop == VMTH_QEMU_FULL || parsed.stop == VMTH_QEMU_SHORT;
        if (parsed.nruns > 0 && !queue(pumped, parsed.nruns, pumped.left, round)) {
            return false;
        }
        // The record that has stopped it is the reader's.
        const size_t used = more ? parsed.used : parsed.used - record_head_bytes;
        pumped.block = block;
        pumped.used_bytes += used;
        pumped.left += used;
        pumped.left_bytes -= used;
        if (!more || pumped.pages >= most_pages) {
            return false;
        }
        if (parsed.stop == VMTH_QEMU_SHORT) {
            // A record that is longer than half a piece would never become whole here.
            return parsed.need <= piece_bytes_ / 2;
        }
    }
}

// All runs or none: false, and none, where a page of them went out since the last barrier, or is of a
// kind that the channels do not take.
bool StreamPump::queue(Pumped &pumped, size_t nruns, const uint8_t *in, uint32_t round)
{
    uint64_t npages = 0;
    uint64_t nbytes = 0;
    for (size_t i = 0; i < nruns; i++) {
        if (runs_[i].kind > VMTH_QEMU_PAGE) {
            return false;
        }
        npages += runs_[i].npages;
        nbytes += runs_[i].npages * runs_[i].nbytes;
    }
    const auto ticket = sender_.send_stretch(runs_.data(), nruns, in, pumped.left_bytes, round);
    if (!ticket) {
        return false;
    }
    pumped.pages += npages;
    tickets_[at_] = *ticket;
    lent_.push_back({*ticket, nbytes});
    lent_bytes_ += nbytes;
    return true;
}

}  // namespace vmth

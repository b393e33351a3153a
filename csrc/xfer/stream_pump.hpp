// SPDX-License-Identifier: Apache-2.0
// Pages of a QEMU's plain stream, from its socket to the page channels, as long as nothing else comes.
//
//   socket --take--> | piece | piece | ... a ring --parse--> runs --send_stretch()--> Sender
//                      ^ filled again once the sender has given back its ticket
//
// Whoever reads the stream has it read here while it is in the midst of page records: small pieces stay
// in the caches until they are sent, and cost nobody an event. What is not simply pages that may go out
// (a section's end, a page that went out since the last barrier, bytes that QEMU does not send) is
// handed back, unused and in order, to whoever knows what to do with it. The payload is read in place.
#ifndef VMTH_XFER_STREAM_PUMP_HPP
#define VMTH_XFER_STREAM_PUMP_HPP

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "vmth/qemu_ram.h"
#include "xfer/sender.hpp"
#include "xfer/unique_fd.hpp"

namespace vmth {

// One run() of a pump ends for the first of these.
struct PumpLimits {
    int64_t time_ns = 0;      // so long, looked at once a piece
    int64_t patience_ns = 0;  // nothing came for so long
    uint64_t pages = 0;       // so many have been queued, or a batch's more
    uint64_t ahead_bytes = 0;  // no more is queued and not read when a piece is read
    size_t piece_bytes = 0;   // read at once, at most; the ring's pieces bound it too
};

enum class PumpStop : uint32_t {
    time = 1,  // or the sender still read what had to be waited for
    pages = 2,  // so many are queued
    idle = 3,  // nothing came, or the connection has ended: a read of it tells which
    other = 4,  // what is left begins with something else than pages that may go out
};

struct Pumped {
    PumpStop stop = PumpStop::idle;
    uint32_t block = VMTH_QEMU_NO_BLOCK;  // that CONTINUE means in what is left
    uint64_t read_bytes = 0;             // of the socket
    uint64_t used_bytes = 0;             // whole records, of what was given and what was read
    uint64_t pages = 0;                  // queued
    uint64_t ahead_bytes = 0;            // payload queued by this pump and not read yet
    uint64_t ticket = 0;                 // of the pages queued last, by this pump; 0: none
    const uint8_t *left = nullptr;       // neither used nor lost; as it is until the next run()
    size_t left_bytes = 0;
};

// Anonymous memory, of huge pages where there are: a stream has something to look at on each 4 KiB.
class PumpRing {
public:
    explicit PumpRing(size_t nbytes);
    ~PumpRing();
    PumpRing(const PumpRing &) = delete;
    PumpRing &operator=(const PumpRing &) = delete;
    uint8_t *at(size_t offset) const noexcept { return memory_ + offset; }

private:
    const size_t nbytes_;
    uint8_t *memory_;
};

class StreamPump {
public:
    // A ring of `npieces` (at least 2) of `piece_bytes`, and the stream's blocks, which are the sender's,
    // in its order. `names` as in vmth_qemu_blocks. The descriptor is duplicated. Throws usage for what
    // does not fit together.
    StreamPump(Sender &sender, int fd, std::vector<uint64_t> used_length, std::string names,
               size_t page_bytes, size_t piece_bytes, size_t npieces);
    StreamPump(const StreamPump &) = delete;
    StreamPump &operator=(const StreamPump &) = delete;

    // From the thread that calls the sender's send*(). `first`: bytes of the stream that were read before
    // (at most half a piece), and the block that CONTINUE means in them. The descriptor is not waited
    // for longer than the limits say. Throws what the sender throws, and io.
    Pumped run(const uint8_t *first, size_t first_bytes, uint32_t block, uint32_t round,
               const PumpLimits &limits);

private:
    struct Lent {
        uint64_t ticket;
        uint64_t nbytes;
    };

    bool next_piece(int64_t until_ns);
    bool settle(uint64_t ahead_bytes, int64_t until_ns);
    bool wait_read(uint64_t ticket, int64_t until_ns) const;
    bool use(Pumped &pumped, uint32_t round, uint64_t most_pages);
    bool queue(Pumped &pumped, size_t nruns, const uint8_t *in, uint32_t round);

    Sender &sender_;
    const UniqueFd fd_;
    const std::vector<uint64_t> used_length_;
    const std::string names_;
    const vmth_qemu_blocks blocks_;
    const size_t piece_bytes_;
    std::shared_ptr<PumpRing> ring_;  // the sender's as well: its threads read it
    std::vector<uint64_t> tickets_;        // of each piece, the last that reads it; 0: none
    size_t at_ = 0;                        // the piece that is filled
    std::vector<vmth_qemu_run> runs_;
    std::vector<Lent> lent_;  // not read yet, the oldest first
    uint64_t lent_bytes_ = 0;
};

}  // namespace vmth

#endif

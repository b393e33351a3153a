// SPDX-License-Identifier: Apache-2.0
// Turns batches into one packet: reads each page once (zero test and hash together), then lists what to
// send, straight from guest memory or from a lent buffer.
//
//   head    | header, 64 | desc | desc | ...     one buffer, reused
//   iov     head, then one entry a stretch of normal pages that lie back to back
//
// Order per page: hash, entry in the table, and only later the send. Belongs to one worker thread.
#ifndef VMTH_XFER_PACKET_BUILDER_HPP
#define VMTH_XFER_PACKET_BUILDER_HPP

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "xfer/guest_memory.hpp"
#include "xfer/hash_table.hpp"
#include "xfer/job_queue.hpp"
#include "xfer/ledger.hpp"
#include "xfer/prefault.hpp"

namespace vmth {

struct FormCounts {
    uint64_t normal = 0;
    uint64_t zero = 0;
    uint64_t hole = 0;
    uint64_t free = 0;
};

class PacketBuilder {
public:
    PacketBuilder(const GuestMemory &memory, HashTable &hashes, Prefault &prefault,
                  unsigned channel);

    void begin(uint32_t block, uint32_t round);
    void add(const Batch &batch);
    // Encode the header and return what the ledger keeps.
    SentPacket finish(uint64_t seq);

    uint64_t payload_bytes() const noexcept { return payload_bytes_; }
    uint64_t npages() const noexcept { return npages_; }
    size_t ndesc() const noexcept { return descs_.size(); }
    const FormCounts &counts() const noexcept { return counts_; }

    // After finish(), until begin(): the vectors may be consumed.
    iovec &head() noexcept { return head_iov_; }
    std::vector<iovec> &payload() noexcept { return payload_; }

private:
    // Pages wherever they lie: the first at `at`, one every `stride` bytes.
    void read_run(const LentRun &run);
    void classify(const LentRun &piece);
    void hash(const LentRun &piece, vmth_u128 *hashes, uint64_t *zero_word) const;
    void append(vmth_page_form form, uint64_t page, uint64_t npages);
    void append_payload(const LentRun &run);

    const GuestMemory &memory_;
    HashTable &hashes_;
    Prefault &prefault_;
    const unsigned channel_;
    const size_t piece_pages_;
    uint32_t block_ = 0;
    uint32_t round_ = 0;
    uint64_t payload_bytes_ = 0;
    uint64_t npages_ = 0;
    vmth_digest fresh_ = {};
    FormCounts counts_;
    std::vector<vmth_desc> descs_;
    std::vector<vmth_run> runs_;  // of the NORMAL pages
    std::vector<uint8_t> head_;
    std::vector<iovec> payload_;
    iovec head_iov_ = {};
};

}  // namespace vmth

#endif

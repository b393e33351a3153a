// SPDX-License-Identifier: Apache-2.0
// Turns batches into one packet: reads pages piece by piece (zero test and hash together), then gives
// each the cheapest form that is on.
//
//   piece, 64 pages   hash -> same as what landed? -> nothing
//                          -> zero                 -> told
//                          -> else                 -> an encoder takes it, or it goes raw
//
// Where nothing turns on the hash, a piece is only tested for zero pages, and its raw pages are read,
// which is to say hashed, or fetched where there is no digest, portion by portion as they go out: the
// send finds them in near caches.
//
// Where a form works on content, the piece is copied first and all that is said of it is said of the
// copy, so that an encoded page is never torn. Raw pages are sent from where they lie. Order per page:
// hash, entry in the table, and only later the send. Belongs to one worker thread.
#ifndef VMTH_XFER_PACKET_BUILDER_HPP
#define VMTH_XFER_PACKET_BUILDER_HPP

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "xfer/content_places.hpp"
#include "xfer/counters.hpp"
#include "xfer/delta_encoder.hpp"
#include "xfer/guest_memory.hpp"
#include "xfer/hash_table.hpp"
#include "xfer/job_queue.hpp"
#include "xfer/kept_copies.hpp"
#include "xfer/known_landed.hpp"
#include "xfer/ledger.hpp"
#include "xfer/packet_parts.hpp"
#include "xfer/page_forms.hpp"
#include "xfer/prefault.hpp"
#include "xfer/reuse_encoder.hpp"
#include "xfer/zstd_encoder.hpp"

namespace vmth {

// What the builders of all channels share.
struct BuilderContext {
    const GuestMemory &memory;
    HashTable &hashes;
    Prefault &prefault;
    KnownLanded &known;
    ContentPlaces &places;
    DeltaCache &deltas;
    const ReuseState &reuse;
    KeptCopies &copies;
    const FormsSwitch &forms;
    Counters &counters;
    size_t packet_bytes;
};

class PacketBuilder {
public:
    PacketBuilder(const BuilderContext &context, unsigned channel);

    void begin(uint32_t block, uint32_t round, uint64_t most_payload_bytes);
    void add(const Batch &batch);
    // Encode the header and return what the ledger keeps. Not for an empty packet. With unread() it is
    // not whole, and its digest lacks what is read later.
    SentPacket finish(uint64_t seq);
    // After end(): raw pages are left to be read, and the payload is nothing else.
    bool unread() const noexcept { return next_unread_ < unread_.size(); }
    // Reads the next of them, and enters their hashes in the table: `portion` is where they lie.
    void read_portion(std::vector<iovec> &portion);
    // All that are left, for a send that does not read them: only if there is a digest.
    void hash_rest();
    // Of the packet so far.
    const vmth_u128 &digest() const noexcept { return fresh_.sum; }

    // Every page so far turned out to be the same, after end().
    bool empty() const noexcept { return parts_.ndesc() == 0; }
    // No page is added any more: what encoders still hold goes into the packet.
    void end();
    // At most, once end() was called.
    uint64_t payload_bytes() const noexcept;
    uint64_t pages_read() const noexcept { return pages_read_; }
    size_t ndesc() const noexcept { return parts_.ndesc(); }
    const PacketParts &parts() const noexcept { return parts_; }

    // After finish(), until begin(): the vectors may be consumed.
    iovec &head() noexcept { return head_iov_; }
    std::vector<iovec> &payload() noexcept { return parts_.payload(); }

private:
    struct Piece;

    // Pages wherever they lie: the first at `at`, one every `stride` bytes.
    void read_run(const LentRun &run, bool lent);
    void read_piece(const LentRun &run, bool lent);
    bool read_later(const Piece &piece) const noexcept;
    void hash(Piece &piece) const;
    void find_known(Piece &piece) const;
    void find_same(Piece &piece) const;
    void emit_unread(const Piece &piece);
    void hash_run(const LentRun &run);
    void replace_hashes(const Piece &piece);
    void emit(const Piece &piece);
    void emit_content(const Piece &piece, size_t first, size_t end);
    StagedPage staged(const Piece &piece, size_t i) const;
    template <typename Take>
    uint64_t take(const Piece &piece, uint64_t pages, FormCounters &counters, Take take_page);
    bool dedup(const StagedPage &page);
    bool keep(const StagedPage &page);
    void forget(const vmth_run &run);
    uint64_t reuse(const Piece &piece, uint64_t pages);

    const BuilderContext context_;
    const unsigned channel_;
    const size_t piece_pages_;
    FormsSetting forms_;  // of this packet
    uint32_t block_ = 0;
    uint32_t round_ = 0;
    uint64_t pages_read_ = 0;
    vmth_digest fresh_ = {};
    PacketParts parts_;
    DeltaEncoder delta_;
    ReuseEncoder reuse_;
    ZstdEncoder zstd_;
    std::vector<uint8_t> staging_;  // a piece, where a form works on content
    std::vector<uint8_t> head_;
    iovec head_iov_ = {};
    std::vector<KeptCopy> kept_;
    std::vector<LentRun> unread_;  // pages back to back, at most a piece each
    size_t next_unread_ = 0;
};

}  // namespace vmth

#endif

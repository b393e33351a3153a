// SPDX-License-Identifier: Apache-2.0
// Reading, classifying and listing the pages of a packet.
#include "xfer/packet_builder.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "vmth/zero_page.h"
#include "xfer/near_cache.hpp"
#include "xfer/thread_clock.hpp"

namespace vmth {

namespace {

// Small enough to be in the nearest caches while it is looked at.
constexpr size_t piece_bytes = 256 * 1024;
constexpr size_t max_piece_pages = 64;

constexpr uint32_t forms_of_content =
    form_bit(VMTH_FORM_DEDUP) | form_bit(VMTH_FORM_DELTA) | form_bit(VMTH_FORM_ZSTD) |
    form_bit(VMTH_FORM_REUSE);

void check(int result)
{
    if (result != 0) {
        throw TransferError(ErrorKind::usage, "page kernel refused its arguments", -result);
    }
}

bool bit(uint64_t word, size_t i)
{
    return (word >> i & 1) != 0;
}

bool equal(const vmth_u128 &a, const vmth_u128 &b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

// Bits [first, end) of a word, first < end <= 64.
uint64_t bits_between(size_t first, size_t end)
{
    return (~uint64_t{0} >> (64 - (end - first))) << first;
}

// Calls body(first, end, set) for each stretch of [0, n) in which bits of `word` are alike.
template <typename Body> void for_stretches(uint64_t word, size_t n, Body body)
{
    for (size_t first = 0; first < n;) {
        size_t end = first + 1;
        while (end < n && bit(word, end) == bit(word, first)) {
            end++;
        }
        body(first, end, bit(word, first));
        first = end;
    }
}

}  // namespace

// Up to 64 pages that are read together; bit i of a word is page i.
struct PacketBuilder::Piece {
    uint64_t page = 0;
    size_t npages = 0;
    bool lent = false;
    LentRun content = {};  // what is hashed
    LentRun origin = {};   // what is sent if it goes raw
    uint64_t zero = 0;
    uint64_t known = 0;
    uint64_t same = 0;
    // Filled with a digest, and `landed` where something is known:
    vmth_u128 hashes[max_piece_pages];
    vmth_u128 landed[max_piece_pages];
};

PacketBuilder::PacketBuilder(const BuilderContext &context, unsigned channel)
    : context_(context), channel_(channel),
      piece_pages_(std::clamp<size_t>(piece_bytes / context.memory.page_bytes(), 1,
                                      max_piece_pages)),
      parts_(context.memory.page_bytes()),
      delta_(context.memory.page_bytes(), context.deltas, context.counters.forms[VMTH_FORM_DELTA]),
      reuse_(context.reuse, context.counters.forms[VMTH_FORM_REUSE], context.memory.page_bytes()),
      zstd_(context.memory.page_bytes(), context.counters.forms[VMTH_FORM_ZSTD])
{
}

void PacketBuilder::begin(uint32_t block, uint32_t round, uint64_t most_payload_bytes)
{
    block_ = block;
    round_ = round;
    forms_ = context_.forms.get();
    if (context_.memory.handed_on(block)) {
        forms_.mask &= ~form_bit(VMTH_FORM_DELTA);
    }
    pages_read_ = 0;
    fresh_ = {};
    unread_.clear();
    next_unread_ = 0;
    // Where less may be sent, a frame still has the room that it may need.
    parts_.begin(std::max<size_t>(context_.packet_bytes, most_payload_bytes));
}

void PacketBuilder::add(const Batch &batch)
{
    for (const LentRun &run : batch.lent) {
        if (run.at != nullptr) {
            read_run(run, true);
            continue;
        }
        pages_read_ += run.npages;
        forget({run.page, run.npages});
        context_.hashes.fill_zero(channel_, block_, run.page, run.npages, &fresh_);
        parts_.told(VMTH_FORM_ZERO, run.page, run.npages);
    }
    for (const vmth_run &run : batch.runs) {
        if (batch.form == VMTH_FORM_NORMAL) {
            context_.prefault.read(block_, run);
            read_run({run.page, run.npages, context_.memory.host(block_, run.page),
                      context_.memory.page_bytes()},
                     false);
            continue;
        }
        forget(run);
        if (batch.form == VMTH_FORM_HOLE) {
            context_.hashes.fill_zero(channel_, block_, run.page, run.npages, &fresh_);
        } else {
            context_.hashes.invalidate(channel_, block_, run.page, run.npages);
        }
        parts_.told(batch.form, run.page, run.npages);
    }
}

// Something else is told of these pages: before the table says so too.
void PacketBuilder::forget(const vmth_run &run)
{
    context_.places.replaced(block_, run);
    context_.known.forget(block_, run.page, run.npages);
}

// ---- pieces -----------------------------------------------------------------------------------------

// `lent`: nobody writes to the pages until they are sent, and they are gone then.
void PacketBuilder::read_run(const LentRun &run, bool lent)
{
    for (uint64_t done = 0; done < run.npages;) {
        const uint64_t take = std::min<uint64_t>(piece_pages_, run.npages - done);
        read_piece({run.page + done, take, run.at + done * run.stride, run.stride}, lent);
        done += take;
    }
    pages_read_ += run.npages;
}

void PacketBuilder::read_piece(const LentRun &run, bool lent)
{
    const size_t page_bytes = context_.memory.page_bytes();
    Piece piece;
    piece.page = run.page;
    piece.npages = static_cast<size_t>(run.npages);
    piece.lent = lent;
    piece.content = run;
    piece.origin = run;
    if (!lent && (forms_.mask & forms_of_content) != 0) {
        staging_.resize(piece_pages_ * page_bytes);
        memcpy(staging_.data(), run.at, piece.npages * page_bytes);  // stride is a page
        piece.content.at = staging_.data();
    }
    find_known(piece);
    if (read_later(piece)) {
        emit_unread(piece);
        return;
    }
    hash(piece);
    find_same(piece);
    replace_hashes(piece);
    emit(piece);
}

void PacketBuilder::hash(Piece &piece) const
{
    const size_t page_bytes = context_.memory.page_bytes();
    const HashTable &table = context_.hashes;
    const bool together = piece.content.stride == page_bytes;
    const size_t at_once = together ? piece.npages : 1;
    for (size_t i = 0; i < piece.npages; i += at_once) {
        const uint8_t *at = piece.content.at + i * piece.content.stride;
        uint64_t zero = 0;
        size_t nzero = 0;
        check(table.enabled() ? vmth_page_hash_zero(&table.key(), at, page_bytes, at_once,
                                                    piece.hashes + i, &zero, &nzero)
                              : vmth_zero_scan(at, page_bytes, at_once, &zero, &nzero));
        piece.zero |= zero << i;
    }
}

// What the destination is known to hold.
void PacketBuilder::find_known(Piece &piece) const
{
    if ((forms_.mask & hashing_forms) != 0 || context_.places.used()) {
        piece.known = context_.known.known(block_, piece.page, piece.npages);
    }
}

// Which pages hold that still.
void PacketBuilder::find_same(Piece &piece) const
{
    if (piece.known == 0) {
        return;
    }
    context_.hashes.entries(block_, piece.page, piece.npages, piece.landed);
    for (size_t i = 0; forms_.on(VMTH_FORM_SAME) && i < piece.npages; i++) {
        if (bit(piece.known, i) && equal(piece.hashes[i], piece.landed[i])) {
            piece.same |= uint64_t{1} << i;
        }
    }
}

// Before the pages are sent: what is sent again is not known landed until it is acknowledged.
void PacketBuilder::replace_hashes(const Piece &piece)
{
    for_stretches(piece.same, piece.npages, [&](size_t first, size_t end, bool same) {
        for (size_t i = first; !same && i < end; i++) {
            if (bit(piece.known, i)) {
                context_.places.replaced(block_, piece.page + i, piece.landed[i]);
            }
        }
        if (!same) {
            context_.known.forget(block_, piece.page + first, end - first);
            context_.hashes.replace(channel_, block_, piece.page + first, end - first,
                                    piece.hashes + first, &fresh_);
        }
    });
}

// ---- read as they go out ----------------------------------------------------------------------------

// No form turns on the pages' content, and nothing is told of what was there before.
bool PacketBuilder::read_later(const Piece &piece) const noexcept
{
    return !piece.lent && piece.known == 0 && (forms_.mask & forms_of_content) == 0;
}

void PacketBuilder::emit_unread(const Piece &piece)
{
    const size_t page_bytes = context_.memory.page_bytes();
    uint64_t zeros = 0;
    size_t nzero = 0;
    check(vmth_zero_scan(piece.content.at, page_bytes, piece.npages, &zeros, &nzero));
    context_.known.forget(block_, piece.page, piece.npages);
    for_stretches(zeros, piece.npages, [&](size_t first, size_t end, bool zero) {
        const LentRun run = {piece.page + first, end - first, piece.origin.at + first * page_bytes,
                             page_bytes};
        if (zero) {
            context_.hashes.fill_zero(channel_, block_, run.page, run.npages, &fresh_);
            parts_.told(VMTH_FORM_ZERO, run.page, run.npages);
        } else {
            parts_.raw(run);
            unread_.push_back(run);
        }
    });
}

void PacketBuilder::read_portion(std::vector<iovec> &portion)
{
    portion.clear();
    for (size_t npages = 0; unread(); next_unread_++) {
        const LentRun &run = unread_[next_unread_];
        const size_t nbytes = static_cast<size_t>(run.npages) * run.stride;
        npages += static_cast<size_t>(run.npages);
        if (npages > piece_pages_ && !portion.empty()) {
            return;
        }
        if (context_.hashes.enabled()) {
            hash_run(run);
        } else if (nbytes <= piece_bytes) {
            fetch(run.at, nbytes);
        }
        auto *at = const_cast<uint8_t *>(run.at);  // sendmsg does not write through it
        portion.push_back({at, nbytes});
    }
}

void PacketBuilder::hash_rest()
{
    for (; unread(); next_unread_++) {
        if (context_.hashes.enabled()) {
            hash_run(unread_[next_unread_]);
        }
    }
}

void PacketBuilder::hash_run(const LentRun &run)
{
    vmth_u128 hashes[max_piece_pages];
    const auto npages = static_cast<size_t>(run.npages);
    check(vmth_page_hash(&context_.hashes.key(), run.at, run.stride, npages, hashes));
    context_.hashes.replace(channel_, block_, run.page, npages, hashes, &fresh_);
}

// ---- forms ------------------------------------------------------------------------------------------

void PacketBuilder::emit(const Piece &piece)
{
    for_stretches(piece.same, piece.npages, [&](size_t first, size_t end, bool same) {
        if (same) {
            FormCounters &counters = context_.counters.forms[VMTH_FORM_SAME];
            counters.pages.add(end - first);
            counters.content_bytes.add((end - first) * context_.memory.page_bytes());
            context_.places.unchanged(block_, {piece.page + first, end - first});
            return;
        }
        for_stretches(piece.zero >> first, end - first, [&](size_t from, size_t to, bool zero) {
            if (zero) {
                parts_.told(VMTH_FORM_ZERO, piece.page + first + from, to - from);
            } else {
                emit_content(piece, first + from, first + to);
            }
        });
    });
}

// Pages [first, end) of the piece, neither the same nor zero: to the first encoder that takes them,
// cheapest on the wire first; those that none takes go raw.
void PacketBuilder::emit_content(const Piece &piece, size_t first, size_t end)
{
    uint64_t left = bits_between(first, end);
    if (forms_.on(VMTH_FORM_DEDUP)) {
        left = take(piece, left, context_.counters.forms[VMTH_FORM_DEDUP],
                    [this](const StagedPage &page) {
                        const bool taken = dedup(page);
                        if (taken && forms_.on(VMTH_FORM_DELTA)) {
                            delta_.remember(page, round_);
                        }
                        return taken;
                    });
    }
    if (forms_.on(VMTH_FORM_DELTA)) {
        left = take(piece, left, context_.counters.forms[VMTH_FORM_DELTA],
                    [this](const StagedPage &page) {
                        return delta_.take(page, round_, forms_, parts_);
                    });
    }
    if (forms_.on(VMTH_FORM_REUSE)) {
        left = reuse(piece, left);
    }
    for (size_t i = first; forms_.on(VMTH_FORM_ZSTD) && i < end; i++) {
        if (bit(left, i) && zstd_.take(staged(piece, i), forms_.zstd_level, parts_)) {
            left &= ~(uint64_t{1} << i);
        }
    }
    for_stretches(left >> first, end - first, [&](size_t from, size_t to, bool raw) {
        if (raw) {
            const LentRun &origin = piece.origin;
            parts_.raw({piece.page + first + from, to - from,
                        origin.at + (first + from) * origin.stride, origin.stride});
        }
    });
}

StagedPage PacketBuilder::staged(const Piece &piece, size_t i) const
{
    StagedPage page = {};
    page.block = block_;
    page.page = piece.page + i;
    page.content = piece.content.at + i * piece.content.stride;
    page.origin = piece.origin.at + i * piece.origin.stride;
    page.lent = piece.lent;
    page.known = bit(piece.known, i);
    if (context_.hashes.enabled()) {
        page.hash = piece.hashes[i];
    }
    if (page.known) {
        page.landed = piece.landed[i];
    }
    return page;
}

// Offers the piece's `pages` (bits) one by one; returns those that were not taken.
template <typename Take>
uint64_t PacketBuilder::take(const Piece &piece, uint64_t pages, FormCounters &counters,
                             Take take_page)
{
    const uint64_t started_ns = thread_cpu_ns();
    uint64_t left = pages;
    for (uint64_t rest = pages; rest != 0; rest &= rest - 1) {
        const size_t i = static_cast<size_t>(__builtin_ctzll(rest));
        if (take_page(staged(piece, i))) {
            left &= ~(uint64_t{1} << i);
        }
    }
    counters.tried_pages.add(static_cast<uint64_t>(__builtin_popcountll(pages)));
    counters.cpu_ns.add(thread_cpu_ns() - started_ns);
    return left;
}

// The pages together, since they are hashed together; returns those that were not taken.
uint64_t PacketBuilder::reuse(const Piece &piece, uint64_t pages)
{
    StagedPage staged_pages[max_piece_pages] = {};
    size_t n = 0;
    for (uint64_t rest = pages; rest != 0; rest &= rest - 1) {
        staged_pages[n++] = staged(piece, static_cast<size_t>(__builtin_ctzll(rest)));
    }
    const uint64_t taken = reuse_.take(staged_pages, n, parts_,
                                       [this](const StagedPage &page) { return keep(page); });
    uint64_t left = pages;
    size_t k = 0;
    for (uint64_t rest = pages; rest != 0; rest &= rest - 1, k++) {
        if (bit(taken, k)) {
            left &= ~(rest & -rest);
        }
    }
    return left;
}

bool PacketBuilder::dedup(const StagedPage &page)
{
    const std::optional<ContentPlace> place = context_.places.find(page.hash);
    if (!place || !keep(page)) {
        return false;
    }
    vmth_desc desc = {};
    desc.page = page.page;
    desc.npages = 1;
    desc.form = VMTH_FORM_DEDUP;
    desc.base_block = place->block;
    desc.base_page = place->page;
    desc.result = page.hash;
    parts_.coded(desc);
    FormCounters &counters = context_.counters.forms[VMTH_FORM_DEDUP];
    counters.pages.add(1);
    counters.content_bytes.add(context_.memory.page_bytes());
    counters.wire_bytes.add(VMTH_DESC_REF_BYTES);
    return true;
}

// What may be missed can be sent again. False: not now.
bool PacketBuilder::keep(const StagedPage &page)
{
    if (!page.lent) {
        return true;
    }
    uint8_t *copy = context_.copies.keep(page.content);
    if (copy != nullptr) {
        kept_.push_back({page.page, copy});
    }
    return copy != nullptr;
}

// ---- the packet -------------------------------------------------------------------------------------

uint64_t PacketBuilder::payload_bytes() const noexcept
{
    return parts_.payload_bytes() + zstd_.pending_bytes();
}

void PacketBuilder::end()
{
    zstd_.flush(parts_);
    uint64_t unread_bytes = 0;
    for (const LentRun &run : unread_) {
        unread_bytes += run.npages * run.stride;
    }
    if (unread_bytes != parts_.payload_bytes()) {
        hash_rest();
    }
}

SentPacket PacketBuilder::finish(uint64_t seq)
{
    head_.assign(VMTH_PACKET_HEADER_BYTES, 0);
    const size_t desc_bytes = parts_.encode(head_);
    vmth_packet_header header = {};
    header.kind = VMTH_PACKET_PAGES;
    header.block = static_cast<uint16_t>(block_);
    header.round = round_;
    header.channel = static_cast<uint16_t>(channel_);
    header.seq = seq;
    header.desc_bytes = static_cast<uint32_t>(desc_bytes);
    header.payload_bytes = static_cast<uint32_t>(parts_.payload_bytes());
    header.ndesc = static_cast<uint32_t>(parts_.ndesc());
    header.npages = parts_.npages();
    vmth_packet_encode_header(&header, head_.data() + VMTH_PACKET_HEADER_BYTES,
                              context_.hashes.key().seed, head_.data());
    head_iov_ = {head_.data(), head_.size()};
    SentPacket sent;
    sent.seq = seq;
    sent.kind = VMTH_PACKET_PAGES;
    sent.block = block_;
    sent.bytes = head_.size() + parts_.payload_bytes();
    sent.made_pages = parts_.pages(VMTH_FORM_DEDUP) + parts_.pages(VMTH_FORM_DELTA) +
                      parts_.pages(VMTH_FORM_REUSE);
    sent.digest = fresh_.sum;
    sent.whole = !unread();
    sent.runs = parts_.content_runs();
    sent.kept = std::exchange(kept_, {});
    if (context_.known.enabled()) {
        sent.zero_runs = parts_.zero_runs();
    }
    return sent;
}

}  // namespace vmth

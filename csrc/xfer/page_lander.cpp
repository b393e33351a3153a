// SPDX-License-Identifier: Apache-2.0
// Writing and hashing what landed.
#include "xfer/page_lander.hpp"

#include <algorithm>
#include <cstring>

#include "vmth/zero_page.h"

namespace vmth {

namespace {

// What landed is hashed while it is in the cache.
constexpr size_t piece_bytes = 256 * 1024;
constexpr size_t max_piece_pages = 64;

}  // namespace

PageLander::PageLander(ReceiverShared &shared, unsigned channel)
    : shared_(shared), channel_(channel),
      piece_pages_(std::clamp<size_t>(piece_bytes / shared.memory.page_bytes(), 1,
                                      max_piece_pages))
{
}

void PageLander::invalidate(uint32_t block, const vmth_run &run)
{
    shared_.hashes.invalidate(channel_, block, run.page, run.npages);
}

// ---- zero pages -------------------------------------------------------------------------------------

void PageLander::zeros(uint32_t block, const vmth_run &run, vmth_digest *fresh)
{
    if (shared_.memory.hostless(block)) {
        // What another program holds is not known: it is told of every zero page.
        invalidate(block, run);
        shared_.sink->write_zeros(block, run);
    } else {
        write_zeros(block, run);
    }
    shared_.hashes.fill_zero(channel_, block, run.page, run.npages, fresh);
}

// Only where not already zero: reading does not populate a hole of private memory.
void PageLander::write_zeros(uint32_t block, const vmth_run &zeros)
{
    const size_t page_bytes = shared_.memory.page_bytes();
    const uint64_t end = zeros.page + zeros.npages;
    for (uint64_t page = zeros.page; page < end;) {
        std::optional<vmth_run> run = shared_.maybe_nonzero[block].first_run(page, end - page);
        if (!run) {
            break;
        }
        invalidate(block, *run);
        for (uint64_t i = 0; i < run->npages; i++) {
            uint8_t *host = shared_.memory.host(block, run->page + i);
            if (!vmth_is_zero(host, page_bytes)) {
                memset(host, 0, page_bytes);
            }
        }
        page = run->page + run->npages;
    }
}

// ---- content ----------------------------------------------------------------------------------------

// The pages at the front of [page, end) that all land in one way. Nobody else changes their bits: they are
// claimed.
PageLander::Part PageLander::first_part(uint32_t block, uint64_t page, uint64_t end)
{
    const vmth_run all = {page, end - page};
    if (!shared_.holes.writes(block)) {
        return {all, false};
    }
    const std::optional<vmth_run> present = shared_.maybe_nonzero[block].first_run(page, end - page);
    if (present && present->page == page) {
        return {*present, false};
    }
    const vmth_run hole = {page, (present ? present->page : end) - page};
    if (!shared_.huge.map(block, hole)) {
        return {hole, true};
    }
    shared_.prefault.mapped(block, hole);
    return {hole, false};
}

void PageLander::about_to_overwrite(uint32_t block, const vmth_run &run)
{
    shared_.prefault.write(block, run, shared_.maybe_nonzero[block]);
    shared_.maybe_nonzero[block].set_range(run.page, run.npages);
}

void PageLander::fill(uint32_t block, const vmth_run &hole, const uint8_t *content)
{
    if (!shared_.holes.write(block, hole, content)) {
        about_to_overwrite(block, hole);
        memcpy(shared_.memory.host(block, hole.page), content,
               static_cast<size_t>(hole.npages) * shared_.memory.page_bytes());
        return;
    }
    shared_.maybe_nonzero[block].set_range(hole.page, hole.npages);
    shared_.counters.written_pages.add(hole.npages);
    if (shared_.hashes.enabled()) {
        // Hashing reads them: a fault maps all that is there around it, and costs less than asking.
        shared_.prefault.mapped(block, hole);
    }
}

std::vector<iovec> &PageLander::direct(uint32_t block, const std::vector<vmth_run> &piece)
{
    const size_t page_bytes = shared_.memory.page_bytes();
    iov_.clear();
    to_write_.clear();
    size_t buffered = 0;
    const auto buffer = [&](uint64_t npages) {
        scratch_.resize(piece_pages_ * page_bytes);
        iov_.push_back({scratch_.data() + buffered, static_cast<size_t>(npages) * page_bytes});
        buffered += iov_.back().iov_len;
    };
    for (const vmth_run &run : piece) {
        if (shared_.memory.hostless(block)) {
            buffer(run.npages);
            continue;
        }
        const uint64_t end = run.page + run.npages;
        for (uint64_t page = run.page; page < end;) {
            const Part part = first_part(block, page, end);
            if (part.hole) {
                buffer(part.run.npages);
                to_write_.push_back(part.run);
            } else {
                about_to_overwrite(block, part.run);
                iov_.push_back({shared_.memory.host(block, page),
                                static_cast<size_t>(part.run.npages) * page_bytes});
            }
            page += part.run.npages;
        }
    }
    return iov_;
}

void PageLander::landed(uint32_t block, const std::vector<vmth_run> &piece, vmth_digest *fresh)
{
    const uint8_t *content = scratch_.data();
    if (shared_.memory.hostless(block)) {
        hand_on(block, piece, content, fresh);
        return;
    }
    for (const vmth_run &hole : to_write_) {
        fill(block, hole, content);
        content += hole.npages * shared_.memory.page_bytes();
    }
    hash_mapped(block, piece, fresh);
}

void PageLander::from_buffer(uint32_t block, const std::vector<vmth_run> &runs,
                             const uint8_t *content, vmth_digest *fresh)
{
    if (shared_.memory.hostless(block)) {
        hand_on(block, runs, content, fresh);
        return;
    }
    for (const vmth_run &run : runs) {
        const uint64_t end = run.page + run.npages;
        for (uint64_t page = run.page; page < end;) {
            const Part part = first_part(block, page, end);
            const size_t nbytes = static_cast<size_t>(part.run.npages) * shared_.memory.page_bytes();
            if (part.hole) {
                fill(block, part.run, content);
            } else {
                about_to_overwrite(block, part.run);
                memcpy(shared_.memory.host(block, page), content, nbytes);
            }
            page += part.run.npages;
            content += nbytes;
        }
    }
    hash_mapped(block, runs, fresh);
}

// After all of the runs have landed: one fault maps those of several.
void PageLander::hash_mapped(uint32_t block, const std::vector<vmth_run> &runs, vmth_digest *fresh)
{
    for (const vmth_run &run : runs) {
        set_hashes(block, run, shared_.memory.host(block, run.page), fresh);
    }
}

// What is hashed is what is handed on: both come from the buffer. Entries are set only after.
void PageLander::hand_on(uint32_t block, const std::vector<vmth_run> &runs, const uint8_t *content,
                         vmth_digest *fresh)
{
    if (runs.empty()) {
        return;
    }
    shared_.sink->write_pages(block, runs, content);
    for (const vmth_run &run : runs) {
        set_hashes(block, run, content, fresh);
        content += run.npages * shared_.memory.page_bytes();
    }
}

void PageLander::set_hashes(uint32_t block, const vmth_run &run, const uint8_t *content,
                            vmth_digest *fresh)
{
    const size_t page_bytes = shared_.memory.page_bytes();
    for (uint64_t done = 0; shared_.hashes.enabled() && done < run.npages;) {
        vmth_u128 hashes[max_piece_pages];
        const size_t take =
            static_cast<size_t>(std::min<uint64_t>(max_piece_pages, run.npages - done));
        if (vmth_page_hash(&shared_.hashes.key(), content + done * page_bytes, page_bytes, take,
                           hashes) != 0) {
            throw TransferError(ErrorKind::usage, "page kernel refused its arguments");
        }
        shared_.hashes.replace(channel_, block, run.page + done, take, hashes, fresh);
        done += take;
    }
}

}  // namespace vmth

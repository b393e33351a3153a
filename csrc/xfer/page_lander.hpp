// SPDX-License-Identifier: Apache-2.0
// Puts pages where they belong, for one channel: into guest memory, or on into the stream sink.
//
//   direct()       where the socket should read them to  ... landed()    hashes what is there now
//   from_buffer()  pages that were made in a buffer of ours
//   zeros()        pages that are told to be zero
//
// What a block's file takes goes into its holes by a write from a buffer, all else is overwritten in place.
// Either way the bytes that are hashed are those of the mapping.
//
// Whoever calls has claimed the pages for this round. An entry of the table is invalid from before its
// page's first byte is overwritten until the page is hashed after the last. Belongs to one thread.
#ifndef VMTH_XFER_PAGE_LANDER_HPP
#define VMTH_XFER_PAGE_LANDER_HPP

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "xfer/receiver.hpp"

namespace vmth {

class PageLander {
public:
    PageLander(ReceiverShared &shared, unsigned channel);

    // Pages that direct() and landed() take at once.
    size_t piece_pages() const noexcept { return piece_pages_; }

    void invalidate(uint32_t block, const vmth_run &run);
    // ZERO and HOLE: `fresh` gets the terms of what landed, here and below.
    void zeros(uint32_t block, const vmth_run &run, vmth_digest *fresh);
    // Vectors for the content of the invalidated `piece`, back to back in its order; then landed() with
    // the same piece, once they are filled.
    std::vector<iovec> &direct(uint32_t block, const std::vector<vmth_run> &piece);
    void landed(uint32_t block, const std::vector<vmth_run> &piece, vmth_digest *fresh);
    // The content of the invalidated `runs`, back to back in their order.
    void from_buffer(uint32_t block, const std::vector<vmth_run> &runs, const uint8_t *content,
                     vmth_digest *fresh);

private:
    struct Part {
        vmth_run run;
        bool hole;  // to be written to the file
    };

    void write_zeros(uint32_t block, const vmth_run &run);
    Part first_part(uint32_t block, uint64_t page, uint64_t end);
    void about_to_overwrite(uint32_t block, const vmth_run &run);
    void fill(uint32_t block, const vmth_run &hole, const uint8_t *content);
    void hash_mapped(uint32_t block, const std::vector<vmth_run> &runs, vmth_digest *fresh);
    void set_hashes(uint32_t block, const vmth_run &run, const uint8_t *content,
                    vmth_digest *fresh);
    void hand_on(uint32_t block, const std::vector<vmth_run> &runs, const uint8_t *content,
                 vmth_digest *fresh);

    ReceiverShared &shared_;
    const unsigned channel_;
    const size_t piece_pages_;
    std::vector<iovec> iov_;
    std::vector<uint8_t> scratch_;    // of a piece: what is not read to its place; empty until needed
    std::vector<vmth_run> to_write_;  // the holes whose content is there, in its order
};

}  // namespace vmth

#endif

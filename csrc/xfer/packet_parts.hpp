// SPDX-License-Identifier: Apache-2.0
// The packet under construction: descriptors, and what its payload is sent from.
//
//   descs     | ZERO 3..9 | NORMAL 10..12 | ZSTD 20 | ZSTD 24..30 |
//   payload                 guest memory     -        own buffer        in the order of the descriptors
//
// Encoders append to it; a page they decline is appended raw. Belongs to one worker thread.
#ifndef VMTH_XFER_PACKET_PARTS_HPP
#define VMTH_XFER_PACKET_PARTS_HPP

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "vmth/packet.h"
#include "xfer/lent_pages.hpp"

namespace vmth {

// A page about to be sent. `content` is what was hashed and does not change while it is encoded.
struct StagedPage {
    uint32_t block;
    uint64_t page;
    const uint8_t *content;
    vmth_u128 hash;
    const uint8_t *origin;  // where it is sent from if it goes raw: there it may change
    bool lent;              // nobody can be asked for it again
    bool known;             // the destination holds the content whose hash is `landed`
    vmth_u128 landed;
};

class PacketParts {
public:
    explicit PacketParts(size_t page_bytes) : page_bytes_(page_bytes) {}

    // Of at most `most_bytes` coded payload.
    void begin(size_t most_bytes);
    // ZERO, HOLE, FREE.
    void told(vmth_page_form form, uint64_t page, uint64_t npages);
    // NORMAL pages, sent from where they lie.
    void raw(const LentRun &run);
    // Room for the payload of the next coded(), until begin(); nullptr: so much does not fit any more.
    uint8_t *room(size_t nbytes);
    // Any other form; its payload_bytes are the first of room().
    void coded(const vmth_desc &desc);

    size_t npages() const noexcept { return npages_; }
    size_t ndesc() const noexcept { return descs_.size(); }
    size_t payload_bytes() const noexcept { return payload_bytes_; }
    uint64_t pages(vmth_page_form form) const noexcept { return counts_[form]; }
    // Pages with content, and pages that are only told to be zero.
    const std::vector<vmth_run> &content_runs() const noexcept { return content_runs_; }
    const std::vector<vmth_run> &zero_runs() const noexcept { return zero_runs_; }
    std::vector<iovec> &payload() noexcept { return payload_; }
    // The descriptors as they go on the wire, appended to `out`. Returns their bytes.
    size_t encode(std::vector<uint8_t> &out) const;

private:
    bool append(const vmth_desc &desc);
    void append_payload(const uint8_t *at, size_t nbytes);

    const size_t page_bytes_;
    size_t most_bytes_ = 0;
    size_t npages_ = 0;
    size_t payload_bytes_ = 0;
    size_t coded_bytes_ = 0;
    std::array<uint64_t, VMTH_FORM_REUSE + 1> counts_ = {};
    std::vector<vmth_desc> descs_;
    std::vector<vmth_run> content_runs_;
    std::vector<vmth_run> zero_runs_;
    std::vector<iovec> payload_;
    std::vector<uint8_t> coded_;  // of the largest packet that used it: payload_ points into it
};

}  // namespace vmth

#endif

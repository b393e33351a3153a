// SPDX-License-Identifier: Apache-2.0
// Pages whose content lies in a buffer that the caller lends, and when the caller has it back.
//
//   buffer    [rec][page 7][rec][page 8][rec][page 9]      at, then one page every `stride` bytes
//   ticket 1  | job | job |   ticket 2  | job |            one send_pages() call each
//              ^ given back once the workers have handed every page of it to a socket
//
// Tickets are given back in order: read() is the last of which, and of all before it, nothing is read
// any more. A worker that failed gives nothing back; then the buffers are free once the sender is closed.
#ifndef VMTH_XFER_LENT_PAGES_HPP
#define VMTH_XFER_LENT_PAGES_HPP

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>

#include "vmth/qemu_ram.h"
#include "xfer/guest_memory.hpp"

namespace vmth {

struct LentRun {
    uint64_t page;
    uint64_t npages;
    const uint8_t *at;  // content of the first page; nullptr: zero pages, nothing is read
    size_t stride;      // from one page's content to the next; unused with one page
};

// The run as it lies in `data`. Throws TransferError(usage) unless it is within its block, of kind ZERO
// or PAGE, and its content within the `nbytes` of data.
LentRun lent_run(const GuestMemory &memory, const vmth_qemu_run &run, const uint8_t *data,
                 size_t nbytes);

class Tickets {
public:
    // The next ticket, of `npages` > 0 pages; before the first of them is queued.
    uint64_t open(uint64_t npages);
    // Any thread: that many pages of the ticket are not read any more.
    void give_back(uint64_t ticket, uint64_t npages);
    uint64_t issued() const;
    uint64_t read() const;
    // Until read() >= ticket or stop(); false at the timeout (0: none) before either.
    bool wait(uint64_t ticket, int64_t timeout_ns) const;
    void stop();  // every wait() returns at once, from now on

private:
    mutable std::mutex mutex_;
    mutable std::condition_variable changed_;
    // Under mutex_:
    std::deque<uint64_t> left_;  // pages not given back, of tickets read_ + 1 and on
    uint64_t read_ = 0;
    bool stopped_ = false;
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// Copies of lent pages that were sent as a reference to what the destination should hold, until it is
// known that it did.
//
//   keep()        a slot of the pool, with the page's content   (worker, before the packet is sent)
//   give_back()   it landed, or the copy was taken              (reader, or the sender's caller)
//
// A buffer that was lent is the caller's again once it was sent: who reads a stream has nothing to read
// a page from once more. Nothing is kept of pages that are read from the guest's memory.
#ifndef VMTH_XFER_KEPT_COPIES_HPP
#define VMTH_XFER_KEPT_COPIES_HPP

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace vmth {

struct KeptCopy {
    uint64_t page;
    uint8_t *content;
};

// Any thread. Takes memory as it is needed, and keeps it: the slot that came back last is used first.
class KeptCopies {
public:
    // At most `nbytes`.
    KeptCopies(size_t page_bytes, uint64_t nbytes)
        : page_bytes_(page_bytes), slots_left_(nbytes / page_bytes)
    {
    }

    // nullptr: as much is kept as may be; the page then goes in a form that the destination cannot miss.
    uint8_t *keep(const uint8_t *content)
    {
        uint8_t *slot = free_slot();
        if (slot != nullptr) {
            memcpy(slot, content, page_bytes_);
        }
        return slot;
    }

    void give_back(uint8_t *slot)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(slot);
    }

private:
    static constexpr uint64_t slots_at_once = 64;

    uint8_t *free_slot()
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (free_.empty()) {
            const uint64_t more = slots_left_ < slots_at_once ? slots_left_ : slots_at_once;
            if (more == 0) {
                return nullptr;
            }
            slabs_.emplace_back(new uint8_t[static_cast<size_t>(more) * page_bytes_]);
            slots_left_ -= more;
            for (uint64_t i = more; i > 0; i--) {
                free_.push_back(slabs_.back().get() + (i - 1) * page_bytes_);
            }
        }
        uint8_t *slot = free_.back();
        free_.pop_back();
        return slot;
    }

    const size_t page_bytes_;
    std::mutex mutex_;
    // Under mutex_:
    uint64_t slots_left_;
    std::vector<std::unique_ptr<uint8_t[]>> slabs_;
    std::vector<uint8_t *> free_;
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// Holes of a block in which a fault brings a huge page: they are mapped and copied to. One fault does for
// 512 pages there, and writing to the file, which brings small pages, would leave the guest with those.
//
//   unknown --first hole whose 2 MiB are empty: one page of it is faulted in--> is all of it there?
//               ... --not among 64--> no                                           yes   no
//
// Whether it does is up to the mount, the mapping's advice and the machine's settings: trying is shorter
// than knowing all of those, and right. Only speed is at stake: where mapping fails, nothing is mapped from
// then on.
#ifndef VMTH_XFER_HUGE_HOLES_HPP
#define VMTH_XFER_HUGE_HOLES_HPP

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "sys/populate.h"
#include "vmth/bitmap.h"
#include "xfer/guest_memory.hpp"

namespace vmth {

class HugeHoles {
public:
    // `ops` nullptr: the kernel's.
    HugeHoles(const GuestMemory &memory, const vmth_populate_ops *ops);

    // Map pages that are about to be filled, if that is how to fill them; false: write them to the file.
    // Any thread, for pages that it has claimed.
    bool map(uint32_t block, const vmth_run &hole);

private:
    enum class Answer { unknown, no, yes };
    struct Block {
        std::mutex trying;
        unsigned looks = 0;  // in vain; under `trying`
        std::atomic<Answer> answer{Answer::unknown};
    };

    bool brings_huge_pages(uint32_t block, const vmth_run &hole);
    Answer try_fault(uint32_t block, const vmth_run &hole);

    const GuestMemory &memory_;
    const vmth_populate_ops *const ops_;
    std::vector<Block> blocks_;
};

}  // namespace vmth

#endif

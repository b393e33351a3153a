// SPDX-License-Identifier: Apache-2.0
// Maps the pages of an end just before they are used: holes that are about to be filled, and all pages of
// memory that was mapped for this transfer.
//
//   a mapping made anew   | . . . . . . |  a fault a page takes longer than the page's copy
//   holes, in one call    | P P P P . . |  a fraction of that; every page once, later rounds cost nothing
//   what is there         | P p p p . . |  one page in each 64 KiB: the kernel maps those around it
//
// Pages of memory that was mapped before are left alone: asking for what is there is not free. Where the
// kernel refuses, nothing is populated from then on and refused() says so: only speed is lost.
#ifndef VMTH_XFER_PREFAULT_HPP
#define VMTH_XFER_PREFAULT_HPP

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "sys/populate.h"
#include "vmth/bitmap.h"
#include "xfer/atomic_bitmap.hpp"
#include "xfer/guest_memory.hpp"

namespace vmth {

class Prefault {
public:
    // `ops` nullptr: the kernel's.
    Prefault(const GuestMemory &memory, const vmth_populate_ops *ops);

    // The pages are about to be read; they hold data (asking would allocate a hole). Any thread.
    void read(uint32_t block, const vmth_run &run) noexcept;
    // The pages are about to be overwritten. `maybe_nonzero`: those with a clear bit are holes.
    void write(uint32_t block, const vmth_run &run, const AtomicBitmap &maybe_nonzero) noexcept;
    // The pages are mapped, or about to be by reading them: they are not asked for. Any thread.
    void mapped(uint32_t block, const vmth_run &run) noexcept;
    // Empty, or what the kernel said. Any thread.
    std::string refused() const;

private:
    bool wanted(uint32_t block, const vmth_run &run) noexcept;
    void populate(uint32_t block, uint64_t page, uint64_t npages, vmth_populate_kind kind) noexcept;
    void map_around(uint32_t block, uint64_t page, uint64_t npages) noexcept;

    const GuestMemory &memory_;
    const vmth_populate_ops *const ops_;
    std::vector<AtomicBitmap> done_;  // one a block: the pages asked for
    std::atomic<int> error_{0};       // the first errno; no call is made any more
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// Fills holes of files that are mapped as guest memory by writing to the file.
//
//   content in a buffer --pwrite--> the file's pages --fault for reading--> mapped, 16 pages at a time
//
// A fault for writing clears the page that is overwritten at once; a write that fills a page does not.
// Only speed is at stake: where a file does not take writes, write() returns false from then on, the
// content is copied to the mapping, and refused() says so. But where the file has no room, a copy would
// end the process with SIGBUS: that is thrown.
#ifndef VMTH_XFER_HOLE_WRITER_HPP
#define VMTH_XFER_HOLE_WRITER_HPP

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "sys/file_ops.h"
#include "vmth/bitmap.h"
#include "xfer/guest_memory.hpp"
#include "xfer/unique_fd.hpp"

namespace vmth {

class HoleWriter {
public:
    // Duplicates the files of `memory`, until close(). `ops` nullptr: the kernel's.
    HoleWriter(const GuestMemory &memory, const vmth_file_ops *ops);

    // Does the block's file take writes, as far as is known? Any thread.
    bool writes(uint32_t block) const noexcept
    {
        return files_[block].error.load(std::memory_order_relaxed) == 0;
    }
    // Put the content of `run` into the file. False: it does not take it, and some of it may be there.
    // Throws TransferError(io) where there is no room. Any thread, for pages that it has claimed.
    bool write(uint32_t block, const vmth_run &run, const uint8_t *content);
    // Let the files go; no thread may be in write(), then or later. Idempotent.
    void close() noexcept;
    // Empty, or what was said of the first file that does not take writes. Any thread.
    std::string refused() const;

private:
    struct File {
        UniqueFd fd;
        // The kernel writes a file for one at a time, and who waits for that there spins on a core.
        std::mutex writing;
        std::atomic<int> error{0};  // the first errno; no call is made any more
    };

    const GuestMemory &memory_;
    const vmth_file_ops *const ops_;
    std::vector<File> files_;  // one a block
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// Writing content to holes, and what is done where a file refuses.
#include "xfer/hole_writer.hpp"

#include <cerrno>
#include <cstring>

#include "xfer/failure.hpp"

namespace vmth {

namespace {

constexpr int no_file = -1;  // not an errno: nothing was refused

// A copy to the mapping needs the same page from the same place, and cannot say that there is none.
bool no_room(int error)
{
    return error == ENOSPC || error == EDQUOT || error == ENOMEM || error == EIO;
}

}  // namespace

HoleWriter::HoleWriter(const GuestMemory &memory, const vmth_file_ops *ops)
    : memory_(memory), ops_(ops != nullptr ? ops : vmth_file_system_ops()), files_(memory.nblocks())
{
    for (size_t block = 0; block < files_.size(); block++) {
        File &file = files_[block];
        if (memory.fd(block) < 0) {
            file.error = no_file;
            continue;
        }
        file.fd = UniqueFd::duplicate(memory.fd(block));
        file.error = file.fd ? -vmth_file_writes_at(file.fd.get()) : errno;
    }
}

bool HoleWriter::write(uint32_t block, const vmth_run &run, const uint8_t *content)
{
    if (!writes(block)) {
        return false;
    }
    File &file = files_[block];
    const size_t nbytes = static_cast<size_t>(run.npages) * memory_.page_bytes();
    int error;
    {
        std::lock_guard<std::mutex> lock(file.writing);
        error = -vmth_file_write_at(ops_, file.fd.get(), content, nbytes,
                                    memory_.file_offset(block, run.page));
    }
    if (no_room(error)) {
        throw system_error("landing pages in the file of block " + std::to_string(block), error);
    }
    if (error != 0) {
        int none = 0;
        file.error.compare_exchange_strong(none, error, std::memory_order_relaxed);
    }
    return error == 0;
}

void HoleWriter::close() noexcept
{
    for (File &file : files_) {
        file.fd.reset();
    }
}

std::string HoleWriter::refused() const
{
    for (size_t block = 0; block < files_.size(); block++) {
        const int error = files_[block].error.load(std::memory_order_relaxed);
        if (error > 0) {
            return "write: the file of block " + std::to_string(block) + " takes no pages (" +
                   strerror(error) + "), so each is cleared by a fault before it lands";
        }
    }
    return {};
}

}  // namespace vmth

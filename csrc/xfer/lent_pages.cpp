// SPDX-License-Identifier: Apache-2.0
// Checking lent runs, and counting their pages back.
#include "xfer/lent_pages.hpp"

#include <chrono>
#include <string>

namespace vmth {

namespace {

TransferError refused(const char *field, uint64_t received, const std::string &allowed)
{
    return TransferError(ErrorKind::usage, std::string(field) + " " + std::to_string(received) +
                                               ", allowed " + allowed);
}

}  // namespace

LentRun lent_run(const GuestMemory &memory, const vmth_qemu_run &run, const uint8_t *data,
                 size_t nbytes)
{
    const uint64_t page_bytes = memory.page_bytes();
    if (run.npages == 0) {
        throw refused("run.npages", 0, "1 or more");
    }
    memory.check_range(run.block, run.page, run.npages);
    if (run.kind == VMTH_QEMU_ZERO) {
        return {run.page, run.npages, nullptr, 0};
    }
    if (run.kind != VMTH_QEMU_PAGE) {
        throw refused("run.kind", run.kind, "1 (zero) and 2 (page)");
    }
    if (run.nbytes != page_bytes) {
        throw refused("run.nbytes", run.nbytes, std::to_string(page_bytes));
    }
    if (run.npages > 1 && run.stride < page_bytes) {
        throw refused("run.stride", run.stride, std::to_string(page_bytes) + " or more");
    }
    if (run.at > nbytes || page_bytes > nbytes - run.at) {
        throw refused("run.at", run.at, "a whole page within " + std::to_string(nbytes) + " bytes");
    }
    const uint64_t room = nbytes - run.at - page_bytes;
    if (run.npages > 1 && run.npages - 1 > room / run.stride) {
        throw refused("run.npages", run.npages,
                      std::to_string(room / run.stride + 1) + " in " + std::to_string(nbytes) +
                          " bytes");
    }
    return {run.page, run.npages, data + run.at, run.stride};
}

uint64_t Tickets::open(uint64_t npages)
{
    std::lock_guard<std::mutex> lock(mutex_);
    left_.push_back(npages);
    return read_ + left_.size();
}

void Tickets::give_back(uint64_t ticket, uint64_t npages)
{
    std::lock_guard<std::mutex> lock(mutex_);
    left_[static_cast<size_t>(ticket - read_ - 1)] -= npages;
    bool any = false;
    while (!left_.empty() && left_.front() == 0) {
        left_.pop_front();
        read_++;
        any = true;
    }
    if (any) {
        changed_.notify_all();
    }
}

uint64_t Tickets::issued() const
{
    std::lock_guard<std::mutex> lock(mutex_);
    return read_ + left_.size();
}

uint64_t Tickets::read() const
{
    std::lock_guard<std::mutex> lock(mutex_);
    return read_;
}

bool Tickets::wait(uint64_t ticket, int64_t timeout_ns) const
{
    std::unique_lock<std::mutex> lock(mutex_);
    auto done = [&] { return stopped_ || read_ >= ticket; };
    if (timeout_ns <= 0) {
        changed_.wait(lock, done);
        return true;
    }
    return changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), done);
}

void Tickets::stop()
{
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
}

}  // namespace vmth

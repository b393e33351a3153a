// SPDX-License-Identifier: Apache-2.0
// The receiver's calls: attaching channels, waiting, the end.
#include "xfer/receiver.hpp"

#include <chrono>

#include "vmth/bitmap.h"
#include "xfer/receiver_channel.hpp"

namespace vmth {

namespace {

ReceiverOptions checked(ReceiverOptions options)
{
    if (options.channels == 0 || options.channels > VMTH_MAX_CHANNELS) {
        throw TransferError(ErrorKind::usage, std::to_string(options.channels) +
                                                  " channels, allowed 1 to " +
                                                  std::to_string(VMTH_MAX_CHANNELS));
    }
    if (options.ops == nullptr) {
        options.ops = vmth_sock_system_ops();
    }
    (void)FormsSwitch(options.forms, options.digest);  // throws for what no session agrees on
    return options;
}

}  // namespace

// ---- shared -----------------------------------------------------------------------------------------

ReceiverShared::ReceiverShared(std::vector<MemoryBlock> blocks, size_t page_bytes,
                               const ReceiverOptions &given)
    : options(checked(given)), memory(std::move(blocks), page_bytes),
      hashes(memory, options.hash_seed, options.digest),
      store(options.reuse, options.reuse_key, page_bytes, options.files), gate(memory, options.channels),
      prefault(memory, options.populate), holes(memory, options.files),
      huge(memory, options.populate)
{
    for (size_t block = 0; block < memory.nblocks(); block++) {
        if (memory.hostless(block) && options.sink.fd < 0) {
            throw TransferError(ErrorKind::usage, "block " + std::to_string(block) +
                                                      " has no memory here, allowed with a sink");
        }
    }
    if (options.sink.fd >= 0) {
        sink = std::make_unique<StreamSink>(options.sink, memory, latch, options.ops);
    }
}

void ReceiverShared::fail(const TransferError &error)
{
    latch.set(error);
    std::lock_guard<std::mutex> lock(mutex);
    for (const std::unique_ptr<ReceiverChannel> &channel : channels) {
        channel->channel().shutdown();
    }
    changed.notify_all();
}

void ReceiverShared::channel_ended()
{
    std::lock_guard<std::mutex> lock(mutex);
    ended++;
    changed.notify_all();
}

void ReceiverShared::barrier_landed()
{
    std::lock_guard<std::mutex> lock(mutex);
    landed_barriers++;
    changed.notify_all();
}

// ---- receiver ---------------------------------------------------------------------------------------

Receiver::Receiver(std::vector<MemoryBlock> blocks, size_t page_bytes,
                   const ReceiverOptions &options,
                   const std::vector<const uint64_t *> &maybe_nonzero,
                   const std::vector<size_t> &nwords)
    : shared_(std::move(blocks), page_bytes, options)
{
    const GuestMemory &memory = shared_.memory;
    if (maybe_nonzero.size() != memory.nblocks() || nwords.size() != memory.nblocks()) {
        throw TransferError(ErrorKind::usage, std::to_string(maybe_nonzero.size()) +
                                                  " maybe_nonzero bitmaps, allowed " +
                                                  std::to_string(memory.nblocks()));
    }
    for (size_t block = 0; block < memory.nblocks(); block++) {
        const uint64_t need = VMTH_BITMAP_WORDS(memory.npages(block));
        if (nwords[block] < need) {
            throw TransferError(ErrorKind::usage, "maybe_nonzero of " +
                                                      std::to_string(nwords[block]) +
                                                      " words, allowed " + std::to_string(need));
        }
        shared_.maybe_nonzero.emplace_back(memory.npages(block));
        shared_.maybe_nonzero.back().assign(maybe_nonzero[block]);
    }
}

Receiver::~Receiver()
{
    close();
}

void Receiver::attach(int fd, unsigned index)
{
    shared_.latch.check();
    if (index >= shared_.options.channels) {
        throw TransferError(ErrorKind::usage, "channel " + std::to_string(index) +
                                                  ", allowed 0 to " +
                                                  std::to_string(shared_.options.channels - 1));
    }
    auto channel = std::make_unique<ReceiverChannel>(shared_, fd, index);
    std::lock_guard<std::mutex> lock(shared_.mutex);
    for (const std::unique_ptr<ReceiverChannel> &other : shared_.channels) {
        if (other->channel().index() == index) {
            throw TransferError(ErrorKind::usage,
                                "channel " + std::to_string(index) + " was attached before");
        }
    }
    // Under the mutex that close() takes after it failed the rest: none starts once it has looked.
    shared_.latch.check();
    if (shared_.closed) {
        throw TransferError(ErrorKind::usage, "the receiver is closed");
    }
    channel->start();
    shared_.channels.push_back(std::move(channel));
}

// `done` is asked under the mutex.
template <typename Done> bool Receiver::wait_until(int64_t timeout_ns, Done done)
{
    std::unique_lock<std::mutex> lock(shared_.mutex);
    auto over = [&] { return shared_.latch.failed() || done(); };
    if (timeout_ns <= 0) {
        shared_.changed.wait(lock, over);
    } else if (!shared_.changed.wait_for(lock, std::chrono::nanoseconds(timeout_ns), over)) {
        return false;
    }
    shared_.latch.check();
    return true;
}

bool Receiver::wait(int64_t timeout_ns)
{
    return wait_until(timeout_ns, [this] { return shared_.ended == shared_.options.channels; });
}

bool Receiver::wait_barriers(uint64_t count, int64_t timeout_ns)
{
    bool ended = false;
    const bool over = wait_until(timeout_ns, [&] {
        ended = shared_.ended == shared_.options.channels && shared_.landed_barriers < count;
        return ended || shared_.landed_barriers >= count;
    });
    if (ended) {
        throw TransferError(ErrorKind::protocol, "all channels have ended before barrier " +
                                                     std::to_string(count));
    }
    return over;
}

void Receiver::cancel(const std::string &reason)
{
    shared_.fail(TransferError(ErrorKind::cancelled, reason));
}

void Receiver::close()
{
    bool ended;
    {
        std::lock_guard<std::mutex> lock(shared_.mutex);
        shared_.closed = true;
        ended = shared_.ended == shared_.options.channels;
    }
    if (!ended) {
        cancel("closed");
    }
    // Threads fail and end under the mutex: join without it.
    std::vector<std::unique_ptr<ReceiverChannel>> channels;
    {
        std::lock_guard<std::mutex> lock(shared_.mutex);
        channels.swap(shared_.channels);
    }
    for (const std::unique_ptr<ReceiverChannel> &channel : channels) {
        channel->join();
    }
    // Whoever reads the stream may wait for its end; only channels use it, and none starts any more.
    std::lock_guard<std::mutex> lock(shared_.mutex);
    shared_.sink.reset();
    shared_.holes.close();
}

std::vector<std::string> Receiver::fallbacks() const
{
    std::vector<std::string> names;
    for (const std::string &refused : {shared_.prefault.refused(), shared_.holes.refused()}) {
        if (!refused.empty()) {
            names.push_back(refused);
        }
    }
    return names;
}

}  // namespace vmth

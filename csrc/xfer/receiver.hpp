// SPDX-License-Identifier: Apache-2.0
// The destination's end of all page channels: one thread a channel lands packets in guest memory.
//
//   socket k --> header, descriptors: all checked --> claim pages --> invalidate their hashes
//            --> payload into guest memory, piece by piece --> hash what landed --> acknowledge
//            --> hole of a file: into a buffer, from there into the file, hash what is mapped of it
//            --> hostless block: into a scratch buffer, hash, hand on to the sink
//            --> a form that cannot be undone here: the page is missed, the acknowledgement says so
//
// The peer is not trusted: nothing is written before a packet's every number was checked. The first
// failure ends all channels. Calls come from any thread, attach() also while close() runs: then it throws.
#ifndef VMTH_XFER_RECEIVER_HPP
#define VMTH_XFER_RECEIVER_HPP

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "sys/populate.h"
#include "sys/sock_zerocopy.h"
#include "xfer/atomic_bitmap.hpp"
#include "xfer/counters.hpp"
#include "xfer/guest_memory.hpp"
#include "xfer/hash_table.hpp"
#include "xfer/hole_writer.hpp"
#include "xfer/huge_holes.hpp"
#include "xfer/page_forms.hpp"
#include "xfer/page_store.hpp"
#include "xfer/prefault.hpp"
#include "xfer/round_gate.hpp"
#include "xfer/stream_sink.hpp"

namespace vmth {

class ReceiverChannel;

struct ReceiverOptions {
    uint64_t hash_seed = 0;
    bool digest = true;
    unsigned channels = 1;
    uint32_t forms = 0;                           // bits of the cheaper forms that both ends agreed on
    StreamSinkOptions sink;                       // needed where a block is hostless
    std::vector<StoreSource> reuse;               // files with pages, in the order they are asked
    uint8_t reuse_key[VMTH_CONTENT_KEY_BYTES] = {};  // of their indexes
    const vmth_file_ops *files = nullptr;         // of `reuse` and of memory; nullptr: the kernel's
    const vmth_sock_ops *ops = nullptr;           // nullptr: the kernel's
    const vmth_populate_ops *populate = nullptr;  // nullptr: the kernel's
};

// What the channels' threads share; each member says who may touch it.
class ReceiverShared {
public:
    ReceiverShared(std::vector<MemoryBlock> blocks, size_t page_bytes,
                   const ReceiverOptions &options);

    void fail(const TransferError &error);
    void channel_ended();
    // All channels have had their barrier, and all before it has landed.
    void barrier_landed();

    const ReceiverOptions options;
    const GuestMemory memory;
    HashTable hashes;
    PageStore store;  // what reuse finds; its files may be none
    RoundGate gate;
    // Bit set: our page may hold non-zero bytes. Written by whoever claimed the page.
    std::vector<AtomicBitmap> maybe_nonzero;
    Prefault prefault;
    HoleWriter holes;
    HugeHoles huge;
    Counters counters;
    FailureLatch latch;
    std::unique_ptr<StreamSink> sink;  // of hostless blocks; nullptr: there are none

    std::mutex mutex;
    std::condition_variable changed;
    // Under mutex:
    std::vector<std::unique_ptr<ReceiverChannel>> channels;
    unsigned ended = 0;
    uint64_t landed_barriers = 0;
    bool closed = false;
};

class Receiver {
public:
    // `maybe_nonzero[i]` points at `nwords[i]` words, copied: the pages of block i that may hold
    // non-zero bytes now. A page whose bit is clear is a proven hole, and a zero page leaves it one.
    // The arrays and files of options.reuse are read until close(). The blocks' own files
    // are duplicated, until close().
    Receiver(std::vector<MemoryBlock> blocks, size_t page_bytes, const ReceiverOptions &options,
             const std::vector<const uint64_t *> &maybe_nonzero, const std::vector<size_t> &nwords);
    ~Receiver();
    Receiver(const Receiver &) = delete;
    Receiver &operator=(const Receiver &) = delete;

    void attach(int fd, unsigned index);
    // True when every channel has ended with END; false at the timeout (0: none).
    bool wait(int64_t timeout_ns);
    // True when so many barriers have come on every channel: all before them has landed. False at the
    // timeout (0: none). Throws protocol when all channels have ended before.
    bool wait_barriers(uint64_t count, int64_t timeout_ns);
    void cancel(const std::string &reason);
    void close();

    const HashTable &hashes() const noexcept { return shared_.hashes; }
    const Counters &counters() const noexcept { return shared_.counters; }
    // Pages that each file of `reuse` gave.
    std::vector<uint64_t> reused() const { return shared_.store.served(); }
    std::vector<std::string> fallbacks() const;

private:
    template <typename Done> bool wait_until(int64_t timeout_ns, Done done);

    ReceiverShared shared_;
};

}  // namespace vmth

#endif

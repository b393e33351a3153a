// SPDX-License-Identifier: Apache-2.0
// The source's end of all page channels.
//
//   caller --send*()--> JobQueue --batches--> worker of channel k: read, hash, packet --> socket k
//          <-barrier()-- ledgers <--------- reader of channel k: acknowledgements  <---- socket k
//
// Threads: add_channel, *_reuse, send*, sent, barrier(s), keep, take_missed*, forget, finish and close come
// from one thread; everything else from any. The first failure ends all channels: sockets are shut down,
// blocked calls wake and throw it, later ones too.
#ifndef VMTH_XFER_SENDER_HPP
#define VMTH_XFER_SENDER_HPP

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "xfer/atomic_bitmap.hpp"
#include "xfer/content_places.hpp"
#include "xfer/counters.hpp"
#include "xfer/delta_cache.hpp"
#include "xfer/flow_control.hpp"
#include "xfer/guest_memory.hpp"
#include "xfer/hash_table.hpp"
#include "xfer/job_queue.hpp"
#include "xfer/kept_copies.hpp"
#include "xfer/known_landed.hpp"
#include "xfer/lent_pages.hpp"
#include "xfer/missed_pages.hpp"
#include "xfer/page_forms.hpp"
#include "xfer/prefault.hpp"
#include "xfer/reuse_encoder.hpp"
#include "xfer/sender_options.hpp"

namespace vmth {

class SenderChannel;

struct MissedCopy {
    uint32_t block;
    uint64_t page;
    std::vector<uint8_t> content;
};

// What the channels' threads share; each member says who may touch it.
class SenderShared {
public:
    SenderShared(std::vector<MemoryBlock> blocks, size_t page_bytes, const SenderOptions &options);

    // Record the first failure and wake everything. Any thread.
    void fail(const TransferError &error);
    // Worker of a channel: its packet of the pending barrier went to the socket.
    void barrier_sent();
    // Worker or reader of a channel: its half of the pending barrier is done.
    void barrier_part_done();
    // Reader: a ledger has become empty. Wakes finish().
    void ledger_drained();
    // Any thread; each name is kept once.
    void fallback(const std::string &name);

    const SenderOptions options;
    const GuestMemory memory;
    HashTable hashes;
    FormsSwitch forms;
    KnownLanded known;
    ContentPlaces places;  // of dedup, if that was agreed on
    DeltaCache deltas;     // of delta, if that was agreed on
    ReuseState reuse;      // of reuse, if that was agreed on
    KeptCopies copies;     // of lent pages
    Prefault prefault;
    FlowControl flow;
    JobQueue queue;
    Tickets tickets;
    MissedPages missed;
    Counters counters;
    FailureLatch latch;

    mutable std::mutex mutex;
    std::condition_variable changed;
    // Under mutex:
    std::vector<std::unique_ptr<SenderChannel>> channels;
    uint64_t unsent_barriers = 0;  // channels that have not sent the pending one
    uint64_t barrier_parts = 0;  // outstanding halves (acknowledged; completions) of a barrier
    std::set<std::string> fallbacks;
};

class Sender {
public:
    Sender(std::vector<MemoryBlock> blocks, size_t page_bytes, const SenderOptions &options);
    ~Sender();
    Sender(const Sender &) = delete;
    Sender &operator=(const Sender &) = delete;

    // Channels are added before the first barrier; the descriptor is duplicated. `trip_ns`: what a short
    // message took there and back; 0: unknown.
    void add_channel(int fd, unsigned index, uint64_t trip_ns = 0);

    // What the destination says it has: the key and the number of entries, then the parts in order, all
    // before the first channel. Throws protocol for a set that is not one, and usage where reuse was not
    // agreed on.
    void begin_reuse(const uint8_t secret[VMTH_CONTENT_KEY_BYTES], uint64_t entries);
    void add_reuse(uint64_t base, uint64_t count, const uint8_t *data, size_t nbytes, bool last);

    // `words` is the whole block's bitmap (`nwords` long); the pages of [page, page + npages) whose bit
    // is set are queued, and read any time before barrier() returns true. Throws usage, and queues
    // nothing, for a page already sent since the last barrier.
    void send(uint32_t block, uint64_t page, uint64_t npages, const uint64_t *words, size_t nwords,
              uint32_t round);
    // Pages whose content lies in `data`, which is read until pages_read() reaches the ticket, and then
    // no more. Queues whole runs in order up to the first that has a page already sent since the last
    // barrier. Returns how many, and the ticket (the last one given if none was queued). Throws usage,
    // and queues nothing, for a run that is not within its block or its data.
    std::pair<size_t, uint64_t> send_pages(const vmth_qemu_run *runs, size_t nruns,
                                           const uint8_t *data, size_t nbytes, uint32_t round);
    // The same, of all runs (at least one) or none: nothing where a page of them was sent since the last
    // barrier, or is in them twice. Returns the ticket.
    std::optional<uint64_t> send_stretch(const vmth_qemu_run *runs, size_t nruns,
                                         const uint8_t *data, size_t nbytes, uint32_t round);
    // Lent memory that stays until no thread of this reads it, however long its owner does.
    void keep(std::shared_ptr<const void> memory) { kept_.push_back(std::move(memory)); }
    // Any thread. wait_read() is false at the timeout (0: none).
    uint64_t pages_read() const { return shared_.tickets.read(); }
    bool wait_read(uint64_t ticket, int64_t timeout_ns) const;
    // HOLE or FREE pages: nothing is read.
    void send_told(vmth_page_form form, uint32_t block, std::vector<vmth_run> runs, uint32_t round);
    // Begins the round's barrier. True when each channel has given all that is before it, and it, to its
    // socket: hashes() is then of all that was queued. False at the timeout (0: none). barrier() follows.
    bool sent(uint32_t round, int64_t timeout_ns);
    // How many were begun: the other end counts them too.
    uint64_t barriers() const noexcept { return barriers_; }
    // True when everything of the round has landed and the kernel reads no page any more; false when
    // `timeout_ns` (0: none) came first: call again with the same round.
    bool barrier(uint32_t round, int64_t timeout_ns);
    void finish();
    void cancel(const std::string &reason);
    void close();

    // `bitmaps` hold what was dirtied since the pages were sent, as it was fetched after the barrier: a
    // packet that landed with another digest is explained by a dirty page in it, and not sent again.
    // `nwords[i]` are checked against the blocks.
    uint64_t take_missed(const std::vector<uint64_t *> &bitmaps, const std::vector<size_t> &nwords);
    // Of the pages that were missed those that came by send_pages() and can be sent again by it: what was
    // lent is gone. Taken after take_missed(), which has them among the others.
    std::vector<MissedCopy> take_missed_pages();
    const HashTable &hashes() const noexcept { return shared_.hashes; }
    const Counters &counters() const noexcept { return shared_.counters; }
    PathInfo path_info() const;
    // In the order in which they were added; none after close(). Any thread.
    std::vector<ChannelInfo> channel_infos() const;
    void set_bandwidth(uint64_t bytes_per_second) { shared_.flow.set_bandwidth(bytes_per_second); }
    // Obeyed from the next packet of each channel on; see FormsSwitch. Any thread. The first time with
    // dedup takes as long as its index takes to be allocated: milliseconds.
    void set_forms(const FormsSetting &setting);
    // The destination may hold something else in these pages than is known: they are sent again even if
    // they are the same. Called before they are queued; the range is checked (usage).
    void forget(uint32_t block, uint64_t page, uint64_t npages);
    // Most bytes in flight over all channels, shared among them by their rates; 0: no limit. Until it is
    // called each channel's opens by itself (opening_window.hpp). Any thread.
    void set_window(uint64_t nbytes);
    uint64_t in_flight() const { return shared_.flow.in_flight(); }
    std::vector<std::string> fallbacks() const;

private:
    void check_open() const;
    void check_no_barrier() const;
    void check_channels() const;
    void check_reuse() const;
    std::vector<LentRun> lent_runs(const vmth_qemu_run *runs, size_t nruns, const uint8_t *data,
                                   size_t nbytes) const;
    size_t claim(const vmth_qemu_run *runs, size_t nruns);
    uint64_t push_lent(const vmth_qemu_run *runs, const std::vector<LentRun> &lent, size_t nruns,
                       uint32_t round);
    void begin_barrier(uint32_t round);
    bool wait(std::unique_lock<std::mutex> &lock, int64_t timeout_ns, const uint64_t &left);
    void join_workers();
    void join_readers();
    void push(Job &&job);

    std::vector<std::shared_ptr<const void>> kept_;
    SenderShared shared_;
    // The calling thread's:
    std::vector<AtomicBitmap> claims_;  // pages sent since the last barrier
    uint64_t barriers_ = 0;
    bool barrier_pending_ = false;
    uint32_t pending_round_ = 0;
    bool finished_ = false;
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// The pages waiting to be sent, which the channels' workers take in batches.
//
//   send() --> | job | job | --> pull() by whichever channel is free --> batch --> packet
//              block, round, form, and a bitmap copy or a list of runs
//
// Which channel takes how much is said by ChannelBalance: a slow one leaves the last pages of a round to
// others. A job leaves the queue when its last batch was taken. A barrier is not a job: each worker sees
// it once, when no job is left, and sends its own barrier packet behind its own pages.
#ifndef VMTH_XFER_JOB_QUEUE_HPP
#define VMTH_XFER_JOB_QUEUE_HPP

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "vmth/bitmap.h"
#include "vmth/packet.h"
#include "xfer/channel_balance.hpp"
#include "xfer/lent_pages.hpp"
#include "xfer/steady_clock.hpp"

namespace vmth {

struct Batch {
    vmth_page_form form = VMTH_FORM_NORMAL;  // NORMAL: to be read; HOLE, FREE: only told
    uint32_t block = 0;
    uint32_t round = 0;
    std::vector<vmth_run> runs;  // of guest memory, if read
    std::vector<LentRun> lent;   // instead of runs
    uint64_t ticket = 0;         // of the lent runs; 0: none are lent
    uint64_t npages = 0;
    uint64_t share = 0;  // pages that the worker may take yet for the packet of this batch
};

// What one send() asked for: a bitmap, lent runs (with a ticket), or runs that are only told. `words`
// covers pages from the multiple of 64 at or below `cursor`.
struct Job {
    vmth_page_form form = VMTH_FORM_NORMAL;
    uint32_t block = 0;
    uint32_t round = 0;
    std::vector<uint64_t> words;  // bitmap
    uint64_t base = 0;            // bitmap: page of bit 0 of words
    uint64_t cursor = 0;          // bitmap: next bit of words; else pages taken of the run
    uint64_t nbits = 0;           // bitmap: end of words
    std::vector<LentRun> lent;
    uint64_t ticket = 0;
    std::vector<vmth_run> runs;  // HOLE, FREE
    size_t run = 0;              // next of lent or runs
    uint64_t remaining = 0;      // pages not taken yet
};

using MostPages = std::function<uint64_t(uint64_t rate_bps)>;

enum class Pulled { batch, barrier, end, stopped };

class JobQueue {
public:
    explicit JobQueue(size_t capacity) : capacity_(capacity) {}

    // Returns the worker's place, which it and its reader name themselves by.
    size_t add_worker();
    // Blocks while `capacity` jobs wait, or, of lent pages, several times as many: those come in small
    // pieces, and who lends them bounds their bytes. Returns false when stopped.
    bool push(Job &&job);
    // Every worker pulls `barrier` once, after the jobs queued before; batch.round is then this.
    void close_round(uint32_t round);
    void close();  // every worker pulls `end`, after the jobs queued before
    void stop();   // every call returns at once, from now on

    // `barriers` counts those this worker has pulled. A batch of pages to be read has at most
    // `most_pages`, which is asked with the worker's rate once there is one, under the queue's lock; and
    // fewer where what is left should be shared among the workers. What it took so is told by sent().
    Pulled pull(size_t worker, Batch &batch, const MostPages &most_pages, uint64_t &barriers);
    // More of the same block, round and form, lent as before or not, without waiting, within the share of
    // the batch: false if there is none at the front. The ticket may be another one.
    bool pull_more(size_t worker, Batch &batch, uint64_t max_pages);

    // Any thread. The life of what a worker took: see ChannelBalance.
    void sent(size_t worker, uint64_t pages, uint64_t nbytes, uint64_t cpu_ns);
    void acked(size_t worker, uint64_t nbytes);
    void set_window(uint64_t nbytes);
    uint64_t rate_bps(size_t worker) const;
    bool opening(size_t worker) const;
    // Jobs with pages not yet taken.
    size_t waiting() const;
    // Nanoseconds, of its whole life, in which there was none.
    uint64_t empty_ns() const;

private:
    void take_locked(size_t worker, Batch &batch, uint64_t max_pages);
    uint64_t left_locked() const;
    bool wait_for_share_locked(std::unique_lock<std::mutex> &lock, size_t worker, Batch &batch);

    const size_t capacity_;
    mutable std::mutex mutex_;
    std::condition_variable room_;  // push waits for it
    std::condition_variable work_;  // pull waits for it
    // Under mutex_:
    std::deque<Job> jobs_;
    int64_t empty_since_ns_ = steady_ns();
    uint64_t empty_ns_ = 0;  // before that
    ChannelBalance balance_;
    unsigned held_back_ = 0;  // workers that leave the front to others, for now
    uint64_t barriers_ = 0;
    uint32_t barrier_round_ = 0;
    bool closed_ = false;
    bool stopped_ = false;
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// Cutting queued jobs into batches.
#include "xfer/job_queue.hpp"

#include <algorithm>
#include <chrono>

namespace vmth {

namespace {

// A batch that is not read costs next to nothing a page; its bounds keep packets and locks short.
constexpr uint64_t told_pages = 1u << 20;
constexpr size_t told_runs = 4096;
// Bits examined at once for runs: bounds the work of one pull where runs are longer than a batch.
constexpr uint64_t scan_bits = 4096;
// Zero pages are lent without bytes, so that their number is bounded here.
constexpr size_t lent_factor = 8;

using Clock = std::chrono::steady_clock;

bool is_read(const Job &job)
{
    return job.form == VMTH_FORM_NORMAL;  // lent ones are
}

void take_run(Job &job, Batch &batch, uint64_t page, uint64_t npages)
{
    batch.runs.push_back({page, npages});
    batch.npages += npages;
    job.remaining -= npages;
}

void cut_bitmap(Job &job, Batch &batch, uint64_t max_pages)
{
    uint64_t window = std::max(scan_bits, 4 * max_pages);
    while (batch.npages < max_pages && job.remaining > 0) {
        vmth_run runs[64];
        size_t nruns = 0;
        uint64_t resume = 0;
        uint64_t end = std::min(job.nbits, job.cursor + window);
        if (vmth_bitmap_runs(job.words.data(), end, job.cursor, runs, 64, &nruns, &resume) != 0) {
            job.remaining = 0;  // unreachable: the arguments are in range
            return;
        }
        window = nruns == 0 ? 2 * window : window;
        job.cursor = resume;
        for (size_t i = 0; i < nruns; i++) {
            uint64_t take = std::min(runs[i].npages, max_pages - batch.npages);
            if (take > 0) {
                take_run(job, batch, job.base + runs[i].page, take);
            }
            if (take < runs[i].npages) {
                job.cursor = runs[i].page + take;
                return;
            }
        }
    }
}

void cut_lent(Job &job, Batch &batch, uint64_t max_pages)
{
    while (job.remaining > 0 && batch.npages < max_pages) {
        const LentRun &run = job.lent[job.run];
        uint64_t take = std::min(run.npages - job.cursor, max_pages - batch.npages);
        const uint8_t *at = run.at == nullptr ? nullptr : run.at + job.cursor * run.stride;
        batch.lent.push_back({run.page + job.cursor, take, at, run.stride});
        batch.npages += take;
        job.remaining -= take;
        job.cursor += take;
        if (job.cursor == run.npages) {
            job.run++;
            job.cursor = 0;
        }
    }
}

void cut_runs(Job &job, Batch &batch)
{
    while (job.remaining > 0 && batch.npages < told_pages && batch.runs.size() < told_runs) {
        const vmth_run &run = job.runs[job.run];
        uint64_t take = std::min(run.npages - job.cursor, told_pages - batch.npages);
        if (take > 0) {
            take_run(job, batch, run.page + job.cursor, take);
        }
        job.cursor += take;
        if (job.cursor == run.npages) {
            job.run++;
            job.cursor = 0;
        }
    }
}

}  // namespace

size_t JobQueue::add_worker()
{
    std::lock_guard<std::mutex> lock(mutex_);
    return balance_.add_channel();
}

bool JobQueue::push(Job &&job)
{
    std::unique_lock<std::mutex> lock(mutex_);
    const size_t capacity = job.ticket == 0 ? capacity_ : lent_factor * capacity_;
    room_.wait(lock, [&] { return stopped_ || jobs_.size() < capacity; });
    if (stopped_) {
        return false;
    }
    if (job.remaining > 0) {
        if (jobs_.empty()) {
            empty_ns_ += static_cast<uint64_t>(steady_ns() - empty_since_ns_);
        }
        jobs_.push_back(std::move(job));
        work_.notify_all();
    }
    return true;
}

void JobQueue::close_round(uint32_t round)
{
    std::lock_guard<std::mutex> lock(mutex_);
    barriers_++;
    barrier_round_ = round;
    work_.notify_all();
}

void JobQueue::close()
{
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    work_.notify_all();
}

void JobQueue::stop()
{
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    work_.notify_all();
    room_.notify_all();
}

uint64_t JobQueue::left_locked() const
{
    uint64_t left = 0;
    for (const Job &waiting : jobs_) {
        left += is_read(waiting) ? waiting.remaining : 0;
    }
    return left;
}

void JobQueue::take_locked(size_t worker, Batch &batch, uint64_t max_pages)
{
    Job &job = jobs_.front();
    batch.runs.clear();
    batch.lent.clear();
    batch.npages = 0;
    batch.ticket = job.ticket;
    max_pages = std::min(max_pages, batch.share);
    if (job.ticket != 0) {
        cut_lent(job, batch, max_pages);
    } else if (is_read(job)) {
        cut_bitmap(job, batch, max_pages);
    } else {
        cut_runs(job, batch);
    }
    if (is_read(job)) {
        balance_.taken(worker, batch.npages);
        batch.share -= batch.npages;
    }
    if (job.remaining == 0) {
        jobs_.pop_front();
        if (jobs_.empty()) {
            empty_since_ns_ = steady_ns();
        }
        room_.notify_one();
        if (held_back_ > 0) {
            work_.notify_all();
        }
    }
}

// Until the worker may take of the front job: true, with batch.share set. False when there is none any
// more, or everything stopped. What others should have taken meanwhile, and have not, it takes after all:
// a measured rate is the past's.
bool JobQueue::wait_for_share_locked(std::unique_lock<std::mutex> &lock, size_t worker, Batch &batch)
{
    bool patient = false;
    Clock::time_point until;
    while (!stopped_ && !jobs_.empty()) {
        if (!is_read(jobs_.front())) {
            return true;
        }
        const Share share = balance_.share(worker, left_locked());
        const Clock::time_point now = Clock::now();
        if (share.pages > 0 || (patient && now >= until && share.patience_ns >= 0)) {
            batch.share = std::max(share.pages, balance_.least_pages());
            return true;
        }
        if (share.patience_ns >= 0 && !patient) {
            patient = true;
            until = now + std::chrono::nanoseconds(share.patience_ns);
        }
        held_back_++;
        if (share.patience_ns >= 0) {
            work_.wait_until(lock, until);
        } else {
            work_.wait(lock);  // for an acknowledgement of what it has under way
        }
        held_back_--;
    }
    return false;
}

Pulled JobQueue::pull(size_t worker, Batch &batch, const MostPages &most_pages, uint64_t &barriers)
{
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        work_.wait(lock,
                   [&] { return stopped_ || !jobs_.empty() || barriers < barriers_ || closed_; });
        if (stopped_) {
            return Pulled::stopped;
        }
        if (jobs_.empty()) {
            break;
        }
        if (wait_for_share_locked(lock, worker, batch)) {
            batch.form = jobs_.front().form;
            batch.block = jobs_.front().block;
            batch.round = jobs_.front().round;
            take_locked(worker, batch, most_pages(balance_.rate_bps(worker)));
            return Pulled::batch;
        }
    }
    if (barriers < barriers_) {
        barriers++;
        batch.round = barrier_round_;
        return Pulled::barrier;
    }
    return Pulled::end;
}

bool JobQueue::pull_more(size_t worker, Batch &batch, uint64_t max_pages)
{
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopped_ || jobs_.empty() || batch.share == 0) {
        return false;
    }
    const Job &job = jobs_.front();
    if (job.form != batch.form || job.block != batch.block || job.round != batch.round ||
        (job.ticket != 0) != (batch.ticket != 0)) {
        return false;
    }
    take_locked(worker, batch, max_pages);
    return true;
}

void JobQueue::sent(size_t worker, uint64_t pages, uint64_t nbytes, uint64_t cpu_ns)
{
    std::lock_guard<std::mutex> lock(mutex_);
    balance_.sent(worker, pages, nbytes, cpu_ns, steady_ns());
    if (held_back_ > 0) {
        work_.notify_all();
    }
}

void JobQueue::acked(size_t worker, uint64_t nbytes)
{
    std::lock_guard<std::mutex> lock(mutex_);
    balance_.acked(worker, nbytes, steady_ns());
    if (held_back_ > 0) {
        work_.notify_all();
    }
}

void JobQueue::set_window(uint64_t nbytes)
{
    std::lock_guard<std::mutex> lock(mutex_);
    balance_.set_window(nbytes);
    work_.notify_all();
}

uint64_t JobQueue::rate_bps(size_t worker) const
{
    std::lock_guard<std::mutex> lock(mutex_);
    return balance_.rate_bps(worker);
}

bool JobQueue::opening(size_t worker) const
{
    std::lock_guard<std::mutex> lock(mutex_);
    return balance_.opening(worker, steady_ns());
}

size_t JobQueue::waiting() const
{
    std::lock_guard<std::mutex> lock(mutex_);
    return jobs_.size();
}

uint64_t JobQueue::empty_ns() const
{
    std::lock_guard<std::mutex> lock(mutex_);
    return empty_ns_ +
           (jobs_.empty() ? static_cast<uint64_t>(steady_ns() - empty_since_ns_) : 0);
}

}  // namespace vmth

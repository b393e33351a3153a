// SPDX-License-Identifier: Apache-2.0
// The sender's calls: queueing, barriers, the end.
#include "xfer/sender.hpp"

#include <algorithm>
#include <cassert>
#include <chrono>

#include "sys/sock_options.h"
#include "xfer/sender_channel.hpp"

namespace vmth {

namespace {

// A packet's trip has the time of both ends' processes in it, TCP's has not: 0.5 to 1.5 ms of it on two
// busy cores. What is longer by more than this lies on the way: TCP's trip then ends at a tunnel.
constexpr uint64_t ends_own_ns = 2'000'000;

TransferError sent_twice(uint32_t block)
{
    return TransferError(ErrorKind::usage, "block " + std::to_string(block) +
                                               ": a page was already sent since the last barrier");
}

bool overlap(std::vector<vmth_run> runs)
{
    std::sort(runs.begin(), runs.end(),
              [](const vmth_run &a, const vmth_run &b) { return a.page < b.page; });
    uint64_t end = 0;
    for (const vmth_run &run : runs) {
        if (run.npages > 0 && run.page < end) {
            return true;
        }
        end = std::max(end, run.page + run.npages);
    }
    return false;
}

}  // namespace

// ---- shared -----------------------------------------------------------------------------------------

SenderShared::SenderShared(std::vector<MemoryBlock> blocks, size_t page_bytes,
                           const SenderOptions &given)
    : options(checked(given, page_bytes)), memory(std::move(blocks), page_bytes),
      hashes(memory, options.hash_seed, options.digest), forms(options.forms, options.digest),
      known(memory, forms.hashing()),
      places(memory, hashes, known, forms.usable(VMTH_FORM_DEDUP) ? options.dedup_index_bytes : 0),
      deltas(page_bytes, forms.usable(VMTH_FORM_DELTA) ? options.delta_cache_bytes : 0,
             memory.total_pages()),
      reuse(memory, forms.usable(VMTH_FORM_REUSE)), copies(page_bytes, options.kept_copies_bytes),
      prefault(memory, options.populate), flow(options.packet_bytes, options.fast_packet_bytes, page_bytes),
      queue(options.queue_jobs), missed(memory)
{
}

void SenderShared::fail(const TransferError &error)
{
    latch.set(error);
    queue.stop();
    tickets.stop();
    flow.stop();
    std::lock_guard<std::mutex> lock(mutex);
    for (const std::unique_ptr<SenderChannel> &channel : channels) {
        channel->channel().shutdown();
    }
    changed.notify_all();
}

void SenderShared::barrier_sent()
{
    std::lock_guard<std::mutex> lock(mutex);
    if (--unsent_barriers == 0) {
        changed.notify_all();
    }
}

void SenderShared::barrier_part_done()
{
    std::lock_guard<std::mutex> lock(mutex);
    if (--barrier_parts == 0) {
        changed.notify_all();
    }
}

void SenderShared::ledger_drained()
{
    std::lock_guard<std::mutex> lock(mutex);
    changed.notify_all();
}

void SenderShared::fallback(const std::string &name)
{
    std::lock_guard<std::mutex> lock(mutex);
    fallbacks.insert(name);
}

// ---- sender -----------------------------------------------------------------------------------------

Sender::Sender(std::vector<MemoryBlock> blocks, size_t page_bytes, const SenderOptions &options)
    : shared_(std::move(blocks), page_bytes, options)
{
    for (size_t block = 0; block < shared_.memory.nblocks(); block++) {
        claims_.emplace_back(shared_.memory.npages(block));
    }
}

Sender::~Sender()
{
    close();
}

void Sender::check_open() const
{
    shared_.latch.check();
    if (finished_) {
        throw TransferError(ErrorKind::usage, "the sender has finished");
    }
}

// No barrier waits for its acknowledgement: only then are pages queued.
void Sender::check_no_barrier() const
{
    if (barrier_pending_) {
        throw TransferError(ErrorKind::usage, "the barrier of round " +
                                                  std::to_string(pending_round_) +
                                                  " is not acknowledged yet");
    }
}

void Sender::add_channel(int fd, unsigned index, uint64_t trip_ns)
{
    check_open();
    if (index >= VMTH_MAX_CHANNELS) {
        throw TransferError(ErrorKind::usage, "channel " + std::to_string(index) +
                                                  ", allowed 0 to " +
                                                  std::to_string(VMTH_MAX_CHANNELS - 1));
    }
    if (barriers_ > 0) {
        throw TransferError(ErrorKind::usage, "channels are added before the first barrier");
    }
    // Only this thread adds channels, so it looks at the list without the lock.
    for (const std::unique_ptr<SenderChannel> &other : shared_.channels) {
        if (other->channel().index() == index) {
            throw TransferError(ErrorKind::usage,
                                "channel " + std::to_string(index) + " was added before");
        }
    }
    auto channel = std::make_unique<SenderChannel>(shared_, fd, index, shared_.channels.size(), trip_ns);
    SenderChannel &added = *channel;
    // First: whoever sees the channel may ask the queue for its rate.
    const size_t place = shared_.queue.add_worker();
    assert(place == added.place());
    (void)place;
    {
        std::lock_guard<std::mutex> lock(shared_.mutex);
        shared_.channels.push_back(std::move(channel));
        if (shared_.latch.failed()) {
            added.channel().shutdown();
        }
    }
    try {
        added.start();
    } catch (const std::exception &error) {
        shared_.fail(TransferError(ErrorKind::io, std::string("thread: ") + error.what()));
        shared_.latch.check();
    }
}

void Sender::check_reuse() const
{
    check_open();
    if (!shared_.reuse.enabled()) {
        throw TransferError(ErrorKind::usage, "a reuse filter, allowed where reuse was agreed on");
    }
    std::lock_guard<std::mutex> lock(shared_.mutex);
    if (!shared_.channels.empty()) {
        throw TransferError(ErrorKind::usage, "the reuse filter comes before the first channel");
    }
}

void Sender::begin_reuse(const uint8_t secret[VMTH_CONTENT_KEY_BYTES], uint64_t entries)
{
    check_reuse();
    shared_.reuse.filter.begin(secret, entries);
}

void Sender::add_reuse(uint64_t base, uint64_t count, const uint8_t *data, size_t nbytes, bool last)
{
    check_reuse();
    if (count > 0) {  // nothing at all is a set, too
        shared_.reuse.filter.add(base, count, data, nbytes);
    }
    if (last) {
        shared_.reuse.filter.complete();
    }
}

void Sender::check_channels() const
{
    std::lock_guard<std::mutex> lock(shared_.mutex);
    if (shared_.channels.empty()) {
        throw TransferError(ErrorKind::usage, "no channel was added");
    }
}

void Sender::push(Job &&job)
{
    check_channels();
    if (!shared_.queue.push(std::move(job))) {
        shared_.latch.check();
    }
}

void Sender::send(uint32_t block, uint64_t page, uint64_t npages, const uint64_t *words,
                  size_t nwords, uint32_t round)
{
    check_open();
    shared_.memory.check_range(block, page, npages);
    if (shared_.memory.hostless(block)) {
        throw TransferError(ErrorKind::usage,
                            "block " + std::to_string(block) +
                                " has no memory here, allowed send_pages with its content");
    }
    if (nwords < VMTH_BITMAP_WORDS(shared_.memory.npages(block))) {
        throw TransferError(ErrorKind::usage,
                            "bitmap of " + std::to_string(nwords) + " words, allowed " +
                                std::to_string(VMTH_BITMAP_WORDS(shared_.memory.npages(block))));
    }
    check_no_barrier();
    check_channels();
    if (npages == 0) {
        return;
    }
    Job job;
    job.block = block;
    job.round = round;
    job.base = page / 64 * 64;
    job.nbits = page + npages - job.base;
    const uint64_t *first = words + job.base / 64;
    job.words.assign(first, first + VMTH_BITMAP_WORDS(job.nbits));
    vmth_bitmap_clear_range(job.words.data(), 0, page - job.base);
    if (job.nbits % 64 != 0) {
        job.words.back() &= (uint64_t{1} << (job.nbits % 64)) - 1;
    }
    job.remaining = vmth_bitmap_count(job.words.data(), 0, job.nbits);
    if (!claims_[block].claim_words(job.base, job.words.data(), job.words.size())) {
        throw sent_twice(block);
    }
    shared_.places.queued(block, job.base, job.words);
    push(std::move(job));
}

std::pair<size_t, uint64_t> Sender::send_pages(const vmth_qemu_run *runs, size_t nruns,
                                               const uint8_t *data, size_t nbytes,
                                               uint32_t round)
{
    const std::vector<LentRun> lent = lent_runs(runs, nruns, data, nbytes);
    const size_t queued = claim(runs, nruns);
    return {queued, queued == 0 ? shared_.tickets.issued() : push_lent(runs, lent, queued, round)};
}

std::optional<uint64_t> Sender::send_stretch(const vmth_qemu_run *runs, size_t nruns,
                                             const uint8_t *data, size_t nbytes, uint32_t round)
{
    const std::vector<LentRun> lent = lent_runs(runs, nruns, data, nbytes);
    const size_t claimed = claim(runs, nruns);
    if (claimed < nruns) {
        for (size_t i = 0; i < claimed; i++) {
            claims_[runs[i].block].clear_range(runs[i].page, runs[i].npages);
        }
        return std::nullopt;
    }
    return push_lent(runs, lent, nruns, round);
}

std::vector<LentRun> Sender::lent_runs(const vmth_qemu_run *runs, size_t nruns, const uint8_t *data,
                                       size_t nbytes) const
{
    check_open();
    check_no_barrier();
    check_channels();
    std::vector<LentRun> lent;
    lent.reserve(nruns);
    for (size_t i = 0; i < nruns; i++) {
        lent.push_back(lent_run(shared_.memory, runs[i], data, nbytes));
    }
    return lent;
}

// How many, up to the first with a page that is claimed already.
size_t Sender::claim(const vmth_qemu_run *runs, size_t nruns)
{
    size_t claimed = 0;
    for (; claimed < nruns; claimed++) {
        const vmth_qemu_run &run = runs[claimed];
        if (claims_[run.block].first_run(run.page, run.npages)) {
            break;
        }
        claims_[run.block].set_range(run.page, run.npages);
        shared_.places.queued(run.block, {run.page, run.npages});
    }
    return claimed;
}

uint64_t Sender::push_lent(const vmth_qemu_run *runs, const std::vector<LentRun> &lent, size_t nruns,
                           uint32_t round)
{
    uint64_t npages = 0;
    for (size_t i = 0; i < nruns; i++) {
        npages += lent[i].npages;
    }
    const uint64_t ticket = shared_.tickets.open(npages);
    for (size_t first = 0; first < nruns;) {  // a job a block
        Job job;
        job.block = runs[first].block;
        job.round = round;
        job.ticket = ticket;
        for (; first < nruns && runs[first].block == job.block; first++) {
            job.lent.push_back(lent[first]);
            job.remaining += lent[first].npages;
        }
        push(std::move(job));
    }
    return ticket;
}

bool Sender::wait_read(uint64_t ticket, int64_t timeout_ns) const
{
    if (ticket > shared_.tickets.issued()) {
        throw TransferError(ErrorKind::usage,
                            "ticket " + std::to_string(ticket) + ", allowed up to " +
                                std::to_string(shared_.tickets.issued()));
    }
    const bool read = shared_.tickets.wait(ticket, timeout_ns);
    if (shared_.tickets.read() < ticket) {
        shared_.latch.check();
    }
    return read;
}

void Sender::send_told(vmth_page_form form, uint32_t block, std::vector<vmth_run> runs,
                       uint32_t round)
{
    check_open();
    check_no_barrier();
    check_channels();
    Job job;
    job.form = form;
    job.block = block;
    job.round = round;
    for (const vmth_run &run : runs) {
        shared_.memory.check_range(block, run.page, run.npages);
        if (run.npages > 0 && claims_[block].first_run(run.page, run.npages)) {
            throw sent_twice(block);
        }
        job.remaining += run.npages;
    }
    if (overlap(runs)) {
        throw sent_twice(block);
    }
    for (const vmth_run &run : runs) {
        claims_[block].set_range(run.page, run.npages);
        shared_.places.queued(block, run);
    }
    job.runs = std::move(runs);
    push(std::move(job));
}

// Under the mutex; again for the same round it does nothing.
void Sender::begin_barrier(uint32_t round)
{
    if (shared_.channels.empty()) {
        throw TransferError(ErrorKind::usage, "no channel was added");
    }
    if (barrier_pending_ && round != pending_round_) {
        throw TransferError(ErrorKind::usage, "barrier of round " + std::to_string(round) +
                                                  ", allowed " + std::to_string(pending_round_) +
                                                  ": it is not acknowledged yet");
    }
    if (!barrier_pending_) {
        barriers_++;
        barrier_pending_ = true;
        pending_round_ = round;
        shared_.unsent_barriers = shared_.channels.size();
        shared_.barrier_parts = 2 * shared_.channels.size();
        shared_.queue.close_round(round);
    }
}

// Until nothing is `left`; false at the timeout.
bool Sender::wait(std::unique_lock<std::mutex> &lock, int64_t timeout_ns, const uint64_t &left)
{
    auto done = [&] { return shared_.latch.failed() || left == 0; };
    if (timeout_ns <= 0) {
        shared_.changed.wait(lock, done);
    } else if (!shared_.changed.wait_for(lock, std::chrono::nanoseconds(timeout_ns), done)) {
        return false;
    }
    shared_.latch.check();
    return true;
}

bool Sender::sent(uint32_t round, int64_t timeout_ns)
{
    check_open();
    std::unique_lock<std::mutex> lock(shared_.mutex);
    begin_barrier(round);
    return wait(lock, timeout_ns, shared_.unsent_barriers);
}

bool Sender::barrier(uint32_t round, int64_t timeout_ns)
{
    check_open();
    std::unique_lock<std::mutex> lock(shared_.mutex);
    begin_barrier(round);
    if (!wait(lock, timeout_ns, shared_.barrier_parts)) {
        return false;
    }
    barrier_pending_ = false;
    for (AtomicBitmap &claims : claims_) {
        claims.reset();
    }
    return true;
}

void Sender::finish()
{
    check_open();
    check_no_barrier();
    shared_.queue.close();
    join_workers();
    {
        std::unique_lock<std::mutex> lock(shared_.mutex);
        shared_.changed.wait(lock, [this] {
            return shared_.latch.failed() ||
                   std::all_of(shared_.channels.begin(), shared_.channels.end(),
                               [](const auto &channel) { return channel->drained(); });
        });
        for (const std::unique_ptr<SenderChannel> &channel : shared_.channels) {
            channel->channel().shutdown_read();
        }
    }
    join_readers();
    shared_.latch.check();
    finished_ = true;
}

void Sender::cancel(const std::string &reason)
{
    shared_.fail(TransferError(ErrorKind::cancelled, reason));
}

void Sender::close()
{
    if (!finished_) {
        cancel("closed");
    }
    join_workers();
    join_readers();
    std::lock_guard<std::mutex> lock(shared_.mutex);
    shared_.channels.clear();
    finished_ = true;
}

// Only the calling thread adds and removes channels, so it walks the list without the lock.
void Sender::join_workers()
{
    for (const std::unique_ptr<SenderChannel> &channel : shared_.channels) {
        channel->join_worker();
    }
}

void Sender::join_readers()
{
    for (const std::unique_ptr<SenderChannel> &channel : shared_.channels) {
        channel->join_reader();
    }
}

uint64_t Sender::take_missed(const std::vector<uint64_t *> &bitmaps,
                             const std::vector<size_t> &nwords)
{
    if (bitmaps.size() != shared_.memory.nblocks() || nwords.size() != bitmaps.size()) {
        throw TransferError(ErrorKind::usage, std::to_string(bitmaps.size()) +
                                                  " bitmaps, allowed " +
                                                  std::to_string(shared_.memory.nblocks()));
    }
    for (size_t block = 0; block < bitmaps.size(); block++) {
        const uint64_t need = VMTH_BITMAP_WORDS(shared_.memory.npages(block));
        if (nwords[block] < need) {
            throw TransferError(ErrorKind::usage, "bitmap of " + std::to_string(nwords[block]) +
                                                      " words, allowed " + std::to_string(need));
        }
    }
    const uint64_t taken = shared_.missed.take(bitmaps);
    shared_.counters.missed_pages.add(taken);
    return taken;
}

std::vector<MissedCopy> Sender::take_missed_pages()
{
    std::vector<MissedCopy> pages;
    for (const MissedPages::Kept &kept : shared_.missed.take_kept()) {
        const uint8_t *content = kept.copy.content;
        pages.push_back({kept.block, kept.copy.page,
                         std::vector<uint8_t>(content, content + shared_.memory.page_bytes())});
        shared_.copies.give_back(kept.copy.content);
    }
    return pages;
}

void Sender::forget(uint32_t block, uint64_t page, uint64_t npages)
{
    shared_.memory.check_range(block, page, npages);
    shared_.places.replaced(block, {page, npages});
    shared_.known.forget(block, page, npages);
}

PathInfo Sender::path_info() const
{
    PathInfo path;
    path.starved_ns = shared_.queue.empty_ns();
    std::lock_guard<std::mutex> lock(shared_.mutex);
    for (const std::unique_ptr<SenderChannel> &channel : shared_.channels) {
        const uint64_t trip_ns = channel->least_trip_ns();
        path.rtt_ns = std::max(path.rtt_ns, trip_ns);
        vmth_sock_info info;
        if (vmth_sock_get_info(channel->channel().fd(), &info) != 0 || !info.tcp) {
            path.base_rtt_ns = std::max(path.base_rtt_ns, trip_ns);
            continue;
        }
        path.rtt_ns = std::max(path.rtt_ns, info.rtt_ns);
        const bool tunnel = info.base_rtt_ns == 0 || trip_ns > info.base_rtt_ns + ends_own_ns;
        path.base_rtt_ns = std::max(path.base_rtt_ns, tunnel ? trip_ns : info.base_rtt_ns);
        path.retransmits += info.retransmits;
        path.carrying_ns = std::max(path.carrying_ns, info.busy_ns - info.peer_full_ns);
        bool smaller = path.path_mtu == 0 || info.path_mtu < path.path_mtu;
        path.path_mtu = smaller ? info.path_mtu : path.path_mtu;
    }
    return path;
}

std::vector<ChannelInfo> Sender::channel_infos() const
{
    std::vector<ChannelInfo> infos;
    std::lock_guard<std::mutex> lock(shared_.mutex);
    for (const std::unique_ptr<SenderChannel> &channel : shared_.channels) {
        const ChannelCounters &counters = channel->counters();
        infos.push_back({channel->channel().index(), counters.pages.get(), counters.packets.get(),
                         counters.wire_bytes.get(), counters.acked_bytes.get(),
                         shared_.queue.rate_bps(channel->place()),
                         shared_.queue.opening(channel->place())});
    }
    return infos;
}

void Sender::set_forms(const FormsSetting &setting)
{
    shared_.forms.check(setting);
    if ((setting.mask & form_bit(VMTH_FORM_DEDUP)) != 0) {
        shared_.places.make_ready(shared_.options.populate);
    }
    shared_.forms.set(setting);
}

void Sender::set_window(uint64_t nbytes)
{
    shared_.flow.set_window(nbytes);
    shared_.queue.set_window(nbytes);
}

std::vector<std::string> Sender::fallbacks() const
{
    std::lock_guard<std::mutex> lock(shared_.mutex);
    std::vector<std::string> names(shared_.fallbacks.begin(), shared_.fallbacks.end());
    const std::string refused = shared_.prefault.refused();
    if (!refused.empty()) {
        names.push_back(refused);
    }
    return names;
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// A page bitmap that several threads set.
#include "xfer/atomic_bitmap.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "xfer/failure.hpp"

namespace vmth {

namespace {

constexpr std::memory_order relaxed = std::memory_order_relaxed;
constexpr std::memory_order acquire = std::memory_order_acquire;
constexpr std::memory_order release = std::memory_order_release;

uint64_t mask(uint64_t from, uint64_t to)  // bits [from, to) of a word, from < to <= 64
{
    uint64_t high = to == 64 ? ~uint64_t{0} : (uint64_t{1} << to) - 1;
    return high & ~((uint64_t{1} << from) - 1);
}

void lower(std::atomic<size_t> &bound, size_t value)
{
    size_t seen = bound.load(relaxed);
    while (value < seen && !bound.compare_exchange_weak(seen, value, relaxed)) {
    }
}

void raise(std::atomic<size_t> &bound, size_t value)
{
    size_t seen = bound.load(relaxed);
    while (value > seen && !bound.compare_exchange_weak(seen, value, relaxed)) {
    }
}

}  // namespace

AtomicBitmap::AtomicBitmap(uint64_t npages)
    : npages_(npages), nwords_(static_cast<size_t>((npages + 63) / 64)), low_(nwords_), high_(0)
{
    static_assert(sizeof(std::atomic<uint64_t>) == sizeof(uint64_t) &&
                  std::atomic<uint64_t>::is_always_lock_free);
    void *words = mmap(nullptr, std::max<size_t>(nwords_, 1) * 8, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (words == MAP_FAILED) {
        throw system_error("page bitmap", errno);
    }
    words_ = static_cast<std::atomic<uint64_t> *>(words);
}

AtomicBitmap::AtomicBitmap(AtomicBitmap &&other) noexcept
    : npages_(other.npages_), nwords_(other.nwords_), words_(other.words_), low_(other.low_.load()),
      high_(other.high_.load())
{
    other.words_ = nullptr;
}

AtomicBitmap::~AtomicBitmap()
{
    if (words_ != nullptr) {
        munmap(words_, std::max<size_t>(nwords_, 1) * 8);
    }
}

void AtomicBitmap::assign(const uint64_t *words) noexcept
{
    for (size_t i = 0; i < nwords_; i++) {
        uint64_t valid = i + 1 == nwords_ && npages_ % 64 != 0 ? mask(0, npages_ % 64) : ~uint64_t{0};
        if ((words[i] & valid) != 0) {
            words_[i].store(words[i] & valid, relaxed);
        }
    }
    low_.store(0, relaxed);
    high_.store(nwords_, relaxed);
}

void AtomicBitmap::set_range(uint64_t page, uint64_t npages) noexcept
{
    (void)claim_range(page, npages);
}

bool AtomicBitmap::claim_range(uint64_t page, uint64_t npages) noexcept
{
    if (npages == 0) {
        return true;
    }
    const uint64_t end = page + npages;
    lower(low_, static_cast<size_t>(page / 64));
    raise(high_, static_cast<size_t>((end + 63) / 64));
    uint64_t taken = 0;
    while (page < end) {
        uint64_t word_end = std::min(end, (page / 64 + 1) * 64);
        uint64_t bits = mask(page % 64, word_end - page / 64 * 64);
        taken |= words_[page / 64].fetch_or(bits, relaxed) & bits;
        page = word_end;
    }
    return taken == 0;
}

void AtomicBitmap::clear_range(uint64_t page, uint64_t npages) noexcept
{
    const uint64_t end = page + npages;
    while (page < end) {
        uint64_t word_end = std::min(end, (page / 64 + 1) * 64);
        uint64_t bits = mask(page % 64, word_end - page / 64 * 64);
        if ((words_[page / 64].load(relaxed) & bits) != 0) {  // what was never set costs no memory
            words_[page / 64].fetch_and(~bits, release);
        }
        page = word_end;
    }
}

uint64_t AtomicBitmap::bits(uint64_t page, uint64_t npages) const noexcept
{
    if (npages == 0) {
        return 0;
    }
    const uint64_t shift = page % 64;
    uint64_t word = words_[page / 64].load(acquire) >> shift;
    if (shift + npages > 64) {
        word |= words_[page / 64 + 1].load(acquire) << (64 - shift);
    }
    return word & mask(0, npages);
}

bool AtomicBitmap::claim_words(uint64_t base, const uint64_t *words, size_t nwords) noexcept
{
    const size_t first = static_cast<size_t>(base / 64);
    for (size_t i = 0; i < nwords; i++) {
        if ((words_[first + i].load(relaxed) & words[i]) != 0) {
            return false;
        }
    }
    set_words(base, words, nwords);
    return true;
}

void AtomicBitmap::set_words(uint64_t base, const uint64_t *words, size_t nwords) noexcept
{
    const size_t first = static_cast<size_t>(base / 64);
    lower(low_, first);
    raise(high_, first + nwords);
    for (size_t i = 0; i < nwords; i++) {
        if (words[i] != 0) {
            words_[first + i].fetch_or(words[i], relaxed);
        }
    }
}

// The first page in [page, end) whose bit, XORed with `invert`, is set; end if there is none.
uint64_t AtomicBitmap::find(uint64_t page, uint64_t end, uint64_t invert) const noexcept
{
    while (page < end) {
        uint64_t word = (words_[page / 64].load(relaxed) ^ invert) >> (page % 64);
        if (word != 0) {
            return std::min(end, page + static_cast<uint64_t>(__builtin_ctzll(word)));
        }
        page = (page / 64 + 1) * 64;
    }
    return end;
}

std::optional<vmth_run> AtomicBitmap::first_run(uint64_t page, uint64_t npages) const noexcept
{
    const uint64_t end = page + npages;
    uint64_t first = find(page, end, 0);
    if (first == end) {
        return std::nullopt;
    }
    return vmth_run{first, find(first, end, ~uint64_t{0}) - first};
}

void AtomicBitmap::reset() noexcept
{
    const size_t low = low_.exchange(nwords_, relaxed);
    const size_t high = high_.exchange(0, relaxed);
    for (size_t i = low; i < high; i++) {
        if (words_[i].load(relaxed) != 0) {
            words_[i].store(0, relaxed);
        }
    }
}

}  // namespace vmth

// SPDX-License-Identifier: Apache-2.0
// Looking up, reading and proving stored pages.
#include "xfer/page_store.hpp"

#include <algorithm>
#include <cstring>

#include "xfer/failure.hpp"

namespace vmth {

namespace {

bool equal(const vmth_u128 &a, const vmth_u128 &b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

bool before(const vmth_u128 &a, const vmth_u128 &b)
{
    return a.lo != b.lo ? a.lo < b.lo : a.hi < b.hi;
}

std::optional<uint64_t> find_place(const StoreSource &source, const vmth_u128 &hash)
{
    const vmth_u128 *end = source.hashes + source.npages;
    const vmth_u128 *found = std::lower_bound(source.hashes, end, hash, before);
    if (found == end || !equal(*found, hash)) {
        return std::nullopt;
    }
    return source.places[found - source.hashes];
}

// By value: the array may be a mapping of a file that somebody writes to, so it is read once.
std::optional<StoredFrame> find_frame(const StoreSource &source, uint64_t place)
{
    const StoredFrame *end = source.frames + source.nframes;
    const StoredFrame *after =
        std::upper_bound(source.frames, end, place,
                         [](uint64_t page, const StoredFrame &frame) { return page < frame.first; });
    if (after == source.frames) {
        return std::nullopt;
    }
    const StoredFrame frame = after[-1];
    return place - frame.first < frame.npages ? std::optional(frame) : std::nullopt;
}

// The first of these places, and how many behind it follow one another in the file.
size_t following(const std::optional<uint64_t> *places, size_t n)
{
    size_t npages = 1;
    while (npages < n && places[npages] && *places[npages] - *places[0] == npages) {
        npages++;
    }
    return npages;
}

}  // namespace

// ---- the store --------------------------------------------------------------------------------------

PageStore::PageStore(const std::vector<StoreSource> &sources,
                     const uint8_t secret[VMTH_CONTENT_KEY_BYTES], size_t page_bytes,
                     const vmth_file_ops *ops)
    : sources_(sources), page_bytes_(page_bytes), ops_(ops == nullptr ? vmth_file_system_ops() : ops),
      served_(sources.size())
{
    vmth_content_key_init(&key_, secret);
}

std::vector<uint64_t> PageStore::served() const
{
    std::vector<uint64_t> pages;
    for (const Counter &counter : served_) {
        pages.push_back(counter.get());
    }
    return pages;
}

// ---- reading ----------------------------------------------------------------------------------------

StoredPages::StoredPages(PageStore &store) : store_(store)
{
}

uint64_t StoredPages::read(const vmth_u128 *hashes, size_t n, uint8_t *content)
{
    const size_t page_bytes = store_.page_bytes();
    uint64_t right = 0;
    // A file after the other: what one had, but did not have any more, the next may have.
    for (size_t source = 0; source < store_.nsources(); source++) {
        const uint8_t *pages[most];
        size_t index[most];
        vmth_u128 got[most];
        size_t nread = 0;
        std::optional<uint64_t> places[most];
        for (size_t i = 0; i < n; i++) {
            if ((right >> i & 1) == 0) {
                places[i] = find_place(store_.source(source), hashes[i]);
            }
        }
        for (size_t i = 0, got_pages; i < n; i += std::max<size_t>(got_pages, 1)) {
            uint8_t *to = content + i * page_bytes;
            got_pages = places[i] ? fetch(source, *places[i], following(places + i, n - i), to) : 0;
            for (size_t k = 0; k < got_pages; k++) {
                pages[nread] = to + k * page_bytes;
                index[nread++] = i + k;
            }
        }
        if (vmth_content_hash(&store_.key(), pages, page_bytes, nread, got) != 0) {
            throw TransferError(ErrorKind::usage, "content kernel refused its arguments");
        }
        uint64_t found = 0;
        for (size_t k = 0; k < nread; k++) {
            found |= uint64_t{equal(got[k], hashes[index[k]])} << index[k];
        }
        store_.count(source, static_cast<uint64_t>(__builtin_popcountll(found)));
        right |= found;
    }
    return right;
}

// How many of these pages, from the first on, are at `to` now. None: it is not there, or cannot be read;
// that is no failure: the page comes another way.
size_t StoredPages::fetch(size_t source, uint64_t place, size_t npages, uint8_t *to)
{
    const size_t page_bytes = store_.page_bytes();
    const StoreSource &from = store_.source(source);
    const std::optional<StoredFrame> frame = find_frame(from, place);
    if (!frame || frame->npages > UINT64_MAX / page_bytes) {
        return 0;
    }
    const uint64_t first = place - frame->first;
    const uint64_t inside = first * page_bytes;
    npages = static_cast<size_t>(std::min<uint64_t>(npages, frame->npages - first));
    if (frame->nbytes == frame->npages * page_bytes) {
        return inside <= UINT64_MAX - frame->offset
                   ? read_pages(from.fd, frame->offset + inside, npages, to)
                   : 0;
    }
    const uint8_t *unpacked = unpack(source, *frame);
    if (unpacked == nullptr) {
        return 0;
    }
    memcpy(to, unpacked + inside, npages * page_bytes);
    return npages;
}

// All at once; where that fails, one page: what is behind a bad one is asked for by itself.
size_t StoredPages::read_pages(int fd, uint64_t offset, size_t npages, uint8_t *to)
{
    const size_t page_bytes = store_.page_bytes();
    int64_t got = vmth_file_read_at(store_.ops(), fd, to, npages * page_bytes, offset);
    if (got < 0 && npages > 1) {
        got = vmth_file_read_at(store_.ops(), fd, to, page_bytes, offset);
    }
    return got < 0 ? 0 : static_cast<size_t>(got) / page_bytes;
}

// The frame's pages; nullptr: it does not unpack to just these.
const uint8_t *StoredPages::unpack(size_t source, const StoredFrame &frame)
{
    if (unpacked_from_ == source && memcmp(&unpacked_of_, &frame, sizeof(frame)) == 0) {
        return unpacked_;
    }
    const uint64_t content_bytes = frame.npages * store_.page_bytes();
    if (content_bytes > PageStore::max_frame_bytes || frame.nbytes > content_bytes) {
        return nullptr;
    }
    unpacked_from_ = source;
    unpacked_of_ = frame;  // also where it fails: it is not tried again for each of its pages
    unpacked_ = nullptr;
    packed_.resize(static_cast<size_t>(frame.nbytes));
    if (vmth_file_read_at(store_.ops(), store_.source(source).fd, packed_.data(), packed_.size(),
                          frame.offset) == static_cast<int64_t>(packed_.size())) {
        unpacked_ = decoder_.decode(packed_.data(), packed_.size(),
                                    static_cast<size_t>(content_bytes));
    }
    return unpacked_;
}

// ---- the filter -------------------------------------------------------------------------------------

FilterWriter::FilterWriter(const std::vector<StoreSource> &sources)
    : sources_(sources), at_(sources.size(), 0)
{
    for (const StoreSource &source : sources_) {
        entries_ += source.npages;
    }
    bits_ = vmth_filter_bits(entries_);
}

// Merge the sources until a part is full; false: there is nothing left. An index that does not rise gives
// a smaller set.
bool FilterWriter::fill()
{
    while (prints_.size() < VMTH_FILTER_PART_ENTRIES) {
        size_t least = sources_.size();
        uint64_t print = UINT64_MAX;
        for (size_t i = 0; i < sources_.size(); i++) {
            if (at_[i] < sources_[i].npages) {
                const uint64_t of = sources_[i].hashes[at_[i]].lo >> (64 - bits_);
                if (least == sources_.size() || of < print) {
                    least = i;
                    print = of;
                }
            }
        }
        if (least == sources_.size()) {
            return false;
        }
        at_[least]++;
        if (!above_ || print > *above_) {
            prints_.push_back(print);
            above_ = print;
        }
    }
    return true;
}

FilterWriter::Part FilterWriter::next()
{
    Part part;
    const bool more = fill();
    if (!prints_.empty()) {
        size_t nbytes = 0;
        part.data.resize(VMTH_FILTER_PART_BYTES);
        part.base = prints_.front();
        part.count = vmth_filter_encode(prints_.data(), prints_.size(), part.data.data(), &nbytes);
        part.data.resize(nbytes);
        prints_.erase(prints_.begin(), prints_.begin() + static_cast<ptrdiff_t>(part.count));
    }
    part.last = !more && prints_.empty();
    return part;
}

}  // namespace vmth

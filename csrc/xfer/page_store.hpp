// SPDX-License-Identifier: Apache-2.0
// Pages that files at the destination hold, found by the hash of their content.
//
//   hash --binary search--> place --frames--> bytes of the file --hashed again--> the page, or nothing
//
// Neither an index nor a file is trusted: every number is checked where it is used, and only content whose
// hash is the one that was asked for counts. Files are read, not mapped: one may be cut at any time.
#ifndef VMTH_XFER_PAGE_STORE_HPP
#define VMTH_XFER_PAGE_STORE_HPP

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sys/file_ops.h"
#include "vmth/content_filter.h"
#include "vmth/content_hash.h"
#include "xfer/counters.hpp"
#include "xfer/frame_decoder.hpp"

namespace vmth {

// Where pages of a file's page space are: as they are if nbytes is npages times the page size, otherwise
// one zstd frame.
struct StoredFrame {
    uint64_t first;
    uint64_t npages;
    uint64_t offset;
    uint64_t nbytes;
};

// One file and its index, which belong to the caller and outlive the store.
struct StoreSource {
    int fd = -1;
    const vmth_u128 *hashes = nullptr;  // rising by lo, then hi
    const uint64_t *places = nullptr;
    size_t npages = 0;
    const StoredFrame *frames = nullptr;  // rising by first page
    size_t nframes = 0;
};

// Any thread.
class PageStore {
public:
    static constexpr size_t max_frame_bytes = 1u << 20;  // content of a packed frame

    PageStore(const std::vector<StoreSource> &sources,
              const uint8_t secret[VMTH_CONTENT_KEY_BYTES], size_t page_bytes,
              const vmth_file_ops *ops);

    size_t nsources() const noexcept { return sources_.size(); }
    const StoreSource &source(size_t i) const noexcept { return sources_[i]; }
    const vmth_content_key &key() const noexcept { return key_; }
    size_t page_bytes() const noexcept { return page_bytes_; }
    const vmth_file_ops *ops() const noexcept { return ops_; }
    // Pages that each file gave.
    std::vector<uint64_t> served() const;
    void count(size_t source, uint64_t npages) { served_[source].add(npages); }

private:
    const std::vector<StoreSource> sources_;
    vmth_content_key key_ = {};
    const size_t page_bytes_;
    const vmth_file_ops *const ops_;
    std::vector<Counter> served_;
};

// One thread's way of reading a store: keeps the frame that was unpacked last.
class StoredPages {
public:
    static constexpr size_t most = 64;  // pages a call

    explicit StoredPages(PageStore &store);

    // Put the content of hash i at content + i pages, for n <= most hashes. Returns bits: page i is there
    // and right. What others hold is of no meaning.
    uint64_t read(const vmth_u128 *hashes, size_t n, uint8_t *content);

private:
    size_t fetch(size_t source, uint64_t place, size_t npages, uint8_t *to);
    size_t read_pages(int fd, uint64_t offset, size_t npages, uint8_t *to);
    const uint8_t *unpack(size_t source, const StoredFrame &frame);

    PageStore &store_;
    FrameDecoder decoder_;
    std::vector<uint8_t> packed_;
    const uint8_t *unpacked_ = nullptr;  // of that frame of that source, if it has any
    size_t unpacked_from_ = SIZE_MAX;
    StoredFrame unpacked_of_ = {};
};

// The fingerprints of all that the sources have, part by part for the wire. Belongs to one thread.
class FilterWriter {
public:
    explicit FilterWriter(const std::vector<StoreSource> &sources);

    struct Part {
        uint64_t base = 0;
        uint64_t count = 0;
        std::vector<uint8_t> data;
        bool last = false;
    };

    // Of all sources; contents that several have count several times.
    uint64_t entries() const noexcept { return entries_; }
    // Not after the last part. A set of nothing is one part without entries.
    Part next();

private:
    bool fill();

    const std::vector<StoreSource> sources_;
    uint64_t entries_ = 0;
    unsigned bits_ = 0;
    std::vector<size_t> at_;         // of each source
    std::vector<uint64_t> prints_;   // strictly rising, not written yet
    std::optional<uint64_t> above_;  // the last that was taken
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// Both ends over files of pages with their indexes, as a destination that reuses them has.
#ifndef VMTH_TESTS_REUSE_FIXTURE_HPP
#define VMTH_TESTS_REUSE_FIXTURE_HPP

#include <algorithm>
#include <numeric>

#include "tests/xfer_fixture.hpp"
#include "vmth/codec.h"

namespace t {

constexpr uint32_t same = vmth::form_bit(VMTH_FORM_SAME);
constexpr uint32_t dedup = vmth::form_bit(VMTH_FORM_DEDUP);
constexpr uint32_t delta = vmth::form_bit(VMTH_FORM_DELTA);
constexpr uint32_t zstd = vmth::form_bit(VMTH_FORM_ZSTD);
constexpr uint32_t reuse = vmth::form_bit(VMTH_FORM_REUSE);

constexpr uint8_t secret[VMTH_CONTENT_KEY_BYTES] = {1, 2, 3};

inline std::vector<vmth_u128> hashes_of(const uint8_t *pages, size_t npages)
{
    vmth_content_key key;
    vmth_content_key_init(&key, secret);
    std::vector<vmth_u128> hashes(npages);
    T_EQUAL(vmth_content_hash_run(&key, pages, page_bytes, npages, hashes.data()), 0);
    return hashes;
}

// A file of pages and its index, as one that built it would hand it over.
class Stored {
public:
    // Frames of `packed` pages each, packed with zstd; 0: one frame of all, as they are.
    Stored(const std::vector<uint8_t> &pages, size_t packed = 0)
        : fd_(static_cast<int>(memfd_create("stored", MFD_CLOEXEC)))
    {
        const size_t npages = pages.size() / page_bytes;
        if (packed == 0) {
            append(pages);
            frames_.push_back({0, npages, 0, pages.size()});
        }
        for (size_t first = 0; packed > 0 && first < npages; first += packed) {
            const size_t n = std::min(packed, npages - first);
            const Bytes frame = pack(pages.data() + first * page_bytes, n * page_bytes);
            frames_.push_back({first, n, size_, frame.size()});
            append(frame);
        }
        const std::vector<vmth_u128> hashes = hashes_of(pages.data(), npages);
        places_.resize(npages);
        std::iota(places_.begin(), places_.end(), uint64_t{0});
        std::sort(places_.begin(), places_.end(), [&](uint64_t a, uint64_t b) {
            return hashes[a].lo != hashes[b].lo ? hashes[a].lo < hashes[b].lo
                                                : hashes[a].hi < hashes[b].hi;
        });
        for (uint64_t place : places_) {
            hashes_.push_back(hashes[place]);
        }
    }

    vmth::StoreSource source() const
    {
        return {fd_.get(), hashes_.data(), places_.data(), places_.size(), frames_.data(),
                frames_.size()};
    }
    int fd() const { return fd_.get(); }
    // What index and frames say, for the tests that let them lie.
    std::vector<vmth_u128> hashes_;
    std::vector<uint64_t> places_;
    std::vector<vmth::StoredFrame> frames_;

private:
    static Bytes pack(const uint8_t *content, size_t nbytes)
    {
        vmth_codec codec = {};
        T_EQUAL(vmth_codec_create(&codec, VMTH_CODEC_COMPRESS), 0);
        Bytes frame(nbytes);
        frame.resize(vmth_codec_compress(&codec, 1, content, nbytes, frame.data(), nbytes - 1));
        T_CHECK(!frame.empty());
        vmth_codec_destroy(&codec);
        return frame;
    }
    void append(const Bytes &bytes)
    {
        T_EQUAL(pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(size_)),
                static_cast<ssize_t>(bytes.size()));
        size_ += bytes.size();
    }

    UniqueFd fd_;
    uint64_t size_ = 0;
};

// Pages of words that repeat, so that they can be packed; content differs from page to page.
inline std::vector<uint8_t> pages_of(Memory &memory, uint64_t first, uint64_t npages)
{
    return {memory.page(first), memory.page(first) + npages * page_bytes};
}

inline void fill(Memory &memory, uint64_t state)
{
    for (uint64_t page = 0; page < memory.npages(); page++) {
        auto *words = reinterpret_cast<uint64_t *>(memory.page(page));
        for (size_t i = 0; i < page_bytes / 8; i++) {
            words[i] = i % 64 == 0 ? t_random(&state) : words[i - i % 64];
        }
    }
}

struct ReusePair {
    ReusePair(uint64_t npages, uint32_t forms, const std::vector<vmth::StoreSource> &sources,
              unsigned channels = 1, const vmth_file_ops *files = nullptr)
        : source(npages), destination(npages), bits(all_bits(npages))
    {
        vmth::SenderOptions sending;
        sending.forms = forms;
        sender = make_sender(source, sending);
        vmth::ReceiverOptions options;
        options.hash_seed = seed;
        options.channels = channels;
        options.forms = forms;
        options.reuse = sources;
        options.files = files;
        std::copy(secret, secret + sizeof(secret), options.reuse_key);
        receiver = std::make_unique<vmth::Receiver>(
            std::vector<vmth::MemoryBlock>{destination.block()}, page_bytes, options,
            std::vector<const uint64_t *>{bits.data()}, std::vector<size_t>{bits.size()});
        tell(sources);
        for (unsigned i = 0; i < channels; i++) {
            FdPair fds = unix_pair();
            sender->add_channel(fds.first.get(), i);
            receiver->attach(fds.second.get(), i);
        }
        sender->set_forms({forms, 1});
    }
    void tell(const std::vector<vmth::StoreSource> &sources)
    {
        vmth::FilterWriter writer(sources);
        sender->begin_reuse(secret, writer.entries());
        for (bool last = false; !last;) {
            const vmth::FilterWriter::Part part = writer.next();
            filter_bytes += part.data.size();
            sender->add_reuse(part.base, part.count, part.data.data(), part.data.size(), part.last);
            last = part.last;
        }
    }
    void round(uint32_t number)
    {
        sender->send(0, 0, source.npages(), bits.data(), bits.size(), number);
        T_CHECK(sender->barrier(number, 0));
    }
    // What was missed goes again. Returns how many pages that were.
    uint64_t repair(uint32_t number)
    {
        std::vector<uint64_t> missed(bits.size(), 0);
        const uint64_t n = sender->take_missed({missed.data()}, {missed.size()});
        sender->send(0, 0, source.npages(), missed.data(), missed.size(), number);
        T_CHECK(sender->barrier(number, 0));
        return n;
    }
    uint64_t reused() const { return sender->counters().forms[VMTH_FORM_REUSE].pages.get(); }
    bool equal()
    {
        const vmth_digest ours = sender->hashes().total();
        const vmth_digest theirs = receiver->hashes().total();
        return ours.sum.lo == theirs.sum.lo && ours.sum.hi == theirs.sum.hi &&
               ours.pages == theirs.pages && source.equals(destination) &&
               receiver->hashes().total().pages == ours.pages;
    }
    void finish()
    {
        T_CHECK(equal());
        sender->finish();
        T_CHECK(receiver->wait(0));
        T_CHECK(equal());
    }

    Memory source;
    Memory destination;
    std::vector<uint64_t> bits;
    size_t filter_bytes = 0;
    std::unique_ptr<vmth::Sender> sender;
    std::unique_ptr<vmth::Receiver> receiver;
};

}  // namespace t

#endif

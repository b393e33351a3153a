// SPDX-License-Identifier: Apache-2.0
// reuse end to end: what files of the destination save, and that files, indexes and filters that lie cost a
// page sent whole, never a wrong one.
#include <algorithm>
#include <numeric>

#include "tests/xfer_fixture.hpp"
#include "vmth/codec.h"

using namespace t;

namespace {

constexpr uint32_t same = vmth::form_bit(VMTH_FORM_SAME);
constexpr uint32_t dedup = vmth::form_bit(VMTH_FORM_DEDUP);
constexpr uint32_t delta = vmth::form_bit(VMTH_FORM_DELTA);
constexpr uint32_t zstd = vmth::form_bit(VMTH_FORM_ZSTD);
constexpr uint32_t reuse = vmth::form_bit(VMTH_FORM_REUSE);

constexpr uint8_t secret[VMTH_CONTENT_KEY_BYTES] = {1, 2, 3};

std::vector<vmth_u128> hashes_of(const uint8_t *pages, size_t npages)
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
std::vector<uint8_t> pages_of(Memory &memory, uint64_t first, uint64_t npages)
{
    return {memory.page(first), memory.page(first) + npages * page_bytes};
}

void fill(Memory &memory, uint64_t state)
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

// ---- what it saves ----------------------------------------------------------------------------------

void test_what_a_file_has_is_not_sent()
{
    for (size_t packed : {0u, 1u, 7u, 64u}) {
        for (unsigned channels : {1u, 3u}) {
            Memory before(512);
            fill(before, 1);
            const Stored file(pages_of(before, 0, 512), packed);
            ReusePair pair(512, reuse, {file.source()}, channels);
            for (uint64_t page = 0; page < 512; page++) {  // in places of their own
                memcpy(pair.source.page(page), before.page(511 - page), page_bytes);
            }
            pair.source.page(100)[5]++;
            pair.round(0);
            T_EQUAL(pair.reused(), 511);
            T_EQUAL(pair.receiver->reused()[0], 511);
            T_CHECK(pair.sender->counters().wire_bytes.get() <
                    511 * 20 + page_bytes + channels * 1000);
            T_CHECK(10 * pair.filter_bytes < 512 * 24);
            T_EQUAL(pair.repair(1), 0);
            pair.finish();
        }
    }
}

void test_several_files_are_asked_in_their_order()
{
    Memory before(192);
    fill(before, 1);
    const Stored first(pages_of(before, 0, 128));
    const Stored second(pages_of(before, 64, 128), 16);
    ReusePair pair(192, reuse, {first.source(), second.source()});
    memcpy(pair.source.page(0), before.page(0), 192 * page_bytes);
    pair.round(0);
    T_EQUAL(pair.reused(), 192);
    T_EQUAL(pair.receiver->reused()[0], 128);
    T_EQUAL(pair.receiver->reused()[1], 64);
    // What the first has no more, the second may have.
    T_EQUAL(ftruncate(first.fd(), 0), 0);
    pair.round(1);
    T_EQUAL(pair.receiver->reused()[0], 128);
    T_EQUAL(pair.receiver->reused()[1], 64 + 128);
    T_EQUAL(pair.repair(2), 64);
    pair.finish();
}

void test_what_was_reused_is_known_landed()
{
    Memory before(64);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 64));
    ReusePair pair(64, reuse | same | delta, {file.source()});
    memcpy(pair.source.page(0), before.page(0), 64 * page_bytes);
    pair.round(0);
    T_EQUAL(pair.reused(), 64);
    pair.round(1);
    T_EQUAL(pair.sender->counters().forms[VMTH_FORM_SAME].pages.get(), 64);
    for (uint64_t page = 0; page < 64; page++) {
        pair.source.page(page)[page]++;
    }
    pair.round(2);
    T_CHECK(pair.sender->counters().forms[VMTH_FORM_DELTA].pages.get() >= 62);
    memcpy(pair.source.page(0), before.page(0), 64 * page_bytes);  // as it was: A, B, A
    pair.round(3);
    pair.repair(4);
    pair.finish();
}

// ---- what lies --------------------------------------------------------------------------------------

// Every other page missed, sent whole, and not proposed again although its content stays.
void check_half_missed(ReusePair &pair)
{
    pair.round(0);
    T_EQUAL(pair.reused(), 128);
    T_CHECK(!pair.equal());
    T_EQUAL(pair.repair(1), 64);
    T_EQUAL(pair.reused(), 128);
    T_CHECK(pair.equal());
    pair.round(2);
    T_EQUAL(pair.reused(), 128 + 64);
    T_EQUAL(pair.repair(3), 0);
    pair.finish();
}

void test_a_file_that_was_changed()
{
    for (size_t packed : {0u, 1u}) {
        Memory before(128);
        fill(before, 1);
        const Stored file(pages_of(before, 0, 128), packed);
        ReusePair pair(128, reuse, {file.source()});
        memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
        for (size_t page = 0; page < 128; page += 2) {
            const auto at = packed == 0 ? page * page_bytes + 77
                                        : file.frames_[page].offset + file.frames_[page].nbytes / 2;
            uint8_t byte;
            T_EQUAL(pread(file.fd(), &byte, 1, static_cast<off_t>(at)), 1);
            byte ^= 0x55;
            T_EQUAL(pwrite(file.fd(), &byte, 1, static_cast<off_t>(at)), 1);
        }
        check_half_missed(pair);
    }
}

void test_a_file_that_was_cut()
{
    Memory before(128);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 128));
    ReusePair pair(128, reuse, {file.source()});
    memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
    T_EQUAL(ftruncate(file.fd(), 63 * page_bytes + 4095 + 1), 0);
    T_EQUAL(ftruncate(file.fd(), 64 * page_bytes), 0);
    check_half_missed(pair);
}

void test_an_index_that_lies()
{
    Memory before(128);
    fill(before, 1);
    Stored file(pages_of(before, 0, 128), 2);
    for (size_t i = 0; i < 32; i++) {
        file.places_[4 * i] = i % 2 == 0 ? UINT64_MAX - i : 128 + i;  // nowhere
        file.places_[4 * i + 2] ^= 1;                                 // another page
    }
    ReusePair pair(128, reuse, {file.source()});
    memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
    check_half_missed(pair);
}

void test_frames_that_lie()
{
    const vmth::StoredFrame lies[] = {
        {0, UINT64_MAX, 0, 7},
        {0, 128, UINT64_MAX, 128 * page_bytes},
        {0, 128, INT64_MAX - 5, 128 * page_bytes},
        {0, 128, 0, 128 * page_bytes - 1},    // not packed, and yet said to be
        {0, 128, 0, 128 * page_bytes + 1},
        {0, 1u << 20, 0, 4096},               // unpacks to more than is ever unpacked
        {0, 0, 0, 0},
        {UINT64_MAX, 1, 0, 4096},
    };
    Memory before(128);
    fill(before, 1);
    for (const vmth::StoredFrame &lie : lies) {
        Stored file(pages_of(before, 0, 128));
        file.frames_[0] = lie;
        ReusePair pair(128, reuse, {file.source()});
        memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
        pair.round(0);
        T_EQUAL(pair.reused(), 128);
        T_EQUAL(pair.repair(1), 128);
        pair.finish();
    }
}

int failing_pread_calls = 0;

ssize_t failing_pread(int fd, void *buffer, size_t nbytes, off_t offset)
{
    switch (failing_pread_calls++ % 4) {
    case 0:
        errno = EINTR;
        return -1;
    case 1:
        return pread(fd, buffer, nbytes / 2 + 1, offset);  // in pieces
    default:
        if (offset / static_cast<off_t>(page_bytes) % 2 == 0) {
            errno = EIO;
            return -1;
        }
        return pread(fd, buffer, nbytes, offset);
    }
}

void test_a_disk_that_fails()
{
    const vmth_file_ops files = {failing_pread, pwrite};
    Memory before(128);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 128));
    ReusePair pair(128, reuse, {file.source()}, 1, &files);
    memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
    pair.round(0);
    T_EQUAL(pair.reused(), 128);
    const uint64_t missed = pair.repair(1);
    T_CHECK(missed > 0 && missed < 128);
    pair.finish();
}

// Pages that can no longer be read, and how often a disk was asked.
struct Disk {
    uint64_t bad_every = UINT64_MAX;
    uint64_t reads = 0;
};
Disk disk;

ssize_t disk_pread(int fd, void *buffer, size_t nbytes, off_t offset)
{
    disk.reads++;
    const uint64_t first = static_cast<uint64_t>(offset) / page_bytes;
    for (uint64_t page = first; page * page_bytes < static_cast<uint64_t>(offset) + nbytes; page++) {
        if (page % disk.bad_every == disk.bad_every - 1) {
            if (page == first) {
                errno = EIO;
                return -1;
            }
            nbytes = page * page_bytes - static_cast<uint64_t>(offset);
        }
    }
    return pread(fd, buffer, nbytes, offset);
}

// Pages that follow one another are read together, and yet one bad page costs no other.
void test_a_disk_with_bad_pages()
{
    const vmth_file_ops files = {disk_pread, pwrite};
    Memory before(128);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 128));
    for (const uint64_t bad_every : {UINT64_MAX, uint64_t{1}, uint64_t{2}, uint64_t{5}, uint64_t{64}}) {
        disk = {bad_every, 0};
        ReusePair pair(128, reuse, {file.source()}, 1, &files);
        memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
        pair.round(0);
        T_EQUAL(pair.reused(), 128);
        T_CHECK(bad_every != UINT64_MAX || disk.reads <= 128 / 8);
        T_EQUAL(pair.repair(1), bad_every == UINT64_MAX ? 0 : 128 / bad_every);
        pair.finish();
    }
}

// The filter knows fingerprints alone: one that is in it by chance costs a miss.
void test_a_filter_that_says_too_much()
{
    Memory other(64);
    fill(other, 9);
    const Stored file(pages_of(other, 0, 64));
    ReusePair pair(64, reuse | zstd, {});
    fill(pair.source, 1);
    T_EQUAL(pair.reused(), 0);
    pair.round(0);
    T_EQUAL(pair.reused(), 0);  // of a filter of nothing
    pair.finish();

    Stored lying(pages_of(pair.source, 0, 64));
    const vmth::StoreSource says = lying.source();
    ReusePair second(64, reuse | zstd, {says});
    memcpy(second.source.page(0), pair.source.page(0), 64 * page_bytes);
    T_EQUAL(ftruncate(lying.fd(), 0), 0);
    second.round(0);
    T_EQUAL(second.reused(), 64);
    T_EQUAL(second.repair(1), 64);
    T_EQUAL(second.sender->counters().forms[VMTH_FORM_ZSTD].pages.get(), 64);
    second.finish();
}

// ---- peers that lie ---------------------------------------------------------------------------------

std::unique_ptr<vmth::Sender> listening(Memory &memory, uint32_t forms = reuse)
{
    vmth::SenderOptions options;
    options.forms = forms;
    return make_sender(memory, options);
}

void test_hostile_filters()
{
    Memory memory(8);
    const uint64_t prints[] = {5, 6, 900};
    uint8_t part[VMTH_FILTER_PART_BYTES];
    size_t nbytes;
    T_EQUAL(vmth_filter_encode(prints, 3, part, &nbytes), 3);
    auto sender = listening(memory);
    const auto refused = [&](const std::function<void()> &body) {
        T_CHECK(expect_error(body).kind() == ErrorKind::protocol);
    };
    refused([&] { sender->begin_reuse(secret, VMTH_FILTER_MAX_ENTRIES + 1); });
    sender->begin_reuse(secret, 2);  // one too many
    refused([&] { sender->add_reuse(5, 3, part, nbytes, true); });
    sender->begin_reuse(secret, 100);
    refused([&] { sender->add_reuse(5, 3, part, nbytes - 1, true); });
    refused([&] { sender->add_reuse(5, UINT64_MAX, part, nbytes, true); });
    refused([&] { sender->add_reuse(UINT64_MAX, 1, part, 0, true); });
    sender->add_reuse(5, 3, part, nbytes, false);
    refused([&] { sender->add_reuse(900, 1, part, 0, false); });  // does not rise
    sender->add_reuse(901, 1, part, 0, true);
    const auto usage = [&](const std::function<void()> &body) {
        T_CHECK(expect_error(body).kind() == ErrorKind::usage);
    };
    auto other = listening(memory, zstd);
    usage([&] { other->begin_reuse(secret, 2); });
    FdPair fds = unix_pair();
    sender->add_channel(fds.first.get(), 0);
    usage([&] { sender->begin_reuse(secret, 2); });
    usage([&] { sender->add_reuse(902, 1, part, 0, true); });
}

void test_hostile_packets()
{
    Memory before(4);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 4));
    const auto receive = [&](uint32_t forms, const std::vector<vmth_desc> &descs,
                             const Bytes &payload, const std::function<void(int, vmth::Receiver &)> &then) {
        Memory memory(8);
        const std::vector<uint64_t> bits = all_bits(8);
        vmth::ReceiverOptions options;
        options.hash_seed = seed;
        options.forms = forms;
        options.reuse = {file.source()};
        std::copy(secret, secret + sizeof(secret), options.reuse_key);
        vmth::Receiver receiver({memory.block()}, page_bytes, options, {bits.data()}, {1});
        FdPair fds = unix_pair();
        receiver.attach(fds.second.get(), 0);
        T_CHECK(write_all(fds.first.get(), pages(1, descs, payload)));
        then(fds.first.get(), receiver);
    };
    const auto refused = [](int, vmth::Receiver &receiver) {
        T_CHECK(expect_error([&] { receiver.wait(0); }).kind() == ErrorKind::protocol);
    };
    const Bytes hashes(8 * VMTH_REUSE_HASH_BYTES, 7);
    const auto some = [&](size_t n) { return Bytes(hashes.begin(), hashes.begin() + static_cast<ptrdiff_t>(n)); };
    receive(zstd, {desc(VMTH_FORM_REUSE, 0, 1)}, some(16), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 0)}, {}, refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 8, 1)}, some(16), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 7, 2)}, some(32), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, UINT32_MAX)}, some(16), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 2)}, some(16), refused);   // too little
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 1)}, some(32), refused);   // too much
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 1), desc(VMTH_FORM_REUSE, 0, 1)}, some(32), refused);
    // Hashes that no file has are missed, beside one that is there.
    const std::vector<vmth_u128> real = hashes_of(before.page(2), 1);
    Bytes payload = some(48);
    memcpy(payload.data() + 16, &real[0], 16);  // little-endian here
    receive(reuse, {desc(VMTH_FORM_REUSE, 1, 3)}, payload, [&](int fd, vmth::Receiver &receiver) {
        T_CHECK(write_all(fd, control(VMTH_PACKET_BARRIER, 2)));
        const Packet ack = read_packet(fd, 8);
        T_EQUAL(ack.header.kind, VMTH_PACKET_ACK);
        vmth_ack one;
        vmth_packet_error error;
        T_EQUAL(vmth_ack_decode(ack.desc.data(), &one, &error), 0);
        T_EQUAL(one.status, VMTH_ACK_MISSED);
        T_EQUAL(ack.header.npages, 2);
        T_EQUAL(receiver.counters().missed_pages.get(), 2);
        T_EQUAL(receiver.reused()[0], 1);
    });
}

// ---- any mixture ------------------------------------------------------------------------------------

void test_any_mixture_ends_equal()
{
    uint64_t state = 42;
    for (unsigned run = 0; run < 12; run++) {
        const uint64_t npages = 64 + t_random(&state) % 400;
        Memory before(npages);
        fill(before, run + 1);
        const Stored raw(pages_of(before, 0, npages / 2));
        const Stored packed(pages_of(before, npages / 3, npages / 2), 1 + run);
        ReusePair pair(npages, reuse | same | dedup | delta | zstd, {raw.source(), packed.source()},
                       1 + run % 3);
        for (uint32_t number = 0; number < 8; number += 2) {
            for (uint64_t page = 0; page < npages; page++) {
                uint8_t *at = pair.source.page(page);
                switch (t_random(&state) % 8) {
                case 0:
                    memset(at, 0, page_bytes);
                    break;
                case 1:
                    at[t_random(&state) % page_bytes]++;
                    break;
                case 2:
                    t_fill(&state, at, page_bytes);
                    break;
                case 3:
                case 4:
                    memcpy(at, before.page(t_random(&state) % npages), page_bytes);
                    break;
                case 5:
                    memcpy(at, pair.source.page(t_random(&state) % npages), page_bytes);
                    break;
                default:
                    break;
                }
            }
            if (number == 4) {
                T_EQUAL(ftruncate(raw.fd(), static_cast<off_t>(npages / 4 * page_bytes)), 0);
            }
            pair.round(number);
            pair.repair(number + 1);
            pair.repair(number + 1);  // a delta on a page that was missed
            T_CHECK(pair.equal());
        }
        T_CHECK(pair.reused() > 0);
        pair.finish();
    }
}

void test_a_lost_channel_and_another_attempt()
{
    Memory before(256);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 256));
    for (bool lost : {true, false}) {
        ReusePair pair(256, reuse, {file.source()}, 2);
        memcpy(pair.source.page(0), before.page(0), 256 * page_bytes);
        if (lost) {
            pair.receiver->cancel("lost");
            expect_error([&] {
                pair.sender->send(0, 0, 256, pair.bits.data(), pair.bits.size(), 0);
                pair.sender->barrier(0, 0);
            });
            continue;
        }
        pair.round(0);
        T_EQUAL(pair.reused(), 256);
        pair.finish();
    }
}

}  // namespace

int main()
{
    test_what_a_file_has_is_not_sent();
    test_several_files_are_asked_in_their_order();
    test_what_was_reused_is_known_landed();
    test_a_file_that_was_changed();
    test_a_file_that_was_cut();
    test_an_index_that_lies();
    test_frames_that_lie();
    test_a_disk_that_fails();
    test_a_disk_with_bad_pages();
    test_a_filter_that_says_too_much();
    test_hostile_filters();
    test_hostile_packets();
    test_any_mixture_ends_equal();
    test_a_lost_channel_and_another_attempt();
    return T_PASS;
}

// SPDX-License-Identifier: Apache-2.0
// Pages of a QEMU's stream from a socket to the page channels, and what a pump hands back.
#include <fcntl.h>

#include "tests/xfer_fixture.hpp"
#include "vmth/qemu_ram.h"
#include "xfer/stream_pump.hpp"

using namespace t;
using vmth::Pumped;
using vmth::PumpLimits;
using vmth::PumpStop;
using vmth::StreamPump;

namespace {

constexpr uint64_t npages = 2048;
constexpr size_t piece_bytes = 64 * 1024;
constexpr size_t npieces = 3;
constexpr size_t record_bytes = 8 + page_bytes;
constexpr uint64_t flag_zero = 0x02;
constexpr uint64_t flag_page = 0x08;
constexpr uint64_t flag_eos = 0x10;
constexpr uint64_t flag_continue = 0x20;
constexpr uint64_t flag_xbzrle = 0x40;
constexpr PumpLimits no_limits = {INT64_MAX / 4, 50000000, UINT64_MAX, UINT64_MAX, piece_bytes};

void put64(Bytes &out, uint64_t value)
{
    for (int shift = 56; shift >= 0; shift -= 8) {
        out.push_back(static_cast<uint8_t>(value >> shift));
    }
}

// Records of one block "ram", whose first names it.
class Records {
public:
    Bytes bytes;

    void zero(uint64_t page)
    {
        head(page, flag_zero);
        bytes.push_back(0);
    }
    void content(uint64_t page, const uint8_t *from)
    {
        head(page, flag_page);
        bytes.insert(bytes.end(), from, from + page_bytes);
    }
    void end() { put64(bytes, flag_eos); }
    void xbzrle(uint64_t page)
    {
        head(page, flag_xbzrle);
        bytes.insert(bytes.end(), {1, 0, 2, 0, 0});
    }

private:
    void head(uint64_t page, uint64_t flags)
    {
        put64(bytes, page * page_bytes | flags | (named_ ? flag_continue : 0));
        if (!named_) {
            bytes.insert(bytes.end(), {3, 'r', 'a', 'm'});
            named_ = true;
        }
    }
    bool named_ = false;
};

std::string names()
{
    std::string all("\3ram");
    all.resize(VMTH_QEMU_NAME_BYTES);
    return all;
}

std::unique_ptr<StreamPump> make_pump(vmth::Sender &sender, int fd, size_t piece = piece_bytes,
                                      size_t pieces = npieces)
{
    return std::make_unique<StreamPump>(sender, fd, std::vector<uint64_t>{npages * page_bytes},
                                        names(), page_bytes, piece, pieces);
}

// Writes in pieces of any size, then closes.
std::thread writer(UniqueFd &&fd, const Bytes &bytes, uint64_t seed_)
{
    return std::thread([fd = std::move(fd), bytes, seed_]() mutable {
        uint64_t state = seed_;
        for (size_t done = 0; done < bytes.size();) {
            const size_t some = 1 + t_random(&state) % 20000;
            const ssize_t n = send(fd.get(), bytes.data() + done,
                                   std::min(some, bytes.size() - done), MSG_NOSIGNAL);
            if (n < 0) {
                return;  // whoever reads has seen enough
            }
            done += static_cast<size_t>(n);
        }
    });
}

// All of a stream without anything but pages; what was read before the pump began: `first` bytes.
void test_all_pages_arrive(unsigned channels, size_t first, uint32_t forms, uint64_t ahead_bytes)
{
    vmth::SenderOptions options;
    options.forms = forms;
    Pair pair(npages, channels, unix_pair, options);
    pair.sender->set_forms({forms, 1});
    pair.source.randomize(7);
    Records records;
    for (uint64_t page = 0; page < npages; page++) {
        if (page % 5 == 3) {
            memset(pair.source.page(page), 0, page_bytes);
            records.zero(page);
        } else {
            records.content(page, pair.source.page(page));
        }
    }
    const size_t whole = records.bytes.size();
    FdPair fds = unix_pair();
    std::thread thread = writer(
        std::move(fds.second),
        Bytes(records.bytes.begin() + static_cast<ptrdiff_t>(first), records.bytes.end()), first);
    Bytes left(records.bytes.begin(), records.bytes.begin() + static_cast<ptrdiff_t>(first));
    auto pump = make_pump(*pair.sender, fds.first.get());
    PumpLimits limits = no_limits;
    limits.ahead_bytes = ahead_bytes;
    limits.time_ns = 1000000;
    uint64_t sent = 0, used = 0, read = first;
    uint32_t block = VMTH_QEMU_NO_BLOCK;
    while (sent < npages) {
        const Pumped pumped =
            pump->run(left.data(), left.size(), block, 0, limits);
        T_CHECK(pumped.stop == PumpStop::time || pumped.stop == PumpStop::idle);
        T_CHECK(pumped.ahead_bytes <= npieces * piece_bytes);
        left = Bytes(pumped.left, pumped.left + pumped.left_bytes);
        block = pumped.block;
        sent += pumped.pages;
        used += pumped.used_bytes;
        read += pumped.read_bytes;
        T_EQUAL(read - used, left.size());
    }
    T_EQUAL(sent, npages);
    T_EQUAL(used, whole);
    const Pumped last = pump->run(nullptr, 0, block, 0, no_limits);
    T_CHECK(last.stop == PumpStop::idle);
    T_EQUAL(last.read_bytes + last.pages + last.left_bytes, 0);
    thread.join();
    T_CHECK(pair.sender->barrier(0, 0));
    pair.finish();
}

// What one run made of a stream, with a copy of what it left.
struct Ran {
    Pumped pumped;
    Bytes left;
};

// Waits at its end for a thread that ends by itself, also where a test throws.
struct Joined {
    std::thread thread;
    ~Joined() { thread.join(); }
};

Ran pump_bytes(vmth::Sender &sender, const Bytes &bytes, uint32_t block, uint32_t round,
               const PumpLimits &limits = no_limits)
{
    FdPair fds = unix_pair();
    const Joined theirs{writer(std::move(fds.second), bytes, 3)};
    const UniqueFd ours = std::move(fds.first);  // closed before that thread is waited for
    auto pump = make_pump(sender, ours.get());
    Ran ran;
    ran.pumped = pump->run(nullptr, 0, block, round, limits);
    ran.left = Bytes(ran.pumped.left, ran.pumped.left + ran.pumped.left_bytes);
    return ran;
}

// Of what comes behind `good` pages nothing is used, and all of it is handed back.
void test_what_is_not_pages_is_handed_back()
{
    Pair pair(npages, 1);
    pair.source.randomize(3);
    for (int kind = 0; kind < 3; kind++) {
        Records records;
        records.content(static_cast<uint64_t>(kind), pair.source.page(static_cast<uint64_t>(kind)));
        const size_t good = records.bytes.size();
        if (kind == 0) {
            records.end();
            records.bytes.insert(records.bytes.end(), {0x7e, 0, 0, 0, 2});
        } else if (kind == 1) {
            put64(records.bytes, (npages * page_bytes) | flag_page | flag_continue);  // outside
            records.bytes.resize(records.bytes.size() + page_bytes);
        } else {
            records.bytes.resize(records.bytes.size() + 9, 0xFF);
        }
        const Ran ran = pump_bytes(*pair.sender, records.bytes, VMTH_QEMU_NO_BLOCK, 0);
        T_CHECK(ran.pumped.stop == PumpStop::other);
        T_EQUAL(ran.pumped.pages, 1);
        T_EQUAL(ran.pumped.block, 0);
        T_EQUAL(ran.pumped.used_bytes, good);
        T_CHECK(ran.left == Bytes(records.bytes.begin() + static_cast<ptrdiff_t>(good),
                                  records.bytes.end()));
    }
    // A kind that the channels do not take, and a page that went out already: nothing of that piece goes.
    for (int kind = 0; kind < 2; kind++) {
        Records records;
        records.content(10, pair.source.page(10));
        records.content(11, pair.source.page(11));
        if (kind == 0) {
            records.xbzrle(12);
        } else {
            records.content(10, pair.source.page(12));
        }
        const Ran ran = pump_bytes(*pair.sender, records.bytes, VMTH_QEMU_NO_BLOCK, 0);
        T_CHECK(ran.pumped.stop == PumpStop::other);
        T_EQUAL(ran.pumped.pages + ran.pumped.used_bytes, 0);
        T_EQUAL(ran.pumped.block, VMTH_QEMU_NO_BLOCK);
        T_CHECK(ran.left == records.bytes);
    }
    // So those pages may go out in this round still, once.
    Records records;
    records.content(10, pair.source.page(10));
    records.content(11, pair.source.page(11));
    const auto again = [&](uint32_t round) {
        return pump_bytes(*pair.sender, records.bytes, VMTH_QEMU_NO_BLOCK, round).pumped;
    };
    T_EQUAL(again(0).pages, 2);
    T_EQUAL(again(0).pages, 0);
    T_CHECK(again(0).stop == PumpStop::other);
    T_CHECK(pair.sender->barrier(0, 0));
    T_EQUAL(again(1).pages, 2);
    T_CHECK(pair.sender->barrier(1, 0));
    for (uint64_t page : {0, 1, 2, 10, 11}) {
        T_CHECK(memcmp(pair.source.page(page), pair.destination.page(page), page_bytes) == 0);
    }
    T_CHECK(pair.digests_equal());
    pair.sender->finish();
    T_CHECK(pair.receiver->wait(0));
}

Bytes content_records(Memory &source, uint64_t first, uint64_t end)
{
    Records records;
    for (uint64_t page = first; page < end; page++) {
        records.content(page, source.page(page));
    }
    return records.bytes;
}

void test_it_comes_back_for_each_limit()
{
    Memory source(npages);
    source.randomize(5);
    auto sender = make_sender(source);
    FdPair channel = unix_pair();  // nobody reads the other end: what is lent is not given back
    sender->add_channel(channel.first.get(), 0);
    PumpLimits limits = no_limits;
    limits.pages = 20;
    const Bytes some = content_records(source, 0, 100);
    const Ran ran = pump_bytes(*sender, some, VMTH_QEMU_NO_BLOCK, 0, limits);
    T_CHECK(ran.pumped.stop == PumpStop::pages);
    T_CHECK(ran.pumped.pages >= 20 && ran.pumped.pages < 20 + piece_bytes / page_bytes);
    // What is queued ahead is bounded, and waited for no longer than the time.
    FdPair fds = unix_pair();
    std::thread thread = writer(std::move(fds.second), content_records(source, 200, npages), 9);
    auto pump = make_pump(*sender, fds.first.get());
    limits = no_limits;
    limits.time_ns = 20000000;
    limits.ahead_bytes = piece_bytes;
    Pumped pumped;
    Bytes left;
    uint64_t queued = 0;
    uint32_t block = VMTH_QEMU_NO_BLOCK;
    for (int i = 0; i < 10; i++) {
        pumped = pump->run(left.data(), left.size(), block, 0, limits);
        T_CHECK(pumped.stop == PumpStop::time || pumped.stop == PumpStop::idle);
        T_CHECK(pumped.ahead_bytes <= limits.ahead_bytes + piece_bytes);
        left = Bytes(pumped.left, pumped.left + pumped.left_bytes);
        block = pumped.block;
        queued += pumped.pages;
    }
    T_CHECK(queued > 0 && queued < npages - 200);
    T_CHECK(pumped.ahead_bytes > 0 && pumped.ticket > sender->pages_read());
    sender->cancel("enough");
    T_CHECK(expect_error([&] { pump->run(left.data(), left.size(), block, 0, limits); }).kind() ==
            ErrorKind::cancelled);
    fds.first.reset();
    pump.reset();
    thread.join();
    sender->close();
}

// Zero pages have no bytes that could bound them.
void test_zero_pages_are_bounded_by_number()
{
    Memory source(npages);
    source.randomize(5);
    vmth::SenderOptions options;
    options.queue_jobs = 1;
    auto sender = make_sender(source, options);
    FdPair channel = unix_pair();  // nobody reads the other end
    sender->add_channel(channel.first.get(), 0);
    PumpLimits limits = no_limits;
    limits.time_ns = 20000000;
    pump_bytes(*sender, content_records(source, 0, 200), VMTH_QEMU_NO_BLOCK, 0, limits);
    std::atomic<uint64_t> queued{0};
    {
        Blocked blocked([&] {
            T_CHECK(expect_error([&] {
                        for (uint64_t page = 300;; page += 2) {
                            Records one;
                            one.zero(page);
                            queued += pump_bytes(*sender, one.bytes, VMTH_QEMU_NO_BLOCK, 0)
                                          .pumped.pages;
                        }
                    }).kind() == ErrorKind::cancelled);
        });
        while (queued < 4) {
            sched_yield();
        }
        blocked.sleeping();
        T_CHECK(queued < 20);
        sender->cancel("enough");
    }
    sender->close();
}

// Its ring is read as long as the sender has pages of it.
void test_the_ring_outlives_the_pump()
{
    Pair pair(npages, 1, nullptr);
    pair.source.randomize(5);
    FdPair channel = unix_pair();
    pair.sender->add_channel(channel.first.get(), 0);
    FdPair fds = unix_pair();
    const Joined theirs{writer(std::move(fds.second), content_records(pair.source, 0, 400), 9)};
    auto pump = make_pump(*pair.sender, fds.first.get(), 1 << 20, 2);
    PumpLimits limits = no_limits;
    limits.piece_bytes = 1 << 20;
    limits.pages = 400;
    const Pumped pumped = pump->run(nullptr, 0, VMTH_QEMU_NO_BLOCK, 0, limits);
    T_EQUAL(pumped.pages, 400);
    T_CHECK(pair.sender->pages_read() < pumped.ticket);  // nobody takes them yet
    pump.reset();
    pair.receiver->attach(channel.second.get(), 0);
    T_CHECK(pair.sender->wait_read(pumped.ticket, 0));
    T_CHECK(pair.sender->barrier(0, 0));
    T_CHECK(pair.digests_equal());
    T_CHECK(memcmp(pair.source.page(0), pair.destination.page(0), 400 * page_bytes) == 0);
    pair.sender->finish();
    T_CHECK(pair.receiver->wait(0));
}

void test_bad_arguments()
{
    Memory source(npages);
    auto sender = make_sender(source);
    FdPair fds = unix_pair();
    const std::vector<uint64_t> lengths = {npages * page_bytes};
    const auto refused = [&](std::vector<uint64_t> of, const std::string &named, size_t page,
                             size_t piece, size_t pieces, int fd, ErrorKind kind) {
        const TransferError error = expect_error(
            [&] { StreamPump(*sender, fd, std::move(of), named, page, piece, pieces); });
        T_CHECK(error.kind() == kind);
    };
    const int fd = fds.first.get();
    refused(lengths, "", page_bytes, piece_bytes, npieces, fd, ErrorKind::usage);
    refused({}, names(), page_bytes, piece_bytes, npieces, fd, ErrorKind::usage);
    refused(lengths, names(), 0, piece_bytes, npieces, fd, ErrorKind::usage);
    refused(lengths, names(), page_bytes, 2 * page_bytes, npieces, fd, ErrorKind::usage);
    refused(lengths, names(), page_bytes, piece_bytes, 1, fd, ErrorKind::usage);
    refused(lengths, names(), page_bytes, piece_bytes, npieces, -1, ErrorKind::io);
    FdPair channel = unix_pair();
    sender->add_channel(channel.first.get(), 0);
    auto pump = make_pump(*sender, fd);
    const Bytes first(piece_bytes / 2 + 1);
    T_CHECK(expect_error([&] { pump->run(first.data(), first.size(), 0, 0, no_limits); }).kind() ==
            ErrorKind::usage);
    // The other end is gone: who reads next is told. A descriptor that cannot be read is an error.
    fds.second.reset();
    T_CHECK(pump->run(first.data(), 5, 0, 0, no_limits).stop == PumpStop::idle);
    UniqueFd file(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    auto unreadable = make_pump(*sender, file.get());
    T_CHECK(expect_error([&] { unreadable->run(nullptr, 0, 0, 0, no_limits); }).kind() ==
            ErrorKind::io);
    sender->cancel("enough");
    sender->close();
}

}  // namespace

int main(void)
{
    for (unsigned channels : {1u, 3u}) {
        test_all_pages_arrive(channels, 0, 0, UINT64_MAX);
        test_all_pages_arrive(channels, 5, 0, piece_bytes);
        test_all_pages_arrive(channels, record_bytes + 100, vmth::form_bit(VMTH_FORM_ZSTD), 1);
    }
    test_what_is_not_pages_is_handed_back();
    test_it_comes_back_for_each_limit();
    test_zero_pages_are_bounded_by_number();
    test_the_ring_outlives_the_pump();
    test_bad_arguments();
    return 0;
}

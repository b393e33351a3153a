// SPDX-License-Identifier: Apache-2.0
// Pages of a QEMU's stream from a socket to the page channels, and what a pump hands back.
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
class Records
{
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

std::unique_ptr<StreamPump> make_pump(vmth::Sender &sender)
{
    return std::make_unique<StreamPump>(sender, std::vector<uint64_t>{npages * page_bytes}, names(),
                                        page_bytes, piece_bytes, npieces);
}

// Writes in pieces of any size, then closes.
std::thread writer(UniqueFd &&fd, const Bytes &bytes, uint64_t seed_)
{
    return std::thread([fd = std::move(fd), bytes, seed_]() mutable {
        uint64_t state = seed_;
        for (size_t done = 0; done < bytes.size();) {
            const size_t some = 1 + t_random(&state) % 20000;
            const ssize_t n =
                send(fd.get(), bytes.data() + done, std::min(some, bytes.size() - done), 0);
            T_CHECK(n > 0);
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
    auto pump = make_pump(*pair.sender);
    PumpLimits limits = no_limits;
    limits.ahead_bytes = ahead_bytes;
    limits.time_ns = 1000000;
    uint64_t sent = 0, used = 0, read = first;
    uint32_t block = VMTH_QEMU_NO_BLOCK;
    while (sent < npages) {
        const Pumped pumped =
            pump->run(fds.first.get(), left.data(), left.size(), block, 0, limits);
        T_CHECK(pumped.stop == PumpStop::time || pumped.stop == PumpStop::idle);
        T_CHECK(pumped.ahead_bytes <= npieces * piece_bytes);
        left.assign(pumped.left, pumped.left + pumped.left_bytes);
        block = pumped.block;
        sent += pumped.pages;
        used += pumped.used_bytes;
        read += pumped.read_bytes;
        T_EQUAL(read - used, left.size());
    }
    T_EQUAL(sent, npages);
    T_EQUAL(used, whole);
    const Pumped last = pump->run(fds.first.get(), nullptr, 0, block, 0, no_limits);
    T_CHECK(last.stop == PumpStop::idle);
    T_EQUAL(last.read_bytes + last.pages + last.left_bytes, 0);
    thread.join();
    pump.reset();  // the sender may still read the ring
    T_CHECK(pair.sender->barrier(0, 0));
    pair.finish();
}

Pumped pump_bytes(StreamPump &pump, const Bytes &bytes, uint32_t block, uint32_t round,
                  const PumpLimits &limits = no_limits)
{
    FdPair fds = unix_pair();
    std::thread thread = writer(std::move(fds.second), bytes, 3);
    const Pumped pumped = pump.run(fds.first.get(), nullptr, 0, block, round, limits);
    Bytes rest(1 << 20);
    while (recv(fds.first.get(), rest.data(), rest.size(), 0) > 0) {
    }
    thread.join();
    return pumped;
}

// Of what comes behind `good` pages nothing is used, and all of it is handed back.
void test_what_is_not_pages_is_handed_back()
{
    Pair pair(npages, 1);
    pair.source.randomize(3);
    auto pump = make_pump(*pair.sender);
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
        const Pumped pumped = pump_bytes(*pump, records.bytes, VMTH_QEMU_NO_BLOCK, 0);
        T_CHECK(pumped.stop == PumpStop::other);
        T_EQUAL(pumped.pages, 1);
        T_EQUAL(pumped.block, 0);
        T_EQUAL(pumped.used_bytes, good);
        T_CHECK(Bytes(pumped.left, pumped.left + pumped.left_bytes) ==
                Bytes(records.bytes.begin() + static_cast<ptrdiff_t>(good), records.bytes.end()));
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
        const Pumped pumped = pump_bytes(*pump, records.bytes, VMTH_QEMU_NO_BLOCK, 0);
        T_CHECK(pumped.stop == PumpStop::other);
        T_EQUAL(pumped.pages + pumped.used_bytes, 0);
        T_EQUAL(pumped.block, VMTH_QEMU_NO_BLOCK);
        T_CHECK(Bytes(pumped.left, pumped.left + pumped.left_bytes) == records.bytes);
    }
    // So those pages may go out in this round still, once.
    Records records;
    records.content(10, pair.source.page(10));
    records.content(11, pair.source.page(11));
    T_EQUAL(pump_bytes(*pump, records.bytes, VMTH_QEMU_NO_BLOCK, 0).pages, 2);
    Pumped again = pump_bytes(*pump, records.bytes, VMTH_QEMU_NO_BLOCK, 0);
    T_CHECK(again.stop == PumpStop::other);
    T_EQUAL(again.pages, 0);
    T_CHECK(pair.sender->barrier(0, 0));
    again = pump_bytes(*pump, records.bytes, VMTH_QEMU_NO_BLOCK, 1);
    T_CHECK(again.stop == PumpStop::idle);
    T_EQUAL(again.pages, 2);
    T_CHECK(pair.sender->barrier(1, 0));
    for (uint64_t page : {0, 1, 2, 10, 11}) {
        T_CHECK(memcmp(pair.source.page(page), pair.destination.page(page), page_bytes) == 0);
    }
    T_CHECK(pair.digests_equal());
    pair.sender->finish();
    T_CHECK(pair.receiver->wait(0));
}

void test_it_comes_back_for_each_limit()
{
    Memory source(npages);
    source.randomize(5);
    auto sender = make_sender(source);
    FdPair channel = unix_pair();  // nobody reads the other end: what is lent is not given back
    sender->add_channel(channel.first.get(), 0);
    auto pump = make_pump(*sender);
    Records records;
    for (uint64_t page = 0; page < 100; page++) {
        records.content(page, source.page(page));
    }
    PumpLimits limits = no_limits;
    limits.pages = 20;
    Pumped pumped = pump_bytes(*pump, records.bytes, VMTH_QEMU_NO_BLOCK, 0, limits);
    T_CHECK(pumped.stop == PumpStop::pages);
    T_CHECK(pumped.pages >= 20 && pumped.pages < 20 + piece_bytes / page_bytes);
    // What is queued ahead is bounded, and waited for no longer than the time.
    Records more;
    for (uint64_t page = 200; page < npages; page++) {
        more.content(page, source.page(page));
    }
    limits = no_limits;
    limits.time_ns = 20000000;
    limits.ahead_bytes = 2 * piece_bytes;
    uint64_t queued = 0;
    for (int i = 0; i < 20; i++) {
        pumped = pump_bytes(
            *pump, Bytes(more.bytes.begin() + static_cast<ptrdiff_t>(queued), more.bytes.end()), 0,
            0, limits);
        T_CHECK(pumped.stop == PumpStop::time || pumped.stop == PumpStop::idle);
        T_CHECK(pumped.ahead_bytes <= 3 * piece_bytes);
        queued += pumped.used_bytes;
    }
    T_CHECK(queued < more.bytes.size());
    T_CHECK(pumped.ahead_bytes > 0 && pumped.ticket > sender->pages_read());
    sender->cancel("enough");
    T_CHECK(expect_error([&] { pump->run(-1, nullptr, 0, 0, 0, limits); }).kind() ==
            ErrorKind::cancelled);
    sender->close();
}

void test_bad_arguments()
{
    Memory source(npages);
    auto sender = make_sender(source);
    const std::vector<uint64_t> lengths = {npages * page_bytes};
    const auto refused = [&](std::vector<uint64_t> of, const std::string &named, size_t page,
                             size_t piece, size_t pieces) {
        const TransferError error =
            expect_error([&] { StreamPump(*sender, std::move(of), named, page, piece, pieces); });
        T_CHECK(error.kind() == ErrorKind::usage);
    };
    refused(lengths, "", page_bytes, piece_bytes, npieces);
    refused({}, names(), page_bytes, piece_bytes, npieces);
    refused(lengths, names(), 0, piece_bytes, npieces);
    refused(lengths, names(), page_bytes, 2 * page_bytes, npieces);
    refused(lengths, names(), page_bytes, piece_bytes, 1);
    FdPair channel = unix_pair();
    sender->add_channel(channel.first.get(), 0);
    auto pump = make_pump(*sender);
    const Bytes first(piece_bytes / 2 + 1);
    T_CHECK(expect_error([&] {
                pump->run(-1, first.data(), first.size(), 0, 0, no_limits);
            }).kind() == ErrorKind::usage);
    // A descriptor that cannot be read: who reads it next is told.
    T_CHECK(pump->run(-1, first.data(), 5, 0, 0, no_limits).stop == PumpStop::idle);
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
    test_bad_arguments();
    return 0;
}

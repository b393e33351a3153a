// SPDX-License-Identifier: Apache-2.0
// Pages lent to the sender, and pages handed on by the receiver as sections of QEMU's stream.
#include <mutex>

#include "tests/xfer_fixture.hpp"
#include "vmth/qemu_ram.h"

using namespace t;

namespace {

constexpr uint64_t npages = 2048;
constexpr uint32_t section_id = 0x01020304;

vmth_qemu_run lent(uint64_t page, uint64_t n, uint64_t at, uint32_t stride)
{
    return {page, n, at, stride, page_bytes, 0, VMTH_QEMU_PAGE};
}

// The program behind the sink, with one block "ram": parses what it gets in a thread.
class Program {
public:
    Program() : fds_(unix_pair()), memory(npages * page_bytes, 0xEE)
    {
        blocks_.page_bytes = page_bytes;
        blocks_.nblocks = 1;
        blocks_.used_length = &length_;
        blocks_.names = names_;
        names_[0] = 3;
        memcpy(names_ + 1, "ram", 3);
    }
    ~Program() { finish(); }

    vmth::StreamSinkOptions options() const { return {fds_.first.get(), section_id, {"ram"}}; }
    int fd() const { return fds_.first.get(); }
    void start()
    {
        thread_ = std::thread([this] { read(); });
    }
    // No more will come: what did is in `memory`.
    void finish()
    {
        fds_.first.reset();
        if (thread_.joinable()) {
            thread_.join();
        }
        fds_.second.reset();
    }

private:
    void read()
    {
        for (Bytes head; (head = read_all(fds_.second.get(), 5)).size() == 5;) {
            T_EQUAL(head[0], 0x02);
            check_id(head);
            section();
            head = read_all(fds_.second.get(), 5);
            T_EQUAL(head.size(), 5);
            T_EQUAL(head[0], 0x7e);
            check_id(head);
        }
    }
    static void check_id(const Bytes &head)
    {
        T_EQUAL(head[1] << 24 | head[2] << 16 | head[3] << 8 | head[4], section_id);
    }
    // Records until EOS, read so that not a byte behind it is taken.
    void section()
    {
        Bytes bytes;
        uint32_t block = VMTH_QEMU_NO_BLOCK;  // every section names its block
        size_t need = 8;
        for (;;) {
            Bytes more = read_all(fds_.second.get(), need);
            T_EQUAL(more.size(), need);
            bytes.insert(bytes.end(), more.begin(), more.end());
            vmth_qemu_run runs[4];
            vmth_qemu_parsed parsed;
            vmth_qemu_error error;
            T_EQUAL(vmth_qemu_ram_parse(&blocks_, &block, bytes.data(), bytes.size(), runs, 4, &parsed,
                                        &error),
                    0);
            for (size_t i = 0; i < parsed.nruns; i++) {
                take(runs[i], bytes);
            }
            bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(parsed.used));
            if (parsed.stop == VMTH_QEMU_EOS) {
                T_EQUAL(bytes.size(), 0);
                return;
            }
            T_EQUAL(parsed.stop, VMTH_QEMU_SHORT);
            need = parsed.need - bytes.size();
        }
    }
    void take(const vmth_qemu_run &run, const Bytes &bytes)
    {
        for (uint64_t i = 0; i < run.npages; i++) {
            uint8_t *page = memory.data() + (run.page + i) * page_bytes;
            if (run.kind == VMTH_QEMU_ZERO) {
                memset(page, 0, page_bytes);
            } else {
                T_EQUAL(run.kind, VMTH_QEMU_PAGE);
                memcpy(page, bytes.data() + run.at + i * run.stride, page_bytes);
            }
        }
    }

    FdPair fds_;
    std::thread thread_;
    uint64_t length_ = npages * page_bytes;
    uint8_t names_[VMTH_QEMU_NAME_BYTES] = {};
    vmth_qemu_blocks blocks_ = {};

public:
    Bytes memory;
};

// Both ends without memory of their own.
struct HostlessPair {
    explicit HostlessPair(unsigned channels, vmth::SenderOptions options = {})
    {
        const std::vector<vmth::MemoryBlock> blocks = {{nullptr, npages}};
        std::vector<uint64_t> bits((npages + 63) / 64);
        options.hash_seed = seed;
        sender = std::make_unique<vmth::Sender>(blocks, page_bytes, options);
        vmth::ReceiverOptions receiving;
        receiving.hash_seed = seed;
        receiving.digest = options.digest;
        receiving.channels = channels;
        receiving.forms = options.forms;
        receiving.sink = program.options();
        receiver = std::make_unique<vmth::Receiver>(blocks, page_bytes, receiving,
                                                    std::vector<const uint64_t *>{bits.data()},
                                                    std::vector<size_t>{bits.size()});
        for (unsigned i = 0; i < channels; i++) {
            FdPair fds = unix_pair();
            sender->add_channel(fds.first.get(), i);
            receiver->attach(fds.second.get(), i);
        }
    }
    void finish()
    {
        sender->finish();
        T_CHECK(receiver->wait(0));
        vmth_digest ours = sender->hashes().total();
        vmth_digest theirs = receiver->hashes().total();
        T_EQUAL(ours.sum.lo, theirs.sum.lo);
        T_EQUAL(ours.sum.hi, theirs.sum.hi);
        T_EQUAL(ours.pages, theirs.pages);
        receiver->close();
        program.finish();
    }

    Program program;
    std::unique_ptr<vmth::Sender> sender;
    std::unique_ptr<vmth::Receiver> receiver;
};

// Rounds over all pages through few small buffers, each reused as soon as its ticket was read; with all
// of `forms` on.
void test_buffers_are_reused(unsigned channels, bool digest, uint32_t forms)
{
    vmth::SenderOptions options;
    options.digest = digest;
    options.forms = forms;
    HostlessPair pair(channels, options);
    pair.sender->set_forms({forms, 1});
    pair.program.start();
    Bytes expected(npages * page_bytes);
    constexpr uint64_t at_once = 24;
    constexpr uint32_t stride = page_bytes + 8;
    std::vector<Bytes> buffers(3, Bytes(at_once * stride));
    std::vector<uint64_t> tickets(buffers.size());
    uint64_t state = 1;
    size_t turn = 0;
    for (uint32_t round = 0; round < 3; round++) {
        for (uint64_t page = 0; page < npages; page += at_once, turn = (turn + 1) % buffers.size()) {
            T_CHECK(pair.sender->wait_read(tickets[turn], 0));
            Bytes &buffer = buffers[turn];
            const uint64_t n = std::min(at_once, npages - page);
            for (uint64_t i = 0; i < n; i++) {
                uint8_t *content = buffer.data() + i * stride;
                memset(content, t_random(&state) % 4 == 0 ? 0 : static_cast<int>(t_random(&state)),
                       page_bytes);
                memcpy(expected.data() + (page + i) * page_bytes, content, page_bytes);
            }
            vmth_qemu_run run = lent(page, n, 0, stride);
            auto [queued, ticket] =
                pair.sender->send_pages(&run, 1, buffer.data(), buffer.size(), round);
            T_EQUAL(queued, 1);
            tickets[turn] = ticket;
        }
        T_CHECK(pair.sender->barrier(round, 0));
        T_EQUAL(pair.sender->pages_read(), *std::max_element(tickets.begin(), tickets.end()));
    }
    pair.finish();
    T_CHECK(pair.program.memory == expected);
    for (vmth_page_form form : {VMTH_FORM_SAME, VMTH_FORM_ZSTD}) {
        const bool on = (forms & vmth::form_bit(form)) != 0;
        T_CHECK((pair.sender->counters().forms[form].pages.get() > 0) == on);
    }
}

void test_holes_and_zero_runs()
{
    HostlessPair pair(2);
    pair.program.start();
    vmth_qemu_run run = {0, 10, 0, 0, 0, 0, VMTH_QEMU_ZERO};
    T_EQUAL(pair.sender->send_pages(&run, 1, nullptr, 0, 0).first, 1);
    pair.sender->send_told(VMTH_FORM_HOLE, 0, {{10, npages - 20}}, 0);
    pair.sender->send_told(VMTH_FORM_FREE, 0, {{npages - 10, 10}}, 0);
    pair.finish();
    const size_t told = (npages - 10) * page_bytes;
    for (size_t i = 0; i < pair.program.memory.size(); i++) {
        T_EQUAL(pair.program.memory[i], i < told ? 0 : 0xEE);
    }
}

// A worker that cannot send gives nothing back, and cancel wakes who waits for it.
void test_cancel_wakes_who_waits_for_a_buffer()
{
    const std::vector<vmth::MemoryBlock> blocks = {{nullptr, npages}};
    vmth::SenderOptions options;
    options.hash_seed = seed;
    Bytes buffer(npages * page_bytes, 1);
    FdPair fds = unix_pair();  // nobody reads
    vmth::Sender sender(blocks, page_bytes, options);
    sender.add_channel(fds.first.get(), 0);
    vmth_qemu_run run = lent(0, npages, 0, page_bytes);
    const uint64_t ticket = sender.send_pages(&run, 1, buffer.data(), buffer.size(), 0).second;
    T_CHECK(!sender.wait_read(ticket, 1000));
    {
        Blocked blocked([&] {
            T_CHECK(expect_error([&] { sender.wait_read(ticket, 0); }).kind() ==
                    ErrorKind::cancelled);
        });
        blocked.sleeping();
        sender.cancel("enough");
    }
    T_EQUAL(sender.pages_read(), 0);
    sender.close();
}

// Several channels wait for one reader that does not read: one in poll(), the others for the sink.
void test_cancel_behind_a_sink_that_is_not_read()
{
    HostlessPair pair(3);
    Bytes buffer(npages * page_bytes, 1);
    vmth_qemu_run run = lent(0, npages, 0, page_bytes);
    pair.sender->send_pages(&run, 1, buffer.data(), buffer.size(), 0);
    {
        Blocked blocked([&] {
            T_CHECK(expect_error([&] { pair.receiver->wait(0); }).kind() == ErrorKind::cancelled);
        });
        blocked.sleeping();
        pollfd entry = {pair.program.fd(), POLLOUT, 0};
        while (poll(&entry, 1, 0) != 0) {
            sched_yield();
        }
        pair.receiver->cancel("enough");
    }
    pair.receiver->close();
    pair.sender->close();
}

}  // namespace

int main()
{
    const size_t fds = entries("/proc/self/fd");
    test_buffers_are_reused(1, true, 0);
    test_buffers_are_reused(4, true, vmth::form_bit(VMTH_FORM_SAME) | vmth::form_bit(VMTH_FORM_ZSTD));
    test_buffers_are_reused(3, false, vmth::form_bit(VMTH_FORM_ZSTD));
    test_holes_and_zero_runs();
    test_cancel_wakes_who_waits_for_a_buffer();
    test_cancel_behind_a_sink_that_is_not_read();
    T_EQUAL(entries("/proc/self/fd"), fds);
    return T_PASS;
}

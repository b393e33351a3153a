// SPDX-License-Identifier: Apache-2.0
// cancel() from another thread wakes every blocked call, and nothing is leaked by it.
#include <fcntl.h>

#include "tests/xfer_fixture.hpp"

using namespace t;

namespace {

constexpr uint64_t npages = 1024;

// A sender whose peer neither reads nor answers.
struct Stuck {
    explicit Stuck(vmth::SenderOptions options = {})
        : memory(npages), bits(all_bits(npages)), sender(make_sender(memory, options)),
          fds(unix_pair())
    {
        memory.randomize(1);
        sender->add_channel(fds.first.get(), 0);
    }
    void send(uint64_t page, uint64_t n)
    {
        sender->send(0, page, n, bits.data(), bits.size(), 0);
    }
    // Cancels once `body` is blocked; body must then throw "cancelled".
    void cancel_in(const std::function<void()> &body)
    {
        {
            Blocked blocked([&] {
                TransferError error = expect_error(body);
                T_CHECK(error.kind() == ErrorKind::cancelled);
                T_CHECK(std::string(error.what()) == "enough");
            });
            blocked.sleeping();
            sender->cancel("enough");
        }
        T_CHECK(expect_error([&] { sender->finish(); }).kind() == ErrorKind::cancelled);
    }

    Memory memory;
    std::vector<uint64_t> bits;
    std::unique_ptr<vmth::Sender> sender;
    FdPair fds;
};

void test_send_blocked_in_the_queue()
{
    vmth::SenderOptions options;
    options.queue_jobs = 1;
    Stuck stuck(options);
    stuck.cancel_in([&] {
        for (uint64_t page = 0; page < npages; page += 128) {
            stuck.send(page, 128);
        }
        stuck.sender->barrier(0, 0);
    });
}

void test_barrier_without_an_answer()
{
    Stuck stuck;
    T_CHECK(!stuck.sender->barrier(0, 1000));
    T_CHECK(!stuck.sender->barrier(0, 1000));
    T_CHECK(expect_error([&] { stuck.sender->barrier(1, 0); }).kind() == ErrorKind::usage);
    T_CHECK(expect_error([&] { stuck.send(0, 1); }).kind() == ErrorKind::usage);
    stuck.cancel_in([&] { stuck.sender->barrier(0, 0); });
}

void test_worker_blocked_on_the_window()
{
    Stuck stuck;
    stuck.sender->set_window(1);
    stuck.send(0, npages);
    T_CHECK(!stuck.sender->sent(0, 1000));
    stuck.cancel_in([&] { stuck.sender->sent(0, 0); });
}

void test_worker_blocked_on_the_bandwidth()
{
    Stuck stuck;
    stuck.sender->set_bandwidth(1);
    stuck.send(0, npages);
    stuck.cancel_in([&] { stuck.sender->barrier(0, 0); });
}

void test_finish_without_an_answer()
{
    Stuck stuck;
    stuck.send(0, 4);
    stuck.cancel_in([&] { stuck.sender->finish(); });
}

// ---- receiver ---------------------------------------------------------------------------------------

struct Waiting {
    Waiting() : memory(npages), receiver(make_receiver(memory, 1)), fds(unix_pair())
    {
        receiver->attach(fds.second.get(), 0);
    }
    void cancel_in_wait(const std::string &thread)
    {
        Blocked blocked([&] {
            T_CHECK(expect_error([&] { receiver->wait_barriers(1, 0); }).kind() ==
                    ErrorKind::cancelled);
            T_CHECK(expect_error([&] { receiver->wait(0); }).kind() == ErrorKind::cancelled);
        });
        blocked.sleeping();
        thread_sleeping(thread);
        receiver->cancel("enough");
    }

    Memory memory;
    std::unique_ptr<vmth::Receiver> receiver;
    FdPair fds;
};

void test_wait_without_data()
{
    Waiting waiting;
    T_CHECK(!waiting.receiver->wait(1000));
    waiting.cancel_in_wait("vmth-recv-0");
}

void test_wait_inside_a_packet()
{
    Waiting waiting;
    Bytes packet = pages(1, {desc(VMTH_FORM_NORMAL, 0, 4)}, Bytes(4 * page_bytes, 1));
    T_CHECK(write_all(waiting.fds.first.get(), packet.data(), packet.size() - 100));
    waiting.cancel_in_wait("vmth-recv-0");
    T_EQUAL(waiting.receiver->hashes().total().pages, 0);
}

void test_peer_that_reads_no_acks()
{
    Memory memory(npages);
    auto receiver = make_receiver(memory, 1);
    FdPair fds = unix_pair();
    receiver->attach(fds.second.get(), 0);
    uint64_t seq = 0;
    // Until neither direction moves: the receiver is blocked in sending acknowledgements.
    for (bool full = false; !full;) {
        Bytes one = control(VMTH_PACKET_BARRIER, ++seq);
        ssize_t sent = ::send(fds.first.get(), one.data(), one.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            T_EQUAL(errno, EAGAIN);
            seq--;
            pollfd entry = {fds.first.get(), POLLOUT, 0};
            full = poll(&entry, 1, 20) == 0;
        } else {
            T_EQUAL(sent, one.size());
        }
    }
    Blocked blocked([&] {
        T_CHECK(expect_error([&] { receiver->wait(0); }).kind() == ErrorKind::cancelled);
    });
    blocked.sleeping();
    thread_sleeping("vmth-recv-0");
    receiver->cancel("enough");
}

void test_channel_failure_ends_the_others()
{
    Memory memory(npages);
    auto receiver = make_receiver(memory, 3);
    FdPair fds[3] = {unix_pair(), unix_pair(), unix_pair()};
    for (unsigned i = 0; i < 3; i++) {
        receiver->attach(fds[i].second.get(), i);
        fds[i].second.reset();
    }
    T_CHECK(write_all(fds[1].first.get(), Bytes(64, 0x42)));
    T_CHECK(expect_error([&] { receiver->wait(0); }).kind() == ErrorKind::protocol);
    for (FdPair &pair : fds) {
        T_EQUAL(read_all(pair.first.get(), 1).size(), 0);  // shut down
    }
}

// A connection that is accepted while the session ends: it joins or is refused, and close() ends it.
void test_attach_while_closing()
{
    constexpr unsigned channels = 4;
    Memory memory(1);
    FdPair fds[channels] = {unix_pair(), unix_pair(), unix_pair(), unix_pair()};
    for (int i = 0; i < 200; i++) {
        auto receiver = make_receiver(memory, channels);
        std::atomic<unsigned> attached{0};
        std::thread listener([&] {
            for (unsigned index = 0; index < channels; index++) {
                try {
                    receiver->attach(fds[index].second.get(), index);
                    attached.store(index + 1);
                } catch (const TransferError &error) {
                    T_CHECK(error.kind() == ErrorKind::cancelled ||
                            error.kind() == ErrorKind::usage);
                }
            }
        });
        while (attached.load() < static_cast<unsigned>(i) % channels) {
            sched_yield();
        }
        receiver->cancel("enough");
        receiver->close();
        listener.join();
        T_CHECK(expect_error([&] { receiver->attach(fds[0].second.get(), 0); }).kind() ==
                ErrorKind::cancelled);
        for (FdPair &pair : fds) {
            pair = unix_pair();
        }
    }
}

void test_attach_after_an_orderly_end()
{
    Pair pair(1, 1);
    pair.sender->finish();
    T_CHECK(pair.receiver->wait(0));
    pair.receiver->close();
    FdPair fds = unix_pair();
    T_CHECK(expect_error([&] { pair.receiver->attach(fds.second.get(), 0); }).kind() ==
            ErrorKind::usage);
}

void test_everything_at_once_from_other_threads()
{
    for (int i = 0; i < 20; i++) {
        Pair pair(npages, 4);
        pair.source.randomize(1);
        std::thread canceller([&] { (i % 2 == 0 ? pair.sender->cancel("x") : pair.receiver->cancel("x")); });
        std::thread reader([&] {
            for (int n = 0; n < 50; n++) {
                pair.sender->set_bandwidth(static_cast<uint64_t>(n % 3) << 30);
                pair.sender->set_window(static_cast<uint64_t>(n % 2) << 20);
                (void)pair.sender->hashes().total();
                (void)pair.receiver->hashes().subdigests(0, 0, npages, 64);
                (void)pair.sender->path_info();
                (void)pair.sender->fallbacks();
            }
        });
        try {
            pair.send_all(0);
            pair.sender->barrier(0, 0);
            pair.sender->finish();
        } catch (const TransferError &) {
        }
        canceller.join();
        reader.join();
    }
}

}  // namespace

int main()
{
    const size_t fds = entries("/proc/self/fd");
    const size_t threads = entries("/proc/self/task");
    test_send_blocked_in_the_queue();
    test_barrier_without_an_answer();
    test_worker_blocked_on_the_window();
    test_worker_blocked_on_the_bandwidth();
    test_finish_without_an_answer();
    test_wait_without_data();
    test_wait_inside_a_packet();
    test_peer_that_reads_no_acks();
    test_channel_failure_ends_the_others();
    test_attach_while_closing();
    test_attach_after_an_orderly_end();
    test_everything_at_once_from_other_threads();
    T_EQUAL(entries("/proc/self/fd"), fds);
    // A sanitizer may start its own thread with ours, and a joined one leaves /proc a moment later.
    for (int tries = 0; entries("/proc/self/task") > threads + 1 && tries < 100000; tries++) {
        sched_yield();
    }
    T_CHECK(entries("/proc/self/task") <= threads + 1);
    return T_PASS;
}

// SPDX-License-Identifier: Apache-2.0
// MSG_ZEROCOPY through replaced socket calls: short sends, refusals, completions in any order, copied,
// or never.
#include <ctime>  // errqueue.h needs timespec

#include <linux/errqueue.h>

#include <deque>
#include <map>
#include <mutex>

#include "tests/xfer_fixture.hpp"

using namespace t;

namespace {

constexpr uint64_t npages = 512;

// A kernel whose zero-copy behaviour the test chooses. Bytes really go over the socket, by copy.
struct FakeKernel {
    vmth_sock_ops ops = {do_sendmsg, do_recvmsg, do_poll, this};
    size_t most_bytes = ~size_t{0};  // a send takes no more
    int enobufs_every = 0;           // every so many zero-copy sends fail with ENOBUFS
    int refuse_every = 0;            // every so many sends fail with EAGAIN or EINTR in turn
    size_t hold = 0;                 // completions kept back, then given newest first
    bool lose = false;               // completions never come
    bool copied = false;             // they say that the kernel copied
    bool bogus = false;              // they name calls that were not made

    std::mutex mutex;
    int sends = 0;
    int zerocopy_sends = 0;
    struct Calls {
        uint32_t next = 0;
        std::deque<uint32_t> done;
    };
    std::map<int, Calls> calls;  // by descriptor

    bool refuse(int flags)
    {
        sends++;
        bool zerocopy = (flags & MSG_ZEROCOPY) != 0;
        zerocopy_sends += zerocopy ? 1 : 0;
        if (refuse_every != 0 && sends % refuse_every == 0) {
            errno = sends % (2 * refuse_every) == 0 ? EAGAIN : EINTR;
            return true;
        }
        if (zerocopy && enobufs_every != 0 && zerocopy_sends % enobufs_every == 0) {
            errno = ENOBUFS;
            return true;
        }
        return false;
    }

    static ssize_t do_sendmsg(void *ctx, int fd, const msghdr *msg, int flags)
    {
        auto *self = static_cast<FakeKernel *>(ctx);
        {
            std::lock_guard<std::mutex> lock(self->mutex);
            if (self->refuse(flags)) {
                return -1;
            }
        }
        // Only the first vector, cut: the shortest of short sends.
        iovec iov = msg->msg_iov[0];
        iov.iov_len = std::min(iov.iov_len, self->most_bytes);
        msghdr part = {};
        part.msg_iov = &iov;
        part.msg_iovlen = 1;
        ssize_t sent = ::sendmsg(fd, &part, flags & ~MSG_ZEROCOPY);
        if (sent > 0 && (flags & MSG_ZEROCOPY) != 0) {
            std::lock_guard<std::mutex> lock(self->mutex);
            Calls &made = self->calls[fd];
            made.done.push_back(made.next++);
        }
        return sent;
    }

    static ssize_t do_recvmsg(void *ctx, int fd, msghdr *msg, int flags)
    {
        auto *self = static_cast<FakeKernel *>(ctx);
        if ((flags & MSG_ERRQUEUE) == 0) {
            return ::recvmsg(fd, msg, flags);
        }
        std::lock_guard<std::mutex> lock(self->mutex);
        std::deque<uint32_t> &done = self->calls[fd].done;
        if (self->lose || done.size() <= self->hold) {
            self->hold = 0;  // the next time, everything
            errno = EAGAIN;
            return -1;
        }
        sock_extended_err err = {};
        err.ee_origin = SO_EE_ORIGIN_ZEROCOPY;
        err.ee_code = self->copied ? SO_EE_CODE_ZEROCOPY_COPIED : 0;
        err.ee_info = err.ee_data = done.back() + (self->bogus ? 1000 : 0);
        done.pop_back();
        msg->msg_controllen = CMSG_SPACE(sizeof(err));
        cmsghdr *cmsg = CMSG_FIRSTHDR(msg);
        cmsg->cmsg_level = SOL_IP;
        cmsg->cmsg_type = IP_RECVERR;
        cmsg->cmsg_len = CMSG_LEN(sizeof(err));
        memcpy(CMSG_DATA(cmsg), &err, sizeof(err));
        return 0;
    }

    static int do_poll(void *, pollfd *fds, nfds_t nfds, int timeout_ms)
    {
        return ::poll(fds, nfds, timeout_ms < 0 ? -1 : std::min(timeout_ms, 1));
    }
};

FdPair tcp4()
{
    return tcp_pair(AF_INET);
}

vmth::SenderOptions options_for(FakeKernel &kernel)
{
    vmth::SenderOptions options;
    options.ops = &kernel.ops;
    options.completion_timeout_ms = 20;
    return options;
}

void run(FakeKernel &kernel, const std::function<void(Pair &)> &check)
{
    Pair pair(npages, 2, tcp4, options_for(kernel));
    for (uint32_t round = 0; round < 2; round++) {
        pair.source.randomize(round + 1);
        pair.send_all(round);
        T_CHECK(pair.sender->barrier(round, 0));
        T_CHECK(pair.same());
    }
    pair.finish();
    T_EQUAL(pair.sender->counters().wire_bytes.get(), pair.sender->counters().acked_bytes.get() + 128);
    check(pair);
}

void test_short_sends_and_refusals()
{
    FakeKernel kernel;
    kernel.most_bytes = 5000;
    kernel.refuse_every = 7;
    run(kernel, [](Pair &pair) {
        T_CHECK(pair.sender->counters().zerocopy_sends.get() > npages);
        T_EQUAL(pair.sender->counters().zerocopy_copied.get(), 0);
        T_EQUAL(pair.sender->fallbacks().size(), 0);
    });
}

void test_completions_out_of_order()
{
    FakeKernel kernel;
    kernel.most_bytes = 20000;
    kernel.hold = 5;
    run(kernel, [](Pair &pair) { T_CHECK(pair.sender->counters().zerocopy_sends.get() > 100); });
    for (const auto &[fd, calls] : kernel.calls) {
        T_EQUAL(calls.done.size(), 0);  // every one was taken before the barrier returned
    }
}

void test_no_room_for_pinned_pages()
{
    FakeKernel kernel;
    kernel.enobufs_every = 2;
    kernel.most_bytes = 30000;
    run(kernel, [](Pair &) {});
}

void test_copied_switches_it_off_by_name()
{
    FakeKernel kernel;
    kernel.copied = true;
    run(kernel, [&](Pair &pair) {
        T_CHECK(pair.sender->counters().zerocopy_copied.get() > 0);
        T_EQUAL(pair.sender->fallbacks().size(), 1);
        T_CHECK(pair.sender->fallbacks()[0].find("copied") != std::string::npos);
        T_CHECK(pair.sender->counters().zerocopy_sends.get() <= 4);
    });
}

void test_lost_completion_is_an_error_in_bounded_time()
{
    FakeKernel kernel;
    kernel.lose = true;
    Pair pair(npages, 1, tcp4, options_for(kernel));
    pair.source.randomize(1);
    pair.send_all(0);
    TransferError error = expect_error([&] { pair.sender->barrier(0, 0); });
    T_CHECK(error.kind() == ErrorKind::timeout);
    T_CHECK(std::string(error.what()).find("20 ms") != std::string::npos);
}

void test_cancel_while_waiting_for_completions()
{
    FakeKernel kernel;
    kernel.lose = true;
    vmth::SenderOptions options = options_for(kernel);
    options.completion_timeout_ms = 60000;
    Pair pair(npages, 1, tcp4, options);
    pair.source.randomize(1);
    pair.send_all(0);
    T_CHECK(!pair.sender->barrier(0, 20000000));
    pair.sender->cancel("enough");
    T_CHECK(expect_error([&] { pair.sender->barrier(0, 0); }).kind() == ErrorKind::cancelled);
}

void test_bogus_completion_is_an_error()
{
    FakeKernel kernel;
    kernel.bogus = true;
    Pair pair(npages, 1, tcp4, options_for(kernel));
    pair.source.randomize(1);
    T_CHECK(expect_error([&] {
                pair.send_all(0);
                pair.sender->barrier(0, 0);
            }).kind() == ErrorKind::io);
}

// Ranges across the wrap of the counter, newest first.
void test_ranges_wrap()
{
    FakeKernel kernel;
    vmth_zerocopy zc = {};
    zc.next = 0xfffffffe;
    for (int i = 0; i < 5; i++) {
        vmth_zerocopy_sent(&zc);
    }
    for (uint32_t i = 0; i < 5; i++) {
        kernel.calls[-1].done.push_back(0xfffffffe + i);
    }
    uint32_t reaped = 0;
    T_EQUAL(vmth_zerocopy_reap(&kernel.ops, -1, &zc, &reaped), 0);
    T_EQUAL(reaped, 5);
    T_EQUAL(zc.outstanding, 0);
    T_EQUAL(zc.next, 3);
}

}  // namespace

int main()
{
    test_short_sends_and_refusals();
    test_completions_out_of_order();
    test_no_room_for_pinned_pages();
    test_copied_switches_it_off_by_name();
    test_lost_completion_is_an_error_in_bounded_time();
    test_cancel_while_waiting_for_completions();
    test_bogus_completion_is_an_error();
    test_ranges_wrap();
    return T_PASS;
}

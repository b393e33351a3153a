// SPDX-License-Identifier: Apache-2.0
// Channels of which one carries far less than the others: every page goes once, whoever takes it.
#include "tests/xfer_fixture.hpp"

using namespace t;

namespace {

// What may pass the slow link: a part of what passed the fast one, and what the test gives.
class Gate {
public:
    void passed_fast(uint64_t nbytes)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        allowed_ += nbytes / 10;
        changed_.notify_all();
    }
    void give(uint64_t nbytes)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        allowed_ += nbytes;
        changed_.notify_all();
    }
    // At least one of `nbytes`; all of them once it was opened for good.
    uint64_t take(uint64_t nbytes)
    {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return open_ || allowed_ > 0; });
        const uint64_t taken = open_ ? nbytes : std::min(nbytes, allowed_);
        allowed_ -= open_ ? 0 : taken;
        return taken;
    }
    void open()
    {
        std::lock_guard<std::mutex> lock(mutex_);
        open_ = true;
        changed_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    uint64_t allowed_ = 256 * 1024;
    bool open_ = false;
};

// Carries a channel's bytes both ways; those of pages through the gate where it is the slow one.
class Wire {
public:
    Wire(FdPair near, FdPair far, Gate &gate, bool slow)
        : near_(std::move(near)), far_(std::move(far)), gate_(gate), slow_(slow),
          there_([this] { carry(near_.second.get(), far_.first.get(), true); }),
          back_([this] { carry(far_.first.get(), near_.second.get(), false); })
    {
    }
    Wire(const Wire &) = delete;
    Wire &operator=(const Wire &) = delete;
    ~Wire()
    {
        there_.join();
        back_.join();
    }
    int source() const { return near_.first.get(); }
    int destination() const { return far_.second.get(); }
    // The ends that sender and receiver have duplicated.
    void let_go()
    {
        near_.first = UniqueFd();
        far_.second = UniqueFd();
    }

private:
    void carry(int from, int to, bool pages)
    {
        Bytes buffer(64 * 1024);
        for (;;) {
            const uint64_t most = pages && slow_ ? gate_.take(buffer.size()) : buffer.size();
            const ssize_t got = recv(from, buffer.data(), most, 0);
            if (got <= 0 || !write_all(to, buffer.data(), static_cast<size_t>(got))) {
                shutdown(to, SHUT_WR);
                return;
            }
            if (pages && !slow_) {
                gate_.passed_fast(static_cast<uint64_t>(got));
            }
        }
    }

    FdPair near_;
    FdPair far_;
    Gate &gate_;
    const bool slow_;
    std::thread there_;
    std::thread back_;
};

void test_every_page_goes_once_over_unequal_channels()
{
    for (unsigned channels : {2u, 4u}) {
        Pair pair(20000, channels, nullptr);
        Gate gate;
        std::vector<std::unique_ptr<Wire>> wires;
        for (unsigned i = 0; i < channels; i++) {
            wires.push_back(std::make_unique<Wire>(unix_pair(), unix_pair(), gate, i == 1));
            pair.sender->add_channel(wires[i]->source(), i);
            pair.receiver->attach(wires[i]->destination(), i);
            wires[i]->let_go();
        }
        for (uint32_t round = 0; round < 3; round++) {
            pair.source.randomize(round + 1);
            memset(pair.source.page(5000), 0, 5000 * page_bytes);
            if (round > 0) {  // in the first one it opens by itself
                pair.sender->set_window(round == 2 ? 4 << 20 : 0);
            }
            pair.send_all(round);
            uint64_t landed = 0;
            while (!pair.sender->barrier(round, 20000000)) {
                // What the slow one holds may go on when the fast ones are done: nothing lands then.
                const uint64_t now = pair.sender->counters().acked_bytes.get();
                if (now == landed) {
                    gate.give(256 * 1024);
                }
                landed = now;
            }
            T_CHECK(pair.same());
        }
        uint64_t pages = 0;
        uint64_t acked_bytes = 0;
        const std::vector<vmth::ChannelInfo> infos = pair.sender->channel_infos();
        T_EQUAL(infos.size(), channels);
        for (const vmth::ChannelInfo &info : infos) {
            T_EQUAL(info.wire_bytes, info.acked_bytes);
            pages += info.pages;
            acked_bytes += info.acked_bytes;
        }
        // The receiver ends the session over a page that comes twice; none was missing either.
        T_EQUAL(pages, 3 * 20000);
        T_EQUAL(acked_bytes, pair.sender->counters().acked_bytes.get());
        T_CHECK(infos[1].pages > 0);
        T_CHECK(infos[1].wire_bytes < infos[0].wire_bytes);
        gate.open();
        pair.finish();
        pair.sender->close();  // the wires end with their sockets
        pair.receiver->close();
    }
}

}  // namespace

int main()
{
    test_every_page_goes_once_over_unequal_channels();
    return T_PASS;
}

// SPDX-License-Identifier: Apache-2.0
// Pages that the destination makes of what it has: so many are under way, however few bytes they take.
#include <condition_variable>
#include <mutex>

#include "tests/xfer_fixture.hpp"
#include "xfer/flow_control.hpp"

using namespace t;

namespace {

constexpr uint32_t dedup = vmth::form_bit(VMTH_FORM_DEDUP);
constexpr uint64_t bound = vmth::FlowControl::most_made_pages;
constexpr uint64_t npages = 4 * bound;

// Carries what either end writes to the other; what the receiver answers only while it is open.
class Gate {
public:
    Gate(int sender, int receiver)
        : forth_([=] { carry(sender, receiver, false); }),
          back_([=] { carry(receiver, sender, true); })
    {
    }
    Gate(const Gate &) = delete;
    Gate &operator=(const Gate &) = delete;
    ~Gate()
    {
        open(true);
        forth_.join();
        back_.join();
    }

    void open(bool is_open)
    {
        std::lock_guard<std::mutex> lock(mutex_);
        open_ = is_open;
        changed_.notify_all();
    }

private:
    void carry(int from, int to, bool waits)
    {
        Bytes bytes(1 << 16);
        for (ssize_t got; (got = recv(from, bytes.data(), bytes.size(), 0)) > 0;) {
            if (waits) {
                std::unique_lock<std::mutex> lock(mutex_);
                changed_.wait(lock, [this] { return open_; });
            }
            if (!write_all(to, bytes.data(), static_cast<size_t>(got))) {
                break;
            }
        }
        shutdown(to, SHUT_WR);
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    bool open_ = true;
    std::thread forth_;
    std::thread back_;
};

uint64_t copies(const Pair &pair)
{
    return pair.sender->counters().forms[VMTH_FORM_DEDUP].pages.get();
}

// All that went out has arrived, and the worker waits.
void wait_held(const Pair &pair)
{
    uint64_t sent;
    do {
        sent = copies(pair);
        thread_sleeping("vmth-send-0");
    } while (sent < bound || copies(pair) != sent ||
             pair.receiver->counters().forms[VMTH_FORM_DEDUP].pages.get() != sent);
}

// One page lands; all others become the same, and nothing of what they are told is acknowledged.
void test_no_more_go_out_than_the_bound_until_some_land()
{
    FdPair ours = unix_pair();
    FdPair theirs = unix_pair();
    Gate gate(ours.second.get(), theirs.first.get());
    Pair pair(npages, 1, nullptr, with_forms(dedup));
    pair.sender->add_channel(ours.first.get(), 0);
    pair.receiver->attach(theirs.second.get(), 0);
    ours.first = UniqueFd();
    theirs.second = UniqueFd();
    pair.sender->set_forms({dedup, 1});
    pair.sender->set_window(uint64_t{1} << 30);  // bytes are not what holds them
    memset(pair.source.page(0), 7, page_bytes);
    pair.sender->send(0, 0, 1, pair.bits.data(), pair.bits.size(), 0);
    T_CHECK(pair.sender->barrier(0, 0));

    gate.open(false);
    for (uint64_t page = 1; page < npages; page++) {
        memset(pair.source.page(page), 7, page_bytes);
    }
    pair.sender->send(0, 1, npages - 1, pair.bits.data(), pair.bits.size(), 1);
    wait_held(pair);
    T_CHECK(copies(pair) < 3 * bound);  // a packet more, and what the trips that were seen allow for

    gate.open(true);
    T_CHECK(pair.sender->barrier(1, 0));
    T_CHECK(copies(pair) > npages - npages / 16);
    pair.finish();
}

}  // namespace

int main()
{
    test_no_more_go_out_than_the_bound_until_some_land();
    return T_PASS;
}

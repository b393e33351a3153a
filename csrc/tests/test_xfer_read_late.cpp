// SPDX-License-Identifier: Apache-2.0
// Raw pages that are read portion by portion as their packet goes out: what was read is what was sent.
#include <poll.h>

#include "tests/xfer_fixture.hpp"
#include "xfer/page_forms.hpp"

using namespace t;
using vmth::form_bit;

namespace {

constexpr uint64_t npages = 512;
constexpr uint64_t portion = 64;  // pages
constexpr uint32_t same = form_bit(VMTH_FORM_SAME);

// Calls `before` with the number of each portion of `memory` before its first byte is sent.
struct Sends {
    explicit Sends(std::function<void(unsigned)> function) : before(std::move(function))
    {
        ops.sendmsg = sendmsg;
        ops.ctx = this;
    }
    static ssize_t sendmsg(void *ctx, int fd, const msghdr *msg, int flags)
    {
        auto *sends = static_cast<Sends *>(ctx);
        for (size_t i = 0; sends->memory != nullptr && i < msg->msg_iovlen; i++) {
            if (msg->msg_iov[i].iov_base == sends->memory->page(sends->next * portion)) {
                sends->before(sends->next++);
            }
        }
        return ::sendmsg(fd, msg, flags);
    }
    std::function<void(unsigned)> before;
    Memory *memory = nullptr;
    unsigned next = 0;
    vmth_sock_ops ops = *vmth_sock_system_ops();
};

constexpr uint64_t open_window = uint64_t{1} << 30;

// Of all pages, once the window is open.
vmth::SenderOptions one_packet()
{
    vmth::SenderOptions options;
    options.packet_bytes = npages * page_bytes;
    options.zerocopy = false;
    return options;
}

void test_a_portion_is_read_just_before_it_is_sent()
{
    const uint8_t content = 1;
    Sends sends([&](unsigned number) {
        if (number == 1) {
            memset(sends.memory->page(2 * portion), content, page_bytes);  // it comes next
        }
    });
    vmth::SenderOptions options = one_packet();
    options.ops = &sends.ops;
    Pair pair(npages, 1, unix_pair, options);
    pair.sender->set_window(open_window);
    sends.memory = &pair.source;
    pair.source.randomize(1);
    pair.send_all(0);
    T_CHECK(pair.sender->barrier(0, 0));
    T_EQUAL(sends.next, npages / portion);
    T_EQUAL(pair.sender->counters().packets.get(), 1);
    T_EQUAL(pair.sender->counters().torn_packets.get(), 0);
    T_CHECK(pair.same());
    T_EQUAL(pair.destination.page(2 * portion)[0], content);
    pair.finish();
}

// A page that changes once its portion was read is torn, wherever in the packet it is, and comes again.
void test_a_page_that_changes_between_is_torn()
{
    for (unsigned torn : {0u, 3u, 7u}) {
        Sends sends([&](unsigned number) {
            if (number == torn) {
                sends.memory->page(torn * portion + 5)[100] ^= 1;
            }
        });
        vmth::SenderOptions options = one_packet();
        options.forms = same;
        options.ops = &sends.ops;
        Pair pair(npages, 1, unix_pair, options);
        pair.sender->set_window(open_window);
        sends.memory = &pair.source;
        pair.sender->set_forms({same, 1});
        pair.source.randomize(2);
        pair.send_all(0);
        T_CHECK(pair.sender->barrier(0, 0));
        T_EQUAL(pair.sender->counters().torn_packets.get(), 1);
        T_CHECK(!pair.digests_equal());
        pair.send_all(1);
        T_CHECK(pair.sender->barrier(1, 0));
        T_EQUAL(pair.sender->counters().forms[VMTH_FORM_SAME].pages.get(), 0);  // nobody knows which
        T_CHECK(pair.same());
        pair.finish();
    }
}

// Of some pieces it is known what is there, and they are hashed at once; beside them in one packet are
// some that nobody knows of.
void test_a_packet_of_both_kinds()
{
    vmth::SenderOptions options = one_packet();
    options.forms = same;
    Pair pair(npages, 1, unix_pair, options);
    pair.sender->set_window(open_window);
    pair.sender->set_forms({same, 1});
    pair.source.randomize(3);
    for (uint64_t first = 0; first < npages; first += 2 * portion) {
        pair.sender->send(0, first, portion, pair.bits.data(), pair.bits.size(), 0);
    }
    T_CHECK(pair.sender->barrier(0, 0));
    const uint64_t before = pair.sender->counters().packets.get();
    for (uint64_t page = 0; page < npages; page += 3) {
        pair.source.page(page)[7] ^= 1;
    }
    for (uint64_t page = 0; page < npages; page += 7) {
        memset(pair.source.page(page), 0, page_bytes);
    }
    pair.send_all(1);
    T_CHECK(pair.sender->barrier(1, 0));
    T_EQUAL(pair.sender->counters().packets.get(), before + 1);
    T_EQUAL(pair.sender->counters().torn_packets.get(), 0);
    T_CHECK(pair.sender->counters().forms[VMTH_FORM_SAME].pages.get() > npages / 8);
    T_CHECK(pair.same());
    pair.finish();
}

// What was known of a page is forgotten when it goes out with the forms off, or a torn one would be the
// same once they are on again.
void test_what_is_sent_without_forms_is_not_known()
{
    Sends sends([&](unsigned number) {
        if (number == 0) {
            sends.memory->page(1)[50] ^= 1;
        }
    });
    vmth::SenderOptions options = one_packet();
    options.forms = same;
    options.ops = &sends.ops;
    Pair pair(npages, 1, unix_pair, options);
    pair.sender->set_window(open_window);
    pair.source.randomize(4);
    pair.sender->set_forms({same, 1});
    pair.send_all(0);
    T_CHECK(pair.sender->barrier(0, 0));
    pair.sender->set_forms({});
    sends.memory = &pair.source;
    pair.send_all(1);
    T_CHECK(pair.sender->barrier(1, 0));
    T_EQUAL(pair.sender->counters().torn_packets.get(), 1);
    pair.source.page(1)[50] ^= 1;  // as it was hashed, and not as it landed
    pair.sender->set_forms({same, 1});
    pair.send_all(2);
    T_CHECK(pair.sender->barrier(2, 0));
    T_CHECK(pair.same());
    pair.finish();
}

// A peer that says a packet has landed when it has seen no more than its beginning, with what would be
// the digest of that: it is found out, since the rest is not in the table yet.
void test_an_acknowledgement_before_the_last_portion()
{
    FdPair fds = unix_pair();
    Sends sends([&](unsigned number) {
        if (number == 1) {  // the head went out with the first
            T_CHECK(write_all(fds.second.get(), acks({{1, {0, 0}, VMTH_ACK_LANDED, 0}})));
            pollfd ended = {fds.first.get(), 0, 0};
            T_CHECK(poll(&ended, 1, 10000) == 1);  // a failure shuts the socket down
        }
    });
    vmth::SenderOptions options = one_packet();
    options.forms = same;
    options.ops = &sends.ops;
    Memory memory(npages);
    memory.randomize(5);
    sends.memory = &memory;
    auto sender = make_sender(memory, options);
    sender->set_window(open_window);
    sender->add_channel(fds.first.get(), 0);
    sender->set_forms({same, 1});
    const std::vector<uint64_t> bits = all_bits(npages);
    std::thread reader([&] { read_all(fds.second.get(), npages * page_bytes * 2); });  // until the end
    const TransferError error = expect_error([&] {
        sender->send(0, 0, npages, bits.data(), bits.size(), 0);
        sender->barrier(0, 0);
    });
    T_CHECK(error.kind() == ErrorKind::protocol);
    T_CHECK(std::string(error.what()).find("allowed once all of it was sent") != std::string::npos);
    sender.reset();
    fds.first.reset();
    reader.join();
    T_EQUAL(sends.next, 2);  // nothing more went out
}

void test_without_a_digest()
{
    vmth::SenderOptions options = one_packet();
    options.digest = false;
    Pair pair(npages, 2, unix_pair, options);
    pair.source.randomize(6);
    for (uint64_t page = 0; page < npages; page += 5) {
        memset(pair.source.page(page), 0, page_bytes);
    }
    pair.send_all(0);
    T_CHECK(pair.sender->barrier(0, 0));
    T_EQUAL(pair.sender->counters().zero_pages.get(), (npages + 4) / 5);
    pair.sender->finish();
    T_CHECK(pair.receiver->wait(0));
    T_CHECK(pair.source.equals(pair.destination));
}

}  // namespace

int main()
{
    test_a_portion_is_read_just_before_it_is_sent();
    test_a_page_that_changes_between_is_torn();
    test_a_packet_of_both_kinds();
    test_what_is_sent_without_forms_is_not_known();
    test_an_acknowledgement_before_the_last_portion();
    test_without_a_digest();
    return 0;
}

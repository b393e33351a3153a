// SPDX-License-Identifier: Apache-2.0
// A peer that sends what it should not, or nothing: every byte flipped or missing ends in an error that
// leaves memory outside the block alone, or in pages to send again.
#include "tests/xfer_fixture.hpp"

using namespace t;

namespace {

constexpr uint64_t npages = 8;

// Two normal pages, a zero page, holes, a free page; then a barrier and the end.
Bytes good_pages(Memory &source)
{
    Bytes payload(source.page(1), source.page(3));
    return pages(1,
                 {desc(VMTH_FORM_NORMAL, 1, 2), desc(VMTH_FORM_ZERO, 0, 1),
                  desc(VMTH_FORM_HOLE, 3, 2), desc(VMTH_FORM_FREE, 7, 1)},
                 payload);
}

Bytes good_stream(Memory &source)
{
    Bytes stream = good_pages(source);
    for (const Bytes &more : {control(VMTH_PACKET_BARRIER, 2), control(VMTH_PACKET_END, 3)}) {
        stream.insert(stream.end(), more.begin(), more.end());
    }
    return stream;
}

// Feeds a stream to a fresh receiver. `close_after`: the peer goes away at its end.
struct Feed {
    explicit Feed(const Bytes &stream, bool close_after = true, size_t chunk = 1 << 20)
        : memory(npages), receiver(make_receiver(memory, 1)), fds(unix_pair())
    {
        memory.randomize(7);
        receiver->attach(fds.second.get(), 0);
        fds.second.reset();
        for (size_t at = 0; at < stream.size(); at += chunk) {
            if (!write_all(fds.first.get(), stream.data() + at,
                           std::min(chunk, stream.size() - at))) {
                break;
            }
        }
        if (close_after) {
            shutdown(fds.first.get(), SHUT_WR);
        }
    }

    TransferError error()
    {
        return expect_error([this] { receiver->wait(0); });
    }

    Memory memory;
    std::unique_ptr<vmth::Receiver> receiver;
    FdPair fds;
};

void check_landed(Memory &source, Memory &memory)
{
    static const uint8_t zeros[page_bytes] = {};
    T_CHECK(memcmp(memory.page(1), source.page(1), 2 * page_bytes) == 0);
    for (uint64_t page : {uint64_t{0}, uint64_t{3}, uint64_t{4}}) {
        T_CHECK(memcmp(memory.page(page), zeros, page_bytes) == 0);
    }
}

void test_good_stream_in_any_chunks()
{
    Memory source(npages);
    source.randomize(1);
    for (size_t chunk : {size_t{1}, size_t{3}, size_t{63}, size_t{64}, size_t{4095}, size_t{1} << 20}) {
        Feed feed(good_stream(source), true, chunk);
        T_CHECK(feed.receiver->wait(0));
        check_landed(source, feed.memory);
        T_EQUAL(feed.receiver->hashes().total().pages, 5);
        T_EQUAL(feed.receiver->counters().free_pages.get(), 1);
    }
}

void test_flipped_header_or_descriptor_lands_nothing()
{
    Memory source(npages);
    Memory before(npages);
    source.randomize(1);
    before.randomize(7);
    const Bytes good = good_stream(source);
    for (size_t at = 0; at < VMTH_PACKET_HEADER_BYTES + 4 * VMTH_DESC_BYTES; at++) {
        Bytes bad = good;
        bad[at] ^= static_cast<uint8_t>(1u << (at % 8));
        Feed feed(bad);
        TransferError error = feed.error();
        T_CHECK(error.kind() == ErrorKind::protocol || error.kind() == ErrorKind::closed);
        T_CHECK(feed.memory.equals(before));
    }
}

void test_flipped_payload_shows_in_the_ack()
{
    Memory source(npages);
    source.randomize(1);
    vmth_digest expected = {};
    const Bytes good = good_stream(source);
    const size_t start = VMTH_PACKET_HEADER_BYTES + 4 * VMTH_DESC_BYTES;
    for (size_t at = start; at <= start + 2 * page_bytes; at += 811) {
        Bytes bad = good;
        bool flipped = at != start;
        if (flipped) {
            bad[at - 1] ^= 0x10;
        }
        Feed feed(bad);
        T_CHECK(feed.receiver->wait(0));
        Packet ack = read_packet(feed.fds.first.get(), npages);
        T_EQUAL(ack.header.kind, VMTH_PACKET_ACK);
        vmth_ack first;
        vmth_packet_error error;
        T_EQUAL(vmth_ack_decode(ack.desc.data(), &first, &error), 0);
        if (!flipped) {
            expected.sum = first.digest;
            T_CHECK((first.digest.lo | first.digest.hi) != 0);
        } else {
            T_CHECK(first.digest.lo != expected.sum.lo || first.digest.hi != expected.sum.hi);
        }
    }
}

void test_truncated_anywhere_is_closed()
{
    Memory source(npages);
    source.randomize(1);
    const Bytes good = good_stream(source);
    for (size_t length = 0; length < good.size();) {
        Feed feed(Bytes(good.begin(), good.begin() + static_cast<ptrdiff_t>(length)));
        T_CHECK(feed.error().kind() == ErrorKind::closed);
        // Every byte of headers and descriptors, every so many of the payload.
        bool payload = length > 130 && length + 140 < good.size();
        length += payload ? 509 : 1;
    }
}

struct Refused {
    const char *name;
    Bytes stream;
    const char *says;
};

void test_refused_packets_say_what_was_received()
{
    Memory source(npages);
    source.randomize(1);
    const Bytes page(page_bytes, 1);
    auto join = [](std::initializer_list<Bytes> parts) {
        Bytes all;
        for (const Bytes &part : parts) {
            all.insert(all.end(), part.begin(), part.end());
        }
        return all;
    };
    const std::vector<Refused> table = {
        {"page past the block", pages(1, {desc(VMTH_FORM_ZERO, npages, 1)}), "desc.page 8"},
        {"run past the block", pages(1, {desc(VMTH_FORM_HOLE, 4, 5)}), "desc.npages 5, allowed 4"},
        {"huge run", pages(1, {desc(VMTH_FORM_HOLE, 1, 0xffffffffu)}), "desc.npages 4294967295"},
        {"form not negotiated", pages(1, {desc(VMTH_FORM_SAME, 1, 1)}), "not negotiated"},
        {"payload without a page", pages(1, {desc(VMTH_FORM_ZERO, 1, 1)}, page), "payload_bytes 4096"},
        {"page twice in a packet",
         pages(1, {desc(VMTH_FORM_ZERO, 1, 2), desc(VMTH_FORM_HOLE, 2, 1)}), "twice"},
        {"page twice in a round",
         join({pages(1, {desc(VMTH_FORM_NORMAL, 1, 1)}, page), pages(2, {desc(VMTH_FORM_ZERO, 1, 1)})}),
         "twice between two barriers"},
        {"sequence jumps", control(VMTH_PACKET_BARRIER, 2), "seq 2, allowed 1"},
        {"sequence repeats",
         join({control(VMTH_PACKET_BARRIER, 1), control(VMTH_PACKET_BARRIER, 1)}), "seq 1, allowed 2"},
        {"an acknowledgement", acks({{1, {0, 0}, VMTH_ACK_LANDED, 0}}), "kind 4"},
        {"another channel", control(VMTH_PACKET_BARRIER, 1, 3), "channel 3, allowed 0"},
        {"garbage", Bytes(64, 0x42), "magic"},
    };
    for (const Refused &refused : table) {
        Feed feed(refused.stream, false);
        TransferError error = feed.error();
        if (error.kind() != ErrorKind::protocol ||
            std::string(error.what()).find(refused.says) == std::string::npos) {
            fprintf(stderr, "%s: %s\n", refused.name, error.what());
            exit(T_FAIL);
        }
    }
}

// Channel 0 has had its barrier, channel 1 not: channel 0 may send nothing.
void test_page_before_the_other_channels_barrier()
{
    Memory memory(npages);
    auto receiver = make_receiver(memory, 2);
    FdPair first = unix_pair();
    FdPair second = unix_pair();
    receiver->attach(first.second.get(), 0);
    receiver->attach(second.second.get(), 1);
    T_CHECK(write_all(first.first.get(), control(VMTH_PACKET_BARRIER, 1)));
    T_CHECK(write_all(first.first.get(), pages(2, {desc(VMTH_FORM_HOLE, 1, 1)})));
    TransferError error = expect_error([&] { receiver->wait(0); });
    T_CHECK(error.kind() == ErrorKind::protocol);
    T_CHECK(std::string(error.what()).find("1 of 2 channels") != std::string::npos);
}

// The same page on both channels at once: exactly one of them is refused, nothing is corrupted.
void test_page_on_two_channels()
{
    for (int attempt = 0; attempt < 20; attempt++) {
        Memory memory(npages);
        auto receiver = make_receiver(memory, 2);
        FdPair fds[2] = {unix_pair(), unix_pair()};
        const Bytes page(page_bytes, 1);
        for (unsigned i = 0; i < 2; i++) {
            receiver->attach(fds[i].second.get(), i);
        }
        std::thread other([&] {
            write_all(fds[1].first.get(), pages(1, {desc(VMTH_FORM_NORMAL, 5, 1)}, page, 1));
        });
        write_all(fds[0].first.get(), pages(1, {desc(VMTH_FORM_NORMAL, 5, 1)}, page, 0));
        other.join();
        TransferError error = expect_error([&] { receiver->wait(0); });
        T_CHECK(error.kind() == ErrorKind::protocol);
        T_CHECK(receiver->hashes().total().pages <= 1);
    }
}

// ---- a receiver that lies -----------------------------------------------------------------------------

// Sends one page and hands its packet, then what `answer` makes of it, to the sender.
struct Liar {
    explicit Liar(const std::function<Bytes(const Packet &)> &answer)
        : memory(npages), bits(all_bits(npages)), sender(make_sender(memory)), fds(unix_pair())
    {
        memory.randomize(3);
        sender->add_channel(fds.first.get(), 0);
        sender->send(0, 2, 1, bits.data(), bits.size(), 0);
        Packet packet = read_packet(fds.second.get(), npages);
        T_CHECK(write_all(fds.second.get(), answer(packet)));
    }
    Memory memory;
    std::vector<uint64_t> bits;
    std::unique_ptr<vmth::Sender> sender;
    FdPair fds;
};

void test_lying_acks()
{
    struct Lie {
        const char *says;
        std::function<Bytes(const Packet &)> answer;
    };
    const std::vector<Lie> table = {
        {"ack.seq 2", [](const Packet &) { return acks({{2, {0, 0}, VMTH_ACK_LANDED, 0}}); }},
        {"ack.seq 1",
         [](const Packet &) {
             return acks({{1, {0, 0}, VMTH_ACK_LANDED, 0}, {1, {0, 0}, VMTH_ACK_LANDED, 0}});
         }},
        {"ack.status 3", [](const Packet &) { return acks({{1, {0, 0}, 3, 0}}); }},
        {"missed pages 1",
         [](const Packet &) { return acks({{1, {0, 0}, VMTH_ACK_MISSED, 0}}, {{3, 1}}); }},
        {"missed pages 2",
         [](const Packet &) { return acks({{1, {0, 0}, VMTH_ACK_MISSED, 0}}, {{2, 1}, {2, 1}}); }},
        {"desc.page", [](const Packet &) {
             return acks({{1, {0, 0}, VMTH_ACK_MISSED, 0}}, {{npages, 1}});
         }},
        {"desc_bytes 48",
         [](const Packet &) { return acks({{1, {0, 0}, VMTH_ACK_LANDED, 0}}, {{2, 1}}); }},
        {"ack.status 2",
         [](const Packet &) {
             return acks({{1, {0, 0}, VMTH_ACK_MISSED, 0}, {2, {0, 0}, VMTH_ACK_MISSED, 0}},
                         {{2, 1}});
         }},
        {"kind 2", [](const Packet &) { return control(VMTH_PACKET_BARRIER, 1); }},
        {"checksum",
         [](const Packet &) {
             Bytes bytes = acks({{1, {0, 0}, VMTH_ACK_LANDED, 0}});
             bytes[70] ^= 1;
             return bytes;
         }},
        {"magic", [](const Packet &) { return Bytes(64, 0x42); }},
    };
    for (const Lie &lie : table) {
        Liar liar(lie.answer);
        TransferError error = expect_error([&] { liar.sender->barrier(0, 0); });
        if (error.kind() != ErrorKind::protocol ||
            std::string(error.what()).find(lie.says) == std::string::npos) {
            fprintf(stderr, "want %s: %s\n", lie.says, error.what());
            exit(T_FAIL);
        }
    }
}

void test_other_digest_and_missed_are_sent_again()
{
    struct Answer {
        vmth_ack ack;
        std::vector<vmth_run> missed;
        uint64_t torn;  // packets
    };
    const std::vector<Answer> table = {
        {{1, {1, 2}, VMTH_ACK_LANDED, 0}, {}, 1},
        {{1, {0, 0}, VMTH_ACK_MISSED, 0}, {{2, 1}}, 0},  // nothing else was in the packet
        {{1, {1, 2}, VMTH_ACK_MISSED, 0}, {}, 1},
    };
    for (const Answer &answer : table) {
        Liar liar([&](const Packet &) { return acks({answer.ack}, answer.missed); });
        std::thread peer([&] {
            Packet barrier = read_packet(liar.fds.second.get(), npages);
            T_EQUAL(barrier.header.kind, VMTH_PACKET_BARRIER);
            T_CHECK(write_all(liar.fds.second.get(), acks({{2, {0, 0}, VMTH_ACK_LANDED, 0}})));
        });
        T_CHECK(liar.sender->barrier(0, 0));
        peer.join();
        std::vector<uint64_t> missed(1);
        T_EQUAL(liar.sender->take_missed({missed.data()}, {1}), 1);
        T_EQUAL(missed[0], 1u << 2);
        T_EQUAL(liar.sender->take_missed({missed.data()}, {1}), 0);
        T_EQUAL(liar.sender->counters().torn_packets.get(), answer.torn);
        T_EQUAL(liar.sender->in_flight(), 0);
    }
}

void test_peer_gone_names_what_is_open()
{
    Liar liar([](const Packet &) { return Bytes(); });
    liar.fds.second.reset();
    TransferError error = expect_error([&] { liar.sender->barrier(0, 0); });
    T_CHECK(error.kind() == ErrorKind::closed);
    T_CHECK(expect_error([&] { liar.sender->finish(); }).kind() == ErrorKind::closed);
}

}  // namespace

int main()
{
    test_good_stream_in_any_chunks();
    test_flipped_header_or_descriptor_lands_nothing();
    test_flipped_payload_shows_in_the_ack();
    test_truncated_anywhere_is_closed();
    test_refused_packets_say_what_was_received();
    test_page_before_the_other_channels_barrier();
    test_page_on_two_channels();
    test_lying_acks();
    test_other_digest_and_missed_are_sent_again();
    test_peer_gone_names_what_is_open();
    return T_PASS;
}

// SPDX-License-Identifier: Apache-2.0
// The cheaper forms end to end: same and zstd, torn and damaged pages, and what was not agreed on.
#include <sys/wait.h>

#include <csignal>

#include "tests/xfer_fixture.hpp"
#include "vmth/codec.h"
#include "vmth/page_hash.h"
#include "xfer/missed_pages.hpp"
#include "xfer/page_forms.hpp"

using namespace t;
using vmth::form_bit;

namespace {

constexpr uint64_t npages = 512;
constexpr uint32_t same = form_bit(VMTH_FORM_SAME);
constexpr uint32_t zstd = form_bit(VMTH_FORM_ZSTD);

// Both ends of one block, which agreed on `forms`. `connected` false leaves every thread for later.
struct FormPair {
    explicit FormPair(uint32_t forms, unsigned channels = 1, vmth::SenderOptions options = {},
                      const vmth_sock_ops *ops = nullptr, bool connected = true)
        : source(npages), destination(npages), bits(all_bits(npages))
    {
        options.forms = forms;
        sender = make_sender(source, options);
        vmth::ReceiverOptions receiving;
        receiving.hash_seed = seed;
        receiving.digest = options.digest;
        receiving.channels = channels;
        receiving.forms = forms;
        receiving.ops = ops;
        receiver = std::make_unique<vmth::Receiver>(
            std::vector<vmth::MemoryBlock>{destination.block()}, page_bytes, receiving,
            std::vector<const uint64_t *>{bits.data()}, std::vector<size_t>{bits.size()});
        if (connected) {
            connect(channels);
        }
    }
    void connect(unsigned channels)
    {
        for (unsigned i = 0; i < channels; i++) {
            FdPair fds = unix_pair();
            sender->add_channel(fds.first.get(), i);
            receiver->attach(fds.second.get(), i);
        }
    }
    void round(uint32_t number)
    {
        sender->send(0, 0, npages, bits.data(), bits.size(), number);
        T_CHECK(sender->barrier(number, 0));
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
        T_CHECK(source.equals(destination));
    }
    uint64_t pages(vmth_page_form form) const { return sender->counters().forms[form].pages.get(); }
    uint64_t wire_bytes() const { return sender->counters().wire_bytes.get(); }

    Memory source;
    Memory destination;
    std::vector<uint64_t> bits;
    std::unique_ptr<vmth::Sender> sender;
    std::unique_ptr<vmth::Receiver> receiver;
};

void fill_text(uint8_t *page, uint64_t state)
{
    for (size_t i = 0; i < page_bytes; i++) {
        page[i] = "etaoin shrdlu"[t_random(&state) % 13];
    }
}

// A third text, a third random, a third zero, in stretches of a few pages.
void fill_mixed(Memory &memory, uint64_t state)
{
    memory.randomize(state);
    for (uint64_t page = 0; page < memory.npages(); page++) {
        const uint64_t kind = (page * 2654435761u >> 4) % 3;
        if (kind == 0) {
            fill_text(memory.page(page), state + page);
        } else if (kind == 1) {
            memset(memory.page(page), 0, page_bytes);
        }
    }
}

void test_same_pages_are_not_sent()
{
    FormPair pair(same);
    fill_mixed(pair.source, 1);
    pair.sender->set_forms({same, 1});
    pair.round(0);
    T_EQUAL(pair.pages(VMTH_FORM_SAME), 0);
    const uint64_t packets = pair.sender->counters().packets.get();
    pair.round(1);
    T_EQUAL(pair.pages(VMTH_FORM_SAME), npages);
    T_EQUAL(pair.sender->counters().packets.get(), packets);
    pair.source.page(7)[100] ^= 1;
    pair.round(2);
    T_EQUAL(pair.pages(VMTH_FORM_SAME), 2 * npages - 1);
    T_EQUAL(pair.sender->counters().packets.get(), packets + 1);
    pair.sender->set_forms({});
    pair.round(3);
    T_EQUAL(pair.pages(VMTH_FORM_SAME), 2 * npages - 1);
    pair.sender->set_forms({same, 1});
    pair.round(4);
    T_EQUAL(pair.pages(VMTH_FORM_SAME), 3 * npages - 1);
    pair.finish();
}

void test_forgotten_pages_are_sent_again()
{
    FormPair pair(same);
    fill_mixed(pair.source, 2);
    pair.sender->set_forms({same, 1});
    pair.round(0);
    T_EQUAL(pair.receiver->hashes().total().pages, npages);  // orders what we do with its writing
    memset(pair.destination.page(5), 0xDD, page_bytes);      // behind everybody's back
    T_EQUAL(pair.receiver->hashes().total().pages, npages);
    pair.sender->forget(0, 5, 1);
    pair.round(1);
    T_EQUAL(pair.pages(VMTH_FORM_SAME), npages - 1);
    pair.finish();
    T_CHECK(expect_error([&] { pair.sender->forget(0, npages, 1); }).kind() == ErrorKind::usage);
}

void test_free_pages_are_not_known()
{
    FormPair pair(same);
    pair.source.randomize(3);
    pair.sender->set_forms({same, 1});
    pair.round(0);
    pair.sender->send_told(VMTH_FORM_FREE, 0, {{10, 5}}, 1);
    T_CHECK(pair.sender->barrier(1, 0));
    pair.round(2);
    T_EQUAL(pair.pages(VMTH_FORM_SAME), npages - 5);
    pair.finish();
}

void test_zstd(unsigned channels, bool digest, uint32_t packet_bytes)
{
    vmth::SenderOptions options;
    options.digest = digest;
    options.packet_bytes = packet_bytes;
    FormPair pair(zstd, channels, options);
    fill_mixed(pair.source, 4);
    pair.round(0);
    const uint64_t plain = pair.wire_bytes();
    T_EQUAL(pair.pages(VMTH_FORM_ZSTD), 0);
    pair.sender->set_forms({zstd, 1});
    pair.round(1);
    const uint64_t packed = pair.wire_bytes() - plain;
    const vmth::FormCounters &counters = pair.sender->counters().forms[VMTH_FORM_ZSTD];
    const uint64_t texts = counters.pages.get();
    T_CHECK(texts > npages / 4 && texts < npages / 2);
    T_EQUAL(counters.tried_pages.get(), npages - pair.sender->counters().zero_pages.get() / 2);
    T_EQUAL(counters.content_bytes.get(), texts * page_bytes);
    T_CHECK(counters.wire_bytes.get() < texts * page_bytes * 6 / 10);
    T_CHECK(counters.cpu_ns.get() > 0);
    T_CHECK(packed < plain - texts * page_bytes * 4 / 10);
    T_EQUAL(pair.receiver->counters().forms[VMTH_FORM_ZSTD].pages.get(), texts);
    T_EQUAL(pair.receiver->counters().forms[VMTH_FORM_ZSTD].wire_bytes.get(),
            counters.wire_bytes.get());
    pair.finish();
}

// Pages change between two patterns and back while they are read, hashed and sent.
void test_torn_pages_are_never_the_same(uint32_t forms, unsigned channels)
{
    FormPair pair(forms, channels, {}, nullptr, false);
    fill_mixed(pair.source, 5);
    pair.sender->set_forms({forms, 1});
    pid_t guest = fork();
    T_CHECK(guest >= 0);
    if (guest == 0) {
        for (uint64_t state = 6;;) {
            const uint64_t page = t_random(&state) % 32;  // few, so that A B A happens
            volatile uint8_t *bytes = pair.source.page(page);
            const uint8_t value = static_cast<uint8_t>(t_random(&state) % 2);
            for (size_t i = 0; i < page_bytes; i++) {
                bytes[i] = value;
            }
        }
    }
    pair.connect(channels);
    for (uint32_t round = 0; round < 30; round++) {
        pair.round(round);
    }
    kill(guest, SIGKILL);
    T_EQUAL(waitpid(guest, nullptr, 0), guest);
    pair.round(30);
    pair.finish();
}

// The peer acknowledges a page with another digest: hash A, landed T, and A again is not the same.
void test_a_torn_page_is_sent_though_its_hash_is_the_same()
{
    vmth::SenderOptions options;
    options.forms = same;
    Memory memory(npages);
    memory.randomize(7);
    const std::vector<uint64_t> bits = all_bits(npages);
    auto sender = make_sender(memory, options);
    FdPair fds = unix_pair();
    sender->add_channel(fds.first.get(), 0);
    sender->set_forms({same, 1});
    vmth_u128 right = {};
    uint64_t seq = 0;
    // Sends page 2; true if it came. `digest` is what its packet is acknowledged with.
    auto came = [&](uint32_t round, vmth_u128 digest) {
        sender->send(0, 2, 1, bits.data(), bits.size(), round);
        bool page = false;
        std::thread peer([&] {
            for (Packet packet; packet.header.kind != VMTH_PACKET_BARRIER;) {
                packet = read_packet(fds.second.get(), npages);
                page = page || packet.header.kind == VMTH_PACKET_PAGES;
                const bool pages = packet.header.kind == VMTH_PACKET_PAGES;
                const vmth_u128 answer = pages ? digest : vmth_u128{0, 0};
                T_CHECK(write_all(fds.second.get(), acks({{++seq, answer, VMTH_ACK_LANDED, 0}})));
            }
        });
        T_CHECK(sender->barrier(round, 0));
        peer.join();
        right = sender->hashes().total().sum;
        return page;
    };
    T_CHECK(came(0, {1, 2}));  // torn
    T_CHECK(came(1, right));
    T_CHECK(!came(2, right));
    T_EQUAL(sender->counters().forms[VMTH_FORM_SAME].pages.get(), 1);
}

// ---- damage -----------------------------------------------------------------------------------------

// Flips a bit at the start of the first zstd frames that are received.
struct Damage {
    static ssize_t recvmsg(void *ctx, int fd, msghdr *msg, int flags)
    {
        auto *damage = static_cast<Damage *>(ctx);
        const ssize_t got = ::recvmsg(fd, msg, flags);
        auto *bytes = got > 0 ? static_cast<uint8_t *>(msg->msg_iov[0].iov_base) : nullptr;
        const uint8_t magic[4] = {0x28, 0xb5, 0x2f, 0xfd};
        if (got > 4 && memcmp(bytes, magic, 4) == 0 && damage->left.load() > 0) {
            damage->left--;
            bytes[damage->at] ^= 0x10;
        }
        return got;
    }
    size_t at;
    std::atomic<int> left;
};

// A frame that is damaged never lands: its pages are asked for again, those beside it are not.
void test_a_damaged_frame_is_missed()
{
    Damage damage{2, {1}};
    vmth_sock_ops ops = *vmth_sock_system_ops();
    ops.recvmsg = Damage::recvmsg;
    ops.ctx = &damage;
    FormPair pair(same | zstd, 1, {}, &ops);
    fill_mixed(pair.source, 8);
    pair.sender->set_forms({same | zstd, 1});
    pair.round(0);
    T_EQUAL(damage.left.load(), 0);
    T_EQUAL(pair.sender->counters().torn_packets.get(), 0);
    std::vector<uint64_t> missed(pair.bits.size());
    const uint64_t taken = pair.sender->take_missed({missed.data()}, {missed.size()});
    T_EQUAL(taken, 16);  // one frame
    T_EQUAL(pair.receiver->counters().missed_pages.get(), taken);
    T_EQUAL(pair.receiver->hashes().total().pages, npages - taken);
    pair.round(1);  // everything: what landed is known
    T_EQUAL(pair.pages(VMTH_FORM_SAME), npages - taken);
    pair.finish();
}

void test_a_frame_made_by_hand_lands_or_is_missed()
{
    Memory memory(8);
    vmth::ReceiverOptions options;
    options.hash_seed = seed;
    options.forms = zstd;
    const uint64_t bits = ~uint64_t{0};
    vmth::Receiver receiver({memory.block()}, page_bytes, options, {&bits}, {1});
    FdPair fds = unix_pair();
    receiver.attach(fds.second.get(), 0);
    Bytes content(3 * page_bytes);
    for (size_t page = 0; page < 3; page++) {
        fill_text(content.data() + page * page_bytes, page);
    }
    vmth_codec codec = {};
    T_EQUAL(vmth_codec_create(&codec, VMTH_CODEC_COMPRESS), 0);
    Bytes frame(content.size());
    frame.resize(vmth_codec_compress(&codec, 3, content.data(), content.size(), frame.data(),
                                     frame.size()));
    vmth_codec_destroy(&codec);
    vmth_desc first = desc(VMTH_FORM_ZSTD, 6, 1);
    vmth_desc second = desc(VMTH_FORM_ZSTD, 1, 2);
    second.payload_bytes = static_cast<uint32_t>(frame.size());
    T_CHECK(write_all(fds.first.get(), pages(1, {first, second}, frame)));
    Packet answer = read_packet(fds.first.get(), 8);
    vmth_ack ack;
    vmth_packet_error error;
    T_EQUAL(vmth_ack_decode(answer.desc.data(), &ack, &error), 0);
    T_EQUAL(ack.status, VMTH_ACK_LANDED);
    T_EQUAL(receiver.hashes().total().pages, 3);  // which also orders our reading with its writing
    T_CHECK(memcmp(memory.page(6), content.data(), page_bytes) == 0);
    T_CHECK(memcmp(memory.page(1), content.data() + page_bytes, 2 * page_bytes) == 0);

    T_CHECK(write_all(fds.first.get(), control(VMTH_PACKET_BARRIER, 2)));
    read_packet(fds.first.get(), 8);
    T_CHECK(write_all(fds.first.get(), pages(3, {first, second}, Bytes(frame.size(), 0x42))));
    answer = read_packet(fds.first.get(), 8);
    T_EQUAL(vmth_ack_decode(answer.desc.data(), &ack, &error), 0);
    T_EQUAL(ack.status, VMTH_ACK_MISSED);
    T_EQUAL(answer.header.npages, 3);
    T_EQUAL(answer.desc.size(), VMTH_ACK_BYTES + 2 * VMTH_DESC_BYTES);
    T_EQUAL(receiver.hashes().total().pages, 0);
    receiver.close();
}

// ---- agreement --------------------------------------------------------------------------------------

void test_what_was_not_agreed_on_is_refused_by_name()
{
    Memory memory(8);
    auto sender = make_sender(memory);
    TransferError error = expect_error([&] { sender->set_forms({zstd, 1}); });
    T_CHECK(error.kind() == ErrorKind::usage);
    T_CHECK(std::string(error.what()) == "forms zstd, allowed none");
    vmth::SenderOptions options;
    options.forms = same | zstd;
    options.digest = false;
    sender = make_sender(memory, options);
    error = expect_error([&] { sender->set_forms({same | zstd, 1}); });
    T_CHECK(std::string(error.what()).find("without a digest same, zstd") != std::string::npos);
    for (int level : {-11, 0, 20}) {
        error = expect_error([&] { sender->set_forms({zstd, level}); });
        T_CHECK(std::string(error.what()).find("zstd level") == 0);
    }
    sender->set_forms({zstd, -10});
    options.forms = form_bit(VMTH_FORM_ZERO);
    T_CHECK(expect_error([&] { make_sender(memory, options); }).kind() == ErrorKind::usage);

    // A peer that sends it all the same; `same` never stands in a packet.
    for (vmth_page_form form : {VMTH_FORM_ZSTD, VMTH_FORM_SAME}) {
        vmth::ReceiverOptions receiving;
        receiving.hash_seed = seed;
        receiving.forms = same;
        const uint64_t bits = 0;
        vmth::Receiver receiver({memory.block()}, page_bytes, receiving, {&bits}, {1});
        FdPair fds = unix_pair();
        receiver.attach(fds.second.get(), 0);
        vmth_desc one = desc(form, 0, 1);
        one.payload_bytes = form == VMTH_FORM_ZSTD ? 5 : 0;
        T_CHECK(write_all(fds.first.get(), pages(1, {one}, Bytes(one.payload_bytes))));
        error = expect_error([&] { receiver.wait(0); });
        T_CHECK(error.kind() == ErrorKind::protocol);
        T_CHECK(std::string(error.what()).find("desc.form") != std::string::npos);
    }
}

void test_forms_are_switched_while_pages_are_sent()
{
    FormPair pair(same | zstd, 3);
    fill_mixed(pair.source, 9);
    std::atomic<bool> stop{false};
    std::thread chooser([&] {
        for (uint32_t i = 0; !stop.load(); i++) {
            pair.sender->set_forms({(i % 2 != 0 ? same : 0) | (i % 3 != 0 ? zstd : 0),
                                    i % 5 != 0 ? 1 : -5});
            sched_yield();
        }
    });
    for (uint32_t round = 0; round < 10; round++) {
        pair.source.page(round * 7)[round] ^= 1;
        pair.round(round);
    }
    stop.store(true);
    chooser.join();
    pair.finish();
}

void test_runs_taken_out_of_runs()
{
    std::vector<vmth_run> runs = {{10, 5}, {0, 4}, {4, 2}, {20, 1}};
    T_CHECK(vmth::remove_runs(runs, {{12, 1}, {3, 2}}));
    T_EQUAL(runs.size(), 5);
    const uint64_t left[5][2] = {{0, 3}, {5, 1}, {10, 2}, {13, 2}, {20, 1}};
    for (size_t i = 0; i < runs.size(); i++) {
        T_EQUAL(runs[i].page, left[i][0]);
        T_EQUAL(runs[i].npages, left[i][1]);
    }
    for (const std::vector<vmth_run> &bad :
         {std::vector<vmth_run>{{6, 1}}, {{14, 2}}, {{0, 2}, {1, 1}}, {{21, 1}}, {{2, 3}}}) {
        std::vector<vmth_run> some = {{0, 4}, {10, 5}, {20, 1}};
        T_CHECK(!vmth::remove_runs(some, bad));
    }
}

}  // namespace

int main()
{
    test_same_pages_are_not_sent();
    test_forgotten_pages_are_sent_again();
    test_free_pages_are_not_known();
    test_zstd(1, true, 256 * 1024);
    test_zstd(4, true, 64 * 1024);
    test_zstd(2, false, 4096);
    test_zstd(2, true, 1024 * 1024);
    test_torn_pages_are_never_the_same(same, 2);
    test_torn_pages_are_never_the_same(zstd | same, 3);
    test_a_torn_page_is_sent_though_its_hash_is_the_same();
    test_a_damaged_frame_is_missed();
    test_a_frame_made_by_hand_lands_or_is_missed();
    test_what_was_not_agreed_on_is_refused_by_name();
    test_forms_are_switched_while_pages_are_sent();
    test_runs_taken_out_of_runs();
    return T_PASS;
}

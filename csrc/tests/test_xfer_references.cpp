// SPDX-License-Identifier: Apache-2.0
// dedup and delta end to end: what they save, and that torn pages, overtaken bases and damage end as equal
// memory or as a miss that the next round repairs.
#include "tests/xfer_fixture.hpp"
#include "vmth/qemu_ram.h"

using namespace t;

namespace {

constexpr uint32_t same = vmth::form_bit(VMTH_FORM_SAME);
constexpr uint32_t dedup = vmth::form_bit(VMTH_FORM_DEDUP);
constexpr uint32_t delta = vmth::form_bit(VMTH_FORM_DELTA);
constexpr uint32_t zstd = vmth::form_bit(VMTH_FORM_ZSTD);
constexpr uint32_t all_forms = same | dedup | delta | zstd;

struct FormsPair : Pair {
    FormsPair(uint64_t npages, unsigned channels, uint32_t on, vmth::SenderOptions options)
        : Pair(npages, channels, unix_pair, options)
    {
        sender->set_forms({on, 1});
    }
    FormsPair(uint64_t npages, unsigned channels, uint32_t on)
        : FormsPair(npages, channels, on, with_forms(on))
    {
    }
    void round(uint32_t number)
    {
        send_all(number);
        T_CHECK(sender->barrier(number, 0));
    }
    uint64_t count(vmth_page_form form) const { return sender->counters().forms[form].pages.get(); }
    uint64_t wire_bytes() const { return sender->counters().wire_bytes.get(); }
    // Missed pages of one block of at most 64 pages.
    uint64_t missed()
    {
        uint64_t word = 0;
        sender->take_missed({&word}, {1});
        return word;
    }
};

// Pages of a buffer, as whoever reads a stream sends them: round after round, one run each.
struct LentPair : FormsPair {
    explicit LentPair(uint32_t on, vmth::SenderOptions options) : FormsPair(64, 1, on, options)
    {
        uint64_t state = 5;
        for (size_t i = 0; i < content.size(); i++) {
            content[i] = static_cast<uint8_t>(t_random(&state) >> 8);
        }
    }
    explicit LentPair(uint32_t on) : LentPair(on, with_forms(on)) {}

    void lend(uint64_t page, uint64_t npages, uint64_t from, unsigned kind = VMTH_QEMU_PAGE)
    {
        const auto nbytes = static_cast<uint32_t>(kind == VMTH_QEMU_PAGE ? page_bytes : 0);
        const vmth_qemu_run run = {page,   npages, from * page_bytes, page_bytes,
                                   nbytes, 0,      kind};
        T_EQUAL(sender->send_pages(&run, 1, content.data(), content.size(), round_number).first, 1);
        T_CHECK(sender->barrier(round_number++, 0));
    }
    bool holds(uint64_t page, uint64_t from)
    {
        return memcmp(destination.page(page), content.data() + from * page_bytes, page_bytes) == 0;
    }

    Bytes content = Bytes(64 * page_bytes);
    uint32_t round_number = 0;
};

// ---- what they save ---------------------------------------------------------------------------------

void test_contents_that_landed_are_not_sent_again()
{
    for (unsigned channels : {1u, 3u}) {
        FormsPair pair(256, channels, dedup);
        pair.source.randomize(1);
        pair.round(0);
        T_CHECK(pair.same());
        T_EQUAL(pair.count(VMTH_FORM_DEDUP), 0);
        const uint64_t before = pair.wire_bytes();
        for (uint64_t page = 0; page < 64; page++) {
            copy_page(pair.source, 100 + page, page);
        }
        pair.sender->send(0, 100, 64, pair.bits.data(), pair.bits.size(), 1);
        T_CHECK(pair.sender->barrier(1, 0));
        T_CHECK(pair.same());
        const uint64_t found = pair.count(VMTH_FORM_DEDUP);
        T_CHECK(found >= 60 && found <= 64);  // a full bucket may have lost one
        T_EQUAL(pair.receiver->counters().forms[VMTH_FORM_DEDUP].pages.get(), found);
        T_CHECK(pair.wire_bytes() - before < 64 * 64 + (64 - found) * page_bytes + channels * 1000);
        T_EQUAL(pair.sender->counters().missed_pages.get(), 0);
        pair.finish();
    }
}

// A base that is queued itself is none, nor is one that has changed since: both would be missed.
void test_only_pages_that_stay_are_bases()
{
    FormsPair pair(64, 1, dedup);
    pair.sender->set_window(0);  // one packet a round: in another, 7 may land before 40 is looked at
    pair.source.randomize(1);
    pair.round(0);
    copy_page(pair.source, 40, 7);  // 7 itself is sent again as well
    pair.round(1);
    T_CHECK(pair.same());
    T_EQUAL(pair.count(VMTH_FORM_DEDUP), 0);
    pair.source.page(7)[0] ^= 1;
    pair.sender->send(0, 7, 1, pair.bits.data(), pair.bits.size(), 2);
    T_CHECK(pair.sender->barrier(2, 0));
    pair.source.page(7)[0] ^= 1;  // its old content again, which 40 holds
    pair.sender->send(0, 7, 1, pair.bits.data(), pair.bits.size(), 3);
    T_CHECK(pair.sender->barrier(3, 0));
    T_CHECK(pair.same());
    T_EQUAL(pair.missed(), 0);
    pair.finish();
}

void test_pages_found_the_same_stay_bases()
{
    FormsPair pair(64, 2, same | dedup);
    pair.source.randomize(1);
    pair.round(0);
    pair.round(1);
    T_EQUAL(pair.count(VMTH_FORM_SAME), 64);
    for (uint64_t page = 0; page < 16; page++) {
        copy_page(pair.source, 32 + page, page);
    }
    pair.sender->send(0, 32, 16, pair.bits.data(), 1, 2);
    T_CHECK(pair.sender->barrier(2, 0));
    T_EQUAL(pair.count(VMTH_FORM_DEDUP), 16);
    T_EQUAL(pair.missed(), 0);
    T_CHECK(pair.destination.equals(pair.source));
}

// Whichever way a base was told to be something else, what it held is looked for there no more.
void test_what_is_told_anew_is_no_base_any_more()
{
    for (const bool hole : {false, true}) {
        LentPair pair(dedup);
        pair.lend(0, 32, 0);
        if (hole) {
            pair.sender->send_told(VMTH_FORM_HOLE, 0, {{6, 3}}, pair.round_number);
            T_CHECK(pair.sender->barrier(pair.round_number++, 0));
        } else {
            pair.lend(6, 3, 0, VMTH_QEMU_ZERO);
        }
        pair.lend(6, 3, 40);
        pair.lend(50, 3, 6);
        T_EQUAL(pair.missed(), 0);
        T_CHECK(pair.holds(50, 6) && pair.holds(51, 7) && pair.holds(52, 8));
        T_EQUAL(pair.count(VMTH_FORM_DEDUP), 0);
        pair.lend(53, 1, 6);  // and now it is there
        T_EQUAL(pair.count(VMTH_FORM_DEDUP), 1);
        T_CHECK(pair.missed() == 0 && pair.holds(53, 6));
    }
}

void test_forgotten_pages_are_no_bases()
{
    LentPair pair(dedup);
    pair.lend(0, 32, 0);
    pair.sender->forget(0, 7, 1);
    pair.lend(7, 1, 40);
    pair.lend(50, 1, 7);
    T_CHECK(pair.missed() == 0 && pair.holds(50, 7));
}

void test_what_changed_is_all_that_goes()
{
    for (uint32_t forms : {delta, delta | zstd, all_forms}) {
        FormsPair pair(256, 2, forms);
        pair.source.randomize(1);
        pair.round(0);
        for (uint32_t round = 1; round < 4; round++) {
            const uint64_t before = pair.wire_bytes();
            for (uint64_t page = 0; page < 256; page += 2) {
                pair.source.page(page)[round * 70 + page]++;
                pair.source.page(page)[page_bytes - 1]++;
            }
            pair.round(round);
            T_CHECK(pair.same());
            if ((forms & same) != 0) {
                T_CHECK(pair.count(VMTH_FORM_DELTA) >= 126 * round);  // a full set may lose one
                T_EQUAL(pair.count(VMTH_FORM_SAME), 128 * round);
                T_CHECK(pair.wire_bytes() - before < 128 * 64 + 4000 + 2 * page_bytes);
            }
        }
        T_CHECK(pair.count(VMTH_FORM_DELTA) >= 3 * 126);
        T_EQUAL(pair.sender->counters().missed_pages.get(), 0);
        pair.finish();
    }
}

// What went as a copy of another page is a base as well.
void test_a_copy_that_changes_goes_as_a_delta()
{
    FormsPair pair(128, 1, dedup | delta);
    pair.source.randomize(1);
    pair.sender->send(0, 0, 64, pair.bits.data(), pair.bits.size(), 0);
    T_CHECK(pair.sender->barrier(0, 0));
    memcpy(pair.source.page(64), pair.source.page(0), 64 * page_bytes);
    pair.sender->send(0, 64, 64, pair.bits.data(), pair.bits.size(), 1);
    T_CHECK(pair.sender->barrier(1, 0));
    T_CHECK(pair.count(VMTH_FORM_DEDUP) >= 60);
    for (uint64_t page = 64; page < 128; page++) {
        pair.source.page(page)[page]++;
    }
    pair.sender->send(0, 64, 64, pair.bits.data(), pair.bits.size(), 2);
    T_CHECK(pair.sender->barrier(2, 0));
    T_CHECK(pair.count(VMTH_FORM_DELTA) >= 60);
    T_CHECK(pair.same());
    pair.finish();
}

// Many changes of a few values pack; the delta of a page that is all new does not pay at all.
void test_long_deltas_are_packed()
{
    FormsPair pair(64, 1, delta | zstd);
    pair.source.randomize(1);
    pair.round(0);
    for (uint64_t page = 0; page < 64; page++) {
        for (size_t at = 0; at < page_bytes; at += 16) {
            pair.source.page(page)[at] ^= 1;
            pair.source.page(page)[at + 1] = 5;
            pair.source.page(page)[at + 2] = 6;
            pair.source.page(page)[at + 3] = 7;
        }
    }
    pair.round(1);
    T_CHECK(pair.same());
    const vmth::FormCounters &counters = pair.sender->counters().forms[VMTH_FORM_DELTA];
    T_EQUAL(counters.pages.get(), 64);
    T_CHECK(counters.wire_bytes.get() < 64 * (256 * 6 + 48) * 3 / 4);
    pair.source.randomize(2);
    pair.round(2);
    T_CHECK(pair.same());
    T_EQUAL(counters.pages.get(), 64);
    pair.finish();
}

void test_bounds_of_memory()
{
    vmth::SenderOptions options = with_forms(all_forms);
    options.dedup_index_bytes = 0;
    options.delta_cache_bytes = 0;
    FormsPair pair(64, 1, all_forms, options);
    pair.source.randomize(1);
    pair.round(0);
    pair.source.page(3)[1]++;
    copy_page(pair.source, 9, 10);
    pair.round(1);
    T_CHECK(pair.same());
    T_EQUAL(pair.count(VMTH_FORM_DELTA) + pair.count(VMTH_FORM_DEDUP), 0);
    T_EQUAL(pair.count(VMTH_FORM_SAME), 62);
    pair.finish();
}

// ---- torn pages -------------------------------------------------------------------------------------

// Changes a page after it was hashed and before its packet is sent.
struct Tearing {
    static ssize_t sendmsg(void *ctx, int fd, const msghdr *msg, int flags)
    {
        auto *self = static_cast<Tearing *>(ctx);
        if (self->page != nullptr && msg->msg_iov[0].iov_len > VMTH_PACKET_HEADER_BYTES) {
            self->page[8]++;
            self->page = nullptr;
        }
        const vmth_sock_ops *system = vmth_sock_system_ops();
        return system->sendmsg(system->ctx, fd, msg, flags);
    }
    vmth_sock_ops ops = *vmth_sock_system_ops();
    uint8_t *page = nullptr;
};

// Hash A, send torn T, A again: neither same, nor a delta against A, nor a copy of A may be said then.
void test_torn_a_b_a()
{
    for (uint32_t forms : {same, dedup, delta, all_forms}) {
        Tearing tearing;
        tearing.ops.sendmsg = Tearing::sendmsg;
        tearing.ops.ctx = &tearing;
        vmth::SenderOptions options = with_forms(forms);
        options.ops = &tearing.ops;
        FormsPair pair(16, 1, forms, options);
        pair.source.randomize(1);
        tearing.page = pair.source.page(11);  // raw: no form knows it yet
        pair.round(0);
        T_EQUAL(pair.sender->counters().torn_packets.get(), 1);
        T_CHECK((pair.missed() >> 11 & 1) != 0);
        pair.source.page(11)[8]--;                    // A again
        copy_page(pair.source, 3, 11);                // and elsewhere
        pair.source.page(5)[100]++;
        pair.round(1);
        T_CHECK(pair.same());
        T_EQUAL(pair.missed(), 0);
        pair.finish();
    }
}

// A page that changes while its delta or its copy's name is sent: what was hashed is what lands, and the
// later content goes in the next round.
void test_changes_behind_an_encoded_page_do_no_harm()
{
    Tearing tearing;
    tearing.ops.sendmsg = Tearing::sendmsg;
    tearing.ops.ctx = &tearing;
    vmth::SenderOptions options = with_forms(all_forms);
    options.ops = &tearing.ops;
    FormsPair pair(16, 1, all_forms, options);
    pair.source.randomize(1);
    pair.round(0);
    for (uint32_t round = 1; round < 5; round++) {
        pair.source.page(4)[100]++;
        tearing.page = pair.source.page(4);
        pair.round(round);
        T_CHECK(pair.digests_equal());
        T_CHECK(!pair.source.equals(pair.destination));
        T_CHECK(pair.digests_equal());  // see same()
    }
    pair.round(5);
    T_CHECK(pair.same());
    T_EQUAL(pair.sender->counters().torn_packets.get(), 0);
    T_EQUAL(pair.missed(), 0);
    pair.finish();
}

// ---- misses -----------------------------------------------------------------------------------------

// The destination's memory is not what it acknowledged: the hash of what it makes of it tells.
void test_a_wrong_base_is_a_miss_that_is_repaired()
{
    FormsPair pair(32, 1, dedup | delta);
    pair.source.randomize(1);
    pair.round(0);
    T_CHECK(pair.same());
    pair.destination.page(1)[9]++;   // base of a copy
    pair.destination.page(20)[9]++;  // base of a delta
    T_CHECK(pair.digests_equal());   // of what landed; orders our writes for ThreadSanitizer
    copy_page(pair.source, 30, 1);
    pair.source.page(20)[50]++;
    uint64_t bits = uint64_t{1} << 30 | 1u << 20;
    pair.sender->send(0, 0, 32, &bits, 1, 1);
    T_CHECK(pair.sender->barrier(1, 0));
    bits = pair.missed();
    T_EQUAL(bits, uint64_t{1} << 30 | 1u << 20);
    T_EQUAL(pair.receiver->counters().missed_pages.get(), 2);
    T_CHECK(!pair.digests_equal());
    pair.sender->forget(0, 1, 1);  // as a repair does that has found page 1 to differ
    bits |= 1u << 1;
    pair.sender->send(0, 0, 32, &bits, 1, 2);
    T_CHECK(pair.sender->barrier(2, 0));
    T_CHECK(pair.same());
    T_EQUAL(pair.missed(), 0);
    pair.finish();
}

// Forms go on and off between rounds; what was remembered is checked against what landed since.
// What was lent is gone when it is missed: the copies come back, once, and what is sent again lands.
void test_missed_lent_pages_come_back()
{
    vmth::SenderOptions options = with_forms(dedup | zstd);
    options.kept_copies_bytes = 4 * page_bytes;
    LentPair pair(dedup | zstd, options);
    pair.lend(0, 32, 0);
    memset(pair.destination.page(7), 0x11, page_bytes);  // as if another page had overtaken
    memset(pair.destination.page(8), 0x22, page_bytes);
    pair.lend(50, 4, 6);
    T_EQUAL(pair.missed(), uint64_t{6} << 50);
    const std::vector<vmth::MissedCopy> copies = pair.sender->take_missed_pages();
    T_EQUAL(copies.size(), 2);
    T_CHECK(pair.sender->take_missed_pages().empty());
    for (const vmth::MissedCopy &copy : copies) {
        T_EQUAL(copy.block, 0);
        T_CHECK(memcmp(copy.content.data(), pair.content.data() + (copy.page - 44) * page_bytes,
                       page_bytes) == 0);
        pair.lend(copy.page, 1, copy.page - 44);
    }
    T_EQUAL(pair.missed(), 0);
    for (uint64_t i = 0; i < 4; i++) {
        T_CHECK(pair.holds(50 + i, 6 + i));
    }
    T_EQUAL(pair.count(VMTH_FORM_DEDUP), 4);
    pair.lend(56, 4, 9);  // all that may be kept is free again
    T_EQUAL(pair.count(VMTH_FORM_DEDUP), 8);
}

void test_no_more_is_kept_than_allowed()
{
    for (const uint64_t npages : {0u, 3u, 16u}) {
        vmth::SenderOptions options = with_forms(dedup);
        options.kept_copies_bytes = npages * page_bytes;
        LentPair pair(dedup, options);
        pair.lend(0, 32, 0);
        for (int again = 1; again <= 2; again++) {  // what landed is given back
            pair.lend(40, 16, again);
            T_EQUAL(pair.count(VMTH_FORM_DEDUP), again * npages);
        }
        T_EQUAL(pair.missed(), 0);
        T_CHECK(pair.sender->take_missed_pages().empty());
        for (uint64_t i = 0; i < 16; i++) {
            T_CHECK(pair.holds(40 + i, 2 + i));
        }
    }
}

void test_forms_that_come_and_go()
{
    FormsPair pair(64, 2, all_forms);
    const uint32_t masks[] = {delta, 0, delta | dedup, same, all_forms, zstd, delta | same, dedup};
    uint64_t state = 1;
    pair.source.randomize(1);
    uint64_t dirty = ~uint64_t{0};
    for (uint32_t round = 0; round < 80; round++) {
        pair.sender->set_forms({masks[round % 8], 1});
        pair.sender->send(0, 0, 64, &dirty, 1, round);
        T_CHECK(pair.sender->barrier(round, 0));
        T_CHECK(pair.same());
        T_EQUAL(pair.missed(), 0);
        dirty = t_random(&state) & t_random(&state);  // some of it with nothing changed
        for (unsigned i = 0; i < 12; i++) {
            const uint64_t page = t_random(&state) % 64;
            dirty |= uint64_t{1} << page;
            switch (t_random(&state) % 4) {
            case 0:
                copy_page(pair.source, page, t_random(&state) % 64);
                break;
            case 1:
                memset(pair.source.page(page), 0, page_bytes);
                break;
            default:
                pair.source.page(page)[t_random(&state) % page_bytes]++;
                break;
            }
        }
    }
    T_CHECK(pair.count(VMTH_FORM_DELTA) > 0 && pair.count(VMTH_FORM_DEDUP) > 0);
    T_CHECK(pair.count(VMTH_FORM_SAME) > 0);
    pair.round(80);
    pair.finish();
}

// ---- a hostile source -------------------------------------------------------------------------------

Bytes reference(uint64_t seq, const vmth_desc &desc, const Bytes &payload)
{
    vmth_packet_header header = {};
    header.kind = VMTH_PACKET_PAGES;
    header.seq = seq;
    header.ndesc = 1;
    header.npages = 1;
    header.desc_bytes = VMTH_DESC_REF_BYTES;
    header.payload_bytes = static_cast<uint32_t>(payload.size());
    Bytes out(VMTH_PACKET_HEADER_BYTES + VMTH_DESC_REF_BYTES);
    uint8_t *at = out.data() + VMTH_PACKET_HEADER_BYTES;
    T_EQUAL(vmth_desc_encode(&desc, at, VMTH_DESC_REF_BYTES), VMTH_DESC_REF_BYTES);
    vmth_packet_encode_header(&header, at, seed, out.data());
    out.insert(out.end(), payload.begin(), payload.end());
    return out;
}

vmth_desc delta_desc(uint64_t page, const Bytes &payload, uint8_t flags = 0)
{
    vmth_desc one = desc(VMTH_FORM_DELTA, page, 1);
    one.flags = flags;
    one.payload_bytes = static_cast<uint32_t>(payload.size());
    one.result = {1, 2};
    return one;
}

// Deltas that are none, that lead outside, that unpack to too much: missed, and nothing is written.
void test_bad_deltas_are_missed()
{
    const Bytes payloads[] = {
        {0x80}, {0x00, 0x01, 0xaa}, {0xff, 0x1f, 0x02, 0xaa, 0xbb}, {0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x00},
    };
    for (const Bytes &payload : payloads) {
        for (uint8_t flags : {uint8_t{0}, uint8_t{VMTH_DESC_PACKED}}) {
            Memory memory(8);
            memory.randomize(3);
            Memory before(8);
            memcpy(before.page(0), memory.page(0), 8 * page_bytes);
            std::unique_ptr<vmth::Receiver> receiver =
                make_receiver(memory, 1, true, false, delta | zstd);
            FdPair fds = unix_pair();
            receiver->attach(fds.second.get(), 0);
            T_CHECK(write_all(fds.first.get(), reference(1, delta_desc(2, payload, flags), payload)));
            T_CHECK(write_all(fds.first.get(), control(VMTH_PACKET_END, 2)));
            T_CHECK(receiver->wait(0));
            receiver->close();
            T_EQUAL(receiver->counters().missed_pages.get(), 1);
            T_CHECK(memory.equals(before));
        }
    }
}

void test_forms_that_were_not_agreed_on_are_refused()
{
    Memory memory(8);
    std::unique_ptr<vmth::Receiver> receiver = make_receiver(memory, 1, true, false, zstd | same);
    FdPair fds = unix_pair();
    receiver->attach(fds.second.get(), 0);
    const Bytes payload = {0x00, 0x01, 0xaa};
    T_CHECK(write_all(fds.first.get(), reference(1, delta_desc(2, payload), payload)));
    TransferError error = expect_error([&] { receiver->wait(0); });
    T_CHECK(error.kind() == ErrorKind::protocol);
    T_CHECK(strstr(error.what(), "not negotiated") != nullptr);
}

}  // namespace

int main()
{
    test_contents_that_landed_are_not_sent_again();
    test_only_pages_that_stay_are_bases();
    test_pages_found_the_same_stay_bases();
    test_what_is_told_anew_is_no_base_any_more();
    test_forgotten_pages_are_no_bases();
    test_missed_lent_pages_come_back();
    test_no_more_is_kept_than_allowed();
    test_what_changed_is_all_that_goes();
    test_a_copy_that_changes_goes_as_a_delta();
    test_long_deltas_are_packed();
    test_bounds_of_memory();
    test_torn_a_b_a();
    test_changes_behind_an_encoded_page_do_no_harm();
    test_a_wrong_base_is_a_miss_that_is_repaired();
    test_forms_that_come_and_go();
    test_bad_deltas_are_missed();
    test_forms_that_were_not_agreed_on_are_refused();
    return T_PASS;
}

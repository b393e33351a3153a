// SPDX-License-Identifier: Apache-2.0
// Files, indexes, disks, filters and peers that lie cost a page sent whole, never a wrong one.
#include <functional>

#include "tests/reuse_fixture.hpp"

using namespace t;

namespace {

// ---- what lies --------------------------------------------------------------------------------------

// Every other page missed, sent whole, and not proposed again although its content stays.
void check_half_missed(ReusePair &pair)
{
    pair.round(0);
    T_EQUAL(pair.reused(), 128);
    T_CHECK(!pair.equal());
    T_EQUAL(pair.repair(1), 64);
    T_EQUAL(pair.reused(), 128);
    T_CHECK(pair.equal());
    pair.round(2);
    T_EQUAL(pair.reused(), 128 + 64);
    T_EQUAL(pair.repair(3), 0);
    pair.finish();
}

void test_a_file_that_was_changed()
{
    for (size_t packed : {0u, 1u}) {
        Memory before(128);
        fill(before, 1);
        const Stored file(pages_of(before, 0, 128), packed);
        ReusePair pair(128, reuse, {file.source()});
        memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
        for (size_t page = 0; page < 128; page += 2) {
            const auto at = packed == 0 ? page * page_bytes + 77
                                        : file.frames_[page].offset + file.frames_[page].nbytes / 2;
            uint8_t byte;
            T_EQUAL(pread(file.fd(), &byte, 1, static_cast<off_t>(at)), 1);
            byte ^= 0x55;
            T_EQUAL(pwrite(file.fd(), &byte, 1, static_cast<off_t>(at)), 1);
        }
        check_half_missed(pair);
    }
}

void test_a_file_that_was_cut()
{
    Memory before(128);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 128));
    ReusePair pair(128, reuse, {file.source()});
    memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
    T_EQUAL(ftruncate(file.fd(), 63 * page_bytes + 4095 + 1), 0);
    T_EQUAL(ftruncate(file.fd(), 64 * page_bytes), 0);
    check_half_missed(pair);
}

void test_an_index_that_lies()
{
    Memory before(128);
    fill(before, 1);
    Stored file(pages_of(before, 0, 128), 2);
    for (size_t i = 0; i < 32; i++) {
        file.places_[4 * i] = i % 2 == 0 ? UINT64_MAX - i : 128 + i;  // nowhere
        file.places_[4 * i + 2] ^= 1;                                 // another page
    }
    ReusePair pair(128, reuse, {file.source()});
    memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
    check_half_missed(pair);
}

void test_frames_that_lie()
{
    const vmth::StoredFrame lies[] = {
        {0, UINT64_MAX, 0, 7},
        {0, 128, UINT64_MAX, 128 * page_bytes},
        {0, 128, INT64_MAX - 5, 128 * page_bytes},
        {0, 128, 0, 128 * page_bytes - 1},    // not packed, and yet said to be
        {0, 128, 0, 128 * page_bytes + 1},
        {0, 1u << 20, 0, 4096},               // unpacks to more than is ever unpacked
        {0, 0, 0, 0},
        {UINT64_MAX, 1, 0, 4096},
    };
    Memory before(128);
    fill(before, 1);
    for (const vmth::StoredFrame &lie : lies) {
        Stored file(pages_of(before, 0, 128));
        file.frames_[0] = lie;
        ReusePair pair(128, reuse, {file.source()});
        memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
        pair.round(0);
        T_EQUAL(pair.reused(), 128);
        T_EQUAL(pair.repair(1), 128);
        pair.finish();
    }
}

int failing_pread_calls = 0;

ssize_t failing_pread(int fd, void *buffer, size_t nbytes, off_t offset)
{
    switch (failing_pread_calls++ % 4) {
    case 0:
        errno = EINTR;
        return -1;
    case 1:
        return pread(fd, buffer, nbytes / 2 + 1, offset);  // in pieces
    default:
        if (offset / static_cast<off_t>(page_bytes) % 2 == 0) {
            errno = EIO;
            return -1;
        }
        return pread(fd, buffer, nbytes, offset);
    }
}

void test_a_disk_that_fails()
{
    const vmth_file_ops files = {failing_pread, pwrite};
    Memory before(128);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 128));
    ReusePair pair(128, reuse, {file.source()}, 1, &files);
    memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
    pair.round(0);
    T_EQUAL(pair.reused(), 128);
    const uint64_t missed = pair.repair(1);
    T_CHECK(missed > 0 && missed < 128);
    pair.finish();
}

// Pages that can no longer be read, and how often a disk was asked.
struct Disk {
    uint64_t bad_every = UINT64_MAX;
    uint64_t reads = 0;
};
Disk disk;

ssize_t disk_pread(int fd, void *buffer, size_t nbytes, off_t offset)
{
    disk.reads++;
    const uint64_t first = static_cast<uint64_t>(offset) / page_bytes;
    for (uint64_t page = first; page * page_bytes < static_cast<uint64_t>(offset) + nbytes; page++) {
        if (page % disk.bad_every == disk.bad_every - 1) {
            if (page == first) {
                errno = EIO;
                return -1;
            }
            nbytes = page * page_bytes - static_cast<uint64_t>(offset);
        }
    }
    return pread(fd, buffer, nbytes, offset);
}

// Pages that follow one another are read together, and yet one bad page costs no other.
void test_a_disk_with_bad_pages()
{
    const vmth_file_ops files = {disk_pread, pwrite};
    Memory before(128);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 128));
    for (const uint64_t bad_every : {UINT64_MAX, uint64_t{1}, uint64_t{2}, uint64_t{5}, uint64_t{64}}) {
        disk = {bad_every, 0};
        ReusePair pair(128, reuse, {file.source()}, 1, &files);
        memcpy(pair.source.page(0), before.page(0), 128 * page_bytes);
        pair.round(0);
        T_EQUAL(pair.reused(), 128);
        T_CHECK(bad_every != UINT64_MAX || disk.reads <= 128 / 8);
        T_EQUAL(pair.repair(1), bad_every == UINT64_MAX ? 0 : 128 / bad_every);
        pair.finish();
    }
}

// The filter knows fingerprints alone: one that is in it by chance costs a miss.
void test_a_filter_that_says_too_much()
{
    Memory other(64);
    fill(other, 9);
    const Stored file(pages_of(other, 0, 64));
    ReusePair pair(64, reuse | zstd, {});
    fill(pair.source, 1);
    T_EQUAL(pair.reused(), 0);
    pair.round(0);
    T_EQUAL(pair.reused(), 0);  // of a filter of nothing
    pair.finish();

    Stored lying(pages_of(pair.source, 0, 64));
    const vmth::StoreSource says = lying.source();
    ReusePair second(64, reuse | zstd, {says});
    memcpy(second.source.page(0), pair.source.page(0), 64 * page_bytes);
    T_EQUAL(ftruncate(lying.fd(), 0), 0);
    second.round(0);
    T_EQUAL(second.reused(), 64);
    T_EQUAL(second.repair(1), 64);
    T_EQUAL(second.sender->counters().forms[VMTH_FORM_ZSTD].pages.get(), 64);
    second.finish();
}

// ---- peers that lie ---------------------------------------------------------------------------------

std::unique_ptr<vmth::Sender> listening(Memory &memory, uint32_t forms = reuse)
{
    vmth::SenderOptions options;
    options.forms = forms;
    return make_sender(memory, options);
}

void test_hostile_filters()
{
    Memory memory(8);
    const uint64_t prints[] = {5, 6, 900};
    uint8_t part[VMTH_FILTER_PART_BYTES];
    size_t nbytes;
    T_EQUAL(vmth_filter_encode(prints, 3, part, &nbytes), 3);
    auto sender = listening(memory);
    const auto refused = [&](const std::function<void()> &body) {
        T_CHECK(expect_error(body).kind() == ErrorKind::protocol);
    };
    refused([&] { sender->begin_reuse(secret, VMTH_FILTER_MAX_ENTRIES + 1); });
    sender->begin_reuse(secret, 2);  // one too many
    refused([&] { sender->add_reuse(5, 3, part, nbytes, true); });
    sender->begin_reuse(secret, 100);
    refused([&] { sender->add_reuse(5, 3, part, nbytes - 1, true); });
    refused([&] { sender->add_reuse(5, UINT64_MAX, part, nbytes, true); });
    refused([&] { sender->add_reuse(UINT64_MAX, 1, part, 0, true); });
    sender->add_reuse(5, 3, part, nbytes, false);
    refused([&] { sender->add_reuse(900, 1, part, 0, false); });  // does not rise
    sender->add_reuse(901, 1, part, 0, true);
    const auto usage = [&](const std::function<void()> &body) {
        T_CHECK(expect_error(body).kind() == ErrorKind::usage);
    };
    auto other = listening(memory, zstd);
    usage([&] { other->begin_reuse(secret, 2); });
    FdPair fds = unix_pair();
    sender->add_channel(fds.first.get(), 0);
    usage([&] { sender->begin_reuse(secret, 2); });
    usage([&] { sender->add_reuse(902, 1, part, 0, true); });
}

void test_hostile_packets()
{
    Memory before(4);
    fill(before, 1);
    const Stored file(pages_of(before, 0, 4));
    const auto receive = [&](uint32_t forms, const std::vector<vmth_desc> &descs,
                             const Bytes &payload, const std::function<void(int, vmth::Receiver &)> &then) {
        Memory memory(8);
        const std::vector<uint64_t> bits = all_bits(8);
        vmth::ReceiverOptions options;
        options.hash_seed = seed;
        options.forms = forms;
        options.reuse = {file.source()};
        std::copy(secret, secret + sizeof(secret), options.reuse_key);
        vmth::Receiver receiver({memory.block()}, page_bytes, options, {bits.data()}, {1});
        FdPair fds = unix_pair();
        receiver.attach(fds.second.get(), 0);
        T_CHECK(write_all(fds.first.get(), pages(1, descs, payload)));
        then(fds.first.get(), receiver);
    };
    const auto refused = [](int, vmth::Receiver &receiver) {
        T_CHECK(expect_error([&] { receiver.wait(0); }).kind() == ErrorKind::protocol);
    };
    const Bytes hashes(8 * VMTH_REUSE_HASH_BYTES, 7);
    const auto some = [&](size_t n) { return Bytes(hashes.begin(), hashes.begin() + static_cast<ptrdiff_t>(n)); };
    receive(zstd, {desc(VMTH_FORM_REUSE, 0, 1)}, some(16), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 0)}, {}, refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 8, 1)}, some(16), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 7, 2)}, some(32), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, UINT32_MAX)}, some(16), refused);
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 2)}, some(16), refused);   // too little
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 1)}, some(32), refused);   // too much
    receive(reuse, {desc(VMTH_FORM_REUSE, 0, 1), desc(VMTH_FORM_REUSE, 0, 1)}, some(32), refused);
    // Hashes that no file has are missed, beside one that is there.
    const std::vector<vmth_u128> real = hashes_of(before.page(2), 1);
    Bytes payload = some(48);
    memcpy(payload.data() + 16, &real[0], 16);  // little-endian here
    receive(reuse, {desc(VMTH_FORM_REUSE, 1, 3)}, payload, [&](int fd, vmth::Receiver &receiver) {
        T_CHECK(write_all(fd, control(VMTH_PACKET_BARRIER, 2)));
        const Packet ack = read_packet(fd, 8);
        T_EQUAL(ack.header.kind, VMTH_PACKET_ACK);
        vmth_ack one;
        vmth_packet_error error;
        T_EQUAL(vmth_ack_decode(ack.desc.data(), &one, &error), 0);
        T_EQUAL(one.status, VMTH_ACK_MISSED);
        T_EQUAL(ack.header.npages, 2);
        T_EQUAL(receiver.counters().missed_pages.get(), 2);
        T_EQUAL(receiver.reused()[0], 1);
    });
}

}  // namespace

int main()
{
    test_a_file_that_was_changed();
    test_a_file_that_was_cut();
    test_an_index_that_lies();
    test_frames_that_lie();
    test_a_disk_that_fails();
    test_a_disk_with_bad_pages();
    test_a_filter_that_says_too_much();
    test_hostile_filters();
    test_hostile_packets();
    return T_PASS;
}

// SPDX-License-Identifier: Apache-2.0
// Filling holes of a mapped file by writing to the file: which pages go that way, what lands, and what
// happens where the file does not take them.
#include <algorithm>

#include "tests/holes_fixture.hpp"
#include "xfer/page_forms.hpp"

using namespace t;
using vmth::form_bit;

namespace {

constexpr uint64_t npages = 600;

// ---- what is written ----------------------------------------------------------------------------------

void test_holes_are_written_and_nothing_else()
{
    for (unsigned channels : {1u, 2u}) {
        for (bool anew : {false, true}) {
            for (bool digest : {false, true}) {
                reset_disk();
                const File file(npages);
                Options options = {channels, 0, anew, digest, {{0, 100}, {301, 1}, {303, 50}}};
                Moved moved(file, options);
                memset(moved.source.page(50), 0, 10 * page_bytes);  // over what is there
                memset(moved.source.page(400), 0, 33 * page_bytes);
                moved.round(0);
                const uint64_t holes = npages - 151 - 33;
                T_EQUAL(moved.written(), holes);
                T_EQUAL(bytes_written.load(), holes * page_bytes);
                T_EQUAL(populated.load(), 0);
                for (uint64_t page = 0; page < npages; page++) {
                    T_EQUAL(file.hole(page), page >= 400 && page < 433);
                }
                // What is there by now is overwritten in place, zeros that turned into content are holes.
                const size_t before = calls;
                moved.source.randomize(2);
                memset(moved.source.page(0), 0, 40 * page_bytes);
                memset(moved.source.page(400), 0, 10 * page_bytes);
                moved.round(1);
                T_EQUAL(moved.written(), holes + 23);
                T_CHECK(calls > before && bytes_written == (holes + 23) * page_bytes);
                moved.round(2);
                T_EQUAL(moved.written(), holes + 23);
                T_CHECK(file.hole(400) && file.hole(409) && !file.hole(410));
                T_CHECK(moved.receiver->fallbacks().empty());
                moved.finish();
            }
        }
    }
}

// Also with nothing between two holes but one page, each way round.
void test_scattered_pages()
{
    for (uint64_t stride : {2u, 3u, 7u}) {
        for (uint64_t phase = 0; phase < 2; phase++) {
            reset_disk();
            const File file(npages);
            Options options;
            options.channels = 2;
            uint64_t holes = npages;
            for (uint64_t page = 0; page < npages; page++) {
                if ((page % stride == 0) == (phase == 0)) {
                    options.present.push_back({page, 1});
                    holes--;
                }
            }
            Moved moved(file, options);
            moved.round(0);
            T_EQUAL(moved.written(), holes);
            moved.finish();
        }
    }
}

void test_caller_may_close_its_file()
{
    reset_disk();
    File file(npages);
    Moved moved(file, {});
    file.close_fd();
    moved.round(0);
    T_EQUAL(moved.written(), npages);
    moved.finish();
}

// The hash has mapped what was written: only without one is it asked for when it is sent again.
void test_what_was_written_is_mapped()
{
    for (bool digest : {false, true}) {
        reset_disk();
        const File file(npages);
        Options options;
        options.digest = digest;
        Moved moved(file, options);
        moved.round(0);
        T_EQUAL(asked.load(), 0);
        moved.round(1);
        T_EQUAL(asked.load() == 0, digest);
        moved.finish();
    }
}

void test_close_lets_the_file_go()
{
    const File file(npages);
    const size_t before = entries("/proc/self/fd");
    const std::vector<uint64_t> none((npages + 63) / 64, 0);
    vmth::ReceiverOptions options;
    vmth::Receiver receiver({file.block()}, page_bytes, options, {none.data()}, {none.size()});
    T_EQUAL(entries("/proc/self/fd"), before + 1);
    receiver.close();
    receiver.close();
    T_EQUAL(entries("/proc/self/fd"), before);
}

// Pages made in a buffer: frames, deltas and pages that are elsewhere.
void test_coded_pages_are_written()
{
    const uint32_t zstd = form_bit(VMTH_FORM_ZSTD);
    const uint32_t dedup = form_bit(VMTH_FORM_DEDUP);
    const uint32_t delta = form_bit(VMTH_FORM_DELTA);
    for (uint32_t forms : {zstd, dedup, zstd | dedup | delta}) {
        for (int error : {0, EPERM}) {
            reset_disk({error, 2});
            const File file(npages);
            Options options = {3, forms, true, true, {{100, 7}, {110, 1}, {500, 3}}};
            Moved moved(file, options);
            for (uint64_t page = 0; page < npages; page++) {  // packs well; the halves are alike
                auto *words = reinterpret_cast<uint64_t *>(moved.source.page(page));
                for (size_t i = 0; i < page_bytes / 8; i++) {
                    words[i] = page % (npages / 2) * 1000 + i % 64 + 1;
                }
            }
            std::vector<uint64_t> half(moved.bits.size(), 0);
            vmth_bitmap_set_range(half.data(), 0, npages / 2);
            moved.round(0, half);
            std::fill(half.begin(), half.end(), 0);
            vmth_bitmap_set_range(half.data(), npages / 2, npages / 2);
            moved.round(1, half);
            const auto &taken = moved.sender->counters().forms;
            T_CHECK(taken[VMTH_FORM_ZSTD].pages.get() + taken[VMTH_FORM_DEDUP].pages.get() > npages / 4);
            if (error == 0) {
                T_EQUAL(moved.written(), npages - 11);
                T_EQUAL(populated.load(), 0);
            }
            for (uint64_t page = 0; page < npages; page += 3) {
                moved.source.page(page)[page % page_bytes] ^= 1;
            }
            moved.round(2);
            T_CHECK(error != 0 || moved.written() == npages - 11);
            moved.finish();
        }
    }
}

// What is hashed is the memory: a write that put something else there is found out, and sent again.
void test_memory_is_what_is_hashed()
{
    reset_disk({0, 0, SIZE_MAX, false, true});
    const File file(npages);
    Moved moved(file, {});
    moved.round(0);
    std::vector<uint64_t> missed(moved.bits.size(), 0);
    T_CHECK(!moved.digests_equal());
    T_CHECK(moved.sender->take_missed({missed.data()}, {missed.size()}) > 0);
    moved.round(1, missed);
    moved.finish();
}

// ---- where a file does not take them ------------------------------------------------------------------

void check_refused(const Moved &moved, int error)
{
    const std::vector<std::string> names = moved.receiver->fallbacks();
    T_EQUAL(names.size(), 1);
    T_EQUAL(names[0].find("write: the file of block 0 takes no pages (" +
                          std::string(strerror(error)) + ")"),
            0);
}

void test_refusal_is_named_and_harmless()
{
    for (int error : {EPERM, EINVAL, EBADF, EFBIG, EOPNOTSUPP}) {
        for (size_t from : {0u, 1u, 3u}) {
            for (unsigned channels : {1u, 2u}) {
                reset_disk({error, from});
                const File file(npages);
                Options options;
                options.channels = channels;
                options.present = {{40, 20}};
                Moved moved(file, options);
                moved.round(0);
                // Two threads may have been on their way when the first was refused.
                T_CHECK(calls > from && calls <= from + channels);
                T_EQUAL(moved.written(), bytes_written / page_bytes);
                T_EQUAL(moved.written() + populated, npages - 20);
                check_refused(moved, error);
                moved.source.randomize(5);
                moved.round(1);
                moved.finish();
            }
        }
    }
}

void test_short_and_interrupted_writes()
{
    for (size_t most : {size_t{1000}, page_bytes, 3 * page_bytes + 1}) {
        reset_disk({0, 0, most});
        const File file(npages);
        Options options;
        options.channels = 2;
        Moved moved(file, options);
        moved.round(0);
        T_EQUAL(moved.written(), npages);
        T_EQUAL(bytes_written.load(), npages * page_bytes);
        T_CHECK(moved.receiver->fallbacks().empty());
        moved.finish();
    }
    // Refused in the middle of a page: all of the run is copied.
    reset_disk({EPERM, 13, 1000});
    const File file(npages);
    Moved moved(file, {});
    moved.round(0);
    T_EQUAL(bytes_written.load(), 7000);
    T_EQUAL(moved.written(), 0);
    check_refused(moved, EPERM);
    moved.finish();
}

// A copy would end the process: the transfer fails instead, and says where.
void test_no_room_is_a_failure()
{
    for (int error : {ENOSPC, EDQUOT, ENOMEM, EIO, 0}) {
        for (size_t from : {0u, 2u}) {
            reset_disk({error, from, SIZE_MAX, error == 0});
            const File file(npages);
            Moved moved(file, {});
            (void)expect_error([&] {
                moved.sender->send(0, 0, npages, moved.bits.data(), moved.bits.size(), 0);
                moved.sender->barrier(0, 0);
            });
            const TransferError failed = expect_error([&] { moved.receiver->wait(0); });
            T_EQUAL(std::string(failed.what()).find("landing pages in the file of block 0: "), 0);
            T_CHECK(failed.kind() == ErrorKind::io);
            T_EQUAL(failed.error(), error == 0 ? EIO : error);
            T_CHECK(moved.receiver->fallbacks().empty());
        }
    }
}

// The kernel's own refusals: a seal that came after the mapping, and files that are not open for it.
void test_files_that_are_not_written()
{
    reset_disk();
    const File sealed(npages, MFD_ALLOW_SEALING);
    T_EQUAL(fcntl(sealed.fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
    Moved moved(sealed, {});
    moved.round(0);
    T_EQUAL(moved.written(), 0);
    check_refused(moved, EPERM);
    moved.finish();
    const std::pair<int, int> flags_and_errors[] = {
        {O_RDONLY, EBADF}, {O_RDWR | O_APPEND, EINVAL}, {O_PATH, EBADF}};
    for (const auto &[flags, error] : flags_and_errors) {
        reset_disk();
        const File file(npages);
        const std::string path = "/proc/self/fd/" + std::to_string(file.fd());
        UniqueFd again(open(path.c_str(), flags | O_CLOEXEC));
        T_CHECK(again);
        vmth::MemoryBlock block = file.block();
        block.fd = again.get();
        Moved other(block, {});
        other.round(0);
        T_EQUAL(calls.load(), 0);
        T_EQUAL(populated.load(), npages);
        check_refused(other, error);
        other.finish();
    }
}

// One block refuses, one has no file, one has no holes to write: each for itself.
void test_blocks_are_on_their_own()
{
    reset_disk();
    const File file(npages);
    const File sealed(npages, MFD_ALLOW_SEALING);
    T_EQUAL(fcntl(sealed.fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
    Memory unnamed(npages);
    std::vector<vmth::MemoryBlock> blocks = {unnamed.block(), sealed.block(), file.block()};
    Memory sources[3] = {Memory(npages), Memory(npages), Memory(npages)};
    std::vector<vmth::MemoryBlock> from;
    for (Memory &source : sources) {
        source.randomize(from.size());
        from.push_back(source.block());
    }
    vmth::SenderOptions sending;
    sending.hash_seed = seed;
    vmth::Sender sender(from, page_bytes, sending);
    vmth::ReceiverOptions receiving;
    receiving.hash_seed = seed;
    const std::vector<uint64_t> none((npages + 63) / 64, 0);
    vmth::Receiver receiver(blocks, page_bytes, receiving, {none.data(), none.data(), none.data()},
                            {none.size(), none.size(), none.size()});
    FdPair fds = unix_pair();
    sender.add_channel(fds.first.get(), 0);
    receiver.attach(fds.second.get(), 0);
    for (uint32_t block = 0; block < 3; block++) {
        sender.send(block, 0, npages, all_bits(npages).data(), none.size(), 0);
    }
    T_CHECK(sender.barrier(0, 0));
    sender.finish();
    T_CHECK(receiver.wait(0));
    T_EQUAL(receiver.counters().written_pages.get(), npages);
    const std::vector<std::string> names = receiver.fallbacks();
    T_EQUAL(names.size(), 1);
    T_EQUAL(names[0].find("write: the file of block 1 "), 0);
    receiver.close();
    T_CHECK(sources[0].equals(unnamed));
    T_EQUAL(memcmp(sources[1].page(0), sealed.page(0), npages * page_bytes), 0);
    T_EQUAL(memcmp(sources[2].page(0), file.page(0), npages * page_bytes), 0);
}

// ---- any of it ------------------------------------------------------------------------------------------

void randomly_present(Options &options, uint64_t *state)
{
    for (uint64_t page = 0; page < npages;) {
        const uint64_t length = std::min(npages - page, 1 + t_random(state) % 90);
        if (t_random(state) % 2 == 0) {
            options.present.push_back({page, length});
        }
        page += length;
    }
}

void change_some(Memory &source, std::vector<uint64_t> &bits, uint64_t *state)
{
    std::fill(bits.begin(), bits.end(), 0);
    for (uint64_t page = 0; page < npages;) {
        const uint64_t length = std::min(npages - page, 1 + t_random(state) % 40);
        const uint64_t what = t_random(state) % 4;
        for (uint64_t i = page; i < page + length && what != 0; i++) {
            bits[i / 64] |= uint64_t{1} << i % 64;
            if (what == 1) {
                memset(source.page(i), 0, page_bytes);
            } else if (what == 2) {
                memset(source.page(i), static_cast<int>(t_random(state)), page_bytes);
            } else {
                source.page(i)[t_random(state) % page_bytes]++;
            }
        }
        page += length;
    }
}

void test_any_order_of_all(uint64_t run_seed)
{
    uint64_t state = run_seed;
    const uint32_t all = form_bit(VMTH_FORM_ZSTD) | form_bit(VMTH_FORM_DEDUP) |
                         form_bit(VMTH_FORM_DELTA) | form_bit(VMTH_FORM_SAME);
    Options options;
    options.forms = t_random(&state) % 2 == 0 ? 0 : all;
    options.channels = 1 + static_cast<unsigned>(t_random(&state) % 3);
    options.anew = t_random(&state) % 2 == 0;
    randomly_present(options, &state);
    Disk how;
    how.from = t_random(&state) % 40;
    how.error = t_random(&state) % 3 == 0 ? EPERM : 0;
    how.most = t_random(&state) % 3 == 0 ? 1 + t_random(&state) % 20000 : SIZE_MAX;
    reset_disk(how);
    const File file(npages);
    Moved moved(file, options);
    std::vector<uint64_t> bits = moved.bits;
    for (uint32_t number = 0; number < 5; number++) {
        moved.round(number, bits);
        T_CHECK(moved.digests_equal());  // orders what we read with what its threads wrote
        change_some(moved.source, bits, &state);
    }
    moved.round(5, bits);
    T_EQUAL(moved.receiver->fallbacks().size(), disk.error != 0 && calls > disk.from ? 1 : 0);
    moved.finish();
}

}  // namespace

int main(int argc, char **argv)
{
    skip_where_memfds_are_huge();
    test_holes_are_written_and_nothing_else();
    test_scattered_pages();
    test_caller_may_close_its_file();
    test_what_was_written_is_mapped();
    test_close_lets_the_file_go();
    test_coded_pages_are_written();
    test_memory_is_what_is_hashed();
    test_refusal_is_named_and_harmless();
    test_short_and_interrupted_writes();
    test_no_room_is_a_failure();
    test_files_that_are_not_written();
    test_blocks_are_on_their_own();
    const uint64_t first = argc > 1 ? strtoull(argv[1], nullptr, 0) : 1;
    for (uint64_t run_seed = first; run_seed < first + (argc > 1 ? 1 : 40); run_seed++) {
        fprintf(stderr, "seed %llu\n", static_cast<unsigned long long>(run_seed));
        test_any_order_of_all(run_seed);
    }
    return T_PASS;
}

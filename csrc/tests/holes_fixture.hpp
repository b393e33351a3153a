// SPDX-License-Identifier: Apache-2.0
// Both ends over a file that is guest memory, with the calls that fill its holes counted or failing.
#ifndef VMTH_TESTS_HOLES_FIXTURE_HPP
#define VMTH_TESTS_HOLES_FIXTURE_HPP

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>

#include "tests/xfer_fixture.hpp"

namespace t {

constexpr uint64_t first_page = 3;  // of the block in its file; other pages are before and behind
constexpr uint64_t tail_pages = 2;
constexpr size_t align = 2u << 20;

// Where a write brings 2 MiB, holes are not what these tests make.
inline void skip_where_memfds_are_huge()
{
    char mode[128] = "";
    FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "re");
    if (file == nullptr) {
        return;
    }
    const bool read = fgets(mode, sizeof(mode), file) != nullptr;
    fclose(file);
    for (const char *huge : {"[always]", "[within_size]", "[force]"}) {
        if (read && strstr(mode, huge) != nullptr) {
            fprintf(stderr, "shmem_enabled is %s", mode);
            exit(T_SKIP);
        }
    }
}

// ---- a file that is guest memory --------------------------------------------------------------------

// Pages of the file outside of the block must never change.
class File {
public:
    explicit File(uint64_t pages, unsigned flags = 0)
        : npages(pages), fd_(memfd_create("holes", MFD_CLOEXEC | flags)),
          nbytes_((first_page + npages + tail_pages) * page_bytes)
    {
        T_CHECK(fd_ && ftruncate(fd_.get(), static_cast<off_t>(nbytes_)) == 0);
        // As the kernel places memory that may be huge, which depends on the machine's settings.
        void *room = mmap(nullptr, nbytes_ + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        T_CHECK(room != MAP_FAILED);
        room_ = static_cast<uint8_t *>(room);
        void *map = mmap(room_ + (align - reinterpret_cast<uintptr_t>(room_) % align), nbytes_,
                         PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_.get(), 0);
        T_CHECK(map != MAP_FAILED);
        base_ = static_cast<uint8_t *>(map);
        memset(base_, 0xA5, first_page * page_bytes);
        memset(page(npages), 0xA5, tail_pages * page_bytes);
    }
    File(const File &) = delete;
    File &operator=(const File &) = delete;
    ~File()
    {
        T_EQUAL(std::count(base_, page(0), 0xA5), first_page * page_bytes);
        T_EQUAL(std::count(page(npages), base_ + nbytes_, 0xA5), tail_pages * page_bytes);
        munmap(room_, nbytes_ + align);
    }
    int fd() const { return fd_.get(); }
    void close_fd() { fd_.reset(); }
    uint8_t *page(uint64_t index) const { return base_ + (first_page + index) * page_bytes; }
    // By the file: looking at the memory would fill the hole.
    bool hole(uint64_t index) const
    {
        const auto at = static_cast<off_t>((first_page + index) * page_bytes);
        return lseek(fd_.get(), at, SEEK_HOLE) == at;
    }
    vmth::MemoryBlock block(bool anew = true) const
    {
        vmth::MemoryBlock one = {page(0), npages, anew};
        one.fd = fd_.get();
        one.offset = first_page * page_bytes;
        return one;
    }

    const uint64_t npages;

private:
    UniqueFd fd_;
    const size_t nbytes_;
    uint8_t *room_;
    uint8_t *base_;
};

// ---- calls that fail ----------------------------------------------------------------------------------

// What pwrite does: take `most` bytes at a time, with every other call interrupted; and from call `from`
// on fail with `error`.
struct Disk {
    int error = 0;
    size_t from = 0;
    size_t most = SIZE_MAX;
    bool zero = false;    // say that nothing was written
    bool damage = false;  // write something else, and say that all is well
};
inline Disk disk;
inline std::atomic<size_t> calls{0};
inline std::atomic<uint64_t> bytes_written{0};

inline ssize_t faulty_pwrite(int fd, const void *buffer, size_t nbytes, off_t offset)
{
    const size_t call = calls++;
    if (call >= disk.from && (disk.error != 0 || disk.zero)) {
        errno = disk.error;
        return disk.zero ? 0 : -1;
    }
    if (disk.most != SIZE_MAX && call % 2 == 1) {
        errno = EINTR;
        return -1;
    }
    nbytes = std::min(nbytes, disk.most);
    Bytes copy(static_cast<const uint8_t *>(buffer), static_cast<const uint8_t *>(buffer) + nbytes);
    copy[nbytes / 2] ^= disk.damage ? 1 : 0;
    const ssize_t put = pwrite(fd, copy.data(), nbytes, offset);
    bytes_written += put > 0 ? static_cast<uint64_t>(put) : 0;
    return put;
}

inline const vmth_file_ops faulty = {pread, faulty_pwrite};

inline void reset_disk(const Disk &how = {})
{
    disk = how;
    calls = 0;
    bytes_written = 0;
}

inline std::atomic<uint64_t> populated{0};  // pages, for writing
inline std::atomic<uint64_t> asked{0};      // calls of any kind

inline const vmth_populate_ops populating = {
    [](void *, void *address, size_t nbytes, vmth_populate_kind kind) {
        asked++;
        populated += kind == VMTH_POPULATE_WRITE ? nbytes / page_bytes : 0;
        const vmth_populate_ops *ops = vmth_populate_system_ops();
        return ops->populate(ops->ctx, address, nbytes, kind);
    },
    [](void *, void *, size_t) -> int64_t { return -ENOSYS; },  // no huge page is looked for
    nullptr};

// ---- both ends ----------------------------------------------------------------------------------------

struct Options {
    unsigned channels = 1;
    uint32_t forms = 0;
    bool anew = true;
    bool digest = true;
    std::vector<vmth_run> present = {};  // pages that hold something else at the destination
    const vmth_populate_ops *populate = &populating;
};

struct Moved {
    Moved(const File &file, const Options &options) : Moved(file.block(options.anew), options) {}
    Moved(vmth::MemoryBlock block, const Options &options)
        : npages(block.npages), memory(block.host), source(npages), bits(all_bits(npages)), maybe_nonzero(bits.size())
    {
        for (const vmth_run &run : options.present) {
            vmth_bitmap_set_range(maybe_nonzero.data(), run.page, run.npages);
            memset(memory + run.page * page_bytes, 0xEE, run.npages * page_bytes);
        }
        populated = asked = 0;
        source.randomize(1);
        vmth::SenderOptions sending;
        sending.digest = options.digest;
        sending.forms = options.forms;
        sender = make_sender(source, sending);
        vmth::ReceiverOptions receiving;
        receiving.hash_seed = seed;
        receiving.digest = options.digest;
        receiving.channels = options.channels;
        receiving.forms = options.forms;
        receiving.files = &faulty;
        receiving.populate = options.populate;
        receiver = std::make_unique<vmth::Receiver>(
            std::vector<vmth::MemoryBlock>{block}, page_bytes, receiving,
            std::vector<const uint64_t *>{maybe_nonzero.data()}, std::vector<size_t>{bits.size()});
        for (unsigned i = 0; i < options.channels; i++) {
            FdPair fds = unix_pair();
            sender->add_channel(fds.first.get(), i);
            receiver->attach(fds.second.get(), i);
        }
        if (options.forms != 0) {
            sender->set_forms({options.forms, 1});
        }
    }
    void round(uint32_t number, const std::vector<uint64_t> &which)
    {
        sender->send(0, 0, npages, which.data(), which.size(), number);
        T_CHECK(sender->barrier(number, 0));
    }
    void round(uint32_t number) { round(number, bits); }
    bool digests_equal()
    {
        const vmth_digest ours = sender->hashes().total();
        const vmth_digest theirs = receiver->hashes().total();
        return ours.sum.lo == theirs.sum.lo && ours.sum.hi == theirs.sum.hi &&
               ours.pages == theirs.pages;
    }
    void finish()
    {
        T_CHECK(digests_equal());
        sender->finish();
        T_CHECK(receiver->wait(0));
        T_CHECK(digests_equal());
        receiver->close();
        T_EQUAL(memcmp(source.page(0), memory, npages * page_bytes), 0);
    }
    uint64_t written() const { return receiver->counters().written_pages.get(); }

    const uint64_t npages;
    uint8_t *memory;
    Memory source;
    std::vector<uint64_t> bits;
    std::vector<uint64_t> maybe_nonzero;
    std::unique_ptr<vmth::Sender> sender;
    std::unique_ptr<vmth::Receiver> receiver;
};

}  // namespace t

#endif

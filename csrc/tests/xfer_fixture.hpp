// SPDX-License-Identifier: Apache-2.0
// What the tests of xfer share: guarded memory, socket pairs, both ends, and packets made by hand.
#ifndef VMTH_TESTS_XFER_FIXTURE_HPP
#define VMTH_TESTS_XFER_FIXTURE_HPP

#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/t_check.h"
#include "xfer/receiver.hpp"
#include "xfer/sender.hpp"
#include "xfer/unique_fd.hpp"

namespace t {

using vmth::ErrorKind;
using vmth::TransferError;
using vmth::UniqueFd;

constexpr size_t page_bytes = 4096;
constexpr uint64_t seed = 0x5eed;

// Shared anonymous memory (a forked child may write to it) between two guard areas of one page that must
// never change.
class Memory {
public:
    explicit Memory(uint64_t npages, int flags = 0) : npages_(npages), flags_(flags)
    {
        void *map = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_ANONYMOUS | flags, -1, 0);
        T_CHECK(map != MAP_FAILED);
        base_ = static_cast<uint8_t *>(map);
        memset(base_, 0xA5, page_bytes);
        memset(base_ + bytes() - page_bytes, 0xA5, page_bytes);
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory()
    {
        for (size_t i = 0; i < page_bytes; i++) {
            T_EQUAL(base_[i], 0xA5);
            T_EQUAL(base_[bytes() - page_bytes + i], 0xA5);
        }
        munmap(base_, bytes());
    }

    uint8_t *page(uint64_t index) { return base_ + (1 + index) * page_bytes; }
    uint64_t npages() const { return npages_; }
    vmth::MemoryBlock block() { return {page(0), npages_}; }
    void randomize(uint64_t state)
    {
        auto *words = reinterpret_cast<uint64_t *>(page(0));
        for (size_t i = 0; i < npages_ * page_bytes / 8; i++) {
            words[i] = t_random(&state);
        }
    }
    bool equals(Memory &other) { return memcmp(page(0), other.page(0), npages_ * page_bytes) == 0; }

private:
    size_t bytes() const { return (npages_ + 2) * page_bytes; }
    uint64_t npages_;
    int flags_;
    uint8_t *base_;
};

using FdPair = std::pair<UniqueFd, UniqueFd>;

inline FdPair unix_pair()
{
    int fds[2];
    T_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

// A connected pair over loopback; `family` AF_INET or AF_INET6. Empty where there is no such loopback.
inline FdPair tcp_pair(int family = AF_INET)
{
    UniqueFd listener(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    UniqueFd client(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_storage address = {};
    address.ss_family = static_cast<sa_family_t>(family);
    if (family == AF_INET) {
        reinterpret_cast<sockaddr_in *>(&address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    } else {
        reinterpret_cast<sockaddr_in6 *>(&address)->sin6_addr = in6addr_loopback;
    }
    socklen_t length = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    auto *raw = reinterpret_cast<sockaddr *>(&address);
    if (!listener || bind(listener.get(), raw, length) != 0 || listen(listener.get(), 1) != 0) {
        return {};
    }
    T_EQUAL(getsockname(listener.get(), raw, &length), 0);
    T_EQUAL(connect(client.get(), raw, length), 0);
    return {std::move(client), UniqueFd(accept(listener.get(), nullptr, nullptr))};
}

inline std::vector<uint64_t> all_bits(uint64_t npages)
{
    return std::vector<uint64_t>((npages + 63) / 64, ~uint64_t{0});
}

inline std::unique_ptr<vmth::Receiver> make_receiver(Memory &memory, unsigned channels,
                                                     bool digest = true, bool holes = false,
                                                     uint32_t forms = 0)
{
    vmth::ReceiverOptions options;
    options.hash_seed = seed;
    options.digest = digest;
    options.channels = channels;
    options.forms = forms;
    std::vector<uint64_t> bits((memory.npages() + 63) / 64, holes ? 0 : ~uint64_t{0});
    return std::make_unique<vmth::Receiver>(std::vector<vmth::MemoryBlock>{memory.block()},
                                            page_bytes, options,
                                            std::vector<const uint64_t *>{bits.data()},
                                            std::vector<size_t>{bits.size()});
}

inline std::unique_ptr<vmth::Sender> make_sender(Memory &memory, vmth::SenderOptions options = {})
{
    options.hash_seed = seed;
    return std::make_unique<vmth::Sender>(std::vector<vmth::MemoryBlock>{memory.block()}, page_bytes,
                                          options);
}

// Both ends over their own sockets; `connect` nullptr leaves them, and every thread, for later.
class Pair {
public:
    Pair(uint64_t npages, unsigned channels, FdPair (*connect)() = unix_pair,
         vmth::SenderOptions options = {}, int flags = 0, bool holes = false)
        : source(npages, flags), destination(npages, flags), bits(all_bits(npages)),
          sender(make_sender(source, options)),
          receiver(make_receiver(destination, channels, options.digest, holes, options.forms))
    {
        if (connect != nullptr) {
            connect_channels(channels, connect);
        }
    }

    void connect_channels(unsigned channels, FdPair (*connect)())
    {
        for (unsigned i = 0; i < channels; i++) {
            FdPair fds = connect();
            sender->add_channel(fds.first.get(), i);
            receiver->attach(fds.second.get(), i);
        }
    }

    void send_all(uint32_t round)
    {
        sender->send(0, 0, source.npages(), bits.data(), bits.size(), round);
    }
    bool digests_equal()
    {
        vmth_digest ours = sender->hashes().total();
        vmth_digest theirs = receiver->hashes().total();
        return ours.sum.lo == theirs.sum.lo && ours.sum.hi == theirs.sum.hi &&
               ours.pages == theirs.pages;
    }
    // Memory and digests are equal. Taking the digest before and after orders our reading of the
    // destination with its threads' writing; without a digest the memory is compared only once everything
    // has ended.
    bool same()
    {
        return digests_equal() && (!sender->hashes().enabled() || source.equals(destination)) &&
               digests_equal();
    }
    void finish()
    {
        sender->finish();
        T_CHECK(receiver->wait(0));
        T_CHECK(same());
    }

    Memory source;
    Memory destination;
    std::vector<uint64_t> bits;
    std::unique_ptr<vmth::Sender> sender;
    std::unique_ptr<vmth::Receiver> receiver;
};

// Runs body, which must throw a TransferError; returns it.
inline TransferError expect_error(const std::function<void()> &body)
{
    try {
        body();
    } catch (const TransferError &error) {
        return error;
    }
    fprintf(stderr, "expected a TransferError\n");
    exit(T_FAIL);
}

// ---- packets made by hand -------------------------------------------------------------------------

using Bytes = std::vector<uint8_t>;

inline Bytes packet(vmth_packet_header header, const std::vector<vmth_desc> &descs,
                    const Bytes &payload = {})
{
    Bytes desc(descs.size() * VMTH_DESC_REF_BYTES);
    size_t used = 0;
    for (const vmth_desc &one : descs) {
        used += vmth_desc_encode(&one, desc.data() + used, desc.size() - used);
        header.npages += one.npages;
    }
    desc.resize(used);
    header.ndesc = static_cast<uint32_t>(descs.size());
    header.desc_bytes = static_cast<uint32_t>(desc.size());
    header.payload_bytes = static_cast<uint32_t>(payload.size());
    Bytes out(VMTH_PACKET_HEADER_BYTES);
    vmth_packet_encode_header(&header, desc.data(), seed, out.data());
    out.insert(out.end(), desc.begin(), desc.end());
    out.insert(out.end(), payload.begin(), payload.end());
    return out;
}

inline Bytes control(vmth_packet_kind kind, uint64_t seq, unsigned channel = 0)
{
    vmth_packet_header header = {};
    header.kind = static_cast<uint8_t>(kind);
    header.seq = seq;
    header.channel = static_cast<uint16_t>(channel);
    return packet(header, {});
}

inline Bytes pages(uint64_t seq, const std::vector<vmth_desc> &descs, const Bytes &payload = {},
                   unsigned channel = 0)
{
    vmth_packet_header header = {};
    header.kind = VMTH_PACKET_PAGES;
    header.seq = seq;
    header.channel = static_cast<uint16_t>(channel);
    return packet(header, descs, payload);
}

inline vmth_desc desc(vmth_page_form form, uint64_t page, uint32_t npages)
{
    vmth_desc one = {};
    one.form = static_cast<uint8_t>(form);
    one.page = page;
    one.npages = npages;
    return one;
}

inline Bytes acks(const std::vector<vmth_ack> &list, const std::vector<vmth_run> &missed = {})
{
    Bytes body(list.size() * VMTH_ACK_BYTES + missed.size() * VMTH_DESC_BYTES);
    for (size_t i = 0; i < list.size(); i++) {
        vmth_ack_encode(&list[i], body.data() + i * VMTH_ACK_BYTES);
    }
    vmth_packet_header header = {};
    uint8_t *at = body.data() + list.size() * VMTH_ACK_BYTES;
    for (const vmth_run &run : missed) {
        vmth_desc one = desc(VMTH_FORM_SAME, run.page, static_cast<uint32_t>(run.npages));
        at += vmth_desc_encode(&one, at, VMTH_DESC_BYTES);
        header.npages += run.npages;
    }
    header.kind = VMTH_PACKET_ACK;
    header.seq = list.back().seq;
    header.ndesc = static_cast<uint32_t>(list.size());
    header.desc_bytes = static_cast<uint32_t>(body.size());
    Bytes out(VMTH_PACKET_HEADER_BYTES);
    vmth_packet_encode_header(&header, body.data(), seed, out.data());
    out.insert(out.end(), body.begin(), body.end());
    return out;
}

// False when the other end went away first.
inline bool write_all(int fd, const uint8_t *bytes, size_t nbytes)
{
    while (nbytes > 0) {
        ssize_t sent = ::send(fd, bytes, nbytes, MSG_NOSIGNAL);
        if (sent <= 0) {
            return false;
        }
        bytes += sent;
        nbytes -= static_cast<size_t>(sent);
    }
    return true;
}

inline bool write_all(int fd, const Bytes &bytes)
{
    return write_all(fd, bytes.data(), bytes.size());
}

// Fewer bytes at the end of the stream.
inline Bytes read_all(int fd, size_t nbytes)
{
    Bytes out(nbytes);
    ssize_t got = nbytes > 0 ? recv(fd, out.data(), nbytes, MSG_WAITALL) : 0;
    out.resize(got > 0 ? static_cast<size_t>(got) : 0);
    return out;
}

struct Packet {
    vmth_packet_header header = {};
    Bytes desc;
    Bytes payload;
};

// The next packet of `npages`-page memory's channel; kind 0 at the end of the stream.
inline Packet read_packet(int fd, uint64_t npages, unsigned channel = 0)
{
    Packet result;
    Bytes raw = read_all(fd, VMTH_PACKET_HEADER_BYTES);
    if (raw.size() < VMTH_PACKET_HEADER_BYTES) {
        return result;
    }
    vmth_packet_limits limits = {};
    limits.page_bytes = page_bytes;
    limits.nblocks = 1;
    limits.block_npages = &npages;
    limits.forms = ~0u;
    limits.channel = static_cast<uint16_t>(channel);
    vmth_packet_error error;
    T_EQUAL(vmth_packet_decode_header(raw.data(), &limits, &result.header, &error), 0);
    result.desc = read_all(fd, result.header.desc_bytes);
    T_EQUAL(vmth_packet_verify(raw.data(), result.desc.data(), result.desc.size(), seed, &error), 0);
    result.payload = read_all(fd, result.header.payload_bytes);
    return result;
}

// ---- threads and descriptors ------------------------------------------------------------------------

inline size_t entries(const char *directory)
{
    size_t count = 0;
    DIR *dir = opendir(directory);
    T_CHECK(dir != nullptr);
    while (readdir(dir) != nullptr) {
        count++;
    }
    closedir(dir);
    return count;
}

// Runs body in a thread; sleeping() returns once that thread is blocked in the kernel.
class Blocked {
public:
    explicit Blocked(std::function<void()> body)
        : thread_([this, body = std::move(body)] {
              tid_.store(static_cast<int>(syscall(SYS_gettid)));
              body();
          })
    {
        while (tid_.load() == 0) {
            sched_yield();
        }
    }
    Blocked(const Blocked &) = delete;
    Blocked &operator=(const Blocked &) = delete;
    ~Blocked() { thread_.join(); }

    void sleeping() const { wait_asleep("/proc/self/task/" + std::to_string(tid_.load()) + "/stat"); }

    static void wait_asleep(const std::string &stat)
    {
        // Asleep in two looks in a row, so that a short wait on a lock does not count.
        for (int seen = 0; seen < 50;) {
            FILE *file = fopen(stat.c_str(), "r");
            char state = 'X';
            if (file != nullptr) {
                T_CHECK(fscanf(file, "%*d (%*[^)]) %c", &state) == 1);
                fclose(file);
            }
            T_CHECK(state != 'X');
            seen = state == 'S' ? seen + 1 : 0;
            sched_yield();
        }
    }

private:
    std::atomic<int> tid_{0};
    std::thread thread_;
};

// The stat file of the thread of this name; empty if there is none (yet).
inline std::string thread_stat(const std::string &name)
{
    DIR *dir = opendir("/proc/self/task");
    T_CHECK(dir != nullptr);
    std::string found;
    while (dirent *entry = readdir(dir)) {
        std::string base = std::string("/proc/self/task/") + entry->d_name;
        FILE *file = fopen((base + "/comm").c_str(), "r");
        char comm[64] = "";
        if (file != nullptr) {
            if (fscanf(file, "%63s", comm) == 1 && name == comm) {
                found = base + "/stat";
            }
            fclose(file);
        }
    }
    closedir(dir);
    return found;
}

// Waits until the thread of this name, just started, is blocked in the kernel.
inline void thread_sleeping(const std::string &name)
{
    // A thread takes its name itself, once it gets to run.
    std::string found;
    while ((found = thread_stat(name)).empty()) {
        sched_yield();
    }
    Blocked::wait_asleep(found);
}

inline void copy_page(Memory &memory, uint64_t to, uint64_t from)
{
    memcpy(memory.page(to), memory.page(from), page_bytes);
}

// Of a sender to which these forms are agreed on; none is on.
inline vmth::SenderOptions with_forms(uint32_t agreed)
{
    vmth::SenderOptions options;
    options.forms = agreed;
    return options;
}

}  // namespace t

#endif

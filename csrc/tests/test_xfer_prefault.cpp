// SPDX-License-Identifier: Apache-2.0
// Populating ahead: which pages, in which way, once; and what is left where the kernel refuses.
#include <algorithm>
#include <cerrno>
#include <mutex>

#include "tests/xfer_fixture.hpp"

using namespace t;

namespace {

constexpr uint64_t npages = 600;

struct Call {
    uint64_t page;
    uint64_t npages;
    vmth_populate_kind kind;
};

// Notes the calls for one memory and answers `result`.
struct Kernel {
    Memory *memory;
    int result = 0;
    std::mutex mutex = {};
    std::vector<Call> calls = {};

    vmth_populate_ops ops()
    {
        return {[](void *ctx, void *address, size_t nbytes, vmth_populate_kind kind) {
                    auto *self = static_cast<Kernel *>(ctx);
                    std::lock_guard<std::mutex> lock(self->mutex);
                    auto at = static_cast<uint8_t *>(address) - self->memory->page(0);
                    self->calls.push_back(
                        {static_cast<uint64_t>(at) / page_bytes, nbytes / page_bytes, kind});
                    return self->result;
                },
                nullptr,  // for holes of files
                this};
    }
    uint64_t pages(vmth_populate_kind kind)
    {
        uint64_t sum = 0;
        for (const Call &call : calls) {
            sum += call.kind == kind ? call.npages : 0;
        }
        return sum;
    }
    bool asked(uint64_t page)
    {
        return std::any_of(calls.begin(), calls.end(), [page](const Call &call) {
            return page >= call.page && page - call.page < call.npages;
        });
    }
    // The kernel maps what is in memory around a page that is asked for to be read: 64 KiB, aligned.
    bool mapped(uint64_t page)
    {
        return asked(page) || std::any_of(calls.begin(), calls.end(), [&](const Call &call) {
                   return call.kind == VMTH_POPULATE_READ && window(call.page) == window(page);
               });
    }
    uintptr_t window(uint64_t page)
    {
        return reinterpret_cast<uintptr_t>(memory->page(page)) / (64 * 1024);
    }
};

// Both ends over memory that was (or was not) mapped anew. At the destination pages below `present` may
// hold something, the others are holes.
struct Moved {
    explicit Moved(bool anew, uint64_t present, int result = 0)
        : source(npages), destination(npages), reads{&source, result}, writes{&destination, result},
          read_ops(reads.ops()), write_ops(writes.ops()), bits(all_bits(npages)),
          maybe_nonzero(bits.size())
    {
        vmth_bitmap_set_range(maybe_nonzero.data(), 0, present);
        vmth::SenderOptions options;
        options.hash_seed = seed;
        options.populate = &read_ops;
        sender = std::make_unique<vmth::Sender>(block(source, anew), page_bytes, options);
        vmth::ReceiverOptions receiving;
        receiving.hash_seed = seed;
        receiving.channels = 2;
        receiving.populate = &write_ops;
        receiver = std::make_unique<vmth::Receiver>(
            block(destination, anew), page_bytes, receiving,
            std::vector<const uint64_t *>{maybe_nonzero.data()}, std::vector<size_t>{bits.size()});
        source.randomize(1);
        memset(source.page(100), 0, 10 * page_bytes);
        memset(source.page(400), 0, 10 * page_bytes);
        for (unsigned i = 0; i < 2; i++) {
            FdPair fds = unix_pair();
            sender->add_channel(fds.first.get(), i);
            receiver->attach(fds.second.get(), i);
        }
    }
    static std::vector<vmth::MemoryBlock> block(Memory &memory, bool anew)
    {
        vmth::MemoryBlock one = memory.block();
        one.mapped_anew = anew;
        return {one};
    }
    // All but pages [200, 300), which are told as holes.
    void round(uint32_t number)
    {
        sender->send(0, 0, 200, bits.data(), bits.size(), number);
        sender->send_told(VMTH_FORM_HOLE, 0, {{200, 100}}, number);
        sender->send(0, 300, 300, bits.data(), bits.size(), number);
        T_CHECK(sender->barrier(number, 0));
        vmth_digest ours = sender->hashes().total();
        vmth_digest theirs = receiver->hashes().total();
        T_CHECK(ours.sum.lo == theirs.sum.lo && ours.sum.hi == theirs.sum.hi);
        T_EQUAL(theirs.pages, npages);
    }
    void finish()
    {
        sender->finish();
        T_CHECK(receiver->wait(0));
        memset(source.page(200), 0, 100 * page_bytes);
        T_CHECK(source.equals(destination));
    }

    Memory source;
    Memory destination;
    Kernel reads;
    Kernel writes;
    vmth_populate_ops read_ops;
    vmth_populate_ops write_ops;
    std::vector<uint64_t> bits;
    std::vector<uint64_t> maybe_nonzero;
    std::unique_ptr<vmth::Sender> sender;
    std::unique_ptr<vmth::Receiver> receiver;
};

void test_all_pages_once_and_no_hole()
{
    Moved moved(true, 350);
    moved.round(0);
    const size_t once = moved.reads.calls.size() + moved.writes.calls.size();
    moved.round(1);
    T_EQUAL(moved.reads.calls.size() + moved.writes.calls.size(), once);
    // What is there: one page for many. Holes that are filled, [350, 400) and [410, 600): every page.
    T_CHECK(moved.reads.pages(VMTH_POPULATE_READ) <= npages / 8);
    T_EQUAL(moved.reads.pages(VMTH_POPULATE_WRITE), 0);
    T_CHECK(moved.writes.pages(VMTH_POPULATE_READ) <= npages / 8);
    T_EQUAL(moved.writes.pages(VMTH_POPULATE_WRITE), 240);
    for (uint64_t page = 0; page < npages; page++) {
        const bool zero = (page >= 100 && page < 110) || (page >= 400 && page < 410);
        const bool hole = page >= 200 && page < 300;
        T_CHECK(hole ? !moved.reads.asked(page) : moved.reads.mapped(page));
        T_CHECK(hole || zero ? !moved.writes.asked(page) : moved.writes.mapped(page));
    }
    T_CHECK(moved.sender->fallbacks().size() == 1);  // no zero-copy on a unix socket
    T_CHECK(moved.receiver->fallbacks().empty());
    moved.finish();
}

void test_only_holes_of_memory_mapped_before()
{
    Moved moved(false, 350);
    moved.round(0);
    T_CHECK(moved.reads.calls.empty());
    T_EQUAL(moved.writes.pages(VMTH_POPULATE_READ), 0);
    T_EQUAL(moved.writes.pages(VMTH_POPULATE_WRITE), 240);
    moved.finish();
}

void test_refusal_is_named_and_harmless()
{
    for (int error : {EINVAL, ENOMEM, EFAULT}) {
        Moved moved(true, 0, -error);
        moved.round(0);
        moved.round(1);
        // Two threads may have been on their way when the first was refused.
        T_CHECK(moved.reads.calls.size() <= 2 && moved.writes.calls.size() <= 2);
        T_EQUAL(moved.receiver->fallbacks().size(), 1);
        T_EQUAL(moved.receiver->fallbacks()[0].find("populate: "), 0);
        std::vector<std::string> names = moved.sender->fallbacks();
        T_EQUAL(std::count(names.begin(), names.end(), moved.receiver->fallbacks()[0]), 1);
        moved.finish();
    }
}

// The index of dedup: for the pages that the destination keeps, when it is first wanted, once; and a kernel
// that does not want to costs nothing but time.
void test_the_index_is_there_before_it_is_wanted()
{
    constexpr uint32_t dedup = vmth::form_bit(VMTH_FORM_DEDUP);
    constexpr uint64_t kept = 131072, handed_on = 65536, at_once = 2u << 20;
    const auto needed = uint64_t{2} * kept * VMTH_CONTENT_ENTRY_BYTES;
    for (int result : {0, -EINVAL}) {
        for (bool keeps : {true, false}) {
            Memory mine(kept), other(handed_on);
            std::vector<vmth::MemoryBlock> blocks{mine.block(), other.block()};
            blocks[0].handed_on = !keeps;
            blocks[1].handed_on = true;
            Kernel kernel{&mine, result};
            const vmth_populate_ops ops = kernel.ops();
            vmth::SenderOptions options;
            options.forms = dedup;
            options.populate = &ops;
            vmth::Sender sender(blocks, page_bytes, options);
            sender.set_forms({0, 1});
            T_CHECK(kernel.calls.empty());
            vmth::TransferError refused = expect_error([&] { sender.set_forms({dedup, 0}); });
            T_CHECK(refused.kind() == vmth::ErrorKind::usage);
            T_CHECK(kernel.calls.empty());
            sender.set_forms({dedup, 1});
            sender.set_forms({0, 1});
            sender.set_forms({dedup, 1});
            T_EQUAL(kernel.pages(VMTH_POPULATE_READ), 0);
            const uint64_t asked = kernel.pages(VMTH_POPULATE_WRITE) * page_bytes;
            T_EQUAL(asked, keeps ? (result == 0 ? needed : at_once) : 0);
            T_EQUAL(kernel.calls.size(), keeps ? (result == 0 ? needed / at_once : 1) : 0);
        }
    }
}

// The kernel's own call: the range becomes resident, its neighbours stay holes.
void test_system_call()
{
    Memory memory(300);
    const vmth_populate_ops *ops = vmth_populate_system_ops();
    int result = ops->populate(ops->ctx, memory.page(100), 64 * page_bytes, VMTH_POPULATE_WRITE);
    if (result == -EINVAL) {
        fprintf(stderr, "this kernel cannot populate\n");
        exit(T_SKIP);
    }
    T_EQUAL(result, 0);
    unsigned char resident[300];
    T_EQUAL(mincore(memory.page(0), sizeof(resident) * page_bytes, resident), 0);
    for (uint64_t page = 1; page < 299; page++) {  // the first and last lie beside the guards
        T_EQUAL(resident[page] & 1, page >= 100 && page < 164 ? 1 : 0);
    }
    T_EQUAL(ops->populate(ops->ctx, memory.page(0), page_bytes, VMTH_POPULATE_READ), 0);
    void *gone = mmap(nullptr, page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    T_CHECK(gone != MAP_FAILED);
    munmap(gone, page_bytes);
    T_EQUAL(ops->populate(ops->ctx, gone, page_bytes, VMTH_POPULATE_WRITE), -ENOMEM);
}

}  // namespace

int main()
{
    test_all_pages_once_and_no_hole();
    test_only_holes_of_memory_mapped_before();
    test_refusal_is_named_and_harmless();
    test_the_index_is_there_before_it_is_wanted();
    test_system_call();
    return T_PASS;
}

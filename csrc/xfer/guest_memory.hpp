// SPDX-License-Identifier: Apache-2.0
// The ramblocks that an end reads from or lands pages in. Not owned: the caller keeps them mapped.
//
// A block without an address is *hostless*: the sender gets its pages in lent buffers, and the receiver
// hands them on in a stream.
#ifndef VMTH_XFER_GUEST_MEMORY_HPP
#define VMTH_XFER_GUEST_MEMORY_HPP

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "vmth/packet.h"
#include "xfer/failure.hpp"

namespace vmth {

struct MemoryBlock {
    uint8_t *host;  // address of page 0; nullptr: hostless
    uint64_t npages;
    bool mapped_anew = false;  // for this transfer: its pages are not in this process's page table
    bool handed_on = false;    // sender: the destination keeps none of its pages, so none is a base
    int fd = -1;               // receiver: the file that is mapped shared at `host`; -1: none is known
    uint64_t offset = 0;       // of page 0 in it
};

class GuestMemory {
public:
    GuestMemory(std::vector<MemoryBlock> blocks, size_t page_bytes)
        : blocks_(std::move(blocks)), page_bytes_(page_bytes)
    {
        bool power_of_two = page_bytes != 0 && (page_bytes & (page_bytes - 1)) == 0;
        if (!power_of_two || page_bytes < 4096 || page_bytes > (2u << 20)) {
            throw TransferError(ErrorKind::usage,
                                "page_bytes " + std::to_string(page_bytes) +
                                    ", allowed a power of two from 4096 to 2097152");
        }
        if (blocks_.empty() || blocks_.size() > VMTH_MAX_BLOCKS) {
            throw TransferError(ErrorKind::usage, std::to_string(blocks_.size()) +
                                                      " blocks, allowed 1 to " +
                                                      std::to_string(VMTH_MAX_BLOCKS));
        }
        for (const MemoryBlock &block : blocks_) {
            npages_.push_back(block.npages);
        }
    }

    size_t nblocks() const noexcept { return blocks_.size(); }
    size_t page_bytes() const noexcept { return page_bytes_; }
    uint64_t npages(size_t block) const noexcept { return npages_[block]; }
    uint64_t total_pages() const noexcept
    {
        return std::accumulate(npages_.begin(), npages_.end(), uint64_t{0});
    }
    bool mapped_anew(size_t block) const noexcept { return blocks_[block].mapped_anew; }
    bool handed_on(size_t block) const noexcept { return blocks_[block].handed_on; }
    int fd(size_t block) const noexcept { return hostless(block) ? -1 : blocks_[block].fd; }
    uint64_t file_offset(size_t block, uint64_t page) const noexcept
    {
        return blocks_[block].offset + page * page_bytes_;
    }
    bool hostless(size_t block) const noexcept { return blocks_[block].host == nullptr; }
    // Not for a hostless block.
    uint8_t *host(size_t block, uint64_t page) const noexcept
    {
        return blocks_[block].host + page * page_bytes_;
    }

    // Bounds for packets of these blocks on one channel; points into this object.
    vmth_packet_limits limits(unsigned channel, uint32_t forms) const noexcept
    {
        vmth_packet_limits limits = {};
        limits.page_bytes = static_cast<uint32_t>(page_bytes_);
        limits.nblocks = static_cast<uint32_t>(npages_.size());
        limits.block_npages = npages_.data();
        limits.forms = forms;
        limits.channel = static_cast<uint16_t>(channel);
        return limits;
    }

    // Throws TransferError(usage) unless [page, page + npages) lies in the block.
    void check_range(uint64_t block, uint64_t page, uint64_t npages) const
    {
        if (block >= blocks_.size()) {
            throw TransferError(ErrorKind::usage, "block " + std::to_string(block) + ", allowed 0 to " +
                                                      std::to_string(blocks_.size() - 1));
        }
        if (page > npages_[block] || npages > npages_[block] - page) {
            throw TransferError(ErrorKind::usage,
                                "pages " + std::to_string(page) + " + " + std::to_string(npages) +
                                    ", allowed up to " + std::to_string(npages_[block]) +
                                    " in block " + std::to_string(block));
        }
    }

private:
    std::vector<MemoryBlock> blocks_;
    std::vector<uint64_t> npages_;
    size_t page_bytes_;
};

}  // namespace vmth

#endif

// SPDX-License-Identifier: Apache-2.0
// Appending pages to the packet under construction.
#include "xfer/packet_parts.hpp"

#include <algorithm>

namespace vmth {

namespace {

void extend(std::vector<vmth_run> &runs, uint64_t page, uint64_t npages)
{
    if (!runs.empty() && runs.back().page + runs.back().npages == page) {
        runs.back().npages += npages;
    } else {
        runs.push_back({page, npages});
    }
}

vmth_desc desc_of(vmth_page_form form, uint64_t page, uint64_t npages)
{
    vmth_desc desc = {};
    desc.page = page;
    desc.npages = static_cast<uint32_t>(npages);
    desc.form = static_cast<uint8_t>(form);
    return desc;
}

}  // namespace

void PacketParts::begin(size_t most_bytes)
{
    most_bytes_ = most_bytes;
    npages_ = 0;
    payload_bytes_ = 0;
    coded_bytes_ = 0;
    counts_.fill(0);
    descs_.clear();
    content_runs_.clear();
    zero_runs_.clear();
    payload_.clear();
}

// A plain descriptor joins the last one where it can: returns true then.
bool PacketParts::append(const vmth_desc &desc)
{
    npages_ += desc.npages;
    counts_[desc.form] += desc.npages;
    const bool joins = vmth_desc_bytes(desc.form) == VMTH_DESC_BYTES && !descs_.empty() &&
                       descs_.back().form == desc.form &&
                       descs_.back().page + descs_.back().npages == desc.page &&
                       descs_.back().npages <= UINT32_MAX - desc.npages;
    if (joins) {
        descs_.back().npages += desc.npages;
    } else {
        descs_.push_back(desc);
    }
    return joins;
}

void PacketParts::told(vmth_page_form form, uint64_t page, uint64_t npages)
{
    append(desc_of(form, page, npages));
    if (form != VMTH_FORM_FREE) {
        extend(zero_runs_, page, npages);
    }
}

void PacketParts::raw(const LentRun &run)
{
    append(desc_of(VMTH_FORM_NORMAL, run.page, run.npages));
    extend(content_runs_, run.page, run.npages);
    const bool together = run.stride == page_bytes_;
    const uint64_t at_once = together ? run.npages : 1;
    for (uint64_t i = 0; i < run.npages; i += at_once) {
        append_payload(run.at + i * run.stride, static_cast<size_t>(at_once) * page_bytes_);
    }
}

uint8_t *PacketParts::room(size_t nbytes)
{
    if (nbytes > most_bytes_ - coded_bytes_) {
        return nullptr;
    }
    coded_.resize(std::max(coded_.size(), most_bytes_));
    return coded_.data() + coded_bytes_;
}

void PacketParts::coded(const vmth_desc &desc)
{
    append(desc);
    extend(content_runs_, desc.page, desc.npages);
    if (desc.payload_bytes > 0) {
        append_payload(coded_.data() + coded_bytes_, desc.payload_bytes);
        coded_bytes_ += desc.payload_bytes;
    }
}

void PacketParts::append_payload(const uint8_t *at, size_t nbytes)
{
    auto *base = const_cast<uint8_t *>(at);  // sendmsg does not write through it
    payload_bytes_ += nbytes;
    if (!payload_.empty() &&
        static_cast<uint8_t *>(payload_.back().iov_base) + payload_.back().iov_len == base) {
        payload_.back().iov_len += nbytes;
    } else {
        payload_.push_back({base, nbytes});
    }
}

size_t PacketParts::encode(std::vector<uint8_t> &out) const
{
    const size_t before = out.size();
    size_t at = before;
    out.resize(before + descs_.size() * VMTH_DESC_REF_BYTES);
    for (const vmth_desc &desc : descs_) {
        at += vmth_desc_encode(&desc, out.data() + at, out.size() - at);
    }
    out.resize(at);
    return at - before;
}

}  // namespace vmth

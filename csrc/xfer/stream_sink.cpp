// SPDX-License-Identifier: Apache-2.0
// Records and sections of QEMU's stream around pages that are not copied: a vector entry for each page
// and for what stands before it costs the sending thread 275 ns a page, a copy into one buffer 375 ns.
#include "xfer/stream_sink.hpp"

#include <algorithm>
#include <cerrno>

namespace vmth {

namespace {

constexpr uint8_t section_part = 0x02;
constexpr uint8_t section_footer = 0x7e;
constexpr uint64_t flag_zero = 0x002;
constexpr uint64_t flag_page = 0x008;
constexpr uint64_t flag_eos = 0x010;
constexpr uint64_t flag_continue = 0x020;

constexpr size_t word_bytes = 8;
constexpr size_t section_bytes = 5;      // type and id; the footer is as long
constexpr size_t max_name_bytes = 256;   // with its length
constexpr uint64_t zeros_a_section = 4096;
// How soon a cancelled receiver is noticed behind a reader that does not read.
constexpr int wait_ms = 50;

void put_be(std::vector<uint8_t> &out, uint64_t value, size_t nbytes)
{
    for (size_t i = nbytes; i-- > 0;) {
        out.push_back(static_cast<uint8_t>(value >> (8 * i)));
    }
}

}  // namespace

StreamSink::StreamSink(const StreamSinkOptions &options, const GuestMemory &memory,
                       const FailureLatch &latch, const vmth_sock_ops *ops)
    : latch_(latch), page_bytes_(memory.page_bytes()), section_id_(options.section_id),
      channel_(options.fd, 0, ops, "stream sink")
{
    if (options.idstrs.size() != memory.nblocks()) {
        throw TransferError(ErrorKind::usage, std::to_string(options.idstrs.size()) +
                                                  " idstrs, allowed " +
                                                  std::to_string(memory.nblocks()));
    }
    for (const std::string &idstr : options.idstrs) {
        if (idstr.empty() || idstr.size() >= max_name_bytes) {
            throw TransferError(ErrorKind::usage, "idstr of " + std::to_string(idstr.size()) +
                                                      " bytes, allowed 1 to 255");
        }
        names_.push_back(std::string(1, static_cast<char>(idstr.size())) + idstr);
    }
}

// ---- sections ---------------------------------------------------------------------------------------

// `heads_` must not move once `iov_` points into it.
void StreamSink::begin_locked(uint32_t block, size_t records)
{
    heads_.clear();
    heads_.reserve(2 * section_bytes + max_name_bytes + (records + 1) * (word_bytes + 1));
    iov_.clear();
    name_ = &names_[block];
    heads_.push_back(section_part);
    put_be(heads_, section_id_, 4);
}

void StreamSink::record_locked(uint64_t page, uint64_t kind)
{
    put_be(heads_, page * page_bytes_ | kind | (name_ == nullptr ? flag_continue : 0), word_bytes);
    if (name_ != nullptr) {
        heads_.insert(heads_.end(), name_->begin(), name_->end());
        name_ = nullptr;
    }
}

void StreamSink::end_locked()
{
    put_be(heads_, flag_eos, word_bytes);
    heads_.push_back(section_footer);
    put_be(heads_, section_id_, 4);
}

void StreamSink::write_pages(uint32_t block, const std::vector<vmth_run> &runs,
                             const uint8_t *content)
{
    uint64_t records = 0;
    for (const vmth_run &run : runs) {
        records += run.npages;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    begin_locked(block, static_cast<size_t>(records));
    size_t listed = 0;  // bytes of heads_ that iov_ has
    auto list = [&] {
        iov_.push_back({heads_.data() + listed, heads_.size() - listed});
        listed = heads_.size();
    };
    for (const vmth_run &run : runs) {
        for (uint64_t i = 0; i < run.npages; i++) {
            record_locked(run.page + i, flag_page);
            list();
            // sendmsg does not write through it
            iov_.push_back({const_cast<uint8_t *>(content), static_cast<size_t>(page_bytes_)});
            content += page_bytes_;
        }
    }
    end_locked();
    list();
    write_locked();
}

void StreamSink::write_zeros(uint32_t block, const vmth_run &run)
{
    for (uint64_t done = 0; done < run.npages;) {
        const uint64_t take = std::min(zeros_a_section, run.npages - done);
        std::lock_guard<std::mutex> lock(mutex_);
        begin_locked(block, static_cast<size_t>(take));
        for (uint64_t i = 0; i < take; i++) {
            record_locked(run.page + done + i, flag_zero);
            heads_.push_back(0);
        }
        end_locked();
        iov_.push_back({heads_.data(), heads_.size()});
        write_locked();
        done += take;
    }
}

// ---- the socket -------------------------------------------------------------------------------------

// Never blocks in the send itself: a reader that does not read must not keep a cancelled receiver.
void StreamSink::write_locked()
{
    iovec *iov = iov_.data();
    size_t count = iov_.size();
    while (count > 0) {
        latch_.check();
        const ssize_t sent = channel_.write_some(iov, count, MSG_DONTWAIT);
        if (sent > 0) {
            const size_t used = advance(iov, count, static_cast<size_t>(sent));
            iov += used;
            count -= used;
        } else if (sent == 0) {
            channel_.wait(POLLOUT, wait_ms);
        } else {
            throw system_error(channel_.name() + ": send", static_cast<int>(-sent));
        }
    }
}

}  // namespace vmth

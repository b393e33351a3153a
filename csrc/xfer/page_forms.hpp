// SPDX-License-Identifier: Apache-2.0
// Which cheaper forms of a page both ends agreed on, and which of them are on now.
//
//   agreed   in the handshake, for the whole session: what the receiver takes
//   on       a subset of it, from any thread at any time: what the next packet may use
//
// normal, zero, hole and free need no agreement and are always on.
#ifndef VMTH_XFER_PAGE_FORMS_HPP
#define VMTH_XFER_PAGE_FORMS_HPP

#include <atomic>
#include <cstdint>

#include "vmth/packet.h"

namespace vmth {

constexpr uint32_t form_bit(vmth_page_form form) noexcept
{
    return 1u << form;
}

constexpr uint32_t plain_forms = form_bit(VMTH_FORM_NORMAL) | form_bit(VMTH_FORM_ZERO) |
                                 form_bit(VMTH_FORM_HOLE) | form_bit(VMTH_FORM_FREE);
// That a session may agree on.
constexpr uint32_t cheaper_forms = form_bit(VMTH_FORM_SAME) | form_bit(VMTH_FORM_DEDUP) |
                                   form_bit(VMTH_FORM_DELTA) | form_bit(VMTH_FORM_ZSTD) |
                                   form_bit(VMTH_FORM_REUSE);
// Of those, the ones that compare hashes: nothing without a digest.
constexpr uint32_t hashing_forms =
    form_bit(VMTH_FORM_SAME) | form_bit(VMTH_FORM_DEDUP) | form_bit(VMTH_FORM_DELTA);

const char *form_name(unsigned form) noexcept;

struct FormsSetting {
    uint32_t mask = 0;  // bit f: form f is on
    int zstd_level = 1;

    bool on(vmth_page_form form) const noexcept { return (mask & form_bit(form)) != 0; }
};

class FormsSwitch {
public:
    // Throws TransferError(usage) for a form that no session may agree on.
    FormsSwitch(uint32_t agreed, bool digest);

    uint32_t agreed() const noexcept { return agreed_; }
    // Agreed on, and with the digest that it may need.
    bool usable(vmth_page_form form) const noexcept
    {
        return (agreed_ & form_bit(form) & (digest_ ? ~0u : ~hashing_forms)) != 0;
    }
    bool hashing() const noexcept { return (agreed_ & hashing_forms) != 0 && digest_; }
    // Throws TransferError(usage) for a form that was not agreed on, one that needs the digest where it
    // is off, and a level outside vmth/codec.h's range.
    void check(const FormsSetting &setting) const;
    // The same, and changes nothing then.
    void set(const FormsSetting &setting);
    FormsSetting get() const noexcept;

private:
    const uint32_t agreed_;
    const bool digest_;
    std::atomic<uint64_t> setting_;  // mask, and the level in the upper half: read together
};

}  // namespace vmth

#endif

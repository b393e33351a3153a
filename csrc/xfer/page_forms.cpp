// SPDX-License-Identifier: Apache-2.0
// Checking and keeping the forms that are on.
#include "xfer/page_forms.hpp"

#include <string>

#include "vmth/codec.h"
#include "xfer/failure.hpp"

namespace vmth {

namespace {

std::string names_of(uint32_t mask)
{
    std::string names;
    for (unsigned form = 0; form < 32; form++) {
        if ((mask >> form & 1) != 0) {
            names += (names.empty() ? "" : ", ") + std::string(form_name(form));
        }
    }
    return names.empty() ? "none" : names;
}

TransferError refused(const std::string &what, uint32_t mask, uint32_t allowed)
{
    return TransferError(ErrorKind::usage,
                         what + " " + names_of(mask) + ", allowed " + names_of(allowed));
}

uint64_t packed(const FormsSetting &setting)
{
    return uint64_t{static_cast<uint32_t>(setting.zstd_level)} << 32 | setting.mask;
}

uint32_t checked(uint32_t agreed)
{
    if ((agreed & ~cheaper_forms) != 0) {
        throw refused("agreed forms", agreed, cheaper_forms);
    }
    return agreed;
}

}  // namespace

const char *form_name(unsigned form) noexcept
{
    switch (form) {
    case VMTH_FORM_NORMAL:
        return "normal";
    case VMTH_FORM_ZERO:
        return "zero";
    case VMTH_FORM_HOLE:
        return "hole";
    case VMTH_FORM_FREE:
        return "free";
    case VMTH_FORM_SAME:
        return "same";
    case VMTH_FORM_DEDUP:
        return "dedup";
    case VMTH_FORM_DELTA:
        return "delta";
    case VMTH_FORM_ZSTD:
        return "zstd";
    case VMTH_FORM_REUSE:
        return "reuse";
    default:
        return "unknown";
    }
}

FormsSwitch::FormsSwitch(uint32_t agreed, bool digest)
    : agreed_(checked(agreed)), digest_(digest), setting_(packed({}))
{
}

void FormsSwitch::check(const FormsSetting &setting) const
{
    if ((setting.mask & ~agreed_) != 0) {
        throw refused("forms", setting.mask, agreed_);
    }
    if (!digest_ && (setting.mask & hashing_forms) != 0) {
        throw refused("forms without a digest", setting.mask, agreed_ & ~hashing_forms);
    }
    if (setting.zstd_level < VMTH_CODEC_MIN_LEVEL || setting.zstd_level > VMTH_CODEC_MAX_LEVEL ||
        setting.zstd_level == 0) {
        throw TransferError(ErrorKind::usage,
                            "zstd level " + std::to_string(setting.zstd_level) + ", allowed " +
                                std::to_string(VMTH_CODEC_MIN_LEVEL) + " to " +
                                std::to_string(VMTH_CODEC_MAX_LEVEL) + " but 0");
    }
}

void FormsSwitch::set(const FormsSetting &setting)
{
    check(setting);
    setting_.store(packed(setting), std::memory_order_relaxed);
}

FormsSetting FormsSwitch::get() const noexcept
{
    const uint64_t value = setting_.load(std::memory_order_relaxed);
    return {static_cast<uint32_t>(value), static_cast<int>(static_cast<uint32_t>(value >> 32))};
}

}  // namespace vmth

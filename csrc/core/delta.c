/* SPDX-License-Identifier: Apache-2.0 */
/* Deltas of pages: encode from masks of changed bytes, which a kernel makes; apply. */
#include "vmth/delta.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "core/kernel_ops.h"
#include "core/page_size.h"

enum {
    MAX_NUMBER_BYTES = 4,
    /* A literal is copied in steps of so many bytes where there is room behind it. */
    STEP_BYTES = 16
};

/* The run not yet written, and where the last written one ended; offsets in the page. */
struct encoder {
    const uint8_t *now;
    size_t page_bytes;
    uint8_t *out;
    size_t room;
    size_t used;
    size_t written_end;
    size_t start;
    size_t end; /* start == end: no run */
};

static size_t number_bytes(size_t value)
{
    size_t nbytes = 1;

    for (; value >= 0x80; value >>= 7) {
        nbytes++;
    }
    return nbytes;
}

static uint8_t *write_number(uint8_t *to, size_t value)
{
    for (; value >= 0x80; value >>= 7) {
        *to++ = (uint8_t)(value | 0x80);
    }
    *to++ = (uint8_t)value;
    return to;
}

/* Write the pending run. False: no room. */
static bool flush(struct encoder *encoder)
{
    const size_t skip = encoder->start - encoder->written_end;
    const size_t length = encoder->end - encoder->start;
    const size_t left = encoder->room - encoder->used;
    uint8_t *to = encoder->out + encoder->used;

    if (length == 0) {
        return true;
    }
    if (number_bytes(skip) + number_bytes(length) + length > left) {
        return false;
    }
    to = write_number(to, skip);
    to = write_number(to, length);
    if (length <= STEP_BYTES && encoder->start + STEP_BYTES <= encoder->page_bytes &&
        to + STEP_BYTES <= encoder->out + encoder->room) {
        memcpy(to, encoder->now + encoder->start, STEP_BYTES); /* what is too much is written over */
    } else {
        memcpy(to, encoder->now + encoder->start, length);
    }
    encoder->used = (size_t)(to - encoder->out) + length;
    encoder->written_end = encoder->end;
    return true;
}

/* Bytes [start, end) changed; runs come in page order. False: no room. */
static inline bool add_run(struct encoder *encoder, size_t start, size_t end)
{
    if (encoder->end != 0 && start - encoder->end < VMTH_DELTA_MIN_SKIP) {
        encoder->end = end;
        return true;
    }
    if (!flush(encoder)) {
        return false;
    }
    encoder->start = start;
    encoder->end = end;
    return true;
}

/* The runs of one cache line at page offset `at`; bit i of `mask`: byte i changed. */
static inline bool add_line(struct encoder *encoder, size_t at, uint64_t mask)
{
    while (mask != 0) {
        const unsigned first = (unsigned)__builtin_ctzll(mask);
        const uint64_t kept = ~(mask >> first); /* 0 only if all 64 changed */
        const unsigned length = kept != 0 ? (unsigned)__builtin_ctzll(kept) : 64;

        if (!add_run(encoder, at + first, at + first + length)) {
            return false;
        }
        if (first + length >= 64) {
            break;
        }
        mask &= ~UINT64_C(0) << (first + length);
    }
    return true;
}

int vmth_delta_encode(const uint8_t *base, const uint8_t *now, size_t page_bytes, uint8_t *out,
                      size_t room, size_t *nbytes)
{
    const struct delta_ops *delta = kernel_delta();
    struct encoder encoder = {.now = now, .page_bytes = page_bytes, .out = out, .room = room};

    if (!page_size_valid(page_bytes)) {
        return -EINVAL;
    }
    for (size_t piece = 0; piece < page_bytes; piece += DELTA_PIECE_BYTES) {
        uint64_t masks[DELTA_PIECE_LINES];
        uint64_t lines = delta->changed(base + piece, now + piece, masks);

        for (; lines != 0; lines &= lines - 1) {
            const unsigned line = (unsigned)__builtin_ctzll(lines);

            if (!add_line(&encoder, piece + 64 * (size_t)line, masks[line])) {
                return -ENOSPC;
            }
        }
    }
    if (!flush(&encoder)) {
        return -ENOSPC;
    }
    *nbytes = encoder.used;
    return 0;
}

/* ---- apply ------------------------------------------------------------------------------------- */

/* One number of the delta, read at *at. False: cut short or longer than it may be. */
static bool read_number(const uint8_t *delta, size_t nbytes, size_t *at, size_t *value)
{
    size_t number = 0;

    for (unsigned i = 0; i < MAX_NUMBER_BYTES && *at < nbytes; i++) {
        const uint8_t byte = delta[(*at)++];

        number |= (size_t)(byte & 0x7f) << (7 * i);
        if ((byte & 0x80) == 0) {
            *value = number;
            return true;
        }
    }
    return false;
}

int vmth_delta_apply(uint8_t *page, size_t page_bytes, const uint8_t *delta, size_t nbytes)
{
    size_t at = 0;
    size_t to = 0;

    while (at < nbytes) {
        size_t skip;
        size_t length;

        if (!read_number(delta, nbytes, &at, &skip) || !read_number(delta, nbytes, &at, &length)) {
            return -EPROTO;
        }
        if (skip > page_bytes - to || length == 0 || length > page_bytes - to - skip ||
            length > nbytes - at) {
            return -EPROTO;
        }
        memcpy(page + to + skip, delta + at, length);
        to += skip + length;
        at += length;
    }
    return 0;
}

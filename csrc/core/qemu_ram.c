/* SPDX-License-Identifier: Apache-2.0 */
/* QEMU's `ram` records to runs and back; docs/qemu-stream.md lists the flags.
 *
 * A plain stream is millions of records that each follow from the one before: the next page of the
 * same block, of the same kind, with CONTINUE. extend_*() recognise such a record by one comparison
 * with the word that must come, and everything else takes the long way through parse_record(). */
#include "vmth/qemu_ram.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "core/big_endian.h"
#include "core/qemu_blocks.h"

enum {
    FLAG_ZERO = 0x002,
    FLAG_MEM_SIZE = 0x004,
    FLAG_PAGE = 0x008,
    FLAG_EOS = 0x010,
    FLAG_CONTINUE = 0x020,
    FLAG_XBZRLE = 0x040,
    FLAG_HOOK = 0x080,
    FLAG_COMPRESS = 0x100,
    FLAG_FLUSH = 0x200,

    WORD_BYTES = 8,
    ZERO_RECORD_BYTES = WORD_BYTES + 1,
    XBZRLE_HEAD_BYTES = 3,
    COMPRESS_HEAD_BYTES = 4,
    XBZRLE_ENCODING = 1,

    /* Headers lie a page apart: each is a miss in cache and TLB unless it was asked for early. */
    PREFETCH_RECORDS = 8
};

/* A page that begins within the block: used_length need not be a multiple of the page. */
static uint64_t block_npages(const struct vmth_qemu_blocks *blocks, uint32_t block)
{
    const uint64_t length = blocks->used_length[block];

    return length / blocks->page_bytes + (length % blocks->page_bytes != 0);
}

static const uint8_t *block_name(const struct vmth_qemu_blocks *blocks, uint32_t block)
{
    return blocks->names + (size_t)block * VMTH_QEMU_NAME_BYTES;
}

/* ---- parse ----------------------------------------------------------------------------------- */

/* The result of one record: what it was, or what is wrong with it, or how much of it is missing. */
struct record {
    struct vmth_qemu_run run;
    size_t nbytes; /* all of it; when short, what it needs at least */
    uint64_t value;
    uint32_t stop; /* 0: a page */
    bool is_short;
};

static int refuse(struct vmth_qemu_error *error, const char *field, uint64_t received,
                  uint64_t allowed)
{
    error->field = field;
    error->received = received;
    error->allowed = allowed;
    return -EPROTO;
}

/* A record that needs `nbytes` of which only some are there. */
static int cut(struct record *record, size_t nbytes)
{
    record->is_short = true;
    record->nbytes = nbytes;
    return 0;
}

/* The block of that name; tables are searched from the current block on, since blocks come in
 * order. */
static uint32_t find_block(const struct vmth_qemu_blocks *blocks, uint32_t current,
                           const uint8_t *name)
{
    uint32_t index = current == VMTH_QEMU_NO_BLOCK ? 0 : current;

    for (uint32_t i = 0; i < blocks->nblocks; i++) {
        if (memcmp(block_name(blocks, index), name, (size_t)name[0] + 1) == 0) {
            return index;
        }
        index = index + 1 < blocks->nblocks ? index + 1 : 0;
    }
    return VMTH_QEMU_NO_BLOCK;
}

static int parse_payload(const struct vmth_qemu_blocks *blocks, uint64_t flag, const uint8_t *in,
                         size_t nbytes, struct record *record, struct vmth_qemu_error *error)
{
    struct vmth_qemu_run *run = &record->run;
    const size_t head = record->nbytes;
    const uint64_t page_bytes = blocks->page_bytes;
    uint64_t length;

    switch (flag) {
    case FLAG_ZERO:
        run->kind = VMTH_QEMU_ZERO;
        record->nbytes = head + 1;
        if (nbytes < record->nbytes) {
            return cut(record, record->nbytes);
        }
        return in[head] == 0 ? 0 : refuse(error, "zero page's byte", in[head], 0);
    case FLAG_PAGE:
        run->kind = VMTH_QEMU_PAGE;
        run->at = head;
        run->nbytes = blocks->page_bytes;
        break;
    case FLAG_XBZRLE:
        run->kind = VMTH_QEMU_XBZRLE;
        run->at = head + XBZRLE_HEAD_BYTES;
        if (nbytes < run->at) {
            return cut(record, run->at);
        }
        if (in[head] != XBZRLE_ENCODING) {
            return refuse(error, "xbzrle encoding", in[head], XBZRLE_ENCODING);
        }
        length = load_be(in + head + 1, 2);
        if (length == 0 || length > page_bytes) {
            return refuse(error, "xbzrle length", length, page_bytes);
        }
        run->nbytes = (uint32_t)length;
        break;
    default: /* FLAG_COMPRESS */
        run->kind = VMTH_QEMU_COMPRESS;
        run->at = head + COMPRESS_HEAD_BYTES;
        if (nbytes < run->at) {
            return cut(record, run->at);
        }
        length = load_be(in + head, 4);
        if (length == 0 || length > VMTH_QEMU_MAX_COMPRESSED(page_bytes)) {
            return refuse(error, "compressed page's length", length,
                          VMTH_QEMU_MAX_COMPRESSED(page_bytes));
        }
        run->nbytes = (uint32_t)length;
    }
    run->stride = run->nbytes + WORD_BYTES;
    record->nbytes = run->at + run->nbytes;
    return nbytes < record->nbytes ? cut(record, record->nbytes) : 0;
}

static int parse_page(const struct vmth_qemu_blocks *blocks, uint32_t current, uint64_t word,
                      const uint8_t *in, size_t nbytes, struct record *record,
                      struct vmth_qemu_error *error)
{
    const uint64_t flags = word & (blocks->page_bytes - 1);
    uint32_t block = current;

    record->nbytes = WORD_BYTES;
    if ((flags & FLAG_CONTINUE) == 0) {
        if (nbytes < WORD_BYTES + 1) {
            return cut(record, WORD_BYTES + 1);
        }
        record->nbytes = WORD_BYTES + 1 + (size_t)in[WORD_BYTES];
        if (nbytes < record->nbytes) {
            return cut(record, record->nbytes);
        }
        block = find_block(blocks, current, in + WORD_BYTES);
        if (block == VMTH_QEMU_NO_BLOCK) {
            return refuse(error, "idstr of no block, its length", in[WORD_BYTES], 0);
        }
    } else if (block == VMTH_QEMU_NO_BLOCK) {
        return refuse(error, "CONTINUE before any block, flags", flags,
                      flags & ~(uint64_t)FLAG_CONTINUE);
    }
    record->run.block = block;
    record->run.npages = 1;
    record->run.page = word / blocks->page_bytes;
    if (record->run.page >= block_npages(blocks, block)) {
        return refuse(error, "offset in block", word - flags, blocks->used_length[block]);
    }
    return parse_payload(blocks, flags & ~(uint64_t)FLAG_CONTINUE, in, nbytes, record, error);
}

static int parse_record(const struct vmth_qemu_blocks *blocks, uint32_t current, const uint8_t *in,
                        size_t nbytes, struct record *record, struct vmth_qemu_error *error)
{
    memset(record, 0, sizeof(*record));
    if (nbytes < WORD_BYTES) {
        return cut(record, WORD_BYTES);
    }
    const uint64_t word = load_be64(in);
    const uint64_t flags = word & (blocks->page_bytes - 1);

    record->nbytes = WORD_BYTES;
    switch (flags) {
    case FLAG_EOS:
    case FLAG_FLUSH:
        if (word != flags) {
            return refuse(error, "offset of a record without page", word - flags, 0);
        }
        record->stop = flags == FLAG_EOS ? VMTH_QEMU_EOS : VMTH_QEMU_FLUSH;
        return 0;
    case FLAG_MEM_SIZE:
        record->stop = VMTH_QEMU_MEM_SIZE;
        record->value = word - flags;
        return 0;
    case FLAG_ZERO:
    case FLAG_PAGE:
    case FLAG_XBZRLE:
    case FLAG_COMPRESS:
    case FLAG_ZERO | FLAG_CONTINUE:
    case FLAG_PAGE | FLAG_CONTINUE:
    case FLAG_XBZRLE | FLAG_CONTINUE:
    case FLAG_COMPRESS | FLAG_CONTINUE:
        return parse_page(blocks, current, word, in, nbytes, record, error);
    default:
        return refuse(error,
                      (flags & FLAG_HOOK) != 0 ? "ram record flags (RDMA)" : "ram record flags",
                      flags, FLAG_FLUSH);
    }
}

/* Add the PAGE records that go on where *run ends; returns the bytes of them. */
static size_t extend_pages(const struct vmth_qemu_blocks *blocks, struct vmth_qemu_run *run,
                           const uint8_t *in, size_t nbytes)
{
    const size_t record_bytes = WORD_BYTES + (size_t)blocks->page_bytes;
    const uint64_t end = block_npages(blocks, run->block);
    uint64_t page = run->page + run->npages;
    size_t at = 0;

    while (nbytes - at >= record_bytes && page < end &&
           load_be64(in + at) == (page * blocks->page_bytes | FLAG_PAGE | FLAG_CONTINUE)) {
        if (nbytes - at > PREFETCH_RECORDS * record_bytes) {
            __builtin_prefetch(in + at + PREFETCH_RECORDS * record_bytes);
        }
        at += record_bytes;
        page++;
    }
    run->npages = page - run->page;
    return at;
}

static size_t extend_zeros(const struct vmth_qemu_blocks *blocks, struct vmth_qemu_run *run,
                           const uint8_t *in, size_t nbytes)
{
    const uint64_t end = block_npages(blocks, run->block);
    uint64_t page = run->page + run->npages;
    size_t at = 0;

    while (nbytes - at >= ZERO_RECORD_BYTES && page < end && in[at + WORD_BYTES] == 0 &&
           load_be64(in + at) == (page * blocks->page_bytes | FLAG_ZERO | FLAG_CONTINUE)) {
        at += ZERO_RECORD_BYTES;
        page++;
    }
    run->npages = page - run->page;
    return at;
}

int vmth_qemu_ram_parse(const struct vmth_qemu_blocks *blocks, uint32_t *block, const uint8_t *in,
                        size_t nbytes, struct vmth_qemu_run *out, size_t cap,
                        struct vmth_qemu_parsed *parsed, struct vmth_qemu_error *error)
{
    struct vmth_qemu_parsed done = {0};
    uint32_t current = *block;

    if (!qemu_blocks_valid(blocks) || cap == 0 ||
        (current != VMTH_QEMU_NO_BLOCK && current >= blocks->nblocks)) {
        return -EINVAL;
    }
    while (done.stop == 0) {
        struct record record;
        const int result =
            parse_record(blocks, current, in + done.used, nbytes - done.used, &record, error);

        if (result != 0 && done.nruns == 0) {
            return result;
        }
        if (result != 0 || (record.stop == 0 && !record.is_short && done.nruns == cap)) {
            done.stop = VMTH_QEMU_FULL;
        } else if (record.is_short) {
            done.stop = VMTH_QEMU_SHORT;
            done.need = record.nbytes;
        } else if (record.stop != 0) {
            done.stop = record.stop;
            done.value = record.value;
            done.used += record.nbytes;
        } else {
            struct vmth_qemu_run *run = &out[done.nruns++];

            *run = record.run;
            current = run->block;
            run->at += run->kind == VMTH_QEMU_ZERO ? 0 : done.used;
            done.used += record.nbytes;
            if (run->kind == VMTH_QEMU_PAGE) {
                done.used += extend_pages(blocks, run, in + done.used, nbytes - done.used);
            } else if (run->kind == VMTH_QEMU_ZERO) {
                done.used += extend_zeros(blocks, run, in + done.used, nbytes - done.used);
            }
        }
    }
    *block = current;
    *parsed = done;
    return 0;
}

/* ---- encode ---------------------------------------------------------------------------------- */

static uint64_t kind_flag(uint32_t kind)
{
    switch (kind) {
    case VMTH_QEMU_ZERO:
        return FLAG_ZERO;
    case VMTH_QEMU_PAGE:
        return FLAG_PAGE;
    case VMTH_QEMU_XBZRLE:
        return FLAG_XBZRLE;
    default:
        return FLAG_COMPRESS;
    }
}

/* Bytes after word and name. */
static size_t body_bytes(const struct vmth_qemu_run *run)
{
    switch (run->kind) {
    case VMTH_QEMU_ZERO:
        return 1;
    case VMTH_QEMU_PAGE:
        return run->nbytes;
    case VMTH_QEMU_XBZRLE:
        return XBZRLE_HEAD_BYTES + (size_t)run->nbytes;
    default:
        return COMPRESS_HEAD_BYTES + (size_t)run->nbytes;
    }
}

/* The run is within its block, and its payload within the nbytes of data. */
static bool run_valid(const struct vmth_qemu_blocks *blocks, const struct vmth_qemu_run *run,
                      size_t nbytes)
{
    const uint32_t most = run->kind == VMTH_QEMU_COMPRESS
                              ? VMTH_QEMU_MAX_COMPRESSED(blocks->page_bytes)
                              : blocks->page_bytes;
    const uint64_t npages = run->block < blocks->nblocks ? block_npages(blocks, run->block) : 0;

    if (run->kind < VMTH_QEMU_ZERO || run->kind > VMTH_QEMU_COMPRESS || run->npages == 0 ||
        run->page >= npages || run->npages > npages - run->page) {
        return false;
    }
    if (run->kind == VMTH_QEMU_ZERO) {
        return true;
    }
    if (run->nbytes == 0 || run->nbytes > most ||
        (run->kind == VMTH_QEMU_PAGE && run->nbytes != blocks->page_bytes)) {
        return false;
    }
    if (run->at > nbytes || run->nbytes > nbytes - run->at) {
        return false;
    }
    const uint64_t room = nbytes - run->at - run->nbytes;

    return run->npages == 1 ||
           (run->stride >= run->nbytes && run->npages - 1 <= room / run->stride);
}

size_t vmth_qemu_ram_encoded_bytes(const struct vmth_qemu_blocks *blocks, uint32_t block,
                                   const struct vmth_qemu_run *runs, size_t nruns, size_t nbytes)
{
    size_t total = 0;

    if (!qemu_blocks_valid(blocks)) {
        return 0;
    }
    for (size_t i = 0; i < nruns; i++) {
        const struct vmth_qemu_run *run = &runs[i];
        size_t bytes;

        if (!run_valid(blocks, run, nbytes) ||
            __builtin_mul_overflow(run->npages, WORD_BYTES + body_bytes(run), &bytes)) {
            return 0;
        }
        if (run->block != block) {
            bytes += 1 + (size_t)block_name(blocks, run->block)[0];
            block = run->block;
        }
        if (__builtin_add_overflow(total, bytes, &total)) {
            return 0;
        }
    }
    return total;
}

static uint8_t *put_record(const struct vmth_qemu_blocks *blocks, const struct vmth_qemu_run *run,
                           uint64_t i, bool named, const uint8_t *data, uint8_t *out)
{
    const uint8_t *name = block_name(blocks, run->block);
    const uint8_t *payload = run->kind == VMTH_QEMU_ZERO ? NULL : data + run->at + i * run->stride;

    store_be(out,
             (run->page + i) * blocks->page_bytes | kind_flag(run->kind) |
                 (named ? 0u : (unsigned)FLAG_CONTINUE),
             WORD_BYTES);
    out += WORD_BYTES;
    if (named) {
        memcpy(out, name, (size_t)name[0] + 1);
        out += (size_t)name[0] + 1;
    }
    if (payload == NULL) {
        *out = 0;
        return out + 1;
    }
    if (run->kind == VMTH_QEMU_XBZRLE) {
        *out++ = XBZRLE_ENCODING;
        store_be(out, run->nbytes, 2);
        out += 2;
    } else if (run->kind == VMTH_QEMU_COMPRESS) {
        store_be(out, run->nbytes, COMPRESS_HEAD_BYTES);
        out += COMPRESS_HEAD_BYTES;
    }
    memcpy(out, payload, run->nbytes);
    return out + run->nbytes;
}

void vmth_qemu_ram_encode(const struct vmth_qemu_blocks *blocks, uint32_t *block,
                          const struct vmth_qemu_run *runs, size_t nruns, const uint8_t *data,
                          uint8_t *out)
{
    for (size_t i = 0; i < nruns; i++) {
        for (uint64_t k = 0; k < runs[i].npages; k++) {
            out = put_record(blocks, &runs[i], k, runs[i].block != *block, data, out);
            *block = runs[i].block;
        }
    }
}

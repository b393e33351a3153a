# SPDX-License-Identifier: Apache-2.0
"""The core's C ABI (csrc/include/vmth), as the Cython modules see it."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "vmth/common.h" nogil:
    struct vmth_run:
        uint64_t page
        uint64_t npages

    struct vmth_u128:
        uint64_t lo
        uint64_t hi


cdef extern from "vmth/bitmap.h" nogil:
    uint64_t vmth_bitmap_count(const uint64_t *words, uint64_t first, uint64_t n)
    uint64_t vmth_bitmap_merge(uint64_t *into, const uint64_t *other, uint64_t npages)
    uint64_t vmth_bitmap_fetch_and_clear(uint64_t *live, uint64_t *into, uint64_t npages)
    void vmth_bitmap_set_range(uint64_t *words, uint64_t page, uint64_t npages)
    void vmth_bitmap_clear_range(uint64_t *words, uint64_t page, uint64_t npages)
    int vmth_bitmap_runs(const uint64_t *words, uint64_t npages, uint64_t first, vmth_run *out,
                         size_t cap, size_t *nruns, uint64_t *resume)
    void vmth_bitmap_from_bytes(uint64_t *words, const uint8_t *data, uint64_t npages)
    void vmth_bitmap_to_bytes(uint8_t *data, const uint64_t *words, uint64_t npages)


cdef extern from "vmth/zero_page.h" nogil:
    bint vmth_is_zero(const uint8_t *data, size_t nbytes)
    int vmth_zero_scan(const uint8_t *pages, size_t page_bytes, size_t npages,
                       uint64_t *zero_words, size_t *nzero)
    int vmth_zero_partition(const uint8_t *host, size_t page_bytes, uint64_t *ids, size_t n,
                            uint64_t *scratch, size_t *nnormal)


cdef extern from "vmth/page_hash.h" nogil:
    struct vmth_hash_key:
        uint64_t seed

    void vmth_hash_key_init(vmth_hash_key *key, uint64_t seed)
    int vmth_page_hash(const vmth_hash_key *key, const uint8_t *pages, size_t page_bytes,
                       size_t npages, vmth_u128 *out)
    int vmth_page_hash_zero(const vmth_hash_key *key, const uint8_t *pages, size_t page_bytes,
                            size_t npages, vmth_u128 *out, uint64_t *zero_words, size_t *nzero)
    uint64_t vmth_checksum64(const void *data, size_t nbytes, uint64_t seed)


cdef extern from "vmth/content_hash.h" nogil:
    enum:
        VMTH_CONTENT_KEY_BYTES

    struct vmth_content_key:
        pass

    void vmth_content_key_init(vmth_content_key *key, const uint8_t *secret)
    int vmth_content_hash_run(const vmth_content_key *key, const uint8_t *base, size_t page_bytes,
                              size_t npages, vmth_u128 *out)


cdef extern from "vmth/memory_digest.h" nogil:
    struct vmth_digest:
        vmth_u128 sum
        uint64_t pages

    vmth_digest vmth_digest_of_hashes(uint32_t block, uint64_t first, size_t n,
                                      const vmth_u128 *hashes)
    vmth_digest vmth_digest_of_fill(uint32_t block, uint64_t first, uint64_t n,
                                    const vmth_u128 *hash)


cdef extern from "vmth/kernels.h" nogil:
    int vmth_kernel_select(const char *family, const char *name)
    const char *vmth_kernel_selected(const char *family)
    const char *vmth_kernel_family(size_t index)
    const char *vmth_kernel_name(const char *family, size_t index)


cdef extern from "vmth/packet.h" nogil:
    enum:
        VMTH_PACKET_HEADER_BYTES
        VMTH_DESC_REF_BYTES
        VMTH_ACK_BYTES

    struct vmth_packet_header:
        uint8_t kind
        uint8_t flags
        uint16_t block
        uint32_t round
        uint16_t channel
        uint64_t seq
        uint32_t desc_bytes
        uint32_t payload_bytes
        uint32_t ndesc
        uint64_t npages
        uint64_t checksum

    struct vmth_desc:
        uint64_t page
        uint32_t npages
        uint8_t form
        uint8_t flags
        uint32_t payload_bytes
        uint16_t base_block
        uint64_t base_page
        vmth_u128 result

    struct vmth_ack:
        uint64_t seq
        vmth_u128 digest
        uint32_t status
        uint32_t block

    struct vmth_packet_error:
        const char *field
        uint64_t received
        uint64_t allowed

    struct vmth_packet_limits:
        uint32_t page_bytes
        uint32_t nblocks
        const uint64_t *block_npages
        uint32_t forms
        uint16_t channel

    void vmth_packet_encode_header(const vmth_packet_header *header, const uint8_t *desc,
                                   uint64_t checksum_seed, uint8_t *out)
    int vmth_packet_decode_header(const uint8_t *data, const vmth_packet_limits *limits,
                                  vmth_packet_header *header, vmth_packet_error *error)
    int vmth_packet_verify(const uint8_t *raw, const uint8_t *desc, size_t desc_bytes,
                           uint64_t checksum_seed, vmth_packet_error *error)
    size_t vmth_desc_encode(const vmth_desc *desc, uint8_t *out, size_t room)
    int vmth_desc_decode(const uint8_t *data, size_t room, uint16_t block,
                         const vmth_packet_limits *limits, vmth_desc *desc, size_t *used,
                         vmth_packet_error *error)
    int vmth_packet_check(const vmth_packet_header *header, const uint8_t *desc,
                          const vmth_packet_limits *limits, vmth_packet_error *error)
    void vmth_ack_encode(const vmth_ack *ack, uint8_t *out)
    int vmth_ack_decode(const uint8_t *data, vmth_ack *ack, vmth_packet_error *error)


cdef extern from "vmth/qemu_ram.h" nogil:
    enum:
        VMTH_QEMU_NAME_BYTES

    struct vmth_qemu_run:
        uint64_t page
        uint64_t npages
        uint64_t at
        uint32_t stride
        uint32_t nbytes
        uint32_t block
        uint32_t kind

    struct vmth_qemu_blocks:
        uint32_t page_bytes
        uint32_t nblocks
        const uint64_t *used_length
        const uint8_t *names

    struct vmth_qemu_parsed:
        size_t nruns
        size_t used
        size_t need
        uint64_t value
        uint32_t stop

    struct vmth_qemu_error:
        const char *field
        uint64_t received
        uint64_t allowed

    int vmth_qemu_ram_parse(const vmth_qemu_blocks *blocks, uint32_t *block, const uint8_t *data,
                            size_t nbytes, vmth_qemu_run *out, size_t cap,
                            vmth_qemu_parsed *parsed, vmth_qemu_error *error)
    size_t vmth_qemu_ram_encoded_bytes(const vmth_qemu_blocks *blocks, uint32_t block,
                                       const vmth_qemu_run *runs, size_t nruns, size_t nbytes)
    void vmth_qemu_ram_encode(const vmth_qemu_blocks *blocks, uint32_t *block,
                              const vmth_qemu_run *runs, size_t nruns, const uint8_t *data,
                              uint8_t *out)


cdef extern from "vmth/qemu_multifd.h" nogil:
    enum:
        VMTH_MULTIFD_SHORT
        VMTH_MULTIFD_FULL
        VMTH_MULTIFD_OTHER

    struct vmth_multifd_parsed:
        size_t nruns
        size_t used
        uint32_t stop

    int vmth_multifd_parse(const vmth_qemu_blocks *blocks, const uint8_t *data, size_t nbytes,
                           vmth_qemu_run *out, size_t cap, vmth_multifd_parsed *parsed)


cdef extern from "vmth/codec.h" nogil:
    enum:
        VMTH_CODEC_MIN_LEVEL
        VMTH_CODEC_MAX_LEVEL
        VMTH_CODEC_COMPRESS
        VMTH_CODEC_DECOMPRESS

    struct vmth_codec:
        void *compressor
        void *decompressor

    int vmth_codec_create(vmth_codec *codec, unsigned uses)
    void vmth_codec_destroy(vmth_codec *codec)
    size_t vmth_codec_bytes(const vmth_codec *codec)
    size_t vmth_codec_compress(vmth_codec *codec, int level, const uint8_t *data, size_t nbytes,
                               uint8_t *out, size_t room)
    int vmth_codec_decompress(vmth_codec *codec, const uint8_t *frame, size_t nbytes, uint8_t *out,
                              size_t exactly)
    bint vmth_codec_promising(const uint8_t *page, size_t page_bytes)


cdef extern from "vmth/delta.h" nogil:
    int vmth_delta_encode(const uint8_t *base, const uint8_t *now, size_t page_bytes, uint8_t *out,
                          size_t room, size_t *nbytes)
    int vmth_delta_apply(uint8_t *page, size_t page_bytes, const uint8_t *delta, size_t nbytes)


cdef extern from "vmth/content_index.h" nogil:
    enum:
        VMTH_CONTENT_BUCKET_BYTES

    struct vmth_content_index:
        uint64_t *words
        uint64_t bucket_mask

    int vmth_content_index_init(vmth_content_index *index, void *memory, size_t nbytes)
    void vmth_content_index_insert(vmth_content_index *index, const vmth_u128 *content,
                                   uint16_t block, uint64_t page)
    bint vmth_content_index_find(const vmth_content_index *index, const vmth_u128 *content,
                                 uint16_t *block, uint64_t *page)
    void vmth_content_index_forget(vmth_content_index *index, const vmth_u128 *content,
                                   uint16_t block, uint64_t page)

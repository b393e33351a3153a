/* SPDX-License-Identifier: Apache-2.0 */
/* Write tracking with userfaultfd WP_ASYNC and PAGEMAP_SCAN, on mappings of this process.
 *
 *   open -> add (register + arm) -> fetch, fetch, ... -> remove -> close
 *
 *   page table entry:   armed --write--> written --fetch--> armed    (one atomic step per entry)
 *
 * The kernel resolves the write faults by itself: no thread waits for events, and a writer loses
 * about a microsecond on its first write to an armed page. Arming memory that was never touched
 * leaves a marker in its page table: 8 bytes a page (0.2 %) of page tables.
 *
 * Not seen, because tracking is per page table: writes through another mapping, pwrite to the file,
 * another process, DMA. Hole punches in shared memory are not seen either. vmth/dirty/probe.py
 * looks for the known kernel faults. Not thread-safe: one caller at a time; no lock for writers. */
#ifndef VMTH_SYS_UFFD_WP_H
#define VMTH_SYS_UFFD_WP_H

#include "sys/pagemap_scan.h"

VMTH_BEGIN_DECLS

/* What this machine lacks, when vmth_uffd_wp_open fails. */
enum vmth_uffd_missing {
    VMTH_UFFD_NOTHING_MISSING = 0,
    VMTH_UFFD_SYSCALL,      /* userfaultfd(2) and /dev/userfaultfd are absent or forbidden */
    VMTH_UFFD_WP_ASYNC,     /* Linux before 6.7, or an architecture without it */
    VMTH_UFFD_PAGEMAP,      /* /proc/self/pagemap cannot be opened */
    VMTH_UFFD_PAGEMAP_SCAN, /* Linux before 6.7 */
};

struct vmth_uffd_wp {
    const struct vmth_memory_ops *ops;
    int uffd;       /* owned; -1: closed */
    int pagemap_fd; /* owned; -1: closed */
    uint64_t page_bytes;
};

/* Fill `*tracker` and open what it needs. On success the caller ends it with vmth_uffd_wp_close. On
 * failure nothing stays open, the negative errno is returned and `*missing` names what was not to
 * be had. `page_bytes` is the page size of the host. */
VMTH_MUST_CHECK int vmth_uffd_wp_open(struct vmth_uffd_wp *tracker,
                                      const struct vmth_memory_ops *ops, uint64_t page_bytes,
                                      enum vmth_uffd_missing *missing);

/* Begin to track `npages` pages from `address` (page aligned): from the return on, every later
 * write through this mapping is reported. `populated`, unless NULL, is a bitmap of `npages` bits in
 * which the bits of pages that were populated when they were armed are set: swapped, or present and
 * not the kernel's page of zeros. It is judged and armed in one step per page, so a page with a
 * clear bit read as zeros then, and whatever was written since will be fetched; only private
 * anonymous memory may be judged so. On failure nothing is tracked: -EBUSY if another userfaultfd
 * has the mapping, -EOPNOTSUPP for hugetlb, -EINVAL for what cannot be registered or is not mapped
 * throughout. */
VMTH_MUST_CHECK int vmth_uffd_wp_add(const struct vmth_uffd_wp *tracker, uint64_t address,
                                     uint64_t npages, uint64_t *populated);

/* OR into `words` (bit i is page i from `address`) the pages written since they were armed, and arm
 * these again. After an error the bits set until then are valid. */
VMTH_MUST_CHECK int vmth_uffd_wp_fetch(const struct vmth_uffd_wp *tracker, uint64_t address,
                                       uint64_t npages, uint64_t *words);

/* OR in what a fetch would, and arm nothing. */
VMTH_MUST_CHECK int vmth_uffd_wp_peek(const struct vmth_uffd_wp *tracker, uint64_t address,
                                      uint64_t npages, uint64_t *words);

/* End the tracking of a range that vmth_uffd_wp_add began. Closing ends all of them. */
VMTH_MUST_CHECK int vmth_uffd_wp_remove(const struct vmth_uffd_wp *tracker, uint64_t address,
                                        uint64_t npages);

/* Close both descriptors. Idempotent; NULL is allowed. */
void vmth_uffd_wp_close(struct vmth_uffd_wp *tracker);

/* The feature bits that this kernel's userfaultfd offers, or a negative errno. */
VMTH_MUST_CHECK int vmth_uffd_features(const struct vmth_memory_ops *ops, uint64_t *features);

VMTH_END_DECLS

#endif

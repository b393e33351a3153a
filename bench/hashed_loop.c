/* SPDX-License-Identifier: Apache-2.0 */
/* What bench/transfer_table.py calls "bare, pages hashed": send and recv with nothing around them but
 * the page hash, at either end. What is slower than this is not the digest's doing. */
#include <errno.h>
#include <stdint.h>
#include <sys/socket.h>

#include "vmth/page_hash.h"

enum { PAGE_BYTES = 4096, CHUNK_BYTES = 256 * 1024, CHUNK_PAGES = CHUNK_BYTES / PAGE_BYTES };

int send_hashed(int fd, const uint8_t *at, size_t nbytes);
int receive_hashed(int fd, uint8_t *at, size_t nbytes);

static int hash_chunk(const uint8_t *at, size_t nbytes)
{
    struct vmth_hash_key key;
    struct vmth_u128 hashes[CHUNK_PAGES];

    vmth_hash_key_init(&key, 1);
    return vmth_page_hash(&key, at, PAGE_BYTES, nbytes / PAGE_BYTES, hashes);
}

/* Both return 0 or -errno; sockets that block, nbytes a multiple of the page size. */
int send_hashed(int fd, const uint8_t *at, size_t nbytes)
{
    for (size_t done = 0; done < nbytes;) {
        const size_t chunk = nbytes - done < CHUNK_BYTES ? nbytes - done : CHUNK_BYTES;
        int result = hash_chunk(at + done, chunk);

        for (size_t sent = 0; result == 0 && sent < chunk;) {
            const ssize_t took = send(fd, at + done + sent, chunk - sent, MSG_NOSIGNAL);

            if (took < 0) {
                return -errno;
            }
            sent += (size_t)took;
        }
        if (result != 0) {
            return result;
        }
        done += chunk;
    }
    return 0;
}

int receive_hashed(int fd, uint8_t *at, size_t nbytes)
{
    for (size_t done = 0; done < nbytes;) {
        const size_t chunk = nbytes - done < CHUNK_BYTES ? nbytes - done : CHUNK_BYTES;
        int result = 0;

        for (size_t got = 0; got < chunk;) {
            const ssize_t took = recv(fd, at + done + got, chunk - got, MSG_WAITALL);

            if (took <= 0) {
                return took < 0 ? -errno : -ECONNRESET;
            }
            got += (size_t)took;
        }
        result = hash_chunk(at + done, chunk);
        if (result != 0) {
            return result;
        }
        done += chunk;
    }
    return 0;
}

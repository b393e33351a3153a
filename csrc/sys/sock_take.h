/* SPDX-License-Identifier: Apache-2.0 */
/* Taking what arrives on a stream socket, in pieces as large as can be had.
 *
 *   peer    |32K| |32K| |32K| ...........................|32K|
 *   taken   |------ one call -----|  patience  |          next call
 *
 * A program that writes in small pieces is read in large ones: what is done for each piece is done
 * less often, and the calls of the system are made here. */
#ifndef VMTH_SYS_SOCK_TAKE_H
#define VMTH_SYS_SOCK_TAKE_H

#include <stdbool.h>
#include <stddef.h>

#include "vmth/common.h"

VMTH_BEGIN_DECLS

/* 1 when there is something to read (an end is), 0 when nothing came in time, or a negative errno. */
VMTH_MUST_CHECK int vmth_sock_wait(int fd, int64_t patience_ns);

/* Read into `buffer` until its `nbytes` are full, nothing comes for `patience_ns` (at least 0) behind
 * what came last, nothing is there at first, or the peer has closed (*ended). Never waits for the
 * first byte. Returns 0 with the bytes read in *got, or a negative errno; outputs untouched then. */
VMTH_MUST_CHECK int vmth_sock_take(int fd, uint8_t *buffer, size_t nbytes, int64_t patience_ns,
                                   size_t *got, bool *ended);

VMTH_END_DECLS

#endif

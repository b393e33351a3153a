/* SPDX-License-Identifier: Apache-2.0 */
/* The assembled walker (walker_program.S), as it is placed at gpa 0x2000. */
#ifndef VMTH_GUEST_WALKER_PROGRAM_H
#define VMTH_GUEST_WALKER_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

extern const uint8_t vmth_walker_program[];
extern const size_t vmth_walker_program_bytes;

#endif

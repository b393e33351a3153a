/* SPDX-License-Identifier: Apache-2.0 */
/* The walker: what the KVM guest runs, flat 32-bit code without paging, interrupts or a stack.
 *
 * Memory layout and meaning of one step stand in vmth/guests/machine.py. The code goes through the
 * schedule in stretches: a stretch ends at the next heartbeat or at the end of the schedule,
 * whichever comes first, so that the inner loops count one register and nothing else.
 *
 *   ebx  loops & value_mask, added to each value     esi  current schedule entry
 *   ebp  steps of this stretch                       esp  store_dwords (there is no stack)
 *
 * With a pool the host copies (micro_vm.h says why), and the loop counts only: that must follow the
 * copies, since it is what marks their pages dirty.
 *
 * walker_program.c holds the assembled bytes; tests/test_kvm_program.py assembles this file again
 * (as --32, objcopy -O binary) and compares. The code is linked for gpa 0x2000 but is position
 * independent: jumps are relative and data addresses absolute. */

        .intel_syntax noprefix
        .code32
        .text

        .set INDEX,          0x1000
        .set ENTRIES,        0x1004
        .set SCHEDULE,       0x1008
        .set LOOPS,          0x100c
        .set BEATS,          0x1010
        .set WRITES_PER_BEAT, 0x1014
        .set COUNTDOWN,      0x1018
        .set STORE_DWORDS,   0x101c
        .set VALUE_MASK,     0x1020
        .set POOL,           0x1024
        .set BEAT_PORT,      0x510
        .set COPY_PORT,      0x514

/* Store one dword and count it, for the entry at esi + offset. */
        .macro step offset
        mov     edi, [esi + \offset]
        mov     eax, [esi + \offset + 4]
        add     eax, ebx
        mov     [edi], eax
        mov     edi, [esi + \offset + 8]
        inc     dword ptr [edi]
        .endm

start:
        cld
stretch:
        mov     ebx, ds:[LOOPS]
        and     ebx, ds:[VALUE_MASK]
        mov     esi, ds:[INDEX]
        mov     ebp, ds:[ENTRIES]
        sub     ebp, esi
        cmp     ebp, ds:[COUNTDOWN]
        jbe     1f
        mov     ebp, ds:[COUNTDOWN]
1:      shl     esi, 4
        add     esi, ds:[SCHEDULE]
        cmp     dword ptr ds:[POOL], 0
        jne     from_pool
        mov     esp, ds:[STORE_DWORDS]
        cmp     esp, 1
        jne     many_dwords

/* One dword a write: four steps a turn, then what is left. */
        mov     ecx, ebp
        shr     ecx, 2
        jz      2f
four_steps:
        step    0
        step    16
        step    32
        step    48
        add     esi, 64
        loop    four_steps
2:      mov     ecx, ebp
        and     ecx, 3
        jz      stretch_done
one_step:
        step    0
        add     esi, 16
        loop    one_step
        jmp     stretch_done

/* Any number of dwords a write (none too: then only the counter moves). */
many_dwords:
        mov     edx, ebp
        test    edx, edx
        jz      stretch_done
one_string:
        mov     edi, [esi]
        mov     eax, [esi + 4]
        add     eax, ebx
        mov     ecx, esp
        rep stosd
        mov     edi, [esi + 8]
        inc     dword ptr [edi]
        add     esi, 16
        dec     edx
        jnz     one_string
        jmp     stretch_done

/* Whole stretches copied by the host; a QEMU of bench/ jumps to code of its own instead. */
from_pool:
        mov     ecx, ebp
        jecxz   stretch_done
        mov     eax, ebp
        mov     edx, COPY_PORT
        out     dx, eax
count_copy:
        mov     edi, [esi + 8]
        inc     dword ptr [edi]
        add     esi, 16
        loop    count_copy

stretch_done:
        mov     eax, ds:[INDEX]
        add     eax, ebp
        cmp     eax, ds:[ENTRIES]
        jb      3f
        xor     eax, eax
        inc     dword ptr ds:[LOOPS]
3:      mov     ds:[INDEX], eax
        sub     ds:[COUNTDOWN], ebp
        jnz     stretch

/* The heartbeat: the control block is complete in memory before the host hears of it. */
        mov     eax, ds:[WRITES_PER_BEAT]
        mov     ds:[COUNTDOWN], eax
        mov     eax, ds:[BEATS]
        inc     eax
        mov     ds:[BEATS], eax
        mov     edx, BEAT_PORT
        out     dx, eax
        jmp     stretch

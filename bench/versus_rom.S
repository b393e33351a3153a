/* SPDX-License-Identifier: Apache-2.0 */
/* A 64 KiB firmware that lets QEMU run the walker of the demo's guest (csrc/guest/walker_program.S).
 *
 * Memory was filled from outside: the walker at 0x2000, its control block at 0x1000, and here:
 *
 *   0x9004  u32 divisor of the PIT: a tick is one beat of the walker     0: not paced
 *   0x9008  u32 ticks so far            0x900c  u32 tick at which the next beat is due
 *   0x9010  u32 where the walker goes on when its stores are copied
 *   0x9100  IDT                         0xa000  stack, used between beats only
 *
 * Where the walker would tell KVM's host of a beat it jumps to `pace` (at 0xf0100), which halts
 * until the beat is due; where it would ask KVM's host for copies it jumps to `copy` (at 0xf0400), with
 * esi at the schedule and ebp steps to copy. Assembled by versus_guest.py with `as --32` and objcopy. */

        .intel_syntax noprefix
        .set DIVISOR, 0x9004
        .set TICKS,   0x9008
        .set DUE,     0x900c
        .set RETURN,  0x9010
        .set IDT,     0x9100
        .set STACK,   0xa000
        .set STRETCH, 0x2001
        .set ROM,     0xf0000
        .set LAG_MAX, 100
        .set LOOPS,        0x100c       /* the walker's control block */
        .set STORE_DWORDS, 0x101c
        .set POOL,         0x1024
        .set POOL_MASK,    0x1028
        .set POOL_STEP,    0x102c

        .text
        .code16
real_mode:
        cli
        lgdt    cs:[gdt_pointer]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        .byte   0x66, 0xea              /* far jump, 32-bit offset */
        .long   ROM + flat_mode
        .word   8

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff
        .quad   0x00cf92000000ffff
gdt_pointer:
        .word   23
        .long   ROM + gdt
idt_pointer:
        .word   0x21 * 8 - 1
        .long   IDT

        .org    0x100
        .code32
pace:
        mov     esp, STACK
        cmp     dword ptr ds:[DIVISOR], 0
        je      3f
        inc     dword ptr ds:[DUE]
1:      mov     eax, ds:[TICKS]
        sub     eax, ds:[DUE]
        jns     2f
        sti
        hlt
        cli
        jmp     1b
2:      cmp     eax, LAG_MAX            /* fell behind: do not catch up */
        jb      3f
        mov     eax, ds:[TICKS]
        mov     ds:[DUE], eax
3:      mov     eax, STRETCH
        jmp     eax

tick:
        push    eax
        inc     dword ptr ds:[TICKS]
        mov     al, 0x20
        out     0x20, al
        pop     eax
        iretd

flat_mode:
        mov     ax, 16
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, STACK
        mov     eax, offset ROM + tick       /* one gate: the timer, vector 0x20 */
        mov     word ptr ds:[IDT + 0x20 * 8], ax
        mov     word ptr ds:[IDT + 0x20 * 8 + 2], 8
        mov     word ptr ds:[IDT + 0x20 * 8 + 4], 0x8e00
        shr     eax, 16
        mov     word ptr ds:[IDT + 0x20 * 8 + 6], ax
        lidt    ds:[ROM + idt_pointer]
        mov     al, 0x11                /* both PICs: vectors from 0x20 on, timer only */
        out     0x20, al
        out     0xa0, al
        mov     al, 0x20
        out     0x21, al
        mov     al, 0x28
        out     0xa1, al
        mov     al, 4
        out     0x21, al
        mov     al, 2
        out     0xa1, al
        mov     al, 1
        out     0x21, al
        out     0xa1, al
        mov     al, 0xfe
        out     0x21, al
        mov     al, 0xff
        out     0xa1, al
        mov     ecx, ds:[DIVISOR]
        test    ecx, ecx
        jz      1f
        mov     al, 0x34                /* PIT channel 0, rate generator */
        out     0x43, al
        mov     al, cl
        out     0x40, al
        mov     al, ch
        out     0x40, al
1:      cld
        mov     eax, STRETCH
        jmp     eax

        .org    0x400
copy:
        mov     ebx, ds:[LOOPS]
        imul    ebx, ds:[POOL_STEP]
        mov     edx, esi
        mov     esp, ebp
1:      mov     edi, [edx]
        mov     esi, [edx + 4]
        add     esi, ebx
        and     esi, ds:[POOL_MASK]
        add     esi, ds:[POOL]
        mov     ecx, ds:[STORE_DWORDS]
        rep movsd
        add     edx, 16
        dec     esp
        jnz     1b
        mov     ecx, ebp
        mov     esi, ebp
        shl     esi, 4
        sub     edx, esi
        mov     esi, edx
        jmp     dword ptr ds:[RETURN]

        .org    0xfff0
        .code16
        jmp     real_mode
        .org    0x10000

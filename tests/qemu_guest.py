# SPDX-License-Identifier: Apache-2.0
"""The guest of the QEMU tests: it writes memory in a known order, tells its progress, and says so
itself when its memory is damaged.

A 512-byte boot sector of flat 32-bit code, written here byte by byte; a 64 KiB firmware starts the
same sector where there is no time for a BIOS (an emulating KVM needs minutes for SeaBIOS).

    page:   0          counter 0, one more each pass         0x40   own address
            0x800      counter 1, likewise, just after       0xffc  own address

    walk:   for ever: `chunk` pages in address order (counter 0, then counter 1), then, where paced,
            halt until the timer ticks; every `beat_every` chunks a heartbeat

With the guest stopped anywhere, all counters in walking order are equal but for at most one place
where the next is one less: a page that is lost, old, torn or misplaced shows. The guest compares
its counters and tags as it walks; a mismatch, or a disk that refuses a write, ends it with a line
`!` + address on the serial port. A heartbeat is a line of eight hex digits there, counting from 1,
and the same number in sector 1 of the first IDE disk, which is also what the sector boots from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["DISK_BYTES", "Walk", "disk_beat", "firmware", "make_disk", "read_beats", "sector"]

PAGE = 4096
MIB = 1 << 20
ORIGIN = 0x7C00  #: where a BIOS loads a boot sector
DISK_BYTES = MIB
TICK_HZ = 1_193_182  #: of the timer, before its divisor

_APIC = 0xFEE00000
_IDT = 0x7E00
_TIMER_VECTOR = 0x20
_SECTOR_BUFFER = 0x8000
_COUNTER_1, _TAG_0, _TAG_1 = 0x800, 0x40, 0xFFC
_BEAT_MAGIC = b"vmth"


@dataclass(frozen=True)
class Walk:
    """What the guest does. ``chunk_pages`` 0: it only beats; ``ticks_hz`` 0: it never rests."""

    start: int = 2 * MIB
    pages: int = 104 * MIB // PAGE
    chunk_pages: int = 1024
    ticks_hz: int = 0
    beat_every: int = 4  #: chunks; a power of two

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE

    def check(self, memory: bytes | memoryview | np.ndarray) -> int:
        """Prove the invariant for the stopped guest's RAM from address 0 on; the number of passes
        that were begun. AssertionError with the first wrong places."""
        ram = np.frombuffer(memory, dtype="<u4")
        words = ram[self.start // 4 : self.end // 4].reshape(self.pages, PAGE // 4)
        addresses = np.arange(self.start, self.end, PAGE, dtype=np.uint32)
        for offset in (_TAG_0, _TAG_1):
            wrong = np.flatnonzero(words[:, offset // 4] != addresses)
            assert not wrong.size, (
                f"{wrong.size} pages without their address at +{offset:#x}: "
                + _places(addresses[wrong], words[wrong, offset // 4])
            )
        counters = np.stack([words[:, 0], words[:, _COUNTER_1 // 4]], axis=1).ravel().astype(int)
        steps = np.diff(counters)
        changes = np.flatnonzero(steps)
        assert len(changes) <= 1 and all(steps[changes] == -1), (
            f"{len(changes)} changes of the counter along the walk, at most one of -1 may be: "
            + _places(addresses[changes // 2], counters[changes])
        )
        return int(counters[0])


def _places(addresses: Iterable[int], values: Iterable[int]) -> str:
    rows = [f"{at:#x} has {value:#x}" for at, value in zip(addresses, values, strict=True)]
    return ", ".join(rows[:8]) + (", ..." if len(rows) > 8 else "")


class _Code:
    """Bytes with labels; a jump may be written before its label is."""

    def __init__(self, origin: int) -> None:
        self.origin = origin
        self.data = bytearray()
        self._labels: dict[str, int] = {}
        self._fixups: list[tuple[int, str, int]] = []  # position, label, bytes (1: relative)

    def op(self, code: str, *operands: tuple[int, int]) -> None:
        """Hex digits, then operands as (value, bytes), little-endian."""
        self.data += bytes.fromhex(code)
        for value, nbytes in operands:
            self.data += (value & (1 << 8 * nbytes) - 1).to_bytes(nbytes, "little")

    def label(self, name: str) -> None:
        self._labels[name] = len(self.data)

    def jump(self, code: str, name: str) -> None:
        """An opcode with an 8-bit distance."""
        self.op(code, (0, 1))
        self._fixups.append((len(self.data) - 1, name, 1))

    def call(self, name: str) -> None:
        self.op("e8", (0, 4))
        self._fixups.append((len(self.data) - 4, name, -4))

    def address(self, code: str, name: str, nbytes: int, tail: str = "") -> None:
        """An opcode with a label's absolute address, then more bytes."""
        self.op(code, (0, nbytes))
        self._fixups.append((len(self.data) - nbytes, name, nbytes))
        self.op(tail)

    def finish(self) -> bytes:
        for at, name, kind in self._fixups:
            target = self._labels[name]
            if kind == 1:
                distance = target - (at + 1)
                assert -128 <= distance <= 127, f"{name} is too far away"
                self.data[at] = distance & 0xFF
            elif kind == -4:
                self.data[at : at + 4] = (target - (at + 4)).to_bytes(4, "little", signed=True)
            else:
                self.data[at : at + kind] = (self.origin + target).to_bytes(kind, "little")
        return bytes(self.data)


def sector(walk: Walk) -> bytes:
    """The boot sector."""
    code = _Code(ORIGIN)
    _enter_flat_mode(code)
    if walk.ticks_hz:
        _start_timer(code, walk.ticks_hz)
    _write_tags(code, walk)
    _walk(code, walk)
    _beat(code, walk)
    _stop(code)
    _subroutines(code)
    _tables(code)
    data = code.finish()
    assert len(data) <= 510, f"{len(data)} bytes of code, 510 fit"
    return data.ljust(510, b"\0") + b"\x55\xaa"


def _enter_flat_mode(code: _Code) -> None:
    # 16 bits; a BIOS has been here, or nobody.
    code.op("fa")  #                     cli
    code.op("31c0")  #                   xor ax, ax
    code.op("8ed8")  #                   mov ds, ax
    code.op("e492")  #                   in al, 0x92
    code.op("0c02")  #                   or al, 2: A20
    code.op("e692")  #                   out 0x92, al
    code.address("0f0116", "gdtr", 2)  # lgdt [gdtr]
    code.address("0f011e", "idtr", 2)  # lidt [idtr]
    code.op("0f20c0")  #                 mov eax, cr0
    code.op("0c01")  #                   or al, 1
    code.op("0f22c0")  #                 mov cr0, eax
    code.address("ea", "flat", 2, "0800")  # jmp 8:flat
    code.label("flat")  # 32 bits from here on
    code.op("66b81000")  #               mov ax, 0x10
    code.op("8ed8")  #                   mov ds, ax
    code.op("8ec0")  #                   mov es, ax
    code.op("8ed0")  #                   mov ss, ax
    code.op("bc", (ORIGIN, 4))  #        mov esp, ORIGIN
    code.op("fc")  #                     cld


def _start_timer(code: _Code, ticks_hz: int) -> None:
    gate = _IDT + 8 * _TIMER_VECTOR
    code.address("b8", "tick", 4)  #                 mov eax, tick
    code.op("0d", (0x00080000, 4))  #                or eax, selector 8 << 16
    code.op("a3", (gate, 4))  #                      mov [gate], eax
    code.op("c705", (gate + 4, 4), (0x8E00, 4))  #   mov dword [gate + 4], an interrupt gate
    # The local APIC passes the old interrupt controller on, as a BIOS leaves it.
    code.op("c705", (_APIC + 0xF0, 4), (0x1FF, 4))  #   mov dword [spurious vector], enabled
    code.op("c705", (_APIC + 0x350, 4), (0x700, 4))  # mov dword [LINT0], external interrupts
    divisor = TICK_HZ // ticks_hz
    assert 0 < divisor <= 0xFFFF, f"{ticks_hz} Hz is not between 19 and {TICK_HZ}"
    for port, value in (
        *((0x20, 0x11), (0x21, _TIMER_VECTOR), (0x21, 0x04), (0x21, 0x01)),
        (0x21, 0xFE),  # of the first interrupt controller only the timer
        *((0x43, 0x34), (0x40, divisor & 0xFF), (0x40, divisor >> 8)),
    ):
        code.op("b0", (value, 1))  #     mov al, value
        code.op("e6", (port, 1))  #      out port, al


def _write_tags(code: _Code, walk: Walk) -> None:
    code.op("bf", (walk.start, 4))  #    mov edi, start
    code.op("b9", (walk.pages, 4))  #    mov ecx, pages
    code.op("31c0")  #                   xor eax, eax
    code.label("tag")
    code.op("8907")  #                   mov [edi], eax
    code.op("8987", (_COUNTER_1, 4))  #  mov [edi + 0x800], eax
    code.op("897f", (_TAG_0, 1))  #      mov [edi + 0x40], edi
    code.op("89bf", (_TAG_1, 4))  #      mov [edi + 0xffc], edi
    code.op("81c7", (PAGE, 4))  #        add edi, 0x1000
    code.jump("e2", "tag")  #            loop tag


def _walk(code: _Code, walk: Walk) -> None:
    # edi: the page; ebp: what its counters become in this pass; ebx: chunks so far.
    code.op("bf", (walk.start, 4))  #    mov edi, start
    code.op("bd", (1, 4))  #             mov ebp, 1
    code.op("31db")  #                   xor ebx, ebx
    code.label("chunk")
    code.op("b9", (walk.chunk_pages, 4))  # mov ecx, chunk_pages
    code.jump("e3", "rest")  #           jecxz rest
    code.label("page")
    code.op("ff07")  #                   inc dword [edi]
    code.op("392f")  #                   cmp [edi], ebp
    code.jump("75", "damage")  #         jne damage
    code.op("397f", (_TAG_0, 1))  #      cmp [edi + 0x40], edi
    code.jump("75", "damage")
    code.op("39bf", (_TAG_1, 4))  #      cmp [edi + 0xffc], edi
    code.jump("75", "damage")
    code.op("ff87", (_COUNTER_1, 4))  #  inc dword [edi + 0x800]
    code.op("39af", (_COUNTER_1, 4))  #  cmp [edi + 0x800], ebp
    code.jump("75", "damage")
    code.op("81c7", (PAGE, 4))  #        add edi, 0x1000
    code.op("81ff", (walk.end, 4))  #    cmp edi, end
    code.jump("72", "next")  #           jb next
    code.op("bf", (walk.start, 4))  #    mov edi, start
    code.op("45")  #                     inc ebp
    code.label("next")
    code.jump("e2", "page")  #           loop page
    code.label("rest")
    if walk.ticks_hz:
        # The interrupt leads to `tick`, without a return: an emulating KVM has no iret here.
        code.op("fb")  #                 sti
        code.op("f4")  #                 hlt
        code.label("tick")
        code.op("bc", (ORIGIN, 4))  #    mov esp, ORIGIN
        code.op("b020")  #               mov al, 0x20
        code.op("e620")  #               out 0x20, al: seen
    code.op("43")  #                     inc ebx
    assert walk.beat_every & (walk.beat_every - 1) == 0, "beat_every is no power of two"
    code.op("f7c3", (walk.beat_every - 1, 4))  # test ebx, beat_every - 1
    code.jump("75", "chunk")  #          jnz chunk
    code.jump("eb", "beat")  #           jmp beat
    code.label("damage")
    code.op("b021")  #                   mov al, '!'
    code.call("put")
    code.op("89f8")  #                   mov eax, edi
    code.call("put_number")
    code.jump("eb", "stop")  #           jmp stop


def _beat(code: _Code, walk: Walk) -> None:
    code.label("beat")
    code.op("89d8")  #                   mov eax, ebx
    code.op("c1e8", (walk.beat_every.bit_length() - 1, 1))  # shr eax, log2(beat_every)
    code.op("a3", (_SECTOR_BUFFER + 4, 4))  # mov [buffer + 4], eax
    code.op("c705", (_SECTOR_BUFFER, 4))  # mov dword [buffer], 'vmth'
    code.op(_BEAT_MAGIC.hex())
    code.call("put_number")
    code.op("66ba", (0x1F6, 2))  #       mov dx, 0x1f6
    code.op("b0e0")  #                   mov al, 0xe0: by sector number, first disk
    code.op("ee")  #                     out dx, al
    code.op("42")  #                     inc edx
    code.label("busy")
    code.op("ec")  #                     in al, dx
    code.op("a880")  #                   test al, 0x80
    code.jump("75", "busy")  #           jnz busy
    code.op("b2f2")  #                   mov dl, 0xf2
    code.op("b001")  #                   mov al, 1
    code.op("ee")  #                     out dx, al: one sector
    code.op("42ee")  #                   inc edx; out dx, al: sector 1
    code.op("30c0")  #                   xor al, al
    code.op("42ee")  #                   inc edx; out dx, al
    code.op("42ee")  #                   inc edx; out dx, al
    code.op("b2f7")  #                   mov dl, 0xf7
    code.op("b030")  #                   mov al, 0x30: write
    code.op("ee")  #                     out dx, al
    code.label("not_ready")
    code.op("ec")  #                     in al, dx
    code.op("a808")  #                   test al, 8
    code.jump("74", "not_ready")  #      jz not_ready
    code.op("b2f0")  #                   mov dl, 0xf0
    code.op("be", (_SECTOR_BUFFER, 4))  # mov esi, buffer
    code.op("b9", (256, 4))  #           mov ecx, 256
    code.op("f3666f")  #                 rep outsw
    code.op("b2f7")  #                   mov dl, 0xf7
    code.label("writing")
    code.op("ec")  #                     in al, dx
    code.op("a880")  #                   test al, 0x80
    code.jump("75", "writing")  #        jnz writing
    code.op("a821")  #                   test al, 0x21: refused?
    code.jump("74", "on")  #             jz on
    code.op("b021")  #                   mov al, '!'
    code.call("put")
    code.op("31c0")  #                   xor eax, eax
    code.call("put_number")
    code.jump("eb", "stop")  #           jmp stop
    code.label("on")
    code.address("68", "chunk", 4)  #    push chunk
    code.op("c3")  #                     ret


def _stop(code: _Code) -> None:
    code.label("stop")
    code.op("fa")  #                     cli
    code.op("f4")  #                     hlt
    code.jump("eb", "stop")  #           jmp stop


def _subroutines(code: _Code) -> None:
    code.label("put_number")  # eax as eight hex digits and an end of line
    code.op("b9", (8, 4))  #             mov ecx, 8
    code.label("digit")
    code.op("c1c004")  #                 rol eax, 4
    code.op("50")  #                     push eax
    code.op("240f")  #                   and al, 15
    code.op("0430")  #                   add al, '0'
    code.op("3c39")  #                   cmp al, '9'
    code.jump("76", "decimal")  #        jbe decimal
    code.op("0427")  #                   add al, 'a' - '9' - 1
    code.label("decimal")
    code.call("put")
    code.op("58")  #                     pop eax
    code.jump("e2", "digit")  #          loop digit
    code.op("b00a")  #                   mov al, '\n'
    code.label("put")  # al to the serial port
    code.op("88c4")  #                   mov ah, al
    code.op("66ba", (0x3FD, 2))  #       mov dx, 0x3fd
    code.label("full")
    code.op("ec")  #                     in al, dx
    code.op("a820")  #                   test al, 0x20
    code.jump("74", "full")  #           jz full
    code.op("b2f8")  #                   mov dl, 0xf8
    code.op("88e0")  #                   mov al, ah
    code.op("ee")  #                     out dx, al
    code.op("c3")  #                     ret


def _tables(code: _Code) -> None:
    code.label("gdt")
    code.op("0000000000000000")
    code.op("ffff0000009acf00")  # 8: code, flat
    code.op("ffff00000092cf00")  # 0x10: data, flat
    code.label("gdtr")
    code.op("", (3 * 8 - 1, 2))
    code.address("", "gdt", 4)
    code.label("idtr")
    code.op("", (8 * (_TIMER_VECTOR + 1) - 1, 2), (_IDT, 4))


def firmware(walk: Walk) -> bytes:
    """A 64 KiB ROM that copies the sector to where a BIOS would have loaded it, and enters it."""
    payload, reset = 0x100, 0xFFF0
    code = _Code(0)
    code.op("fa")  #                     cli
    code.op("31c0")  #                   xor ax, ax
    code.op("8ec0")  #                   mov es, ax
    code.op("be", (payload, 2))  #       mov si, payload
    code.op("bf", (ORIGIN, 2))  #        mov di, ORIGIN
    code.op("b9", (256, 2))  #           mov cx, 256
    code.label("copy")
    code.op("2e8b04")  #                 mov ax, cs:[si]
    code.op("268905")  #                 mov es:[di], ax
    code.op("83c602")  #                 add si, 2
    code.op("83c702")  #                 add di, 2
    code.jump("e2", "copy")  #           loop copy
    code.op("ea", (ORIGIN, 2), (0, 2))  # jmp 0:ORIGIN
    image = (code.finish().ljust(payload, b"\xf4") + sector(walk)).ljust(reset, b"\xf4")
    to_begin = b"\xe9" + (-(reset + 3) & 0xFFFF).to_bytes(2, "little")  # jmp 0
    return (image + to_begin).ljust(1 << 16, b"\xf4")


def make_disk(path: Path, walk: Walk) -> None:
    """The disk that the guest boots from, and writes its heartbeat to."""
    path.write_bytes(sector(walk).ljust(DISK_BYTES, b"\0"))


def disk_beat(path: Path) -> int:
    """The last heartbeat on the disk; 0 before the first."""
    with path.open("rb") as disk:
        disk.seek(512)
        head = disk.read(8)
    if head == bytes(8):
        return 0
    assert head[:4] == _BEAT_MAGIC, f"sector 1 begins with {head.hex()}"
    return int.from_bytes(head[4:], "little")


def read_beats(serial: Sequence[bytes]) -> int:
    """The last of the heartbeats that were written to these serial ports, one after the other.

    AssertionError unless each is the one before plus one, from 1 on, and none of the guest's lines
    tells of damage. The last line may be unfinished."""
    lines = b"".join(serial).split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        assert line == b"%08x" % number, f"heartbeat {number} is {line!r}"
    assert not lines[-1].startswith(b"!"), f"the guest tells of damage: {lines[-1]!r}"
    return len(lines) - 1

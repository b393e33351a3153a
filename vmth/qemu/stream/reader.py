# SPDX-License-Identifier: Apache-2.0
"""The main connection's bytes to events. No I/O: ``feed()`` bytes, take ``next_event()``.

    file header -> configuration -> section* -> end of state -> vmdescription
                                    |  ram: natively parsed, delimited by its own records
                                    |  device: opaque; its end is known or looked for (devices.py)
                                    |  command; a package is sections within a known length
                                    +- unknown: everything from there on is passed through

Each state is a method that is shown what there is, returns how many bytes it used, or raises
``ShortError``. What the peer sent wrong is a StreamError, after which the reader stays failed.
However the bytes are cut, the events are the same (but for how runs of pages are gathered).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from vmth.errors import StreamError
from vmth.qemu.ram import MAX_BLOCKS, BlockTable, RamParser, Stop
from vmth.qemu.stream.devices import DeviceSizes, find_end, footer_pattern
from vmth.qemu.stream.events import (
    BlockListed,
    Command,
    CommandCode,
    Configuration,
    ConfigurationField,
    Description,
    DeviceState,
    EndOfState,
    Event,
    FileHeader,
    MappedPages,
    PackageFinished,
    PackageStarted,
    PassThrough,
    RamEnd,
    RamFlush,
    RamPages,
    RamSize,
    RawBytes,
    SectionFinished,
    SectionKind,
    SectionStarted,
    StreamFinished,
)
from vmth.qemu.stream.fields import (
    COMMAND_BYTES,
    FILE_MAGIC,
    FILE_VERSION,
    MAX_CAPABILITIES,
    MAX_DESCRIPTION_BYTES,
    MAX_DEVICE_BYTES,
    MAX_MACHINE_BYTES,
    MAX_SECTIONS,
    RAM_VERSION,
    SECTION_FOOTER,
    be,
    bound,
    expect,
    name_text,
    string_at,
)
from vmth.qemu.stream.mapped import MappedRegion
from vmth.qemu.stream.window import ShortError, Window

__all__ = ["StreamReader"]

State: TypeAlias = Callable[[memoryview], int]

CONFIGURATION = "configuration/"
#: What a search for a footer joins at a time.
SEARCH_BYTES = 64 << 10


class StreamReader:
    """One main connection or one stored stream.

    ``device_sizes``: payload bytes of device sections, where a vmdescription was read before.
    ``opaque_devices``: do not look for the ends of device sections; from the first one behind the
    last ram section on everything is passed through. ``page_bytes``: the target's page, until the
    configuration says otherwise.
    """

    def __init__(
        self,
        *,
        device_sizes: DeviceSizes | None = None,
        opaque_devices: bool = False,
        page_bytes: int = 4096,
    ) -> None:
        self._window = Window()
        self._events: deque[Event] = deque()
        self._state: State = self._file_header
        self._failure: StreamError | None = None
        self._want = self._want_next = 1
        self._page_bytes = page_bytes
        self._device_sizes = device_sizes
        self._opaque_devices = opaque_devices
        self._ram = RamParser()
        self._table: BlockTable | None = None
        self._listed: list[BlockListed] = []
        self._to_list_bytes = 0
        self._mapped: MappedRegion | None = None
        self._capabilities: tuple[str, ...] = ()
        self._iterable: dict[int, SectionStarted] = {}
        self._seen: set[int] = set()
        self._section: SectionStarted | None = None
        self._find: Callable[[memoryview, int], int] | None = None
        self._scanned = 0
        self._footers = self._ram_ended = False
        self._after_configuration = False
        self._host_pages_advised = False
        self._package_left: int | None = None
        self._complete = False
        self._settled = False

    # ---- what callers use ----------------------------------------------------------------------

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes; they must not change as long as events that refer to them are used."""
        self._settled = False
        self._window.feed(data)

    def give_back(self, at_most: int) -> int:
        """Forget the last bytes that were fed, if at most so many are not used yet. How many: they
        must be fed again in front of those that follow. A record that a buffer's end cuts needs no
        copy and no event of its own then. Only when ``next_event()`` has returned None."""
        if self._window.available > at_most:
            return 0
        self._want = 1
        return self._window.forget()

    def in_pages(self, at_most: int) -> tuple[BlockTable, int] | None:
        """In the midst of page records, nothing else to tell, at most so many bytes not used: what
        somebody needs who parses on from here (the blocks, and the one that CONTINUE means).
        Else None."""
        amid = self._state == self._ram_records and self._package_left is None
        if self._table is None or not amid or self._events or self._failure:
            return None
        if self._window.eof or self._window.available > at_most:
            return None
        return self._table, self._ram.block

    def went_on(self, used_bytes: int, block: int) -> None:
        """Somebody else has parsed so many bytes, from the first on that was fed here and not used:
        what is left of those is fed again."""
        self._window.forget()
        self._window.position += used_bytes
        self._want = 1
        self._ram.go_on(block)

    def feed_eof(self) -> None:
        """Nothing comes any more."""
        self._window.eof = True

    def settle(self) -> None:
        """Nothing comes for now: what was fed ends at the end of a section or of the state.

        A device section's end is believed only when the next header is seen, and behind the last
        one there is but a byte when the source sends no vmdescription. Without this such a source,
        which waits for the destination's answer before it closes, would be waited for.
        """
        self._settled = True

    def next_event(self) -> Event | None:
        """The next event, or None when more bytes are needed. Raises StreamError, then always."""
        while not self._events:
            if self._failure is not None:
                raise self._failure
            try:
                if not self._advance():
                    return None
            except StreamError as error:
                self._failure = StreamError(f"{error} (byte {self._window.position} of the stream)")
        return self._events.popleft()

    @property
    def position(self) -> int:
        """Bytes that were understood so far."""
        return self._window.position

    @property
    def blocks(self) -> tuple[BlockListed, ...]:
        """The ramblocks that the stream has listed so far."""
        return tuple(self._listed)

    @property
    def table(self) -> BlockTable | None:
        """The same for parsing records; None until all blocks are listed."""
        return self._table

    @property
    def ram_section_id(self) -> int | None:
        return next((key for key, of in self._iterable.items() if of.idstr == "ram"), None)

    def reconnected(self) -> None:
        """A new connection goes on with the same postcopy: sections and blocks stay known."""
        self._window, self._events = Window(), deque()
        self._state, self._failure, self._want = self._section_header, None, 1
        self._section, self._package_left = None, None
        self._after_configuration = False
        self._ram = RamParser()

    # ---- the driver ----------------------------------------------------------------------------

    def _advance(self) -> bool:
        """One step. False: more bytes are needed."""
        window = self._window
        if window.available < self._want and not (window.eof or self._settled):
            window.gather(self._want)  # what was fed is let go before more is asked for
            return False
        if window.available == 0:
            return self._at_end()
        seen = window.gather(self._want) if window.carried else len(window.view())
        left = self._package_left
        # The carry cannot grow while a view of it is alive.
        with window.view() as whole, whole[:left] as view:
            nbytes = len(view)
            self._complete = nbytes == left or (
                (window.eof or self._settled) and seen == window.available
            )
            short = None
            try:
                used = self._state(view)
            except ShortError as caught:
                short = caught
        if short is not None:
            return self._join(short, nbytes)
        window.use(used)
        self._want, self._want_next = self._want_next, 1
        if left is not None:
            self._in_package(left - used)
        return True

    def _join(self, short: ShortError, nbytes: int) -> bool:
        """Show more bytes to the same state, if there are more. False: they must be fed first."""
        window, left = self._window, self._package_left
        need = short.need
        if left is not None and need > left:
            if not short.soft or nbytes == left:
                raise StreamError(f"package: {left} bytes left, a record needs {need}")
            need = left
        seen = window.gather(need)
        if seen >= need or (short.soft and seen > nbytes):
            self._want = seen
            return True
        if window.eof and seen == window.available:
            raise StreamError(f"the stream ends within a record: received {seen}, needs {need}")
        self._want = nbytes + 1 if short.soft else need
        return False

    def _at_end(self) -> bool:
        if not self._window.eof or self._state == self._finished:
            return False
        if self._state not in (self._description, self._trailing, self._raw):
            raise StreamError("the stream ends before the end of state")
        self._state = self._finished
        self._events.append(StreamFinished())
        return True

    def _in_package(self, left: int) -> None:
        if self._package_left is None or self._state == self._raw:
            return
        self._package_left = left
        if left == 0:
            if self._state != self._section_header:
                raise StreamError("the package ends within a section")
            self._package_left = None
            self._events.append(PackageFinished())

    def _pass_through(self, reason: str) -> int:
        self._events.append(PassThrough(reason, self._window.position))
        self._state = self._raw
        self._package_left = None
        return 0

    def _raw(self, view: memoryview) -> int:
        self._events.append(RawBytes(self._keep(view, len(view))))
        return len(view)

    def _keep(self, view: memoryview, nbytes: int) -> memoryview:
        """The first bytes of ``view`` for an event: by reference, unless they are of the carry."""
        return memoryview(bytes(view[:nbytes])) if self._window.carried else view[:nbytes]

    def _finished(self, view: memoryview) -> int:
        raise StreamError("bytes after the end")

    # ---- header and configuration --------------------------------------------------------------

    def _file_header(self, view: memoryview) -> int:
        if view[0] == 8:  # a connection that resumes a postcopy begins with a command
            self._state = self._section_header
            return 0
        expect("file magic", be(view, 0, 4), int.from_bytes(FILE_MAGIC, "big"))
        expect("file version", be(view, 4, 4), FILE_VERSION)
        self._events.append(FileHeader(FILE_VERSION))
        self._state = self._configuration
        return 8

    def _configuration(self, view: memoryview) -> int:
        self._state = self._section_header
        if view[0] != 7:
            return 0
        self._state = self._configuration
        end = 5 + bound("machine name", be(view, 1, 4), MAX_MACHINE_BYTES)
        if len(view) < end:
            raise ShortError(end)
        self._events.append(Configuration(name_text(bytes(view[5:end]))))
        self._state = self._section_header
        self._after_configuration = True
        return end

    def _configuration_field(self, view: memoryview) -> int:
        name, at = string_at(view, 1)
        version = be(view, at, 4)
        at += 4
        if name == CONFIGURATION + "target-page-bits":
            end = at + 4
            bits = be(view, at, 4)
            if not 10 <= bits <= 16:
                raise StreamError(f"target page bits: received {bits}, allowed 10 to 16")
            self._page_bytes = 1 << bits
        elif name == CONFIGURATION + "uuid":
            end = at + 16
        elif name == CONFIGURATION + "capabilities":
            names = []
            end = at + 4
            for _ in range(bound("capabilities", be(view, at, 4), MAX_CAPABILITIES)):
                text, end = string_at(view, end)
                names.append(text)
            self._capabilities = tuple(names)
        else:
            return self._pass_through(f"configuration subsection {name!r}")
        if len(view) < end:
            raise ShortError(end)
        field = ConfigurationField(name.removeprefix(CONFIGURATION), version, bytes(view[at:end]))
        self._events.append(field)
        return end

    # ---- between sections ----------------------------------------------------------------------

    def _section_header(self, view: memoryview) -> int:
        kind = view[0]
        if kind == 5 and self._after_configuration:
            return self._configuration_field(view)
        self._after_configuration = False
        if kind in (1, 4):
            return self._start_or_full(view)
        if kind in (2, 3):
            return self._part_or_end(view)
        if kind == 8:
            return self._command(view)
        if kind == 0 and self._package_left is None:
            self._events.append(EndOfState())
            self._state = self._description
            return 1
        if kind in (0, 5, 6, 7, SECTION_FOOTER):
            raise StreamError(f"section type: received {kind:#x}, allowed 1, 2, 3, 4, 8 here")
        return self._pass_through(f"section type {kind:#x}")

    def _start_or_full(self, view: memoryview) -> int:
        kind = SectionKind(view[0])
        section_id = be(view, 1, 4)
        idstr, at = string_at(view, 5)
        instance_id, version_id = be(view, at, 4), be(view, at + 4, 4)
        if section_id in self._seen:
            raise StreamError(f"section id {section_id}: received again, allowed once")
        bound("sections", len(self._seen) + 1, MAX_SECTIONS)
        started = SectionStarted(kind, section_id, idstr, instance_id, version_id)
        if kind is SectionKind.START:
            if (idstr, instance_id, version_id) != ("ram", 0, RAM_VERSION):
                return self._pass_through(f"iterable section {idstr!r} version {version_id}")
            if self._iterable:
                raise StreamError("ram section: received a second START, allowed one")
            self._iterable[section_id] = started
            self._state = self._ram_records
        else:
            if self._opaque_devices and self._ram_ended:
                return self._pass_through("device state, as asked")
            self._state = self._device
            self._find, self._scanned = footer_pattern(section_id), 0
        self._seen.add(section_id)
        self._section = started
        self._events.append(started)
        return at + 8

    def _part_or_end(self, view: memoryview) -> int:
        kind, section_id = SectionKind(view[0]), be(view, 1, 4)
        of = self._iterable.get(section_id)
        if of is None:
            raise StreamError(
                f"section id of {kind.name}: received {section_id}, allowed {list(self._iterable)}"
            )
        self._section = SectionStarted(kind, section_id, of.idstr, of.instance_id, of.version_id)
        self._events.append(self._section)
        self._state = self._ram_records
        return 5

    def _footer(self, view: memoryview) -> int:
        assert self._section is not None
        if view[0] != SECTION_FOOTER:
            if self._footers:
                raise StreamError(f"section footer: received {view[0]:#x}, allowed 0x7e")
            return self._pass_through("sections without footers")
        expect("section footer's id", be(view, 1, 4), self._section.section_id)
        self._footers = True
        self._ram_ended |= self._section.kind is SectionKind.END
        self._events.append(SectionFinished(self._section.section_id))
        self._section = None
        self._state = self._section_header
        return 5

    def _command(self, view: memoryview) -> int:
        code, nbytes = be(view, 1, 2), be(view, 3, 2)
        allowed = COMMAND_BYTES.get(code)
        if allowed is not None and nbytes not in allowed:
            raise StreamError(f"command {code}: received {nbytes} bytes, allowed {allowed}")
        end = 5 + nbytes
        if len(view) < end:
            raise ShortError(end)
        if code == CommandCode.PACKAGED:
            if self._package_left is not None:
                raise StreamError("package within a package")
            package = be(view, 5, 4)
            if package == 0:
                raise StreamError("package: received 0 bytes, allowed at least 1")
            self._events.append(PackageStarted(package))
            self._package_left = package
            return end
        if code == CommandCode.POSTCOPY_ADVISE and nbytes == 16:
            self._host_pages_advised = True
        self._events.append(Command(code, bytes(view[5:end])))
        return end

    # ---- device sections -----------------------------------------------------------------------

    def _device(self, view: memoryview) -> int:
        section = self._section
        assert section is not None and self._find is not None
        known = None
        if self._device_sizes is not None:
            known = self._device_sizes.get((section.idstr, section.instance_id))
        if known is not None:
            end, found = known, len(view) >= known
            if not found and not self._complete:
                raise ShortError(known)
        else:
            end, found = find_end(
                self._find,
                view,
                self._scanned,
                self._seen,
                self._iterable,
                complete=self._complete,
                in_package=self._package_left is not None,
            )
        if not found:
            self._scanned = end
            if len(view) > MAX_DEVICE_BYTES:
                return self._pass_through(
                    f"device section {section.idstr!r} without an end in {MAX_DEVICE_BYTES} bytes"
                )
            if self._complete and not self._settled:
                raise StreamError(f"device section {section.idstr!r} does not end")
            raise ShortError(len(view) + SEARCH_BYTES, soft=True)
        self._events.append(DeviceState(bytes(view[:end])))
        self._footers = True
        self._state = self._footer
        return end

    def _description(self, view: memoryview) -> int:
        if view[0] != 6:
            return self._pass_through("bytes after the end of state")
        end = 5 + bound("vmdescription", be(view, 1, 4), MAX_DESCRIPTION_BYTES)
        if len(view) < end:
            raise ShortError(end)
        self._events.append(Description(bytes(view[5:end])))
        self._state = self._trailing
        return end

    def _trailing(self, view: memoryview) -> int:
        return self._pass_through("bytes after the vmdescription")

    # ---- ram -----------------------------------------------------------------------------------

    def _ram_records(self, view: memoryview) -> int:
        table = self._table or BlockTable([], self._page_bytes)
        parsed = self._ram.parse(table, view)
        if len(parsed.runs):
            data = self._keep(view, parsed.used)
            self._events.append(RamPages(table, parsed.runs, data))
        if parsed.stop is Stop.SHORT:
            if parsed.used == 0:
                raise ShortError(parsed.need)
            if self._package_left is None:  # whose end is checked first
                self._want_next = parsed.need
        elif parsed.stop is Stop.EOS:
            self._events.append(RamEnd())
            self._state = self._footer
        elif parsed.stop is Stop.FLUSH:
            self._events.append(RamFlush())
        elif parsed.stop is Stop.MEM_SIZE:
            self._begin_list(parsed.value)
        return parsed.used

    def _begin_list(self, total_bytes: int) -> None:
        assert self._section is not None
        if self._section.kind is not SectionKind.START or self._listed or self._table is not None:
            raise StreamError("block list: received again, allowed once, in the START section")
        self._events.append(RamSize(total_bytes))
        self._to_list_bytes = total_bytes
        self._state = self._block_list
        self._end_list()

    def _end_list(self) -> None:
        if self._to_list_bytes == 0:
            self._table = self._listed_table()
            self._state = self._ram_records

    def _listed_table(self) -> BlockTable:
        return BlockTable([(b.idstr, b.used_length) for b in self._listed], self._page_bytes)

    def _block_list(self, view: memoryview) -> int:
        idstr, at = string_at(view, 0)
        used_length = bound(f"length of block {idstr!r}", be(view, at, 8), self._to_list_bytes)
        at += 8
        bound("blocks", len(self._listed) + 1, MAX_BLOCKS)
        if not idstr or any(block.idstr == idstr for block in self._listed):
            raise StreamError(f"block name: received {idstr!r} empty or again, allowed once")
        page_size = gpa = mapped = None
        if self._host_pages_advised and _is_page_size(be(view, at, 8)):
            page_size = be(view, at, 8)
            at += 8
        if "x-ignore-shared" in self._capabilities:
            gpa = be(view, at, 8)
            at += 8
        if "mapped-ram" in self._capabilities:
            expect("mapped-ram version", be(view, at, 4), 1)
            mapped = MappedPages(be(view, at + 4, 8), be(view, at + 12, 8), be(view, at + 20, 8))
            at += 28
            if mapped.pages_offset:
                expect("mapped-ram page size", mapped.page_bytes, self._page_bytes)
                self._mapped = MappedRegion(mapped, used_length, self._window.position + at)
                self._state = self._mapped_pages
        block = BlockListed(idstr, used_length, page_size, gpa, mapped)
        self._listed.append(block)
        self._events.append(block)
        self._to_list_bytes -= used_length
        if self._mapped is None:
            self._end_list()
        return at

    def _mapped_pages(self, view: memoryview) -> int:
        assert self._mapped is not None
        used, runs = self._mapped.step(view, self._window.position, len(self._listed) - 1)
        if len(runs):
            self._events.append(RamPages(self._listed_table(), runs, self._keep(view, used)))
        if self._mapped.finished:
            self._mapped = None
            self._state = self._block_list
            self._end_list()
        return used


def _is_page_size(value: int) -> bool:
    """Not a name's length (its first byte is never 0) and not a record that ends the list."""
    return 4096 <= value < 1 << 56 and value & (value - 1) == 0

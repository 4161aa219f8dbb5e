"""Follow the codes of a sequential JPEG scan to find where its picture ends. Nothing is decoded to pixels.

The format: ITU-T T.81, annexes B (segments) and F (sequential coding). Offsets are those in the data of a scan, in
which the byte 0xFF is written as 0xFF 0x00.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# This takes about 2 s per megabyte. Only the codes after the last restart marker are followed.
MAX_FOLLOWED_BYTES = 20_000_000
MAX_EXTRANEOUS_BYTES = 65_536
MAX_BLOCKS_PER_MCU = 10
SKIP = 8  # in an entry of a table: bits 0 to 7 are the bits to advance, bits 8 and up the coefficients to advance
END_OF_BLOCK = 128  # coefficients to advance: more than a block has

_RESTART = re.compile(rb"\xff+[\xd0-\xd7]")


class Component(NamedTuple):
    """A component of a frame: its id, and its number of blocks across and down in a unit (MCU) of the scan."""

    id: int
    across: int
    down: int


class Frame(NamedTuple):
    """The content of a start-of-frame segment."""

    height: int
    width: int
    components: list[Component]


class ScanHeader(NamedTuple):
    """The content of a start-of-scan segment."""

    components: dict[int, int]
    """Component to its tables: DC in the upper four bits, AC in the lower ones."""
    first: int
    """First coefficient."""
    last: int
    last_bit: int
    """0 if the scan has the lowest bits of the coefficients."""


def frame_of(content: bytes) -> Frame:
    """Parse the content of a start-of-frame segment, which may be cut off."""
    parts = [content[i : i + 3] for i in range(6, len(content) - 2, 3)]
    components = [Component(part[0], part[1] >> 4, part[1] & 15) for part in parts]
    return Frame(int.from_bytes(content[1:3]), int.from_bytes(content[3:5]), components)


def scan_of(content: bytes) -> ScanHeader:
    """Parse the content of a start-of-scan segment. If it is cut off, the result has no components."""
    count = content[0] if content else 0
    names, tables, rest = content[1 : 1 + 2 * count : 2], content[2 : 2 + 2 * count : 2], content[1 + 2 * count :]
    if len(rest) < 3:
        return ScanHeader({}, 0, 0, 0)
    return ScanHeader(dict(zip(names, tables, strict=False)), rest[0], min(rest[1], 63), rest[2] & 15)


def tables_of(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and definition of each code table of a segment: 16 counts, then the values."""
    while len(content) > 16:
        size = 17 + sum(content[1:17])
        yield content[0], content[1:size]
        content = content[size:]


def end_of_picture(
    data: bytes, frame: Frame, scan: ScanHeader, tables: Mapping[int, bytes], interval: int
) -> int | None:
    """Return the offset after the last block, or None if the bytes after it may be part of the picture.

    Args:
        data: data of the scan, up to the next marker that is not a restart marker.
        frame: frame of the scan, which must be sequential.
        scan: parameters of the scan.
        tables: number (0x10 for AC) to definition, see `tables_of`.
        interval: units between restart markers; 0: there are none.
    """
    units, blocks = _units(frame, scan, tables)
    if not units or not blocks or (interval and not (restarts := list(_RESTART.finditer(data)))):
        return None
    begin = 0
    if interval:
        begin, units = restarts[-1].end(), units - interval * len(restarts)
    coded = data[begin:].replace(b"\xff\0", b"\xff")
    if not 0 < len(coded) <= MAX_FOLLOWED_BYTES or units <= 0:
        return None
    bits = _Bits(coded)
    end = bits.follow(blocks, 0, units)
    if end is None or not bits.is_padded(end) or bits.continues(blocks, end):
        return None
    whole = -(-end // 8)
    if len(coded) - whole > MAX_EXTRANEOUS_BYTES:
        return None
    return begin + whole + coded[:whole].count(b"\xff")


def _units(
    frame: Frame, scan: ScanHeader, tables: Mapping[int, bytes]
) -> tuple[int, list[tuple[memoryview, memoryview]]]:
    """Return the number of units (MCUs) of a scan, and the DC and AC table of each block of a unit.

    Return (0, []) if the scan lacks a component or a table, or if a unit has no blocks or too many.
    """
    components = frame.components
    if not components or [c.id for c in components] != list(scan.components):
        return 0, []
    if len(components) == 1:
        components = [Component(components[0].id, 1, 1)]
    across, down = max(c.across for c in components), max(c.down for c in components)
    if not across or not down or sum(c.across * c.down for c in components) > MAX_BLOCKS_PER_MCU:
        return 0, []
    numbers = [(scan.components[c.id] >> 4, 0x10 | scan.components[c.id] & 15, c.across * c.down) for c in components]
    if any(dc not in tables or ac not in tables for dc, ac, _ in numbers):
        return 0, []
    blocks = [(_lookup(tables[dc], False), _lookup(tables[ac], True), count) for dc, ac, count in numbers]
    units = -(-frame.width // (8 * across)) * -(-frame.height // (8 * down))
    return units, [(dc, ac) for dc, ac, count in blocks for _ in range(count)]


def _lookup(definition: bytes, is_ac: bool) -> memoryview:
    """Return a table of 65,536 entries, one per value of the next 16 bits: see `SKIP`; 0 if they begin with no code."""
    table = np.zeros(1 << 16, np.uint32)
    code, values = 0, iter(definition[16:])
    for length, count in enumerate(definition[:16], 1):
        for value in (next(values, None) for _ in range(count)):
            if value is None or code >= 1 << length:
                return table.data
            run, size = divmod(value, 16) if is_ac else (0, value)
            if size == 0 and is_ac:
                skip = END_OF_BLOCK if run == 0 else 16 if run == 15 else None
            else:
                skip = run + 1 if size <= 15 else None
            if skip is not None:
                table[code << 16 - length : code + 1 << 16 - length] = length + size | skip << SKIP
            code += 1
        code <<= 1
    return table.data


class _Bits:
    """The bits of a scan, without stuffed zero bytes."""

    def __init__(self, coded: bytes) -> None:
        padded = np.frombuffer(coded + bytes(4), np.uint8).astype(np.uint32)
        self.windows = (padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]).data  # the 24 bits from each byte on
        self.length = 8 * len(coded)
        self.last = coded[-1]

    def follow(self, blocks: "Sequence[tuple[memoryview, memoryview]]", at: int, units: int) -> int | None:
        """Return the position after `units` units, or None if the codes are not those of a picture."""
        windows = self.windows
        try:
            for _ in range(units):
                for dc, ac in blocks:
                    at = _after_block(windows, dc, ac, at)
        except (IndexError, ValueError):
            return None
        return at if at <= self.length else None

    def is_padded(self, at: int) -> bool:
        """Return whether the last byte of a picture that ends at `at` is padded with ones, as the format demands."""
        rest = -at % 8
        return rest == 0 or self.windows[at >> 3] >> 16 & (1 << rest) - 1 == (1 << rest) - 1

    def continues(self, blocks: "Sequence[tuple[memoryview, memoryview]]", at: int) -> bool:
        """Return whether codes of a picture continue from `at` to the end of the data."""
        try:
            while at < self.length:
                for dc, ac in blocks:
                    at = _after_block(self.windows, dc, ac, at)
                    if self.length - 8 < at <= self.length and self.is_padded(at):
                        return True
        except (IndexError, ValueError):
            pass
        return False


def _after_block(windows: memoryview, dc: memoryview, ac: memoryview, at: int) -> int:
    """Return the position after a block.

    Raises:
        ValueError: a code or a number of coefficients that no block has.
        IndexError: the bits end within the block.
    """
    entry = dc[windows[at >> 3] >> 8 - (at & 7) & 0xFFFF]
    coefficient = 1
    while entry:
        at += entry & 0xFF
        if coefficient >= 64:
            break
        entry = ac[windows[at >> 3] >> 8 - (at & 7) & 0xFFFF]
        coefficient += entry >> SKIP
    if not entry or 64 < coefficient < END_OF_BLOCK:
        raise ValueError("no block of a picture")
    return at

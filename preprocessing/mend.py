"""Mend JPEG files that every viewer opens but libjpeg complains about, without hiding damage.

A mend changes only bytes that are not part of the picture, and the caller decodes the result strictly again. Bytes that
might be part of the picture are not dropped, so that a damaged file stays a loss. Three messages of libjpeg lead to
these mends:

- Extraneous bytes between the segments of the header are dropped, unless they may be a segment whose marker was
  destroyed.
- Extraneous bytes between the end of the picture and the end marker are dropped if the picture's codes can be followed
  to its last block, are padded there as the format demands, and do not continue in these bytes (see `huffman.py`).
- A missing end marker is added. A file with several scans must have its last ones. If the data of a scan are cut off,
  only the second decoding shows it.
- Invalid parameters of a sequential scan are set to their only legal value.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from preprocessing.huffman import end_of_picture, frame_of, scan_of, tables_of

END = b"\xff\xd9"
SOF, SOF_EXTENDED, SOF_PROGRESSIVE, DHT, SOS, DRI = 0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDD
HUFFMAN_FRAMES = (SOF, SOF_EXTENDED, SOF_PROGRESSIVE)
MAX_SEGMENTS = 10_000
ALL_COEFFICIENTS = b"\0\x3f\0"  # first and last coefficient, and bit positions, of a sequential scan

_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
EXTRANEOUS = "extraneous bytes before marker"  # libjpeg's message, after which it names the marker
_BEFORE = re.compile(f"{EXTRANEOUS} 0x(..)")


@dataclass(frozen=True)
class Mend:
    """A mended file. It may have further faults."""

    data: bytes
    what: str
    """What was mended."""


class _Segment(NamedTuple):
    marker: int
    garbage: int
    """Offset of the bytes before the marker; equal to `begin` if there are none."""
    begin: int
    """Offset of the marker, with its fill bytes."""
    content: int
    """Offset of the content, after the length."""
    end: int
    """Offset after the segment; for a scan, after its data."""


def mend(data: bytes, complaint: str) -> Mend | None:
    """Mend what libjpeg complained about. Return None if that may be damage.

    Args:
        data: the file.
        complaint: libjpeg's message.
    """
    if "Premature end of JPEG file" in complaint:
        return _with_end(data)
    if "Invalid SOS parameters" in complaint:
        return _with_right_parameters(data)
    if found := _BEFORE.search(complaint):
        return _without_extraneous(data, at_end=found[1] == "d9")
    return None


def _segments(data: bytes) -> Iterator[_Segment]:
    """Yield the segments after the start marker, up to the first malformed one; the end marker is not yielded."""
    offset = 2
    for _ in range(MAX_SEGMENTS):
        if not (found := _MARKER.search(data, offset)):
            return
        marker, content = found[1][0], found.end() + 2
        end = found.end() + int.from_bytes(data[found.end() : content])
        if marker in (0x01, *range(0xD0, 0xDA)) or not content <= end <= len(data):
            return
        if marker == SOS:
            after = _END_OF_SCAN.search(data, end)
            end = after.start() if after else len(data)
        yield _Segment(marker, offset, found.start(), content, end)
        offset = end


def _with_end(data: bytes) -> Mend | None:
    missing: set[tuple[int, int]] = set()  # component and coefficient
    for segment in _segments(data):
        content = data[segment.content : segment.end] if segment.marker in (*HUFFMAN_FRAMES, SOS) else b""
        if segment.marker in HUFFMAN_FRAMES:
            missing = {(component.id, k) for component in frame_of(content).components for k in range(64)}
        elif segment.marker == SOS and (scan := scan_of(content)).last_bit == 0:
            missing -= {(name, k) for name in scan.components for k in range(scan.first, scan.last + 1)}
    return None if missing else Mend(data.rstrip(b"\xff") + END, "end marker was missing")


def _with_right_parameters(data: bytes) -> Mend | None:
    mended = bytearray(data)
    sequential = False
    for segment in _segments(data):
        if segment.marker in HUFFMAN_FRAMES:
            sequential = segment.marker != SOF_PROGRESSIVE
        elif segment.marker == SOS:
            at = segment.content + 1 + 2 * data[segment.content]
            if not sequential or at + 3 > segment.end:
                return None
            mended[at : at + 3] = ALL_COEFFICIENTS
    return Mend(bytes(mended), "parameters of a scan were out of range")


def _without_extraneous(data: bytes, at_end: bool) -> Mend | None:
    """Drop extraneous bytes in the header or, if there are none and `at_end`, those before the end marker."""
    kept, dropped = [data[:2]], 0
    for segment in _segments(data):
        garbage = data[segment.garbage : segment.begin]
        if garbage and _is_lost_segment(garbage):
            return None
        if segment.marker == SOS:
            kept.append(data[segment.begin :])
            break
        kept.append(data[segment.begin : segment.end])
        dropped += len(garbage)
    if not dropped:
        return _without_extraneous_end(data) if at_end else None
    return Mend(b"".join(kept), f"{dropped} extraneous bytes before a marker were dropped")


def _is_lost_segment(garbage: bytes) -> bool:
    """Return whether bytes look like a segment or the rest of one, whose content would be missed."""
    return b"Exif" in garbage or int.from_bytes(garbage[2:4]) == len(garbage) - 2


def _without_extraneous_end(data: bytes) -> Mend | None:
    tables: dict[int, bytes] = {}
    frame, interval = None, 0
    for segment in _segments(data):
        content = data[segment.content : segment.end]
        if segment.marker == DHT:
            tables |= dict(tables_of(content))
        elif segment.marker == DRI:
            interval = int.from_bytes(content[:2])
        elif segment.marker in HUFFMAN_FRAMES:
            frame = frame_of(content) if segment.marker != SOF_PROGRESSIVE else None
        elif segment.marker == SOS:
            header = int.from_bytes(data[segment.content - 2 : segment.content]) - 2
            end = frame and end_of_picture(content[header:], frame, scan_of(content), tables, interval)
            if not end:
                return None
            extraneous = len(content) - header - end
            return Mend(
                data[: segment.content + header + end] + data[segment.end :],
                f"{extraneous} extraneous bytes after the picture were dropped",
            )
    return None

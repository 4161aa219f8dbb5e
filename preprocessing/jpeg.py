"""Decode JPEG files strictly, within limits that are checked in their headers.

A file that libjpeg complains about is mended where that hides no damage (see `mend.py`), and decoded strictly again.

Memory of a task within the limits: 700 MB for 250 megapixels in one sequential scan (of which the file has 100 MB, and
the page 250 MB before and 250 MB after it is turned upright); for 100 megapixels in several scans, such as progressive
ones, 500 MB with one component, 900 MB with three, 1400 MB with four.
"""

import re
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from preprocessing.crop import MAX_PAGE_PIXELS, MAX_PAGE_SCANS, MAX_SEQUENTIAL_PIXELS, PageFault
from preprocessing.exif import EXIF, UPRIGHT, orientation_of
from preprocessing.mend import EXTRANEOUS, mend

START = b"\xff\xd8"
SCAN = b"\xff\xda"  # marker "start of scan"; these two bytes do not occur inside the data of a scan
SEQUENTIAL = (0xC0, 0xC1)  # markers "start of frame" of the sequential (not progressive) codings
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
# Markers of segments that may precede the scan: tables, restart interval, application data, comments.
BEFORE_SCAN = (0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
WITHOUT_SEGMENT = (0x01, *range(0xD0, 0xD8))
MAX_SEGMENTS = 10_000  # of a header; further ones are not read
MAX_MENDS = 4
CMYK_ROWS = 256  # to convert at once
AMBIGUOUS_CMYK = "CMYK without Adobe's marker, so 0 may be ink or no ink: read so that the page is light"

_FILL = re.compile(b"\xff+")


@dataclass(frozen=True)
class JpegHeader:
    """Content of the segments before the first scan. Fields that they do not state have these defaults."""

    width: int = 0
    """Pixels, before the page is turned upright."""
    height: int = 0
    components: int = 0
    one_scan: bool = False
    """Whether the coding is certainly sequential, with all components in the first scan."""
    orientation: int = UPRIGHT
    """EXIF orientation, 1 to 8."""
    adobe: bool = False
    """Whether there is an Adobe marker."""


def read_header(data: bytes) -> JpegHeader:
    """Read the segments before the first scan. Segments after a malformed one are not read."""
    offset, orientation, adobe = 2, 0, False
    width = height = components = 0
    sequential = one_scan = False
    for _ in range(MAX_SEGMENTS):
        if not (fill := _FILL.match(data, offset)) or fill.end() == len(data):
            break
        marker, offset = data[fill.end()], fill.end() + 1
        if marker in WITHOUT_SEGMENT:
            continue
        length = int.from_bytes(data[offset : offset + 2])
        begin, end = offset + 2, offset + length
        if marker in FRAMES and not components:
            height, width = int.from_bytes(data[begin + 1 : begin + 3]), int.from_bytes(data[begin + 3 : begin + 5])
            components = data[begin + 5] if begin + 5 < len(data) else 0
            sequential = marker in SEQUENTIAL
        elif marker == SCAN[1]:
            one_scan = sequential and data[begin : begin + 1] == bytes([components])
            break
        elif marker == 0xE1 and not orientation and data.startswith(EXIF, begin):
            orientation = orientation_of(data[begin + len(EXIF) : end])
        elif marker == 0xEE and data.startswith(b"Adobe", begin):
            adobe = True
        elif marker not in BEFORE_SCAN:
            break
        if length < 2:
            break
        offset = end
    return JpegHeader(width, height, components, one_scan, orientation or UPRIGHT, adobe)


def with_mended_header(data: bytes) -> bytes:
    """Return a file, or its first bytes, without the extraneous bytes in its header that `decode_jpeg` drops.

    `read_header` stops at such bytes, and would miss an orientation after them.
    """
    try:
        simplejpeg.decode_jpeg_header(data, strict=True)
    except (ValueError, KeyError) as error:  # KeyError: simplejpeg, for a header that is cut off
        mended = mend(data, str(error)) if EXTRANEOUS in str(error) else None
        return mended.data if mended else data
    return data


def decode_jpeg(data: bytes) -> tuple[NDArray[np.uint8], int, list[str]]:
    """Decode a JPEG file to grayscale, not yet turned upright.

    Returns:
        (height, width) uint8; the EXIF orientation; and warnings.

    Raises:
        PageFault: the file is truncated, corrupt, or exceeds a limit.
    """
    warnings: list[str] = []
    while True:
        try:
            image, header = _decoded(data)
        except ValueError as error:
            mended = mend(data, str(error))
            if mended is None or len(warnings) == MAX_MENDS:
                raise PageFault(f"page can't be decoded: {error}") from error
            data = mended.data
            warnings.append(mended.what)
        else:
            if header.components == 4 and not header.adobe:
                warnings.append(AMBIGUOUS_CMYK)
            return image, header.orientation, warnings


def _decoded(data: bytes) -> tuple[NDArray[np.uint8], JpegHeader]:
    """Return image and header. Raises: PageFault for a limit; ValueError for what libjpeg complains about."""
    header = read_header(data)
    height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    most = MAX_SEQUENTIAL_PIXELS if header.one_scan and header.components <= 3 else MAX_PAGE_PIXELS
    if height * width > most:
        raise PageFault(too_large(width, height, most))
    if not header.one_scan and (scans := data.count(SCAN)) > MAX_PAGE_SCANS:
        raise PageFault(f"page of {scans} scans is over {MAX_PAGE_SCANS} scans")
    if space == "CMYK" and not header.adobe:
        return cv2.cvtColor(_ambiguous_cmyk(data), cv2.COLOR_RGB2GRAY), header
    # With `fastdct`, crops differ from those of the exact transform by 0.3 grey levels, and by 0.7 for pages saved with
    # a quality of 95 or higher.
    return simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True, strict=True)[:, :, 0], header


def _ambiguous_cmyk(data: bytes) -> NDArray[np.uint8]:
    """Decode CMYK whose values may mean ink or light, to RGB.

    Viewers disagree on the meaning. The one that makes the page light is chosen, since paper is lighter than ink.
    """
    light: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="CMYK", strict=True)
    if np.median(light[::8, ::8, 3].astype(np.uint16) * light[::8, ::8, 1] // 255) < 128:
        light = ~light
    page = np.empty((*light.shape[:2], 3), np.uint8)
    for start in range(0, len(light), CMYK_ROWS):  # the products take two bytes per value
        rows = light[start : start + CMYK_ROWS].astype(np.uint16)
        page[start : start + CMYK_ROWS] = rows[..., :3] * rows[..., 3:] // 255
    return page


def too_large(width: int, height: int, most: int) -> str:
    """Return the fault of a page with more than `most` pixels."""
    way = "scale the page and its boxes down, or divide them"
    if most < MAX_SEQUENTIAL_PIXELS:
        way = f"save it as a baseline JPEG, which may have {MAX_SEQUENTIAL_PIXELS}, or {way}"
    return f"page of {width} x {height} pixels is over {most} pixels: {way}"

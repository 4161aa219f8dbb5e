"""Decode a page scan of any supported format, and turn it upright."""

from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from preprocessing.crop import MAX_PAGE_BYTES, PageFault
from preprocessing.exif import upright, upright_size
from preprocessing.jpeg import START, decode_jpeg, read_header, with_mended_header
from preprocessing.raster import decode_raster, is_raster, is_turned, open_raster

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".jp2", ".webp", ".bmp")


@dataclass(frozen=True)
class Scan:
    """A decoded page."""

    image: NDArray[np.uint8]
    """(height, width) uint8, grayscale, upright."""
    orientation: int
    """EXIF orientation of the file, 1 to 8; 1: it was stored upright."""
    warnings: list[str]
    """What was mended, or is unusual."""


def decode_scan(data: bytes) -> Scan:
    """Decode a page to grayscale, upright. The format is recognized by the content, not by the file's suffix.

    Raises:
        PageFault: the format is not supported, or the file is truncated, corrupt, or exceeds a limit.
    """
    decode = decode_jpeg if _checked(data).startswith(START) else decode_raster
    image, orientation, warnings = decode(data)
    return Scan(image if is_turned(data) else upright(image, orientation), orientation, warnings)


def scan_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a page in pixels, upright, from its header alone.

    Raises:
        PageFault: the format is not supported, or the header is malformed or exceeds a limit.
    """
    if not data.startswith(START):
        raster = open_raster(_checked(data))
        return raster.width, raster.height
    header = read_header(with_mended_header(data))
    width, height = header.width, header.height
    if not width or not height:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError) as error:  # KeyError: simplejpeg, for a header that is cut off
            raise PageFault(f"page can't be decoded: {error}") from error
    return upright_size(width, height, header.orientation)


def _checked(data: bytes) -> bytes:
    if len(data) > MAX_PAGE_BYTES:
        raise PageFault(f"page file over {MAX_PAGE_BYTES} bytes")
    if not data.startswith(START) and not is_raster(data):
        raise PageFault("page is not a JPEG, PNG, TIFF, JPEG 2000, WebP or BMP file")
    return data

"""Decode PNG, TIFF, JPEG 2000, WebP and BMP files, through Pillow and, for WebP, OpenCV.

The size of a page is read from its header and checked before a decoder allocates memory. Memory of a task for 100
megapixels, as measured: up to 1100 MB, and 1700 MB for a picture of `predict --annotate`; for JPEG 2000, whose decoder
holds four bytes for each value, 1900 MB with three components and 2400 MB with four.
"""

import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, ImageFile, Jpeg2KImagePlugin, PngImagePlugin, TiffImagePlugin

from preprocessing.crop import MAX_PAGE_PIXELS, PageFault
from preprocessing.exif import EXIF, ORIENTATION, UPRIGHT, orientation_of, upright_size
from preprocessing.jpeg import too_large

# Not Image.open, which tries the plugins of all formats and warns of large pages.
FORMATS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"II*\0": TiffImagePlugin.TiffImageFile,
    b"MM\0*": TiffImagePlugin.TiffImageFile,
    b"II+\0": TiffImagePlugin.TiffImageFile,
    b"MM\0+": TiffImagePlugin.TiffImageFile,
    b"\0\0\0\x0cjP  \r\n\x87\n": Jpeg2KImagePlugin.Jpeg2KImageFile,
    b"\xff\x4f\xff\x51": Jpeg2KImagePlugin.Jpeg2KImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}
PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH = 262, 322, 323  # tags of TIFF
WHITE_IS_ZERO = 0  # a photometric interpretation
ANIMATED = 2  # a flag of WebP
MAX_CHUNKS = 10_000  # per file
MAX_MESSAGE_CHARS = 200
ROWS = 256  # scaled at once
FIRST_OF_SEVERAL = "first of several pages of a TIFF file"


@dataclass(frozen=True)
class Raster:
    """A file whose header was read."""

    width: int
    """Pixels, after the page is turned upright."""
    height: int
    orientation: int
    """EXIF orientation, 1 to 8."""
    image: ImageFile.ImageFile | None
    """Opened with Pillow, not decoded; None for WebP."""


def is_raster(data: bytes) -> bool:
    """Return whether a file starts like one of the formats of this module."""
    return _is_webp(data) or data.startswith(tuple(FORMATS))


def open_raster(data: bytes) -> Raster:
    """Read the header of a file, see `is_raster`.

    Raises:
        PageFault: the header is malformed, or the page exceeds a limit.
    """
    with _faults():
        raster = _open_webp(data) if _is_webp(data) else _open(data)
    if raster.width <= 0 or raster.height <= 0:
        raise PageFault(f"page can't be decoded: it has {raster.width} x {raster.height} pixels")
    if raster.width * raster.height > MAX_PAGE_PIXELS:
        raise PageFault(too_large(raster.width, raster.height, MAX_PAGE_PIXELS))
    return raster


def decode_raster(data: bytes) -> tuple[NDArray[np.uint8], int, list[str]]:
    """Decode a file to grayscale, not yet turned upright, except for TIFF, which Pillow turns upright.

    Returns, Raises: as `jpeg.decode_jpeg`.
    """
    raster = open_raster(data)
    with _faults():
        if raster.image is None:
            return _decode_webp(data, raster), raster.orientation, []
        image, found = _decode(raster.image)
        return image, raster.orientation, found


def is_turned(data: bytes) -> bool:
    """Return whether the decoder of a file turns it upright."""
    return FORMATS.get(data[:4]) is TiffImagePlugin.TiffImageFile


@contextmanager
def _faults() -> Iterator[None]:
    """Turn exceptions of a decoder, except MemoryError, into a PageFault, and suppress its warnings and log lines."""
    log = logging.getLogger("PIL")
    silence, propagate = logging.NullHandler(), log.propagate
    log.addHandler(silence)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (PageFault, MemoryError):
        raise
    except Exception as error:  # plugins raise KeyError, struct.error and others, with the file's bytes in the message
        text = " ".join(str(error).split()) or type(error).__name__
        text = "".join(character if character.isprintable() else "?" for character in text)
        raise PageFault(f"page can't be decoded: {text[:MAX_MESSAGE_CHARS]}") from error
    finally:
        log.propagate = propagate
        log.removeHandler(silence)


def _open(data: bytes) -> Raster:
    plugin = next(plugin for magic, plugin in FORMATS.items() if data.startswith(magic))
    image = plugin(io.BytesIO(data))
    orientation = UPRIGHT
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        orientation = image.tag_v2.get(ORIENTATION, UPRIGHT)
        tile = image.tag_v2.get(TILE_WIDTH, 0) * image.tag_v2.get(TILE_LENGTH, 0)
        if tile > MAX_PAGE_PIXELS:  # memory is allocated for a whole tile, even if it is larger than the page
            raise ValueError(f"a tile of {tile} pixels")
        if orientation not in range(1, 9):
            orientation = UPRIGHT
        return Raster(*image.size, orientation, image)
    if isinstance(image, PngImagePlugin.PngImageFile):
        orientation = orientation_of(_chunk(data, 8, b"eXIf", ">L4s", 4))
    width, height = image.size
    return Raster(*upright_size(width, height, orientation), orientation, image)


def _chunk(data: bytes, offset: int, name: bytes, form: str, checksum: int = 0, padding: int = 1) -> bytes:
    """Return the content of the first chunk with this name; empty if there is none.

    Args:
        data: the file.
        offset: where the first chunk begins.
        name: four bytes.
        form: `struct` format of the head of a chunk, which has its length and name.
        checksum: number of bytes of the checksum after a chunk.
        padding: chunks begin at multiples of this number of bytes.
    """
    for _ in range(MAX_CHUNKS):
        head = data[offset : offset + 8]
        if len(head) < 8:
            break
        values = struct.unpack(form, head)
        length, found = sorted(values, key=lambda value: isinstance(value, bytes))
        if found == name:
            return data[offset + 8 : offset + 8 + length]
        offset += 8 + length + checksum
        offset += -offset % padding
    return b""


def _decode(image: ImageFile.ImageFile) -> tuple[NDArray[np.uint8], list[str]]:
    found = []
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.is_animated:
        found.append(FIRST_OF_SEVERAL)
    white_is_zero = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    tiles = list(image.tile)  # empty once the image is loaded
    image.load()
    if image.mode.startswith("I"):  # more than 8 bits
        gray, what = _scaled(np.asarray(image), white_is_zero)
        return gray, [*found, what]
    if any(re.search(";16[BLN]", str(tile.args)) for tile in tiles):
        found.append("colour or transparency of 16 bits: the upper 8 bits were read")
    return np.asarray(_over_white(image)), found


def _scaled(values: NDArray[np.integer[Any]], white_is_zero: bool) -> tuple[NDArray[np.uint8], str]:
    """Scale gray of 8 to 16 bits, the fewest that hold all values, to 8 bits. Return it and a warning about this."""
    low, high = int(values.min()), int(values.max())
    bits = max(8, high.bit_length())
    if low < 0 or bits > 16:
        raise ValueError(f"gray values from {low} to {high} do not fit into 8 to 16 bits")
    table = np.rint(np.arange(1 << bits) * (255 / ((1 << bits) - 1))).astype(np.uint8)
    if white_is_zero:
        table = table[::-1]
    page = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS):  # an index takes 8 bytes per pixel
        page[start : start + ROWS] = table[values[start : start + ROWS]]
    return page, f"gray of 16 bits: 0 to {(1 << bits) - 1} was scaled to 0 to 255"


def _over_white(image: Image.Image) -> Image.Image:
    """Convert an image to grayscale, over a white background if it is transparent."""
    if image.mode in ("F", "HSV"):
        raise ValueError(f"pixels of type {image.mode}")
    if image.mode == "LAB":
        image = image.getchannel(0)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L")
        return Image.composite(image, Image.new("L", image.size, 255), alpha)
    return image.convert("L")


# --- WebP. Pillow decodes it as an animation, with three copies of the page.


def _is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def _open_webp(data: bytes) -> Raster:
    kind, head = data[12:16], data[20:30]
    orientation = UPRIGHT
    if kind == b"VP8X":
        if head[0] & ANIMATED:
            raise ValueError("an animation")
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (4, 7))
        orientation = orientation_of(_chunk(data, 12, b"EXIF", "<4sL", padding=2).removeprefix(EXIF))
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        raise ValueError("WebP of an unknown kind")
    return Raster(*upright_size(width, height, orientation), orientation, None)


def _decode_webp(data: bytes, raster: Raster) -> NDArray[np.uint8]:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.shape[0] * image.shape[1] != raster.width * raster.height:
        raise ValueError("WebP that is cut off or corrupt")
    page: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    if image.shape[2] == 4:  # page * alpha + white * (1 - alpha), in bytes
        alpha = np.ascontiguousarray(image[:, :, 3])
        del image
        page = cv2.add(cv2.multiply(page, alpha, scale=1 / 255), ~alpha)
    return page

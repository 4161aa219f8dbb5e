"""The EXIF orientation of a scan: how its stored rows and columns must be turned, as viewers and labelling tools do."""

import struct

import cv2
import numpy as np
from numpy.typing import NDArray

EXIF = b"Exif\0\0"  # precedes the TIFF header of the metadata
UPRIGHT = 1
ORIENTATION = 0x0112
SHORT = 3  # type of the value
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def orientation_of(exif: bytes) -> int:
    """Return the orientation, 1 to 8, in EXIF metadata, or 1 if there is no valid one.

    Args:
        exif: the metadata from the TIFF header on.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return UPRIGHT
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, min(start + 2 + 12 * count, len(exif)), 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHLH", exif, entry)
            if tag == ORIENTATION:
                return value if (kind, values) == (SHORT, 1) and 1 <= value <= 8 else UPRIGHT
    except struct.error:
        pass
    return UPRIGHT


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Return width and height of an upright image. width, height: as stored."""
    return (height, width) if orientation in _TURNED else (width, height)


def upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn an image, (height, width) or (height, width, 3), upright by its EXIF orientation. It may be overwritten."""
    if orientation in _TURNED:
        image = cv2.transpose(image)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    if flip is None:
        return image
    turned: NDArray[np.uint8] = cv2.flip(image, flip, image if image.flags.writeable else None)  # in place: less memory
    return turned

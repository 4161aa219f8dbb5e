"""Ids of pages: the name of a page's file without its suffix."""

import os

from cluster.errors import InputError
from cluster.storage import plain_name

MAX_NAME_CHARS = 255  # of a file, in the file systems of Linux
MAX_ID_CHARS = MAX_NAME_CHARS - len(".jpg")
# Of scans. Other suffixes belong to the id.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".jp2", ".webp", ".bmp")


def parse_id(text: str) -> str:
    """Check that a page id is safe as a file name, and return it.

    Raises:
        ValueError: the id has other characters than `plain_name` allows (such as `/`), or is too long.
    """
    if len(text) > MAX_ID_CHARS:
        raise ValueError(f"an image_id must have at most {MAX_ID_CHARS} characters. Received: {text[:40]!r}...")
    try:
        return plain_name(text, "an image_id")
    except InputError as error:
        raise ValueError(str(error)) from error


def is_image(name: str) -> bool:
    """Whether a file is an image, by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def id_of_file(name: str) -> str:
    """Return the page id of an image's file name: the name without the suffix of an image.

    Raises:
        ValueError: as `parse_id`.
    """
    return parse_id(os.path.splitext(name)[0] if is_image(name) else name)

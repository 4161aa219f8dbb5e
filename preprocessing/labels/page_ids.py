"""Ids of pages: the name of a page's file without its suffix."""

import os
import re
import unicodedata

from preprocessing.scan import SUFFIXES

MAX_NAME_CHARS = 255  # of a file, in the file systems of Linux
MAX_ID_CHARS = MAX_NAME_CHARS - len(".jpg")
_ASCII_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def parse_id(text: str) -> str:
    """Check that a page id is safe as a path below a folder, and return it in Unicode's form NFC.

    Raises:
        ValueError: a part of the id between `/` is empty, starts with a character other than a letter, a digit or `_`
            (such as `..`), or has other characters than letters and digits of any script, spaces, `.`, `_` and `-`; or
            the id is too long.
    """
    page_id = text if text.isascii() else unicodedata.normalize("NFC", text)
    if len(page_id) > MAX_ID_CHARS:
        raise ValueError(f"an image_id must have at most {MAX_ID_CHARS} characters. Received: {text[:40]!r}...")
    if not _ASCII_ID.fullmatch(page_id) and not all(map(_is_plain, page_id.split("/"))):
        raise ValueError(
            "an image_id must be letters, digits, spaces, '.', '_' or '-', with '/' between folders, and no part may "
            f"start with a space, '.' or '-'. Received: {text!r}"
        )
    return page_id


def _is_plain(name: str) -> bool:
    # Letters, the marks that scripts add to them, and digits: categories L, M and N of Unicode.
    return (name[:1].isalnum() or name[:1] == "_") and all(
        character in " ._-" or unicodedata.category(character)[0] in "LMN" for character in name
    )


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its suffix."""
    return name.lower().endswith(SUFFIXES)


def id_of_file(name: str) -> str:
    """Return the page id for an image's file name: the name without its suffix, if that is one of an image.

    Raises:
        ValueError: as `parse_id`.
    """
    return parse_id(os.path.splitext(name)[0] if is_image(name) else name)

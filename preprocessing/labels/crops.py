"""Folders of crops, one per class: CODH's `characters/`, Kuzushiji-Kanji, and other data for image classifiers.

    U+304B/U+304B_100241706_00004_2_X1231_Y3465.jpg    は/0001.png

Each file counts as a page with one box that covers the whole file.
"""

import hashlib
import os
import re
from collections import Counter

import numpy as np
from upath import UPath

from cluster.errors import InputError
from cluster.storage import is_file, list_tree
from preprocessing.archive import list_members
from preprocessing.books import NO_BOOKS, book_of
from preprocessing.labels.code_points import code_point_name, parse_character
from preprocessing.labels.page_ids import is_image, parse_id
from preprocessing.labels.table import MAX_PAGES, WHOLE_FILE, Labels
from preprocessing.matching import Files
from preprocessing.pages import HIDDEN, count_kinds, is_archive, kind_of

NO_BOOK = "unknown"  # the book of all crops whose names do not contain one
OUTSIDE = "images outside of folders of characters"
# The names of CODH's files: code point, page, position on the page.
_CODH_NAME = re.compile(r"U\+[0-9A-F]{4,6}_(.+)_X[0-9]+_Y[0-9]+")


def read_crops(crops: UPath) -> tuple[Labels, Files, dict[str, int]]:
    """List a folder or zip archive of crops. The folder of a file is named after its character.

    Returns:
        The labels, the files, and the number of skipped files of each kind, as `Listing.ignored`.

    Raises:
        InputError: there are no crops or too many, a folder of images is not named after a character, the id of a crop
            is unsafe, or two crops have the same id.
    """
    listed, aside = _list_images(crops)
    found: dict[str, tuple[str, int]] = {}
    code_points: dict[str, int] = {}
    short_ids = [_crop_id(name, code_point, crops) for name, _, code_point in listed]
    count = Counter(short_ids)
    for short_id, (name, size, code_point) in zip(short_ids, listed, strict=True):
        crop_id = short_id if count[short_id] == 1 else _crop_id(name, code_point, crops, with_folders=True)
        if crop_id in found:
            raise InputError(
                f"each crop must have a unique name. Received: {found[crop_id][0]!r} and {name!r} in {crops}"
            )
        found[crop_id], code_points[crop_id] = (name, size), code_point
    if not found:
        raise InputError(
            "--crops must be a folder with a folder of images for each character, named は or U+306F. "
            f"Received: {crops}, without any. See docs/data.md#crops"
        )
    ids = sorted(found)
    codes = [code_points[crop_id] for crop_id in ids]
    digest = hashlib.sha256("\n".join(f"{crop_id} {code}" for crop_id, code in zip(ids, codes, strict=True)).encode())
    labels = Labels(
        ids,
        np.arange(len(ids) + 1, dtype=np.int64),
        np.array(codes, np.int32),
        np.tile(np.array(WHOLE_FILE, np.int32), (len(ids), 1)),
        digest.hexdigest(),
        books={crop_id: _book_of(found[crop_id][0]) for crop_id in ids},
    )
    return labels, found, count_kinds(map(_ignored_as, aside))


def _list_images(crops: UPath) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Return name, size in bytes and code point of each crop, sorted by name, and the names of the skipped files."""
    listed: list[tuple[str, int, int]] = []
    aside: list[str] = []
    for name, size in sorted(_members(crops)):
        code_point = _class_of(name, crops)
        if code_point is None:
            aside.append(name)
            continue
        listed.append((name, size, code_point))
        if len(listed) > MAX_PAGES:
            raise InputError(f"--crops must have at most {MAX_PAGES} files. Received: more, in {crops}")
    return listed, aside


def _members(crops: UPath) -> list[tuple[str, int]]:
    if is_file(crops) and is_archive(crops):
        return list_members(crops, "--crops")
    return list(list_tree(crops))


def _class_of(name: str, crops: UPath) -> int | None:
    """Return the code point that the folder of an image is named after; None for a file to skip.

    Skipped are files that are not images, hidden files, images outside of any folder, and images in a folder of
    `NO_BOOKS`, which are pages.

    Raises:
        InputError: an image is in any other folder that is not named after a character.
    """
    *folders, base_name = name.split("/")
    if not folders or base_name.startswith(".") or not is_image(name):
        return None
    try:
        return parse_character(folders[-1])
    except ValueError as error:
        if folders[-1] in NO_BOOKS:
            return None
        what = "Rename class numbers to their characters" if folders[-1].isdecimal() else "Rename the folder"
        raise InputError(
            "each image of --crops must be in a folder named after its character, は or U+306F. "
            f"Received: {name!r} in {crops}. {what}. See docs/data.md#crops"
        ) from error


def _ignored_as(name: str) -> str:
    """Return the kind of a file that `_class_of` skips."""
    if name.rpartition("/")[2].startswith("."):
        return HIDDEN
    return OUTSIDE if is_image(name) else kind_of(name)


def _crop_id(name: str, code_point: int, crops: UPath, with_folders: bool = False) -> str:
    """Return `306F_<name>` for `U+306F/<name>.jpg` and for CODH's `U+306F/U+306F_<name>.jpg`.

    with_folders: return `train/306F_<name>` for `train/U+306F/<name>.jpg`.
    """
    *folders, _, base_name = name.split("/")
    stem = os.path.splitext(base_name)[0].removeprefix(f"{code_point_name(code_point)}_")
    try:
        return parse_id("/".join([*(folders if with_folders else []), f"{code_point:04X}_{stem}"]))
    except ValueError as error:
        raise InputError(f"{crops}: {name!r}: {error}. Rename the file or folder") from error


def _book_of(name: str) -> str:
    match = _CODH_NAME.fullmatch(os.path.splitext(os.path.basename(name))[0])
    return book_of(match[1]) if match else NO_BOOK

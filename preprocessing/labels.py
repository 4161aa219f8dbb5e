"""Read label files in Kaggle's format: the characters of each page and their boxes.

    image_id,labels
    100241706_00004_2,U+306F 1231 3465 133 53 U+304C 275 1652 84 69 ...

Files for `predict` may give boxes without characters: `1231 3465 133 53 275 1652 84 69 ...`.

A malformed row stops the job before any work, because guessing its meaning could train a model on wrong crops. Faults
that need the page to be detected (a box off its page, a scan that can't be read) are found later and listed as losses.
"""

import csv
import hashlib
import io
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from cluster.storage import is_file, read_bytes

HEADER = ["image_id", "labels"]
FIELDS_PER_BOX = 5
UNKNOWN = -1  # the code point of a box without a character
# Kaggle's page with the most boxes has 614. This limit allows 400 times as many, and rejects files of other formats.
MAX_CELL_CHARS = 8_000_000

MAX_NAME_CHARS = 255  # of a file, in the file systems of Linux
MAX_ID_CHARS = MAX_NAME_CHARS - len(".jpg")

_ASCII_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_CODE_POINT = re.compile(r"U\+([0-9A-F]{4,6})")
_INTEGER = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class Labels:
    """The contents of a label file: P pages sorted by id, and N boxes page by page, in the order of their row."""

    page_ids: list[str]
    """P ids."""
    starts: NDArray[np.int64]
    """(P + 1,); page p has the boxes starts[p]:starts[p + 1]."""
    code_points: NDArray[np.int32]
    """(N,); `UNKNOWN` if the file has no character for the box."""
    boxes: NDArray[np.int32]
    """(N, 4): x, y, width, height in pixels, from the upper left corner of the page."""
    sha256: str
    """Hex digest of the file's bytes."""
    books: Mapping[str, str] = field(default_factory=dict)
    """Page id to book, for the pages whose book the file states."""
    page_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Page id to the width and height in pixels that the boxes were made for, where the file says it."""

    @property
    def boxes_per_page(self) -> NDArray[np.int64]:
        """(P,)."""
        return np.diff(self.starts)


def code_point_name(code_point: int) -> str:
    return f"U+{code_point:04X}"


def name_if_known(code_point: int) -> str | None:
    return None if code_point == UNKNOWN else code_point_name(code_point)


def parse_code_point(text: str) -> int:
    """Parse the Unicode notation of a character: return 0x306F for `U+306F`.

    Raises:
        ValueError: the text is not in this notation, or is a surrogate, which is not a character.
    """
    match = _CODE_POINT.fullmatch(text)
    value = int(match[1], 16) if match else -1
    if not 0 <= value <= 0x10FFFF or 0xD800 <= value <= 0xDFFF or code_point_name(value) != text:
        raise ValueError(f"a code point must look like U+306F. Received: {text[:40]!r}")
    return value


def read_labels(path: UPath, option: str = "--labels", bare: bool = False) -> Labels:
    """Read and check a label file.

    Args:
        path: the file.
        option: the command-line option to name in error messages.
        bare: whether rows may give boxes without characters.

    Raises:
        InputError: the file does not exist, is not UTF-8 or CSV, has a wrong header, a repeated or unsafe id, a
            malformed row, or no boxes.
    """
    if not is_file(path):
        raise InputError(f"{option} must be a file. Received: {path}, where there is none")
    data = read_bytes(path)
    page_ids: list[str] = []
    rows: list[NDArray[np.int32]] = []
    for page_id, boxes in parse_rows(data, str(path), bare):
        page_ids.append(page_id)
        rows.append(boxes)
    order = sorted(range(len(page_ids)), key=page_ids.__getitem__)
    for previous, current in itertools.pairwise(order):
        if page_ids[previous] == page_ids[current]:
            raise InputError(f"{path}: an image_id must have one row only. Received: {page_ids[current]!r} twice")
    table = np.concatenate([np.empty((0, FIELDS_PER_BOX), np.int32), *(rows[i] for i in order)])
    if len(table) == 0:
        raise InputError(
            f"{path}: at least one page must have a labelled box. Received: {len(page_ids)} pages without boxes"
        )
    starts = np.concatenate([[0], np.cumsum([len(rows[i]) for i in order], dtype=np.int64)])
    return Labels([page_ids[i] for i in order], starts, table[:, 0], table[:, 1:], hashlib.sha256(data).hexdigest())


def parse_rows(data: bytes, where: str, bare: bool = False) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Yield page id and boxes of each row of a label file, in the order of the file.

    The boxes are (n, 5) int32: code point, x, y, width, height. `where` names the file in error messages; `bare` is as
    in `read_labels`.

    Raises:
        InputError: the file is not UTF-8 or CSV, or has a wrong header; or a malformed row, when it is reached.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} must be a UTF-8 CSV file. Received: {error}") from error
    csv.field_size_limit(MAX_CELL_CHARS)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if header != HEADER:
            raise InputError(f"{where} must begin with the header image_id,labels. Received: {','.join(header)[:80]!r}")
        for row in filter(None, reader):  # skip empty lines
            if len(row) != len(HEADER):
                raise ValueError(f"a row must have 2 columns. Received: {len(row)}")
            yield parse_id(row[0]), _parse_cell(row[1], bare)
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: not CSV ({error})") from error
    except ValueError as error:
        raise InputError(f"{where}, line {reader.line_num}: {error}. Fix that row") from error


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


def _parse_cell(cell: str, bare: bool) -> NDArray[np.int32]:
    """Return (n, 5) int32: code point, x, y, width, height. An empty cell and `nan` mean a page without text."""
    if cell.strip() in ("", "nan"):
        return np.empty((0, FIELDS_PER_BOX), np.int32)
    fields = cell.split()
    has_code_points = not bare or fields[0].startswith("U+")
    per_box = FIELDS_PER_BOX if has_code_points else FIELDS_PER_BOX - 1
    if len(fields) % per_box:
        raise ValueError(f"labels must be groups of {per_box} fields. Received: {len(fields)} fields")
    values = [
        parse_code_point(field) if has_code_points and i % per_box == 0 else _parse_integer(field)
        for i, field in enumerate(fields)
    ]
    table = np.array(values, np.int32).reshape(-1, per_box)
    return table if has_code_points else np.insert(table, 0, UNKNOWN, axis=1)


def _parse_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"x, y, width and height must be whole numbers of pixels. Received: {text[:40]!r}")
    return int(text)

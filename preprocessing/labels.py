"""Kaggle's label files: which characters stand where on which page.

    image_id,labels
    100241706_00004_2,U+306F 1231 3465 133 53 U+304C 275 1652 84 69 ...

Boxes to be read may lack their characters: `1231 3465 133 53 275 1652 84 69 ...`.

A malformed row stops the job before any work: half-understood labels would train a model on the wrong pictures.
What only the page can tell (a box off its page, a scan that can't be read) is found later and listed as a loss.
"""

import csv
import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from cluster.storage import is_file, plain_name, read_bytes

HEADER = ["image_id", "labels"]
FIELDS_PER_BOX = 5
UNKNOWN = -1  # the code point of a box whose character is not told
# Kaggle's fullest page has 614 boxes; this is room for 400 times as many, and an end to a file that is no labels file.
MAX_CELL_CHARS = 8_000_000

MAX_ID_CHARS = 251  # of a file's name, less `.jpg`

_CODE_POINT = re.compile(r"U\+([0-9A-F]{4,6})")
_INTEGER = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class Labels:
    """All boxes of a label file. P pages sorted by id; N boxes, page by page, in the order of their row.

    page_ids: P ids. starts: (P + 1,) int64, page p has the boxes starts[p]:starts[p + 1].
    code_points: (N,) int32, `UNKNOWN` where a file of boxes does not tell.
    boxes: (N, 4) int32, x, y, width, height in pixels from the upper left.
    sha256: of the file's bytes.
    """

    page_ids: list[str]
    starts: NDArray[np.int64]
    code_points: NDArray[np.int32]
    boxes: NDArray[np.int32]
    sha256: str

    @property
    def boxes_per_page(self) -> NDArray[np.int64]:
        return np.diff(self.starts)


def book_of(page_id: str) -> str:
    """The book of a page: what stands before the first `_` or `-` of its id (`hnsd001-003` is of `hnsd001`)."""
    return re.split("[_-]", page_id, maxsplit=1)[0]


def code_point_name(code_point: int) -> str:
    return f"U+{code_point:04X}"


def parse_code_point(text: str) -> int:
    """`U+306F` to 0x306F.

    Raises:
        ValueError: not the Unicode notation of a character (surrogates are none).
    """
    match = _CODE_POINT.fullmatch(text)
    value = int(match[1], 16) if match else -1
    if not 0 <= value <= 0x10FFFF or 0xD800 <= value <= 0xDFFF or code_point_name(value) != text:
        raise ValueError(f"a code point looks like U+306F. Received: {text[:40]!r}")
    return value


def read_labels(path: UPath, option: str = "--labels", bare: bool = False) -> Labels:
    """Read and check a whole label file, which `option` names. bare: boxes may stand without their characters.

    Raises:
        InputError: wrong header, a repeated or unsafe id, or a row that is not groups of well-formed fields.
    """
    if not is_file(path):
        raise InputError(f"{option} must be a file. Received: {path}, which is not there")
    data = read_bytes(path)
    page_ids: list[str] = []
    rows: list[NDArray[np.int32]] = []
    for page_id, boxes in parse_rows(data, str(path), bare):
        page_ids.append(page_id)
        rows.append(boxes)
    order = sorted(range(len(page_ids)), key=page_ids.__getitem__)
    for before, after in itertools.pairwise(order):
        if page_ids[before] == page_ids[after]:
            raise InputError(f"{path}: an image_id must stand in one row only. Received: {page_ids[after]!r} twice")
    table = np.concatenate([np.empty((0, FIELDS_PER_BOX), np.int32), *(rows[i] for i in order)])
    if len(table) == 0:
        raise InputError(
            f"{path}: at least one page must have a labelled box. Received: {len(page_ids)} pages with none"
        )
    starts = np.concatenate([[0], np.cumsum([len(rows[i]) for i in order], dtype=np.int64)])
    return Labels([page_ids[i] for i in order], starts, table[:, 0], table[:, 1:], hashlib.sha256(data).hexdigest())


def parse_rows(data: bytes, where: str, bare: bool = False) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Id and (n, 5) int32 code point, x, y, width, height of each row of a label file, in the file's order.

    Raises:
        InputError: as `read_labels`, when it comes to the row.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} must be a UTF-8 CSV file. Received: {error}") from None
    csv.field_size_limit(MAX_CELL_CHARS)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if header != HEADER:
            raise InputError(f"{where} must begin with the header image_id,labels. Received: {','.join(header)[:80]!r}")
        for row in filter(None, reader):  # an empty line is no row
            if len(row) != len(HEADER):
                raise ValueError(f"a row must have 2 columns. Received: {len(row)}")
            yield parse_id(row[0]), _parse_cell(row[1], bare)
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: not CSV ({error})") from None
    except ValueError as error:
        raise InputError(f"{where}, line {reader.line_num}: {error}. Mend that row") from None


def parse_id(text: str) -> str:
    """A page's id, which can't leave a folder.

    Raises:
        ValueError: it could, or is too long for the name of a file.
    """
    if len(text) > MAX_ID_CHARS:
        raise ValueError(f"an image_id must have at most {MAX_ID_CHARS} characters. Received: {text[:40]!r}...")
    try:
        return plain_name(text, "an image_id")
    except InputError as error:
        raise ValueError(str(error)) from None


def _parse_cell(cell: str, bare: bool) -> NDArray[np.int32]:
    """(n, 5) int32: code point, x, y, width, height. An empty cell and `nan` are a page without text."""
    if cell.strip() in ("", "nan"):
        return np.empty((0, FIELDS_PER_BOX), np.int32)
    fields = cell.split()
    told = not bare or fields[0].startswith("U+")
    per_box = FIELDS_PER_BOX if told else FIELDS_PER_BOX - 1
    if len(fields) % per_box:
        raise ValueError(f"labels must be groups of {per_box} fields. Received: {len(fields)} fields")
    values = [
        parse_code_point(field) if told and i % per_box == 0 else _parse_integer(field)
        for i, field in enumerate(fields)
    ]
    table = np.array(values, np.int32).reshape(-1, per_box)
    return table if told else np.insert(table, 0, UNKNOWN, axis=1)


def _parse_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"x, y, width and height must be whole numbers of pixels. Received: {text[:40]!r}")
    return int(text)

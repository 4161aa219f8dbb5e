"""Kaggle's CSV: one row per page.

    image_id,labels
    100241706_00004_2,U+306F 1231 3465 133 53 U+304C 275 1652 84 69 ...

Files for `predict` may have boxes without characters: `1231 3465 133 53 275 1652 84 69 ...`.

A malformed row stops the job before any work, because guessing its meaning could train a model on wrong crops. Faults
that need the page to be detected (a box off its page, a scan that can't be read) are found later and listed as losses.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InputError
from preprocessing.labels.code_points import UNKNOWN, parse_code_point
from preprocessing.labels.files import LabelFile, csv_rows
from preprocessing.labels.page_ids import parse_id
from preprocessing.labels.table import COLUMNS, PageBoxes

HEADER = ["image_id", "labels"]
_INTEGER = re.compile(r"-?[0-9]{1,9}(?:\.0{1,9})?")


def read_kaggle(files: Sequence[LabelFile], bare: bool) -> Iterator[PageBoxes]:
    """Yield the pages of files in Kaggle's form. bare: as in `read_labels`. Raises: as `parse_rows`."""
    for file in files:
        for page_id, table in parse_rows(file.read(), file.where, bare):
            yield PageBoxes(page_id, table, file.where)


def parse_rows(data: bytes, where: str, bare: bool = False) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Yield page id and boxes of each row of a label file, in the order of the file.

    The boxes are (n, 5) int32: code point, x, y, width, height. `where` names the file in error messages; `bare` is as
    in `read_labels`.

    Raises:
        InputError: the file is not text or CSV, has a wrong header, or has a malformed row (raised at that row).
    """
    with csv_rows(data, where, "docs/data.md#kaggles-csv") as reader:
        header = next(reader, [])
        if header != HEADER:
            raise InputError(f"{where} must begin with the header image_id,labels. Received: {','.join(header)[:80]!r}")
        for row in filter(None, reader):  # skip empty lines
            if len(row) != len(HEADER):
                raise ValueError(f"a row must have 2 columns. Received: {len(row)}")
            yield parse_id(row[0]), _parse_cell(row[1], bare)


def _parse_cell(cell: str, bare: bool) -> NDArray[np.int32]:
    """Return (n, 5) int32: code point, x, y, width, height. An empty cell and `nan` mean a page without text."""
    if cell.strip() in ("", "nan"):
        return np.empty((0, COLUMNS), np.int32)
    fields = cell.split()
    has_code_points = not bare or fields[0].startswith("U+")
    per_box = COLUMNS if has_code_points else COLUMNS - 1
    if len(fields) % per_box:
        raise ValueError(f"labels must be groups of {per_box} fields. Received: {len(fields)} fields")
    values = [
        parse_code_point(field) if has_code_points and i % per_box == 0 else parse_integer(field)
        for i, field in enumerate(fields)
    ]
    table = np.array(values, np.int32).reshape(-1, per_box)
    return table if has_code_points else np.insert(table, 0, UNKNOWN, axis=1)


def parse_integer(text: str) -> int:
    """Return a whole number of pixels, at most nine digits, which may be written `572.0`.

    Raises:
        ValueError: the text is not such a number.
    """
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"x, y, width and height must be whole numbers of pixels. Received: {text[:40]!r}")
    return int(text.partition(".")[0])

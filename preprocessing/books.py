"""The book of each page. A book is a title: its volumes, which look alike, are one book.

The first of these that names the book of a page counts:

1. `--books FILE`;
2. the label file, if its form names books;
3. the folder of the book, if the pages are in folders: the uppermost one that not all pages share, and whose name is
   not in `NO_BOOKS`;
4. the ASCII letters at the beginning of the page's id: `hnsd` for `hnsd001-003`;
5. the part of the id before the first `_` or `-`: `100241706` for `100241706_00004_2`.
"""

import hashlib
import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from cluster.storage import read_small
from preprocessing.archive import decode_name
from preprocessing.config import BooksFile, TrainOnlyFile
from preprocessing.labels.files import csv_rows, open_text
from preprocessing.labels.table import Labels

# Names of folders that do not name a book: they hold the pages of one book or of all.
NO_BOOKS = frozenset({"images", "train_images"})
HEADERS: dict[tuple[str, ...], Literal["page", "prefix"]] = {("page", "book"): "page", ("prefix", "book"): "prefix"}
MAX_FILE_BYTES = 1 << 28  # some million rows
_LETTERS = re.compile("[A-Za-z]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

log = logging.getLogger("kuzushiji")


def book_of(page_id: str, folders: Sequence[str] = (), stated: str | None = None) -> str:
    """Return the book of a page that `--books` does not name.

    Args:
        page_id: the id of the page, which may have folders before a `/`.
        folders: the folders of its file, without those that all pages share and those in `NO_BOOKS`.
        stated: the book that the label file states.
    """
    if stated:
        return _normal(stated)
    if folders:
        folder = os.fsencode(folders[0])
        # With escapes if it has neither encoding, so that different folders stay different books.
        return _normal(decode_name(folder) or folder.decode(errors="backslashreplace"))
    name = _normal(page_id.rpartition("/")[2])
    letters = _LETTERS.match(name)
    return letters[0] if letters else volume_of(name) or name


def volume_of(page_id: str) -> str:
    """Return the volume of a page: the part of its id before the first `_` or `-`, `hnsd001` for `hnsd001-003`."""
    return re.split("[_-]", page_id, maxsplit=1)[0]


def books_of_pages(labels: Labels, files: Mapping[str, tuple[str, int]], named: BooksFile | None = None) -> list[str]:
    """Return the book of each of the P pages of a label file.

    Args:
        labels: P pages.
        files: page id to file name and size in bytes, see `Listing.files_of`.
        named: the file of `--books`.

    Raises:
        InputError: `named` names none of the pages.
    """
    folders = {page_id: _folders(name) for page_id, (name, _) in files.items()}
    common = _common(folders.values())
    given = _given_books(labels, files, named) if named else {}
    books = []
    for page_id in labels.page_ids:
        own = folders[page_id][common:] if page_id in folders else _folders(page_id)
        books.append(given.get(page_id) or book_of(page_id, own, labels.books.get(page_id)))
    return books


def _folders(name: str) -> list[str]:
    return [folder for folder in name.split("/")[:-1] if folder not in NO_BOOKS]


def _common(paths: Collection[list[str]]) -> int:
    """Return how many folders at the beginning are the same in all paths."""
    first, last = min(paths), max(paths)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _normal(text: str) -> str:
    """Return text in the composed form (NFC), since macOS writes file names decomposed."""
    return unicodedata.normalize("NFC", text)


def _given_books(labels: Labels, files: Mapping[str, tuple[str, int]], named: BooksFile) -> dict[str, str]:
    """Return page id to book for the pages that `--books` names. The longest prefix counts.

    Lines that name no page are logged: they may be for other pages of the books, or mistyped.
    """
    lengths = sorted({len(prefix) for prefix in named.books}, reverse=True)
    given, used = {}, set()
    for page_id in {*labels.page_ids, *files}:
        normal = _normal(page_id)
        keys = [normal] if named.by == "page" else [normal[:length] for length in lengths]
        if found := [key for key in keys if key in named.books]:
            given[page_id] = named.books[found[0]]
            used.update(found)
    if not used:
        raise InputError(
            f"--books must name pages of the input. Received: {len(named.books)} lines of {named.by},book, none of "
            f"which names a page, such as {min(named.books)[:40]!r}. Use the ids of the label file"
        )
    if unused := sorted(named.books.keys() - used):
        log.warning("--books: %d of %d lines name no page, such as %r", len(unused), len(named.books), unused[0])
    return given


def pages_for_training(
    labels: Labels, files: Mapping[str, tuple[str, int]], books: Sequence[str], named: TrainOnlyFile
) -> NDArray[np.bool_]:
    """Return which of the P pages of a label file are for training only, (P,) bool.

    Args:
        labels: P pages.
        files: as in `books_of_pages`.
        books: the book of each page.
        named: the file of `--train-only`.

    Raises:
        InputError: a line names neither a page nor a book.
    """
    ids = [_normal(page_id) for page_id in labels.page_ids]
    if unknown := sorted(named.names.difference(ids, books, map(_normal, files))):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"each line of --train-only must be a page or a book of the input. Received: {unknown[0][:80]!r}{more}. "
            "Use ids of the label file, or books as in pages.parquet"
        )
    return np.array([page_id in named.names or book in named.names for page_id, book in zip(ids, books, strict=True)])


def books_digest(page_ids: Sequence[str], books: Sequence[str]) -> str:
    """Return a hex digest of the book of each page."""
    lines = "".join(f"{page_id}\n{book}\n" for page_id, book in zip(page_ids, books, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_books(path: UPath) -> BooksFile:
    """Read a file of `--books`: CSV with the header `page,book` or `prefix,book`.

    Raises:
        InputError: the file does not exist, or is not such a CSV file.
    """
    data = _read(path, "--books")
    books: dict[str, str] = {}
    with csv_rows(data, str(path), "docs/data.md#books") as reader:
        header = tuple(next(reader, []))
        if header not in HEADERS:
            raise InputError(
                f"{path} must begin with the header page,book or prefix,book. Received: {','.join(header)[:80]!r}. "
                "See docs/data.md#books"
            )
        for row in filter(None, reader):  # skip empty lines
            if len(row) != len(header) or not all(cell.strip() for cell in row) or _CONTROL.search("".join(row)):
                raise ValueError(f"a row must be a {header[0]} and its book. Received: {','.join(row)[:80]!r}")
            name, book = _normal(row[0]), _normal(row[1].strip())
            if name in books:
                raise ValueError(f"a {header[0]} must have one row only. Received: {name[:80]!r} twice")
            books[name] = book
    if not books:
        raise InputError(f"{path} must name the book of at least one page. Received: no row")
    return BooksFile(sha256=hashlib.sha256(data).hexdigest(), by=HEADERS[header], books=books)


def read_train_only(path: UPath) -> TrainOnlyFile:
    """Read a file of `--train-only`: a page id or a book on each line.

    Raises:
        InputError: the file does not exist, is not text, or has no line.
    """
    data = _read(path, "--train-only")
    names = frozenset(_normal(line.strip()) for line in open_text(data, str(path)).read().splitlines() if line.strip())
    if not names:
        raise InputError(f"{path} must name a page or book on each line. Received: no line")
    return TrainOnlyFile(sha256=hashlib.sha256(data).hexdigest(), names=names)


def _read(path: UPath, option: str) -> bytes:
    data = read_small(path, MAX_FILE_BYTES)
    if data is None:
        raise InputError(f"{option} must be a file. Received: {path}, where there is none")
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{option} must have at most {MAX_FILE_BYTES} bytes. Received: {path}")
    return data

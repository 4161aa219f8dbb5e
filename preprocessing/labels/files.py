"""Label files: one, several, or those in a folder or zip archive. Each is read up to a limit of size."""

import codecs
import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from upath import UPath

from cluster.errors import InputError
from cluster.storage import CHUNK_BYTES, is_file, list_tree, read_at_most, size_of
from preprocessing.archive import list_members
from preprocessing.crop import PageFault
from preprocessing.labels.page_ids import is_image
from preprocessing.pages import OTHER_FOLDERS, is_archive, page_reader

# Kaggle's page with the most boxes has 614. This limit of a cell of a CSV allows 400 times as many.
MAX_CELL_CHARS = 8_000_000
# Files are read one at a time, each as a whole. `page_reader` reads at most 100 MB of a member of an archive.
MAX_FILE_BYTES = 1 << 29
HEAD_BYTES = 1 << 14
# Bytes that CP932 does not use; Python decodes them to private-use characters.
_NOT_CP932 = re.compile(rb"[\xfd-\xff]")


@dataclass
class LabelFile:
    """A file that may hold labels."""

    name: str
    """Path in the given folder or archive; for a file that was given itself, its name."""
    where: str
    """Path or address, for error messages."""
    size: int
    """In bytes."""
    given: bool
    """Whether the file itself was given, rather than its folder or archive."""
    read_at_most: Callable[[int], bytes]
    sha256: str = ""
    """Of the bytes that `read` returned."""

    @property
    def base_name(self) -> str:
        return os.path.basename(self.name)

    def head(self) -> bytes:
        return self.read_at_most(HEAD_BYTES)

    def read(self) -> bytes:
        """Return all bytes.

        Raises:
            InputError: the file has more than `MAX_FILE_BYTES`, or can't be read from the archive as a whole.
        """
        data = self.read_at_most(MAX_FILE_BYTES + 1) if self.size <= MAX_FILE_BYTES else b""
        if max(self.size, len(data)) > MAX_FILE_BYTES:
            raise InputError(
                f"a label file must have at most {MAX_FILE_BYTES} bytes. Received: {self.where} with {self.size}. "
                "Split it into several files"
            )
        if len(data) < self.size:
            raise InputError(
                f"{self.where} must be completely readable. Received: {len(data)} of {self.size} bytes. "
                "Unpack the archive, or split the file"
            )
        self.sha256 = hashlib.sha256(data).hexdigest()
        return data


@contextmanager
def label_files(places: Sequence[UPath], option: str) -> Iterator[list[LabelFile]]:
    """Yield the files of all places, sorted by name. Of folders and archives, skip images, hidden files, and the files
    in `OTHER_FOLDERS`, such as CODH's `characters/`.

    places: files, folders (with their sub-folders), or zip archives.

    Raises:
        InputError: a place does not exist or has no such file, an archive is broken, or folders are nested too deep.
    """
    found: list[LabelFile] = []
    with ExitStack() as stack:
        for given in places:
            if not is_file(given):
                files = [_file(given / name, name, size) for name, size in list_tree(given) if _may_hold_labels(name)]
            elif is_archive(given):
                read = stack.enter_context(page_reader(given, option))
                members = [(name, size) for name, size in list_members(given, option) if _may_hold_labels(name)]
                files = [_member(given, name, size, read) for name, size in members]
            else:
                files = [_file(given, given.name, size_of(given), given=True)]
            if not files:
                raise InputError(
                    f"{option} must be a file or a folder of label files. Received: {given}, where there is none"
                )
            found += files
        yield sorted(found, key=lambda file: (file.name, file.where))


def _may_hold_labels(name: str) -> bool:
    *folders, base_name = name.split("/")
    hidden = base_name.startswith(".")
    return bool(base_name) and not (hidden or is_image(name) or set(OTHER_FOLDERS) & set(folders))


def _file(path: UPath, name: str, size: int, given: bool = False) -> LabelFile:
    return LabelFile(name, _printable(str(path)), size, given, lambda most: read_at_most(path, most))


def _member(archive: UPath, name: str, size: int, read_member: Callable[[str], bytes]) -> LabelFile:
    where = _printable(f"{archive}: {name}")

    def read(most: int) -> bytes:
        try:
            return read_member(name)[:most]
        except PageFault as fault:
            raise InputError(f"{where} must be readable. Received: {fault}") from fault

    return LabelFile(name, where, size, False, read)


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


@contextmanager
def csv_rows(data: bytes, where: str, see: str) -> Iterator[Iterator[list[str]]]:
    """Yield the rows of a CSV file, also empty ones. A ValueError of the block is taken for a fault of the last row.

    where: the file, for error messages. see: the page of the docs to name in them.

    Raises:
        InputError: the file is not text or CSV, or the block raised a ValueError.
    """
    csv.field_size_limit(MAX_CELL_CHARS)
    reader = csv.reader(open_text(data, where), strict=True)
    try:
        yield reader
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: not CSV ({error})") from error
    except ValueError as error:
        raise InputError(f"{where}, line {reader.line_num}: {error}. Fix that row. See {see}") from error


def open_text(data: bytes, where: str) -> io.TextIOWrapper:
    """Return a stream of a file's text, without translation of line ends.

    Raises:
        InputError: the file is not UTF-8, UTF-16 or CP932 (Japanese Windows).
    """
    return io.TextIOWrapper(io.BytesIO(data), encoding=_encoding_of(data, where), newline="")


def head_text(data: bytes) -> str:
    """Return the text of the first bytes of a file. They may end within a character."""
    return data.decode(_wide_encoding(data) or "utf-8-sig", errors="replace")


def _wide_encoding(data: bytes) -> str | None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a byte order mark, the zero bytes of ASCII characters show the byte order.
    return {(False, True): "utf-16-le", (True, False): "utf-16-be"}.get((data[:1] == b"\0", data[1:2] == b"\0"))


def _encoding_of(data: bytes, where: str) -> str:
    if data.startswith(b"PK\x03\x04"):
        raise InputError(
            f"{where} must be text. Received: a zip archive, such as .xlsx: save the spreadsheet as CSV in UTF-8. "
            "See docs/data.md#label-files"
        )
    wide = _wide_encoding(data)
    faults = []
    for encoding in [wide] if wide else ["utf-8-sig", "cp932"]:
        decoder = codecs.getincrementaldecoder(encoding)()
        if encoding == "cp932" and _NOT_CP932.search(data):
            continue
        try:
            for begin in range(0, len(data), CHUNK_BYTES):
                decoder.decode(data[begin : begin + CHUNK_BYTES])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            faults.append(error)
        else:
            return encoding
    raise InputError(
        f"{where} must be text in UTF-8, UTF-16 or CP932. Received: {faults[0]}. See docs/data.md#label-files"
    ) from faults[0]

"""List and read page scans: the files of a folder and its sub-folders, or of a zip archive as Kaggle provides it."""

import errno
import hashlib
import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from upath import UPath

from cluster.bucket import explaining
from cluster.errors import DamageError, InputError
from cluster.storage import CHUNK_BYTES, is_local, list_tree, open_read, read_at_most
from preprocessing.crop import MAX_PAGE_BYTES, PageFault
from preprocessing.matching import Files, Matcher
from preprocessing.scan import SUFFIXES, scan_size

# Folders whose files are no pages: CODH's single characters, which its archives hold beside the pages, and the
# attributes that macOS adds to an archive.
OTHER_FOLDERS = ("characters", "__MACOSX")
MAX_KINDS, MAX_SUFFIX_CHARS = 100, 16
OTHERS, HIDDEN = "other files", "hidden files"
# Exceptions that zipfile and its decompressors raise for members that are broken, encrypted or of an unknown method.
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError, EOFError, OverflowError)
UNREADABLE = (*BROKEN, ValueError, OSError)
# Bytes to read at once. For methods other than stored and deflated, zipfile decompresses all bytes it has read at once.
# 32 bytes contain at most one block of bz2, and a block can decompress to 46 MB.
STEP_BYTES = {zipfile.ZIP_STORED: CHUNK_BYTES, zipfile.ZIP_DEFLATED: CHUNK_BYTES}
SMALL_STEP_BYTES = 32
UTF8_FLAG = 0x800  # of a member of an archive whose name is UTF-8
HEADER_BYTES = 1 << 16  # of a page, in which its size is stated nearly always


class ReadPage(Protocol):
    """Return the bytes of a page file. See `page_reader`."""

    def __call__(self, name: str) -> bytes: ...


@dataclass(frozen=True)
class Listing:
    """The files of a folder or archive."""

    scans: dict[str, int]
    """Path below the folder, or name in the archive, to size in bytes; sorted."""
    ignored: dict[str, int]
    """Kind of file that is no scan (`.db`, `characters/`) to number of such files."""
    where: str
    """The folder or archive, for error messages."""

    def files_of(self, page_ids: Iterable[str]) -> Files:
        """Return the file of each page, and the other files. Raises: InputError: as `Matcher`."""
        return Matcher(self.scans, self.where).match(page_ids)


def list_pages(pages: UPath) -> Listing:
    """List the scans in a folder and its sub-folders, or in an archive. The suffix of a file decides, in any case.

    Raises:
        InputError: the folder or archive does not exist, the archive is broken, or there are no scans.
        DamageError: two reads of a remote archive's directory gave different lists.
    """
    if is_archive(pages):
        members = list_members(pages)
        # Read the directory of a remote archive twice: unlike the pages, it has no checksum.
        if not is_local(pages) and members != list_members(pages):
            raise DamageError(
                f"{pages} must arrive unchanged. Received: two different lists of files. Run the same command again"
            )
    else:
        members = list_tree(pages)
    scans: dict[str, int] = {}
    ignored: list[str] = []
    for name, size in sorted(members):
        kind = _ignored_as(name)
        if kind:
            ignored.append(kind)
        elif name in scans:
            raise InputError(f"{pages} must hold one file per page. Received: {name!r} twice")
        else:
            scans[name] = size
    if not scans:
        raise InputError(
            f"--pages must be a folder or .zip of scans ({' '.join(SUFFIXES)}). Received: {pages}, without any"
        )
    return Listing(scans, count_kinds(ignored), str(pages))


def count_kinds(kinds: Iterable[str]) -> dict[str, int]:
    """Count files by their kind, of at most `MAX_KINDS`."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        counts[kind if kind in counts or len(counts) < MAX_KINDS else OTHERS] += 1
    return dict(sorted(counts.items()))


def ignored_line(ignored: Mapping[str, int]) -> str:
    """Return counts of files by kind as text: `3 .db, 120 characters/`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())


def _ignored_as(name: str) -> str:
    """Return the kind of a file that is not read, or nothing for a scan."""
    *folders, base = name.split("/")
    for folder in OTHER_FOLDERS:
        if folder in folders:
            return f"{folder}/"
    if base.startswith("."):  # macOS writes `._page.jpg` beside `page.jpg`
        return HIDDEN
    kind = kind_of(base)
    return "" if kind in SUFFIXES else kind


def kind_of(name: str) -> str:
    """Return the kind of a file: its suffix, in small letters."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix.isprintable() and 1 < len(suffix) <= MAX_SUFFIX_CHARS else OTHERS


def fingerprint(labels_sha256: str, files: Files) -> str:
    """Return a hex digest of the input: the labels' SHA-256, and the ids and sizes of the pages, which are not read."""
    digest = hashlib.sha256(labels_sha256.encode())
    for page_id, (_, size) in sorted(files.items()):
        digest.update(f"\n{page_id} {size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextmanager
def page_reader(pages: UPath, option: str = "--pages") -> Iterator[ReadPage]:
    """Yield a function that takes a file name from `list_pages` and returns the first `MAX_PAGE_BYTES` + 1 bytes.

    The function raises PageFault if the page can't be read from the archive, and FileNotFoundError if the file no
    longer exists.
    """
    if not is_archive(pages):
        yield lambda name: read_at_most(pages / name, MAX_PAGE_BYTES + 1)
        return
    with _open_archive(pages, option) as archive:

        def read(name: str) -> bytes:
            try:
                return _read_member(archive, name)
            except (PageFault, FileNotFoundError):
                if is_local(pages):
                    raise
            # A byte of the page or of the archive's directory may have been corrupted in transit: read both again.
            with _open_archive(pages) as reopened:
                return _read_member(reopened, name)

        yield read


@contextmanager
def size_reader(pages: UPath, listed: Callable[[], Listing]) -> Iterator[Callable[[str], tuple[int, int] | None]]:
    """Yield a function that takes a page id and returns the page's width and height in pixels, from its header alone;
    None for a page without a file or with one that can't be read.

    listed: returns the listing of `pages`; called when the first size is asked for.
    """
    with ExitStack() as stack:
        read = cache(lambda: stack.enter_context(page_reader(pages)))
        matcher = cache(lambda: Matcher(listed().scans, listed().where))

        def size_of(page_id: str) -> tuple[int, int] | None:
            path = matcher().path_of(page_id)
            if path is None:
                return None
            name = matcher().paths[path]
            # After a long preface, such as a thumbnail, the header comes later.
            for most in (MAX_PAGE_BYTES,) if is_archive(pages) else (HEADER_BYTES, MAX_PAGE_BYTES):
                try:
                    return scan_size(read()(name) if most == MAX_PAGE_BYTES else read_at_most(pages / name, most))
                except (PageFault, FileNotFoundError):
                    continue
            return None

        yield size_of


def is_archive(pages: UPath) -> bool:
    """Whether a place is a zip archive, by its suffix in any case."""
    return pages.suffix.lower() == ".zip" and not (is_local(pages) and os.path.isdir(pages.path))


def list_members(pages: UPath, option: str = "--pages") -> list[tuple[str, int]]:
    r"""Return name and uncompressed size in bytes of each file in an archive. option: to name in error messages.

    Names that are not marked as UTF-8 are read by `decode_name`, and `\` in names is `/`.
    """
    with _open_archive(pages, option) as archive:
        return [(info.filename, info.file_size) for info in archive.infolist() if not info.is_dir()]


def decode_name(name: bytes) -> str | None:
    """Return the name of a file as text: of UTF-8 or of CP932, which Japanese Windows writes; None if it is neither."""
    for encoding in ("utf-8", "cp932"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def _rename_members(archive: zipfile.ZipFile) -> None:
    """Give the members of an archive the names that were meant, for `infolist` and `getinfo`."""
    for info in archive.infolist():
        name = info.filename
        # Without the flag, zipfile decodes as CP437, which keeps every byte. A name in an extra field is right already.
        if not info.flag_bits & UTF8_FLAG and not name.isascii() and name == info.orig_filename:
            name = decode_name(name.encode("cp437")) or name
        name = name.replace("\\", "/")  # only now: the second byte of 表 in CP932 is a backslash
        if name != info.filename:
            info.filename = name
            archive.NameToInfo[name] = info


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    data = bytearray()
    try:
        info = archive.getinfo(name)
        step = STEP_BYTES.get(info.compress_type, SMALL_STEP_BYTES)
        with _broken_archive_as(PageFault, "page can't be read from the archive"), archive.open(info) as stream:
            assert isinstance(stream, zipfile.ZipExtFile)
            stream.MIN_READ_SIZE = step
            while len(data) <= MAX_PAGE_BYTES and (chunk := stream.read(step)):
                data += chunk
    except (KeyError, FileNotFoundError) as error:  # FileNotFoundError: the archive was replaced
        raise FileNotFoundError(f"{name} is no longer in the archive") from error
    del data[MAX_PAGE_BYTES + 1 :]
    if len(data) != min(info.file_size, MAX_PAGE_BYTES + 1):
        raise PageFault(f"page can't be read from the archive: {len(data)} bytes instead of {info.file_size}")
    return bytes(data)


@contextmanager
def _broken_archive_as(error_type: Callable[[str], Exception], message: str) -> Iterator[None]:
    """Convert what zipfile raises for broken archives to `error_type`. Errors of disk and bucket pass through."""
    try:
        with explaining():
            yield
    except UNREADABLE as error:
        # bz2 (no errno) and seeks to invalid offsets (EINVAL) raise OSError too. Any other errno comes from the disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise error_type(f"{message}: {' '.join(str(error).split())}") from error


@contextmanager
def _open_archive(pages: UPath, option: str = "--pages") -> Iterator[zipfile.ZipFile]:
    try:
        stream = open_read(pages)
    except FileNotFoundError as error:
        raise InputError(f"{option} must exist. Received: {pages}") from error
    with stream:
        with _broken_archive_as(InputError, f"{option} must be a folder or a valid .zip. Received: {pages}"):
            archive = zipfile.ZipFile(stream)
            _rename_members(archive)
        with archive:
            yield archive

"""Where page scans come from: a folder of `<image_id>.jpg`, or a zip archive of them as Kaggle ships it."""

import errno
import hashlib
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from upath import UPath

from cluster.bucket import explaining
from cluster.errors import DamageError, InputError
from cluster.storage import CHUNK_BYTES, is_local, list_files, open_read, read_at_most
from preprocessing.crop import MAX_PAGE_BYTES, PageFault

SUFFIX = ".jpg"
# What zipfile and its decompressors raise for what is broken, encrypted or of an unknown method.
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError, EOFError, OverflowError)
UNREADABLE = (*BROKEN, ValueError, OSError)
# Of other than stored and deflated members, zipfile unpacks at once what it has read: 32 bytes are a block of bz2 at
# most, of which each may be 46 MB.
STEP_BYTES = {zipfile.ZIP_STORED: CHUNK_BYTES, zipfile.ZIP_DEFLATED: CHUNK_BYTES}
SMALL_STEP_BYTES = 32


class ReadPage(Protocol):
    def __call__(self, name: str) -> bytes: ...


def list_pages(pages: UPath) -> dict[str, tuple[str, int]]:
    """Page id to name (in the folder or archive) and size in bytes; files of other kinds are none of ours.

    Raises:
        InputError: no such folder or archive, a broken archive, no page in it, or two pages of one id.
        DamageError: an archive's list of its pages did not arrive as it is there.
    """
    if _is_archive(pages):
        members = _list_members(pages)
        if not is_local(pages) and members != _list_members(pages):  # unlike its pages, it has no checksum
            raise DamageError(f"{pages} must arrive as it is there. Received: other bytes. Run the same command again")
        found = [(name, size) for name, size in members if not name.startswith("__MACOSX/")]
    else:
        found = list(list_files(pages).items())
    listing: dict[str, tuple[str, int]] = {}
    for name, size in sorted(found):
        page_id, suffix = os.path.splitext(os.path.basename(name))
        if suffix == SUFFIX:
            if page_id in listing:
                raise InputError(f"{pages} must hold one file a page. Received: {listing[page_id][0]!r} and {name!r}")
            listing[page_id] = (name, size)
    if not listing:
        raise InputError(f"--pages must be a folder or .zip of <image_id>{SUFFIX} files. Received: {pages}, with none")
    return listing


def fingerprint(labels_sha256: str, listing: Mapping[str, tuple[str, int]]) -> str:
    """Tells one input from another before any page is read: the labels' bytes, the pages' names and sizes."""
    digest = hashlib.sha256(labels_sha256.encode())
    for page_id, (_, size) in sorted(listing.items()):
        digest.update(f"\n{page_id} {size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextmanager
def page_reader(pages: UPath) -> Iterator[ReadPage]:
    """A function from a name of the listing to the file's bytes.

    It raises PageFault for what can't be read as it is there, and FileNotFoundError for what is there no more.
    """
    if not _is_archive(pages):
        yield lambda name: read_at_most(pages / name, MAX_PAGE_BYTES + 1)
        return
    with _open_archive(pages) as archive:

        def read(name: str) -> bytes:
            try:
                return _read_member(archive, name)
            except (PageFault, FileNotFoundError):
                if is_local(pages):
                    raise
            # A byte may have changed on its way here, of the page or of the archive's list of its pages.
            with _open_archive(pages) as afresh:
                return _read_member(afresh, name)

        yield read


def _is_archive(pages: UPath) -> bool:
    return pages.suffix == ".zip"


def _list_members(pages: UPath) -> list[tuple[str, int]]:
    """Name and size in bytes of all that an archive holds."""
    with _open_archive(pages) as archive:
        return [(info.filename, info.file_size) for info in archive.infolist()]


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    data = bytearray()
    try:
        info = archive.getinfo(name)
        step = STEP_BYTES.get(info.compress_type, SMALL_STEP_BYTES)
        with _broken_as(PageFault, "page can't be read from the archive"), archive.open(info) as stream:
            assert isinstance(stream, zipfile.ZipExtFile)
            stream.MIN_READ_SIZE = step
            while len(data) <= MAX_PAGE_BYTES and (chunk := stream.read(step)):
                data += chunk
    except (KeyError, FileNotFoundError):  # the latter, of an archive that was replaced
        raise FileNotFoundError(f"{name} is no longer in the archive") from None
    del data[MAX_PAGE_BYTES + 1 :]
    if len(data) != min(info.file_size, MAX_PAGE_BYTES + 1):
        raise PageFault(f"page can't be read from the archive: {len(data)} bytes instead of {info.file_size}")
    return bytes(data)


@contextmanager
def _broken_as(kind: Callable[[str], Exception], what: str) -> Iterator[None]:
    """What zipfile raises for broken bytes comes out as an error of one kind; failures of disk and bucket do not."""
    try:
        with explaining():
            yield
    except UNREADABLE as error:
        # bz2 and a misled seek raise OSError too; one with another number is of the disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise kind(f"{what}: {' '.join(str(error).split())}") from None


@contextmanager
def _open_archive(pages: UPath) -> Iterator[zipfile.ZipFile]:
    try:
        stream = open_read(pages)
    except FileNotFoundError:
        raise InputError(f"--pages must be there. Received: {pages}") from None
    with stream:
        with _broken_as(InputError, f"--pages must be a folder or a whole .zip. Received: {pages}"):
            archive = zipfile.ZipFile(stream)
        with archive:
            yield archive

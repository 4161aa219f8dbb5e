"""Zip archives, as Kaggle provides its pages: list their members, and read members within limits.

An archive in a bucket is read by ranges. If it is known which members come next, their ranges are read ahead, those of
neighbours in one request.
"""

import errno
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from upath import UPath

from cluster.ahead import ahead
from cluster.errors import InputError
from cluster.places import is_local
from cluster.ranged_file import RangedFile
from cluster.storage import CHUNK_BYTES, open_read
from preprocessing.crop import MAX_PAGE_BYTES, PageFault

# Exceptions that zipfile and its decompressors raise for members that are broken, encrypted or of an unknown method.
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError, EOFError, OverflowError)
UNREADABLE = (*BROKEN, ValueError, OSError)
# Bytes to read at once. For methods other than stored and deflated, zipfile decompresses all bytes it has read at once.
# 32 bytes contain at most one block of bz2, and a block can decompress to 46 MB.
STEP_BYTES = {zipfile.ZIP_STORED: CHUNK_BYTES, zipfile.ZIP_DEFLATED: CHUNK_BYTES}
SMALL_STEP_BYTES = 32
UNREAD = "page can't be read from the archive"
UTF8_FLAG = 0x800  # flag of a member whose name is UTF-8
# Length of the end of an archive that is read first. It contains the whole directory of up to ten thousand members.
TAIL_BYTES = 1 << 20
# Room before a member's bytes: 30 bytes, its name, and its extra fields, which may be longer than in the directory.
LOCAL_HEADER_BYTES = 1 << 12
STRETCH_BYTES = 4 << 20  # most bytes of one request, unless a single member is larger
REQUESTS_AT_ONCE = 4
AHEAD_BYTES = 32 << 20


@dataclass
class _Stretch:
    """Neighbouring members, which are read with one request."""

    begin: int
    end: int
    names: list[str]


@contextmanager
def member_reader(
    place: UPath, option: str = "--pages", expected: Sequence[str] = ()
) -> Iterator[Callable[[str], bytes]]:
    """Yield a function that takes the name of a member and returns its first `MAX_PAGE_BYTES` + 1 bytes.

    Args:
        place: the archive.
        option: the option that error messages name.
        expected: the members that will be read, each once and in this order; empty: not known.

    The function raises PageFault if the member can't be read, and FileNotFoundError if there is none of this name.
    """
    with _open(place, option) as (archive, stream), _reader(archive, stream, expected) as read_member:

        def read(name: str) -> bytes:
            try:
                return read_member(name)
            except (PageFault, FileNotFoundError) as error:
                was_replaced = isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, KeyError)
                if is_local(place) or was_replaced:
                    raise
            # A byte of the member or of the archive's directory may have been corrupted in transit: read both again.
            with _open(place, option) as (reopened, _):
                return _read(reopened, name)

        yield read


def list_members(place: UPath, option: str = "--pages") -> list[tuple[str, int]]:
    r"""Return name and uncompressed size in bytes of each file in an archive.

    Names that are not marked as UTF-8 are decoded by `decode_name`, `\` in names becomes `/`, and a leading `./` is
    dropped. Files in hidden folders are skipped, as in `list_tree`.

    Args:
        place: the archive.
        option: the option that error messages name.
    """
    with _open(place, option) as (archive, _):
        files = [info for info in archive.infolist() if info.filename and not info.is_dir()]
        return [(file.filename, file.file_size) for file in files if not _in_hidden_folder(file.filename)]


def _in_hidden_folder(name: str) -> bool:
    return any(folder.startswith(".") and folder.strip(".") for folder in name.split("/")[:-1])  # `..` is not hidden


def decode_name(name: bytes) -> str | None:
    """Decode a file name from UTF-8 or from CP932, which Japanese Windows writes. Return None if it is neither."""
    for encoding in ("utf-8", "cp932"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def _rename_members(archive: zipfile.ZipFile) -> None:
    """Correct the names of an archive's members, for `infolist` and `getinfo`."""
    for info in archive.infolist():
        name = info.filename
        # Without the flag, zipfile decodes as CP437, which keeps every byte. A name in an extra field is already right.
        if not info.flag_bits & UTF8_FLAG and not name.isascii() and name == info.orig_filename:
            name = decode_name(name.encode("cp437")) or name
        # Only after decoding: the second byte of 表 in CP932 is a backslash.
        name = name.replace("\\", "/")
        name = name.removeprefix("./") or name  # an entry `./` keeps its name
        if name != info.filename:
            info.filename = name
            archive.NameToInfo[name] = info


@contextmanager
def _reader(
    archive: zipfile.ZipFile, stream: BinaryIO | RangedFile, expected: Sequence[str]
) -> Iterator[Callable[[str], bytes]]:
    """Yield a function that reads a member. In a bucket, expected members are read ahead into the stream."""
    if not isinstance(stream, RangedFile) or not expected:
        yield partial(_read, archive)
        return
    stretches = _stretches(archive, expected, stream.size)
    begins = {stretch.names[0]: stretch.begin for stretch in stretches}
    lasts = {stretch.names[-1] for stretch in stretches}
    requests = [(part.end - part.begin, partial(stream.read_range, part.begin, part.end)) for part in stretches]
    with ahead(requests, REQUESTS_AT_ONCE, AHEAD_BYTES) as answers:

        def read(name: str) -> bytes:
            if name in begins:
                answer = next(answers)
                with _broken_archive_as(PageFault, UNREAD):
                    stream.hold(begins[name], answer.result())
            try:
                return _read(archive, name)
            finally:
                if name in lasts:
                    stream.hold(0, b"")  # free the memory before the page is decoded

        yield read


def _stretches(archive: zipfile.ZipFile, names: Iterable[str], size: int) -> list[_Stretch]:
    """Return the parts of an archive of `size` bytes that contain these members, in this order.

    If a part ends too early, or a member is in no part, reading the member takes another request.
    """
    stretches: list[_Stretch] = []
    for name in names:
        info = archive.NameToInfo.get(name)
        if info is None or not 0 <= info.header_offset < size:
            continue
        begin = info.header_offset
        end = min(begin + LOCAL_HEADER_BYTES + min(info.compress_size, MAX_PAGE_BYTES + 1), size)
        last = stretches[-1] if stretches else None
        if last and last.begin <= begin <= last.end and end - last.begin <= STRETCH_BYTES:
            last.end = max(last.end, end)
            last.names.append(name)
        else:
            stretches.append(_Stretch(begin, end, [name]))
    return stretches


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    data = bytearray()
    try:
        info = archive.getinfo(name)
        step = STEP_BYTES.get(info.compress_type, SMALL_STEP_BYTES)
        with _broken_archive_as(PageFault, UNREAD), archive.open(info) as stream:
            assert isinstance(stream, zipfile.ZipExtFile)
            stream.MIN_READ_SIZE = step
            while len(data) <= MAX_PAGE_BYTES and (chunk := stream.read(step)):
                data += chunk
    except (KeyError, FileNotFoundError) as error:  # FileNotFoundError: the archive was replaced
        raise FileNotFoundError(f"{name} is no longer in the archive") from error
    del data[MAX_PAGE_BYTES + 1 :]
    if len(data) != min(info.file_size, MAX_PAGE_BYTES + 1):
        raise PageFault(f"{UNREAD}: {len(data)} bytes instead of {info.file_size}")
    return bytes(data)


@contextmanager
def _broken_archive_as(error_type: Callable[[str], Exception], message: str) -> Iterator[None]:
    """Convert exceptions of zipfile for broken archives to `error_type`. Errors of disk and bucket pass through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        # bz2 (no errno) and seeks to invalid offsets (EINVAL) raise OSError too. Any other errno comes from the disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise error_type(f"{message}: {' '.join(str(error).split())}") from error


@contextmanager
def _open(place: UPath, option: str = "--pages") -> Iterator[tuple[zipfile.ZipFile, BinaryIO | RangedFile]]:
    try:
        stream = open_read(place)
    except FileNotFoundError as error:
        raise InputError(f"{option} must exist. Received: {place}") from error
    with stream:
        with _broken_archive_as(InputError, f"{option} must be a folder or a valid .zip. Received: {place}"):
            if isinstance(stream, RangedFile) and stream.size:
                tail = max(0, stream.size - TAIL_BYTES)
                stream.hold(tail, stream.read_range(tail, stream.size))
            archive = zipfile.ZipFile(stream)
            _rename_members(archive)
        with archive:
            yield archive, stream

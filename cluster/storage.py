"""Places: local paths and fsspec addresses (`gs://bucket/x`) behind one pathlib interface.

Nothing half-written ever stands under a final name: local files are written under a temporary name in the same
folder and moved; object stores show an object only when its upload is complete.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fsspec import get_filesystem_class
from upath import UPath

from cluster import bucket
from cluster.errors import InputError, KuzushijiError, OptionError

CHUNK_BYTES = 1 << 20
TEMPORARY_PREFIX = ".tmp-"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def place(text: str | os.PathLike[str]) -> UPath:
    """A path or address. Local ones are made absolute, since workers run in other folders.

    Raises:
        OptionError: it is empty, an address of a kind that can't be used here, or of no bucket's name.
    """
    if not str(text):
        raise OptionError("a place must be a path or an address. Received: an empty one")
    try:
        path: UPath = UPath(text)
        get_filesystem_class(path.protocol)  # which imports what is needed for it
    except (ValueError, ImportError) as error:
        raise OptionError(f"a place must be a path or an address. Received: {text}: {error}") from None
    if is_local(path):
        return UPath(os.path.abspath(path.path))
    if bucket.is_bucket(path) and not bucket.has_name(path):
        raise OptionError(
            f"an address of Google Cloud Storage must be gs://BUCKET/..., in small letters. Received: {text}"
        )
    if bucket.is_bucket(path):
        path = UPath(text, **bucket.options())
    return path


def reachable_place(text: str | os.PathLike[str]) -> UPath:
    """A place that a person named: of a bucket, only if it is there and lets us in.

    Raises:
        OptionError: as `place`.
        KuzushijiError: there is no such bucket, no right to look into it, or nobody to ask for.
    """
    path = place(text)
    if bucket.is_bucket(path):
        bucket.reach(path.path.partition("/")[0])
    return path


def is_local(path: UPath) -> bool:
    return path.protocol in ("", "file", "local")


def local_path(text: str, option: str) -> Path:
    """A path of this machine.

    Raises:
        OptionError: it is an address.
    """
    path = place(text)
    if not is_local(path):
        raise OptionError(f"{option} must be a path of this machine. Received: {text}")
    return Path(path.path)


def plain_name(name: str, what: str) -> str:
    """`name` itself if it can't leave a folder it is put in.

    Raises:
        InputError: it holds a separator, starts with a dot, or has other than ASCII letters, digits, `.`, `_`, `-`.
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise InputError(
            f"{what} must be letters, digits, '.', '_' or '-' and not start with '.' or '-'. Received: {name!r}"
        )
    return name


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Failures to write in a local folder come out as ours, with its name: that of a full disk names no place."""
    try:
        yield
    except OSError as error:
        # The second, of a copy, is where it was going.
        names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        named = any(name.is_relative_to(folder) for name in names)
        elsewhere = bool(names) and not named
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if (elsewhere or not (named or full)) and os.path.isdir(folder):
            raise  # of another folder, or of what is read
        raise KuzushijiError(
            "a folder must be there, writable and have room as long as it is written. "
            f"Received: {folder}: {error.strerror}. Mend that and run the same command again"
        ) from error


@contextmanager
def new_file(target: UPath, within: UPath | None = None) -> Iterator[Path]:
    """A local path to write; it becomes `target` in one step when the block ends, and is removed when the block
    fails.

    within: the folder for that path, on the same disk as `target`. It is not made: once it is removed, nothing that
    was begun in it comes to be.

    Raises:
        KuzushijiError: its folder is full, read-only or gone.
    """
    beside = target.parent if within is None else within
    folder = Path(beside.path if is_local(target) else tempfile.gettempdir())
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    with writing_in(folder):
        if within is None:
            os.makedirs(folder, exist_ok=True)
        try:
            yield temporary
            if is_local(target):
                with open(temporary, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(temporary, target.path)
            elif bucket.is_bucket(target):
                bucket.upload(temporary, target)
            else:
                target.fs.put_file(str(temporary), target.path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(target: UPath, data: bytes, within: UPath | None = None) -> None:
    """Write a small file so that readers see the old content or the new one, never a part. within: see `new_file`."""
    with new_file(target, within) as temporary:
        temporary.write_bytes(data)


def change_bytes(target: UPath, content: Callable[[bytes | None], bytes | None]) -> None:
    """Replace a small file by what `content` makes of its bytes (None: there is none; as a result: leave it), with
    nobody writing in between. `content` may be called again with what somebody else wrote meanwhile.
    """
    if bucket.is_bucket(target):
        bucket.change(target, content)
        return
    with _alone_in(target.parent):
        new = content(read_bytes(target) if is_file(target) else None)
        if new is not None:
            write_bytes(target, new)


@contextmanager
def _alone_in(folder: UPath) -> Iterator[None]:
    """One at a time among all processes that change files of a local folder so; other places know no locks."""
    if not is_local(folder):
        yield
        return
    with writing_in(Path(folder.path)):
        os.makedirs(folder.path, exist_ok=True)
        descriptor = os.open(folder.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(descriptor), os.stat(folder.path)):  # while another one had it
                raise FileNotFoundError(errno.ENOENT, "removed meanwhile, and made anew", folder.path)
            yield
        finally:
            os.close(descriptor)


def is_file(path: UPath) -> bool:
    """Whether there is such a file; a bucket that does not answer is no answer, but a failure."""
    return bucket.has(path) if bucket.is_bucket(path) else bool(path.is_file())


def open_read(path: UPath) -> BinaryIO:
    """Open for reading here and there, as it is now.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_local(path):  # a third of the time that it takes by way of fsspec
        return open(path.path, "rb")
    stream: BinaryIO = bucket.open_read(path) if bucket.is_bucket(path) else path.fs.open(path.path, "rb")
    return stream


def read_chunks(path: UPath, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of a file, in pieces; fewer if it is shorter.

    Raises:
        FileNotFoundError: there is no such file.
        DamageError: a whole object of a bucket did not arrive as it is there.
    """
    if bucket.is_bucket(path):
        yield from bucket.read_chunks(path, begin, end)
        return
    with open_read(path) as stream:
        stream.seek(begin)
        while begin < end and (chunk := stream.read(min(CHUNK_BYTES, end - begin))):
            begin += len(chunk)
            yield chunk


def read_at_most(path: UPath, most: int) -> bytes:
    """A file, or its first bytes where it has more than `most`; raises what `read_chunks` does.

    A local one in one piece: put together from chunks, a page takes twice as long.
    """
    if not is_local(path):
        return b"".join(read_chunks(path, 0, most))
    with open_read(path) as stream:
        return stream.read(min(most, os.fstat(stream.fileno()).st_size))


def read_bytes(path: UPath) -> bytes:
    """A small file, as it was at one moment.

    Raises:
        FileNotFoundError: there is no such file.
    """
    content: bytes = bucket.read_bytes(path) if bucket.is_bucket(path) else path.read_bytes()
    return content


def fetch(path: UPath, local: Path) -> None:
    """Copy a file to this machine, as fast as its place allows."""
    with local.open("wb") as out:
        for chunk in read_chunks(path, 0, sys.maxsize):
            out.write(chunk)


def sha256_of(path: UPath) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    return _hex_digest(path, hashlib.sha256())


def md5_of(path: UPath) -> str:
    """As `sha256_of`, for files whose publishers give this hash only: it finds damage, not intent."""
    return _hex_digest(path, hashlib.md5(usedforsecurity=False))


def _hex_digest(path: UPath, digest: "hashlib._Hash") -> str:
    for chunk in read_chunks(path, 0, sys.maxsize):
        digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: UPath) -> dict[str, int]:
    """Name to size in bytes of the files that stand directly in `folder`; empty if there is no such folder."""
    if is_local(folder):  # fsspec calls a link to a file no file
        try:
            with os.scandir(folder.path) as found:
                return dict(_sizes(found))
        except (FileNotFoundError, NotADirectoryError):
            return {}
    if bucket.is_bucket(folder):
        return bucket.list_folder(folder)[0]
    return {os.path.basename(entry["name"]): int(entry["size"]) for entry in _list(folder) if entry["type"] == "file"}


def _sizes(found: Iterable["os.DirEntry[str]"]) -> Iterator[tuple[str, int]]:
    for entry in found:
        with suppress(FileNotFoundError):  # somebody moved it meanwhile, as `new_file` does
            if entry.is_file():
                yield entry.name, entry.stat().st_size


def list_folders(folder: UPath) -> list[str]:
    """Names of the folders that stand directly in `folder`, sorted; none if there is no such folder."""
    if bucket.is_bucket(folder):
        return bucket.list_folder(folder)[1]
    if is_local(folder):  # where a link to a folder is one
        try:
            with os.scandir(folder.path) as found:
                return sorted(entry.name for entry in found if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(os.path.basename(entry["name"]) for entry in _list(folder) if entry["type"] == "directory")


def _list(folder: UPath) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:
        return []
    return entries


def remove_temporaries(folder: UPath) -> None:
    """Remove what `new_file` leaves directly in a folder when its process is killed."""
    for name in list_files(folder):
        if name.startswith(TEMPORARY_PREFIX):
            (folder / name).unlink(missing_ok=True)


def remove_folder(folder: UPath) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if is_local(folder):
        shutil.rmtree(folder.path, ignore_errors=True)
    elif bucket.is_bucket(folder):
        bucket.remove_folder(folder)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)

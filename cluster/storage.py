"""Files in a local folder, in a bucket, or on another fsspec file system, through the same functions.

`places.store_of` picks the implementation of `Store` for a path: `Local`, `Bucket` or `Fsspec`. `Local` and `Bucket`
never show an incomplete file under its final name; whether `Fsspec` does depends on the file system.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from upath import UPath

from cluster import local
from cluster.errors import InputError
from cluster.local import TEMPORARY_PREFIX as TEMPORARY_PREFIX
from cluster.places import is_local, store_of
from cluster.ranged_file import RangedFile
from cluster.storage_interface import CHUNK_BYTES as CHUNK_BYTES

_MAX_DEPTH = 32


# --- writing


def writing_in(folder: UPath | Path) -> AbstractContextManager[None]:
    """Turn an OSError about a local folder into a KuzushijiError that names it. For any other folder, do nothing.

    Raises:
        KuzushijiError: the folder is missing, full, read-only, or not a folder.
    """
    path = UPath(folder)
    return local.writing_in(Path(path.path)) if is_local(path) else nullcontext()


def check_writable(folder: UPath) -> None:
    """Create a local folder if it is missing, and check that it is writable. For any other folder, do nothing.

    Call this before long work.

    Raises:
        KuzushijiError: the folder is full, read-only, or not a folder.
    """
    if is_local(folder):
        local.check_writable(Path(folder.path))


def new_file(target: UPath, within: UPath | None = None) -> AbstractContextManager[Path]:
    """Return a context manager that yields a temporary local path to write.

    When the block ends, the file there becomes `target` in one step; if the block raises, the file is removed.

    Args:
        target: the file to create or replace.
        within: for a local `target`, folder of the temporary path, on the same disk. It is not created: if another
            process removes it, a file that was begun in it never becomes `target`. None: the folder of `target`, which
            is created.

    Raises:
        KuzushijiError: the folder is full, read-only or missing, or the upload failed.
    """
    return store_of(target).new_file(target, within)


def write_bytes(target: UPath, data: bytes, within: UPath | None = None) -> None:
    """Write a small file. Readers get the old or the new bytes, never a part. `within` and Raises: as `new_file`."""
    with new_file(target, within) as temporary:
        temporary.write_bytes(data)


def change_bytes(target: UPath, update: Callable[[bytes | None], bytes | None]) -> None:
    """Atomic read-modify-write of a small file.

    `update(old)` gets the bytes, or None if the file does not exist, and returns the new bytes, or None to leave the
    file as it is. In a bucket, `update` is called again if another process wrote the file in between. On NFS, it is
    atomic among the processes of one host. Other file systems give no protection from other processes.

    Raises:
        KuzushijiError: the folder is full, read-only, or removed in between; or the request failed.
    """
    store_of(target).change_bytes(target, update)


def remove_file(path: UPath) -> None:
    """Remove a file, if it exists."""
    store_of(path).remove_file(path)


def remove_folder(folder: UPath) -> None:
    """Remove a folder and everything in it, if it exists. Local files that can't be removed are left."""
    store_of(folder).remove_folder(folder)


def remove_temporaries(folder: UPath) -> None:
    """Remove the temporary files that a killed process left directly in a folder."""
    for name in list_files(folder):
        if name.startswith(TEMPORARY_PREFIX):
            remove_file(folder / name)


# --- reading


def is_file(path: UPath) -> bool:
    """Return whether a file exists.

    Raises:
        KuzushijiError: the bucket does not answer, or refuses the request.
    """
    return store_of(path).is_file(path)


def size_of(path: UPath) -> int:
    """Return the size of a file in bytes. Raises: FileNotFoundError if there is none; KuzushijiError as `is_file`."""
    return store_of(path).size_of(path)


def list_files(folder: UPath) -> dict[str, int]:
    """Return name to size in bytes of the files directly in a folder; empty if it is missing. Raises: as `is_file`."""
    return store_of(folder).list_files(folder)


def list_folders(folder: UPath) -> list[str]:
    """Return the sorted names of the folders directly in a folder; empty if it is missing. Raises: as `is_file`."""
    return store_of(folder).list_folders(folder)


def list_tree(folder: UPath) -> list[tuple[str, int]]:
    """Return path and size in bytes of each file in a folder and its sub-folders.

    Paths are relative to the folder, with `/` between folders. Folders whose names start with `.` are skipped.

    Raises:
        InputError: folders are nested too deep, for example by a symbolic link to a folder above it.
        KuzushijiError: as `is_file`.
    """
    found: list[tuple[str, int]] = []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        if prefix.count("/") > _MAX_DEPTH:
            raise InputError(f"{folder} must have folders at most {_MAX_DEPTH} deep. Received: {prefix[:200]}")
        here = folder / prefix if prefix else folder
        files, folders = store_of(here).listing(here)
        found += ((prefix + name, size) for name, size in files.items())
        waiting += (f"{prefix}{name}/" for name in folders if not name.startswith("."))
    return found


def open_read(path: UPath) -> BinaryIO | RangedFile:
    """Open a file for reading and seeking.

    In a bucket, the result is a `RangedFile`, which reads the generation that is current when the file is opened. It
    compares no checksum, and its reads raise as this function does.

    Raises:
        FileNotFoundError: the file does not exist, or, in a bucket, was replaced since it was opened.
        KuzushijiError: as `is_file`.
    """
    return store_of(path).open_read(path)


def read_chunks(path: UPath, begin: int, end: int) -> Iterator[bytes]:
    """Yield bytes `begin` to `end` of a file, in chunks and in order; fewer bytes if the file is shorter.

    In a bucket, the bytes are from one generation, and several requests run at once.

    Raises:
        FileNotFoundError: the file does not exist, or, in a bucket, was replaced while it was read.
        DamageError: the range covers a whole object of a bucket, and the CRC32C of the bytes is not the object's.
        KuzushijiError: as `is_file`.
    """
    return store_of(path).read_chunks(path, begin, end)


def read_at_most(path: UPath, most: int) -> bytes:
    """Return the bytes of a file, or the first `most` if it has more. In a bucket, up to 8 MiB take one request.

    Raises:
        FileNotFoundError, KuzushijiError: as `read_chunks`.
        DamageError: in a bucket, the object has fewer than `most` bytes, and their CRC32C is not the object's.
    """
    return store_of(path).read_at_most(path, most)


def read_small(path: UPath, most: int) -> bytes | None:
    """Return the bytes of a file, or the first `most` + 1 if it has more; None if there is no file.

    Raises:
        KuzushijiError, DamageError: as `read_at_most`.
    """
    if not is_file(path):
        return None
    with suppress(FileNotFoundError):  # another process removed it in between
        return read_at_most(path, most + 1)
    return None


def read_bytes(path: UPath) -> bytes:
    """Return the bytes of a small file, all from one version of it.

    Raises:
        FileNotFoundError: the file does not exist.
        DamageError: the CRC32C of the bytes is not that of the object in the bucket.
        KuzushijiError: as `is_file`.
    """
    return store_of(path).read_bytes(path)


def fetch(path: UPath, target: Path) -> None:
    """Copy a file to a path on this machine. Raises: as `read_chunks`."""
    with target.open("wb") as out:
        for chunk in read_chunks(path, 0, sys.maxsize):
            out.write(chunk)


@contextmanager
def local_file(path: UPath, scratch: Path) -> Iterator[Path]:
    """Yield the path of a local file itself, or of a copy in the folder `scratch`, removed when the block ends.

    Raises: as `read_chunks`.
    """
    if is_local(path):
        yield Path(path.path)
        return
    copy = scratch / path.name
    try:
        fetch(path, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def sha256_of(path: UPath) -> str:
    """Return the SHA-256 of a file as hex digits. Raises: as `read_chunks`."""
    return _hex_digest(path, hashlib.sha256())


def md5_of(path: UPath) -> str:
    """Return the MD5 of a file as hex digits, for publishers that give no other hash.

    An MD5 detects damage, but not manipulation.

    Raises: as `read_chunks`.
    """
    return _hex_digest(path, hashlib.md5(usedforsecurity=False))


def _hex_digest(path: UPath, digest: "hashlib._Hash") -> str:
    for chunk in read_chunks(path, 0, sys.maxsize):
        digest.update(chunk)
    return digest.hexdigest()

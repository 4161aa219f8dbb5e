"""Files on this machine.

A new file is written under a temporary name and then moved, so a file under its final name is always complete.
"""

import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from upath import UPath

from cluster.errors import KuzushijiError, OptionError
from cluster.storage_interface import Store

TEMPORARY_PREFIX = ".tmp-"


class Local(Store):
    """The store of paths without a protocol and of `file://` addresses."""

    def is_file(self, path: UPath) -> bool:
        return Path(path.path).is_file()

    def size_of(self, path: UPath) -> int:
        return os.stat(path.path).st_size

    def list_files(self, folder: UPath) -> dict[str, int]:
        # Not through fsspec, which does not report a symbolic link to a file as a file.
        try:
            with os.scandir(folder.path) as found:
                return dict(_sizes(found))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def list_folders(self, folder: UPath) -> list[str]:
        # A symbolic link to a folder counts as a folder.
        try:
            with os.scandir(folder.path) as found:
                return sorted(entry.name for entry in found if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open_read(self, path: UPath) -> BinaryIO:
        return open(path.path, "rb")  # takes a third of the time of fsspec's `open`

    def read_bytes(self, path: UPath) -> bytes:
        return Path(path.path).read_bytes()

    def read_at_most(self, path: UPath, most: int) -> bytes:
        # One read: joining chunks takes twice as long for a page scan.
        with self.open_read(path) as stream:
            return stream.read(min(most, os.fstat(stream.fileno()).st_size))

    @contextmanager
    def new_file(self, target: UPath, within: UPath | None) -> Iterator[Path]:
        folder = target.parent if within is None else within
        with temporary_file(Path(folder.path), create_folder=within is None) as temporary:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target.path)

    def change_bytes(self, target: UPath, update: Callable[[bytes | None], bytes | None]) -> None:
        with _locked(target.parent):
            super().change_bytes(target, update)

    def remove_file(self, path: UPath) -> None:
        Path(path.path).unlink(missing_ok=True)

    def remove_folder(self, folder: UPath) -> None:
        shutil.rmtree(folder.path, ignore_errors=True)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turn an OSError about `folder` into a KuzushijiError that names the folder.

    The OSError of a full or read-only disk may name no path, so it counts as an error about `folder`. While `folder`
    exists, an OSError that names only other paths, and any other OSError without a path, is re-raised unchanged.

    Raises:
        KuzushijiError: the folder is missing, full, read-only, or not a folder.
    """
    try:
        yield
    except OSError as error:
        # `filename2` is the target path of a copy or a move.
        names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        named = any(name.is_relative_to(folder) for name in names)
        elsewhere = bool(names) and not named
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if (elsewhere or not (named or full)) and os.path.isdir(folder):
            raise
        raise KuzushijiError(
            "a folder must exist, be writable and have free space while files are written to it. "
            f"Received: {folder}: {error.strerror}. Fix that and run the same command again. "
            "See docs/faq.md#a-folder-must-exist-be-writable-and-have-free-space"
        ) from error


def lock(file: int | IO[Any], folder: Path, wait: bool = False) -> None:
    """Lock an open file, or folder, exclusively.

    folder: its folder, for the message of an error. wait: whether to wait for another process that has locked it.

    Raises:
        BlockingIOError: another process has locked it.
        OptionError: its file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise OptionError(
                f"a folder must be on a file system with locks (flock). Received: {folder}: {error.strerror}. "
                "Name a folder on another one, for copies of crops by XDG_CACHE_HOME. See docs/faq.md"
            ) from error
        raise


def check_writable(folder: Path) -> None:
    """Create a folder if it is missing, and a temporary file in it, which is removed at once.

    Raises:
        KuzushijiError: the folder is full, read-only, or not a folder.
    """
    with writing_in(folder):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def temporary_file(folder: Path, create_folder: bool = True) -> Iterator[Path]:
    """Yield a new temporary path in `folder`. The file is removed when the block ends, unless the block moved it.

    Raises:
        KuzushijiError: as `writing_in`.
    """
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    with writing_in(folder):
        if create_folder:
            os.makedirs(folder, exist_ok=True)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`, which other processes may have removed or replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):  # the last: NFS, if another host removed it
            raise
        return False


@contextmanager
def _locked(folder: UPath) -> Iterator[None]:
    """Lock a folder against other threads and processes while the block runs. Create the folder if it is missing.

    Raises:
        KuzushijiError: the folder can't be created, or was removed while this process waited for the lock.
        OptionError: its file system has no locks.
    """
    with writing_in(Path(folder.path)):
        os.makedirs(folder.path, exist_ok=True)
        descriptor = os.open(folder.path, os.O_RDONLY)
        try:
            lock(descriptor, Path(folder.path), wait=True)
            # The lock is on the folder that was opened, which another process may have removed and created again.
            if not is_at(descriptor, Path(folder.path)):
                raise FileNotFoundError(errno.ENOENT, "removed by another process", folder.path)
            yield
        finally:
            os.close(descriptor)


def _sizes(found: Iterable["os.DirEntry[str]"]) -> Iterator[tuple[str, int]]:
    """Yield name and size in bytes of each file."""
    for entry in found:
        with suppress(FileNotFoundError):  # another process removed or moved the file after it was listed
            if entry.is_file():
                yield entry.name, entry.stat().st_size

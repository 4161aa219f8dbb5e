"""The interface that each kind of storage implements: `Local`, `Bucket` and `Fsspec`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from upath import UPath

from cluster.ranged_file import RangedFile

CHUNK_BYTES = 1 << 20


class Store(ABC):
    """One kind of storage. The functions of `cluster.storage` with the same names document the methods."""

    @abstractmethod
    def is_file(self, path: UPath) -> bool: ...

    @abstractmethod
    def size_of(self, path: UPath) -> int: ...

    @abstractmethod
    def list_files(self, folder: UPath) -> dict[str, int]: ...

    @abstractmethod
    def list_folders(self, folder: UPath) -> list[str]: ...

    def listing(self, folder: UPath) -> tuple[dict[str, int], list[str]]:
        """Return what `list_files` and `list_folders` return. `Bucket` asks for both with one request."""
        return self.list_files(folder), self.list_folders(folder)

    @abstractmethod
    def open_read(self, path: UPath) -> BinaryIO | RangedFile: ...

    @abstractmethod
    def read_bytes(self, path: UPath) -> bytes: ...

    def read_chunks(self, path: UPath, begin: int, end: int) -> Iterator[bytes]:
        with self.open_read(path) as stream:
            stream.seek(begin)
            while begin < end and (chunk := stream.read(min(CHUNK_BYTES, end - begin))):
                begin += len(chunk)
                yield chunk

    def read_at_most(self, path: UPath, most: int) -> bytes:
        return b"".join(self.read_chunks(path, 0, most))

    @abstractmethod
    def new_file(self, target: UPath, within: UPath | None) -> AbstractContextManager[Path]: ...

    def change_bytes(self, target: UPath, update: Callable[[bytes | None], bytes | None]) -> None:
        # Atomic only if no other process writes the file meanwhile. `Local` takes a lock, `Bucket` overrides this.
        new = update(self.read_bytes(target) if self.is_file(target) else None)
        if new is not None:
            with self.new_file(target, None) as temporary:
                temporary.write_bytes(new)

    @abstractmethod
    def remove_file(self, path: UPath) -> None: ...

    @abstractmethod
    def remove_folder(self, folder: UPath) -> None: ...

"""Files on any other fsspec file system, such as `memory://`. fsspec has no locks and no checksums."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from upath import UPath

from cluster.local import temporary_file
from cluster.storage_interface import Store


class Fsspec(Store):
    """The store of addresses that are neither local nor of Google Cloud Storage."""

    def is_file(self, path: UPath) -> bool:
        return bool(path.is_file())

    def size_of(self, path: UPath) -> int:
        return int(path.stat().st_size)

    def list_files(self, folder: UPath) -> dict[str, int]:
        return {_name(entry): int(entry["size"]) for entry in _list(folder) if entry["type"] == "file"}

    def list_folders(self, folder: UPath) -> list[str]:
        return sorted(_name(entry) for entry in _list(folder) if entry["type"] == "directory")

    def open_read(self, path: UPath) -> BinaryIO:
        stream: BinaryIO = path.fs.open(path.path, "rb")
        return stream

    def read_bytes(self, path: UPath) -> bytes:
        content: bytes = path.read_bytes()
        return content

    @contextmanager
    def new_file(self, target: UPath, within: UPath | None) -> Iterator[Path]:
        with temporary_file(Path(tempfile.gettempdir())) as temporary:
            yield temporary
            target.fs.put_file(str(temporary), target.path)

    def remove_file(self, path: UPath) -> None:
        path.unlink(missing_ok=True)

    def remove_folder(self, folder: UPath) -> None:
        if folder.exists():
            folder.fs.rm(folder.path, recursive=True)


def _name(entry: dict[str, Any]) -> str:
    return os.path.basename(str(entry["name"]))


def _list(folder: UPath) -> list[dict[str, Any]]:
    folder.fs.invalidate_cache(folder.path)  # other processes write there, too
    try:
        entries: list[dict[str, Any]] = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:
        return []
    return entries

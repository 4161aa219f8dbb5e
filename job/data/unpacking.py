"""Unpacking: parse the records of shards into the flat arrays of a staged split; and the checks before it."""

import mmap
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError, OptionError
from cluster.manifest import FileEntry, fault_of, size_fault_of
from cluster.places import is_local
from cluster.storage import size_of
from preprocessing.classes import CLASSES_FILE
from preprocessing.dataset import VOLUMES, DatasetManifest, Shard
from preprocessing.labels.code_points import parse_code_point
from preprocessing.labels.page_ids import parse_id
from preprocessing.labels.table import MAX_PIXELS
from preprocessing.parquet import PAGES_TABLE
from preprocessing.records import FRAME_BYTES, SIDE, decode_example, read_frames

PARSE_RECORDS = 1024
MIN_RECORD_BYTES = FRAME_BYTES + SIDE * SIDE
PAGES_FILE = "page_ids.txt"


class SplitWriter:
    """Writes the crops of a split into a new folder, as `.npy` files whose sizes are known in advance."""

    def __init__(self, folder: Path, examples: int, classes: int) -> None:
        folder.mkdir()
        self.classes = classes
        self.images = _new_array(folder / "images.npy", np.uint8, (examples, SIDE, SIDE, 1))
        self.labels = _new_array(folder / "labels.npy", np.int64, (examples,))
        self.code_points = _new_array(folder / "code_points.npy", np.int32, (examples,))
        self.boxes = _new_array(folder / "boxes.npy", np.int32, (examples, 4))
        self.pages = open(folder / PAGES_FILE, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self.filled = 0

    def parse(self, records: Sequence[bytes]) -> None:
        """Append crops.

        Raises:
            ValueError: a record is not one that `prepare` writes, or there are more crops than the manifest says.
        """
        rows = slice(self.filled, self.filled + len(records))
        if rows.stop > len(self.labels):
            raise ValueError("more crops than the manifest says")
        images, labels, code_points, page_ids, boxes = zip(*map(decode_example, records), strict=True)
        numbers = np.array(boxes, np.int64)
        if any(len(image) != SIDE * SIDE for image in images):
            raise ValueError(f"an image that is not {SIDE} x {SIDE} pixels")
        if not 0 <= min(labels) <= max(labels) < self.classes:
            raise ValueError(f"a label that is none of the {self.classes} classes")
        if ((numbers < -MAX_PIXELS) | (numbers > MAX_PIXELS)).any():
            raise ValueError("a box with more than nine digits")
        self.images[rows] = np.frombuffer(b"".join(images), np.uint8).reshape(-1, SIDE, SIDE, 1)
        self.labels[rows] = labels
        self.code_points[rows] = [parse_code_point(text.decode()) for text in code_points]
        self.boxes[rows] = numbers
        self.pages.writelines(parse_id(page_id.decode()) + "\n" for page_id in page_ids)
        self.filled = rows.stop

    def close(self) -> None:
        self.pages.close()


def _new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    """Create a memory-mapped array and reserve its disk space: a full disk raises OSError now, not SIGBUS later."""
    array: NDArray[Any] = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def unpack(dataset: UPath, shard: Shard, local: UPath, writer: SplitWriter) -> None:
    """Verify the checksum of a shard, then parse it into the arrays. local: its file on this machine."""
    if fault := fault_of(local.parent, shard, {shard.name: size_of(local)}):
        raise DamageError(f"{dataset}: {fault}. Run `prepare` again, or copy the folder again")
    filled_before = writer.filled
    if shard.bytes:
        with (
            open(local.path, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            try:
                frames = read_frames(data)
                while records := list(islice(frames, PARSE_RECORDS)):
                    writer.parse(records)
            except (ValueError, DamageError) as error:
                raise DamageError(
                    f"{dataset}: {shard.name} must hold crops as prepare writes them. Received: {error}. "
                    "Run `prepare` again"
                ) from error
    parsed = writer.filled - filled_before
    if parsed != shard.examples:
        raise DamageError(f"{dataset}: {shard.name} must hold {shard.examples} crops. Received: {parsed}")


def check_sizes(dataset: UPath, manifest: DatasetManifest, sizes: dict[str, int]) -> list[FileEntry]:
    """Check the sizes of all files, before hours of reading, and before disk space is reserved for the crops.

    sizes: bytes of each file in the dataset.

    Returns:
        The entries of the labels file and of the table of pages. Datasets of earlier releases do not have the table.
    """
    for entry in manifest.entries:
        if fault := size_fault_of(entry, sizes):
            raise DamageError(f"{dataset}: {fault}. Run `prepare` again, or copy the folder again")
    for shard in manifest.shards:
        if shard.examples * MIN_RECORD_BYTES > shard.bytes:
            received = f"Received: {shard.bytes} bytes. Run `prepare` again"
            raise DamageError(f"{dataset}: {shard.name} must hold {shard.examples} crops. {received}")
    needed = {CLASSES_FILE} if manifest.book_rule == VOLUMES else {CLASSES_FILE, PAGES_TABLE}
    entries = [entry for entry in manifest.files if entry.name in needed]
    if missing := needed - {entry.name for entry in entries}:
        raise DamageError(f"{dataset}: the manifest must list {min(missing)}")
    return entries


def check_room(dataset: UPath, shards: Mapping[str, Sequence[Shard]], root: Path) -> None:
    """Check that the disk has room for the crops, and for the largest shard if it must be fetched first.

    Raises:
        OptionError: it has too little room.
    """
    every = [shard for of_split in shards.values() for shard in of_split]
    needed = sum(shard.bytes for shard in every)  # a record is a little larger than its part in the arrays
    needed += 0 if is_local(dataset) else max((shard.bytes for shard in every), default=0)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OptionError(
            f"the disk of {socket.gethostname()} must hold the crops that are read there, {needed / 1e9:.3f} GB of "
            f"{dataset}. Received: {free / 1e9:.3f} GB free at {root}. Let XDG_CACHE_HOME name a folder on a larger "
            "disk, or train on more hosts, with as many --partitions as --workers. "
            "See docs/models.md#train-on-a-part-per-worker"
        )

"""Unpacking: parse the records of shards into the flat arrays of a staged split."""

import mmap
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError
from cluster.manifest import fault_of
from cluster.storage import size_of
from preprocessing.dataset import Shard
from preprocessing.labels.code_points import parse_code_point
from preprocessing.labels.page_ids import parse_id
from preprocessing.labels.table import MAX_PIXELS
from preprocessing.records import SIDE, decode_example, read_frames

PARSE_RECORDS = 1024
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

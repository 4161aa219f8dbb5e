"""The TFRecord files that each group of pages becomes.

One Ray Data task reads a group's pages once and writes one file for each split planned in it.
Its report is left in `.prepare/`, so that a later attempt finds what is done and does not make it again. Its files are
begun there too, and it does not make that folder: a task that outlives its job adds nothing once the folder is gone.
"""

import hashlib
import json
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.bucket import explained
from cluster.errors import DamageError, KuzushijiError, one_line
from cluster.storage import CHUNK_BYTES, is_file, list_files, new_file, place, read_bytes, sha256_of, write_bytes
from preprocessing.cutting import cut_boxes, group_pages
from preprocessing.labels import Labels, code_point_name
from preprocessing.records import encode_example, frame
from preprocessing.split import SPLITS

DATASET_NAME = "kuzushiji"
PROGRESS_FOLDER = ".prepare"
PLAN_FILE = "plan.json"

# A crop makes a record of some 6.5 kB: about 64 MB a shard, which is what readers of object stores like.
BOXES_PER_GROUP = 10_000
# Small sets too are cut into enough groups for a laptop's cores; fixed, since the bytes must not depend on the machine.
MIN_GROUPS = 16


def shard_name(split: str, index: int, count: int) -> str:
    return f"{DATASET_NAME}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def plan_groups(
    labels: Labels,
    classes: NDArray[np.int64],
    splits: NDArray[np.int8],
    files: dict[str, tuple[str, int]],
    groups: int | None,
) -> list[dict[str, Any]]:
    """Rows for Ray Data, one a group, in the order of their pages.

    classes, splits: (N,), of each box. files: page id to file name and size in bytes, for the pages that have a file.
    groups: how many; None: by size. A row is one of `cutting.group_pages`, and has besides `files` (a name or "" for
    each of `SPLITS`), and n values each of `label` and `split`.
    """
    if groups is None:
        groups = max(MIN_GROUPS, -(-len(labels.boxes) // BOXES_PER_GROUP))
    rows = group_pages(labels, files, groups)
    ends = np.cumsum([len(row["unicode"]) for row in rows])
    for row, of_row, in_split in zip(rows, np.split(classes, ends), np.split(splits, ends), strict=False):
        row |= {"label": of_row.tolist(), "split": in_split.tolist()}
    _name_files(rows)
    return rows


def _name_files(rows: list[dict[str, Any]]) -> None:
    """Number the files of each split over the groups in which the split is planned."""
    for row in rows:
        row["files"] = [""] * len(SPLITS)
    for split, split_name in enumerate(SPLITS):
        planned = [row for row in rows if split in row["split"]]
        for index, row in enumerate(planned):
            row["files"][split] = shard_name(split_name, index, len(planned))


def report_path(dataset: UPath, group: int) -> UPath:
    return dataset / PROGRESS_FOLDER / f"group-{group:05d}.json"


def finished_report(dataset: UPath, group: int) -> str | None:
    """The report of a group whose files are all there and right."""
    path = report_path(dataset, group)
    if not is_file(path):
        return None
    text = read_bytes(path).decode()
    there = list_files(dataset)
    for shard in json.loads(text)["shards"].values():
        if there.get(shard["name"]) != shard["bytes"] or sha256_of(dataset / shard["name"]) != shard["sha256"]:
            return None
    return text


def write_group(row: dict[str, Any], pages: str, dataset: str) -> dict[str, Any]:
    """The Ray Data task: cut a group's pages into its files, unless an earlier attempt did.

    Returns {"group", "report": JSON}: `shards` (split to `Shard`), `losses` (page, box, unicode, what), `clipped`
    (page, box).

    Raises:
        DamageError: the folder is not the one of the plan.
        KuzushijiError: whatever failed for reasons outside the code.
    """
    folder = place(dataset)
    try:
        if not is_file(folder / PROGRESS_FOLDER / PLAN_FILE):  # else it would be made anew, without what was in it
            raise DamageError(
                "--dataset must stay while it is made, and be one folder for all workers. "
                f"Received: {dataset}, without its plan. Run the same command again"
            )
        report = finished_report(folder, row["group"])
        if report is None:
            report = json.dumps(_cut_group(row, place(pages), folder), ensure_ascii=False, sort_keys=True)
            write_bytes(report_path(folder, row["group"]), report.encode(), within=folder / PROGRESS_FOLDER)
    except OSError as error:  # Ray Data would put its own text where the path is
        raise explained(error) or KuzushijiError(one_line(error)) from error
    return {"group": row["group"], "report": report}


def _cut_group(row: dict[str, Any], pages: UPath, folder: UPath) -> dict[str, Any]:
    losses: list[dict[str, Any]] = []
    clipped: list[dict[str, Any]] = []
    with ExitStack() as stack:
        writers = [_open_writer(stack, folder, name) if name else None for name in row["files"]]
        for i, cut in enumerate(cut_boxes(row, pages)):
            unicode = code_point_name(row["unicode"][i])
            if cut.crop is None:
                losses.append({"page": cut.page_id, "box": cut.box, "unicode": unicode, "what": cut.fault})
                continue
            if cut.clipped:
                clipped.append({"page": cut.page_id, "box": cut.box})
            example = {
                "image": cut.crop.tobytes(),
                "label": [row["label"][i]],
                "unicode": unicode.encode(),
                "image_id": cut.page_id.encode(),
                "box": cut.box,
            }
            writer = writers[row["split"][i]]
            assert writer is not None, "files are planned for every split of a group"
            writer.write(example)
        shards = {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True) if writer}
    return {"shards": shards, "losses": losses, "clipped": clipped}


def _open_writer(stack: ExitStack, folder: UPath, name: str) -> "_ShardWriter":
    path = stack.enter_context(new_file(folder / name, within=folder / PROGRESS_FOLDER))
    return _ShardWriter(name, stack.enter_context(path.open("wb", buffering=CHUNK_BYTES)))


class _ShardWriter:
    """Writes one TFRecord file and hashes it on the way."""

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name, self.stream = name, stream
        self.digest = hashlib.sha256()
        self.bytes = self.examples = 0

    def write(self, example: dict[str, Any]) -> None:
        record = frame(encode_example(example))
        self.stream.write(record)
        self.digest.update(record)
        self.bytes += len(record)
        self.examples += 1

    def close(self) -> dict[str, Any]:
        """Flush, and what the manifest says of the file."""
        self.stream.close()
        return {"name": self.name, "bytes": self.bytes, "sha256": self.digest.hexdigest(), "examples": self.examples}

"""Groups of consecutive pages, and the TFRecord files that each group becomes.

A group is the unit of work: one Ray Data task reads its pages once and writes one file for each split planned in it.
Its report is left in `.prepare/`, so that a later attempt finds what is done and does not make it again. Its files are
begun there too, and it does not make that folder: a task that outlives its job adds nothing once the folder is gone.
"""

import hashlib
import itertools
import json
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.bucket import explained
from cluster.errors import DamageError, InputError, KuzushijiError, one_line
from cluster.storage import CHUNK_BYTES, is_file, list_files, new_file, place, read_bytes, sha256_of, write_bytes
from preprocessing.crop import MAX_PAGE_BYTES, PageFault, clip_box, crop, decode_page
from preprocessing.labels import Labels, code_point_name
from preprocessing.pages import ReadPage, page_reader
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
    A row has `group`, `files` (a name or "" for each of `SPLITS`), P values each of `image_id`, `name` ("" without a
    file), `bytes` (to be read) and `boxes`, and n values each of `unicode`, `label`, `split` and 4n of `box`, page by
    page.
    """
    total, pages = len(labels.boxes), len(labels.page_ids)
    if groups is None:
        groups = max(MIN_GROUPS, -(-total // BOXES_PER_GROUP))
    groups = min(groups, pages)
    targets = np.arange(1, groups) * total / groups
    # The cut nearest to each target; cuts that fall together leave fewer groups.
    after = np.clip(np.searchsorted(labels.starts, targets), 1, pages)
    cuts = np.where(targets - labels.starts[after - 1] <= labels.starts[after] - targets, after - 1, after)
    bounds = np.unique(np.concatenate([[0], cuts, [pages]]))
    rows: list[dict[str, Any]] = []
    for first, last in itertools.pairwise(bounds):
        boxes = slice(labels.starts[first], labels.starts[last])
        if boxes.start == boxes.stop:
            continue
        ids = labels.page_ids[first:last]
        row = {
            "group": len(rows),
            "image_id": ids,
            "name": [files.get(page_id, ("", 0))[0] for page_id in ids],
            # No reader reads more, whatever an archive says.
            "bytes": [min(files.get(page_id, ("", 0))[1], MAX_PAGE_BYTES + 1) for page_id in ids],
            "boxes": labels.boxes_per_page[first:last].tolist(),
            "unicode": labels.code_points[boxes].tolist(),
            "label": classes[boxes].tolist(),
            "split": splits[boxes].tolist(),
            "box": labels.boxes[boxes].ravel().tolist(),
        }
        rows.append(row)
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
    boxes = np.asarray(row["box"], np.int64).reshape(-1, 4)
    start = 0
    with ExitStack() as stack:
        writers = [_open_writer(stack, folder, name) if name else None for name in row["files"]]
        read = stack.enter_context(page_reader(pages))
        files = zip(row["image_id"], row["name"], row["bytes"], row["boxes"], strict=True)
        for page_id, name, size, count in files:
            page = _read_page(read, name, size) if count else PageFault("page without boxes")
            for i in range(start, start + count):
                box: list[int] = boxes[i].tolist()
                unicode = code_point_name(row["unicode"][i])
                try:
                    if isinstance(page, PageFault):
                        raise page
                    on_page = clip_box(box, page.shape)
                except PageFault as fault:
                    losses.append({"page": page_id, "box": box, "unicode": unicode, "what": str(fault)})
                    continue
                if list(on_page) != box:
                    clipped.append({"page": page_id, "box": box})
                example = {
                    "image": crop(page, on_page).tobytes(),
                    "label": [row["label"][i]],
                    "unicode": unicode.encode(),
                    "image_id": page_id.encode(),
                    "box": box,
                }
                writer = writers[row["split"][i]]
                assert writer is not None, "files are planned for every split of a group"
                writer.write(example)
            start += count
            del page  # before the next one takes as much
        shards = {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True) if writer}
    return {"shards": shards, "losses": losses, "clipped": clipped}


def _read_page(read: ReadPage, name: str, size: int) -> "NDArray[np.uint8] | PageFault":
    """A page, or why it can't be cut; only what is wrong with the file that was listed is such a reason.

    Raises:
        InputError: it is not the file that was listed.
    """
    try:
        if not name:
            raise PageFault("page has no file")
        data = read(name)
        if len(data) != size:
            raise FileNotFoundError(f"{name} with {len(data)} bytes instead of {size}")
        return decode_page(data)
    except PageFault as fault:
        return fault
    except FileNotFoundError as error:
        raise InputError(
            "--pages must stay as they are while they are cut, and be one place for all workers. "
            f"Received: {' '.join(str(error).split())}. Run the same command again"
        ) from None


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

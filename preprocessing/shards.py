"""A task of `prepare`: cut the crops of a group and write them into its shards, one shard per split.

The report of a group stays in `.prepare/` until the dataset is sealed: a later attempt skips the groups that are
complete. Temporary files of shards are in that folder too. Tasks do not create the folder, so that a task that outlives
its job writes nothing after the folder was removed.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

from pydantic import BaseModel
from upath import UPath

from cluster.errors import DamageError
from cluster.storage import CHUNK_BYTES, is_file, list_files, new_file, place, read_bytes, sha256_of, write_bytes
from preprocessing.config import SPLITS
from preprocessing.cutting import cut_boxes
from preprocessing.dataset import Clipped, Loss, Shard
from preprocessing.labels import code_point_name
from preprocessing.plan import Group
from preprocessing.records import Value, encode_example, frame

PROGRESS_FOLDER = ".prepare"
PLAN_FILE = "plan.json"


class GroupReport(BaseModel):
    """What became of a group."""

    shards: dict[str, Shard]
    """Split to the file that was written; no entry for a split without a box in the group."""
    losses: list[Loss]
    clipped: list[Clipped]


def report_path(dataset: UPath, group: int) -> UPath:
    return dataset / PROGRESS_FOLDER / f"group-{group:05d}.json"


def finished_report(dataset: UPath, group: int) -> GroupReport | None:
    """Return the report of a group if all its shards are complete; None if the group is to be cut."""
    path = report_path(dataset, group)
    if not is_file(path):
        return None
    report = GroupReport.model_validate_json(read_bytes(path))
    there = list_files(dataset)
    for shard in report.shards.values():
        if there.get(shard.name) != shard.bytes or sha256_of(dataset / shard.name) != shard.sha256:
            return None
    return report


@dataclass
class CutGroup:
    """The work of `prepare` on a group: cut its pages into its shards, unless an earlier attempt did.

    pages, dataset: places, as text.
    """

    pages: str
    dataset: str

    def __call__(self, group: Group) -> GroupReport:
        """Raises:
        DamageError: the folder of the dataset is not the one of the plan.
        OSError: pages can't be read, or shards can't be written.
        """
        folder = place(self.dataset)
        if not is_file(folder / PROGRESS_FOLDER / PLAN_FILE):  # writing would create the folder, without its shards
            raise DamageError(
                "--dataset must stay while it is made, and be one folder for all workers. "
                f"Received: {self.dataset}, without its plan. Run the same command again"
            )
        report = finished_report(folder, group.number)
        if report is None:
            report = _cut_group(group, place(self.pages), folder)
            content = report.model_dump_json().encode()
            write_bytes(report_path(folder, group.number), content, within=folder / PROGRESS_FOLDER)
        return report


def _cut_group(group: Group, pages: UPath, folder: UPath) -> GroupReport:
    losses: list[Loss] = []
    clipped: list[Clipped] = []
    with ExitStack() as stack:
        writers = [_open_writer(stack, folder, name) if name else None for name in group.shard_names]
        for i, cut in enumerate(cut_boxes(group, pages)):
            unicode = code_point_name(group.code_points[i])
            if cut.crop is None:
                losses.append({"box": cut.box, "page": cut.page_id, "unicode": unicode, "what": cut.fault})
                continue
            if cut.clipped:
                clipped.append({"box": cut.box, "page": cut.page_id})
            example: dict[str, Value] = {
                "image": cut.crop.tobytes(),
                "label": [group.labels[i]],
                "unicode": unicode.encode(),
                "image_id": cut.page_id.encode(),
                "box": cut.box,
            }
            writer = writers[group.splits[i]]
            assert writer is not None, "files are planned for every split of a group"
            writer.write(example)
        shards = {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True) if writer}
    return GroupReport(shards=shards, losses=losses, clipped=clipped)


def _open_writer(stack: ExitStack, folder: UPath, name: str) -> "_ShardWriter":
    path = stack.enter_context(new_file(folder / name, within=folder / PROGRESS_FOLDER))
    return _ShardWriter(name, stack.enter_context(path.open("wb", buffering=CHUNK_BYTES)))


class _ShardWriter:
    """Writes one TFRecord file and computes its SHA-256."""

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name, self.stream = name, stream
        self.digest = hashlib.sha256()
        self.bytes = self.examples = 0

    def write(self, example: dict[str, Value]) -> None:
        record = frame(encode_example(example))
        self.stream.write(record)
        self.digest.update(record)
        self.bytes += len(record)
        self.examples += 1

    def close(self) -> Shard:
        """Flush the file. Returns its entry for the manifest."""
        self.stream.close()
        return Shard(name=self.name, bytes=self.bytes, sha256=self.digest.hexdigest(), examples=self.examples)

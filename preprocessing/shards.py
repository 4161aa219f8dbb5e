"""A task of `prepare`: cut the crops of a group and write them into its shards, one shard per split.

The report of a group stays in `.prepare/` until the dataset is sealed: a later attempt skips the groups that are
complete. The files of `groups.py`, temporary files of shards, and the notes of `tries.py` are in that folder too. Tasks
do not create the folder, so that a task that outlives its job writes nothing after the folder was removed.
"""

import hashlib
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO

from pydantic import BaseModel, ValidationError
from upath import UPath

from cluster.errors import DamageError
from cluster.manifest import fault_of
from cluster.storage import (
    CHUNK_BYTES,
    is_file,
    list_files,
    new_file,
    place,
    read_bytes,
    sha256_of,
    size_of,
    write_bytes,
)
from preprocessing.config import SPLITS
from preprocessing.cutting import cut_boxes
from preprocessing.dataset import Clipped, DatasetManifest, Loss, Shard
from preprocessing.groups import Group, Groups, read_group
from preprocessing.labels.code_points import code_point_name
from preprocessing.page_results import PageResult
from preprocessing.parquet import LOSSES_TABLE, PAGES_TABLE, losses_of_table, results_of_table
from preprocessing.records import Value, encode_example, frame
from preprocessing.tries import Tries

PROGRESS_FOLDER = ".prepare"
PLAN_FILE = "plan.json"


class GroupReport(BaseModel):
    """Result of a group: the shards that were written, the boxes that were lost or clipped, what its pages are like."""

    shards: dict[str, Shard]
    """Split to shard; no entry for a split without a box in the group."""
    losses: list[Loss]
    clipped: list[Clipped]
    pages: list[PageResult]
    """The pages that were decoded."""


def report_path(dataset: UPath, group: int) -> UPath:
    """Return where the `GroupReport` of a group is stored until the dataset is sealed."""
    return dataset / PROGRESS_FOLDER / f"group-{group:05d}.json"


def finished_report(dataset: UPath, group: int) -> GroupReport | None:
    """Return the report of a group if it is readable and all its shards exist with the right size and SHA-256,
    otherwise None: the group is cut again.
    """
    try:
        report = GroupReport.model_validate_json(read_bytes(report_path(dataset, group)))
        for shard in report.shards.values():  # without a listing of the folder, which has the shards of all groups
            path = dataset / shard.name
            if size_of(path) != shard.bytes or sha256_of(path) != shard.sha256:
                return None
    except (FileNotFoundError, ValidationError):
        return None
    return report


def write_reports(dataset: UPath, groups: Groups, manifest: DatasetManifest) -> None:
    """Recreate the reports of all groups from a manifest, so that only groups with damaged shards are cut again.

    Without the tables of pages and losses (datasets of earlier releases have none) nothing is written: all groups are
    cut again.
    """
    entries, files = {entry.name: entry for entry in manifest.files}, list_files(dataset)
    tables = [PAGES_TABLE, *([LOSSES_TABLE] if manifest.more_losses else [])]
    if any(name not in entries or fault_of(dataset, entries[name], files) for name in tables):
        return
    shards = {shard.name: shard for shard in manifest.shards}
    reports = []
    for names in groups.shard_names:
        of_group = {split: shards[name] for split, name in zip(SPLITS, names, strict=True) if name}
        reports.append(GroupReport(shards=of_group, losses=[], clipped=[], pages=[]))
    of_page = {page_id: report for number, report in enumerate(reports) for page_id in groups.page_ids(number)}
    for loss in manifest.losses + (losses_of_table(dataset / LOSSES_TABLE) if manifest.more_losses else []):
        of_page[loss["page"]].losses.append(loss)
    for box in manifest.clipped:
        of_page[box["page"]].clipped.append(box)
    for result in results_of_table(dataset / PAGES_TABLE):
        of_page[result["page"]].pages.append(result)
    for number, report in enumerate(reports):
        write_bytes(report_path(dataset, number), report.model_dump_json().encode())


@dataclass
class CutGroup:
    """The Ray task of `prepare`: write the shards of a group, unless an earlier attempt has done so."""

    pages: str
    """Place of the pages, as text."""
    dataset: str
    """Place of the dataset folder, as text."""
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identifies the attempt of the command, see `Tries` and `write_groups`."""

    def __call__(self, number: int) -> GroupReport:
        """Cut a group and write its report, unless an earlier attempt has done so.

        Raises:
            DamageError: the dataset folder has no plan: it was removed, or this worker sees another folder. Or the file
                of the group is damaged.
            InputError: a page file was removed or changed after the pages were listed, or a page ended too many
                processes.
            KuzushijiError: the dataset folder is full, read-only or gone.
            OSError: pages can't be read.
        """
        folder = place(self.dataset)
        progress_folder = folder / PROGRESS_FOLDER
        if not is_file(progress_folder / PLAN_FILE):  # in a bucket, writing would recreate the folder
            raise self._without("its plan")
        report = finished_report(folder, number)
        if report is not None:
            return report
        try:
            group = read_group(progress_folder, self.attempt, number)
        except FileNotFoundError as error:
            raise self._without("the groups of pages of this attempt") from error
        with Tries(group, progress_folder, self.attempt) as tries:
            report = _cut_group(group, place(self.pages), folder, tries.begin)
            content = report.model_dump_json().encode()
            write_bytes(report_path(folder, number), content, within=progress_folder)
        return report

    def _without(self, what: str) -> DamageError:
        return DamageError(
            "--dataset must stay in place while it is made, and be a folder that all workers share. "
            f"Received: {self.dataset}, without {what}. Run the same command again"
        )


def _cut_group(group: Group, pages: UPath, folder: UPath, begin: Callable[[str], None]) -> GroupReport:
    losses: list[Loss] = []
    clipped: list[Clipped] = []
    results: dict[str, PageResult] = {}
    with ExitStack() as stack:
        writers = [_open_writer(stack, folder, name) if name else None for name in group.shard_names]
        for i, cut in enumerate(cut_boxes(group, pages, begin)):
            unicode = code_point_name(int(group.code_points[i]))
            if cut.page:
                results[cut.page_id] = cut.page
            if cut.crop is None:
                losses.append({"box": cut.box, "page": cut.page_id, "unicode": unicode, "what": cut.fault})
                continue
            if cut.clipped:
                clipped.append({"box": cut.box, "page": cut.page_id})
            example: dict[str, Value] = {
                "image": cut.crop.tobytes(),
                "label": [int(group.labels[i])],
                "unicode": unicode.encode(),
                "image_id": cut.page_id.encode(),
                "box": cut.box,
            }
            writer = writers[group.splits[i]]
            assert writer is not None, "a shard is planned for every split that has a box in the group"
            writer.write(example)
        shards = {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True) if writer}
    return GroupReport(shards=shards, losses=losses, clipped=clipped, pages=list(results.values()))


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
        """Close the file and return its entry for the manifest."""
        self.stream.close()
        return Shard(name=self.name, bytes=self.bytes, sha256=self.digest.hexdigest(), examples=self.examples)

"""A task of `prepare`: cut the crops of a group and write them into its shards, one shard per split.

The report of a group stays in `.prepare/` until the dataset is sealed, see `resumable.py`.
"""

import hashlib
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO

from upath import UPath

from cluster.manifest import fault_of
from cluster.places import place
from cluster.storage import CHUNK_BYTES, list_files, new_file, write_bytes
from preprocessing.config import SPLITS
from preprocessing.cutting import cut_boxes
from preprocessing.dataset import Clipped, DatasetManifest, Loss, Shard
from preprocessing.groups import Group, Groups
from preprocessing.labels.code_points import code_point_name
from preprocessing.page_results import PageResult
from preprocessing.parquet import LOSSES_TABLE, PAGES_TABLE, losses_of_table, results_of_table
from preprocessing.records import Value, encode_example, frame
from preprocessing.resumable import Report, Resumable


def resumable(dataset: UPath) -> Resumable:
    """Return the `Resumable` of a dataset folder."""
    return Resumable(dataset, ".prepare", "--dataset")


class GroupReport(Report):
    """Result of a group: the shards that were written, the boxes that were lost or clipped, and results of pages."""

    shards: dict[str, Shard]
    """Split to shard; no entry for a split without a box in the group."""
    clipped: list[Clipped]
    pages: list[PageResult]
    """The pages that were decoded."""

    @property
    def entries(self) -> list[Shard]:
        """The shards."""
        return list(self.shards.values())


def write_reports(dataset: UPath, groups: Groups, manifest: DatasetManifest) -> None:
    """Recreate the reports of all groups from a manifest, so that only groups with damaged shards are cut again.

    If a table of pages or losses is missing or damaged, or lists other pages, nothing is written, so all groups are cut
    again. Datasets of earlier releases have no tables.
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
    losses = manifest.losses + (losses_of_table(dataset / LOSSES_TABLE) if manifest.more_losses else [])
    results = results_of_table(dataset / PAGES_TABLE)
    if not {row["page"] for row in (*losses, *manifest.clipped, *results)} <= of_page.keys():
        return
    for loss in losses:
        of_page[loss["page"]].losses.append(loss)
    for box in manifest.clipped:
        of_page[box["page"]].clipped.append(box)
    for result in results:
        of_page[result["page"]].pages.append(result)
    for number, report in enumerate(reports):
        write_bytes(resumable(dataset).report_path(number), report.model_dump_json().encode())


@dataclass
class CutGroup:
    """The Ray task of `prepare`: write the shards of a group, unless an earlier attempt has done so."""

    pages: str
    """Path or address of the pages."""
    dataset: str
    """Path or address of the dataset folder."""
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identifies the attempt of the command, see `Tries` and `write_groups`."""

    def __call__(self, number: int) -> GroupReport:
        """Cut a group and write its report, unless an earlier attempt has done so.

        Raises:
            DamageError, KuzushijiError: as `Resumable.report_of`.
            InputError: as `cut_boxes`, or too many processes died at the same page.
            OSError: pages can't be read.
        """
        return resumable(place(self.dataset)).report_of(number, self.attempt, GroupReport, self._cut)

    def _cut(self, group: Group, begin: Callable[[str], None]) -> GroupReport:
        return _cut_group(group, place(self.pages), place(self.dataset), begin)


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
    path = stack.enter_context(new_file(folder / name, within=resumable(folder).progress_folder))
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

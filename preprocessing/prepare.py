"""Run `prepare`: turn page scans and labels into a sealed dataset folder, or resume an earlier one (`attempts.py`)."""

import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from upath import UPath

from cluster.capacity import START_LIMIT
from cluster.errors import DamageError, InputError
from cluster.manifest import MANIFEST_FILE, encoded, seal, write_listed
from cluster.storage import list_files
from cluster.tasks import map_tasks
from preprocessing.attempts import Attempts
from preprocessing.box_checks import clipped_line, count_ink, ink_lines
from preprocessing.card import dataset_card
from preprocessing.config import SPLITS, PrepareConfig
from preprocessing.dataset import Clipped, DatasetManifest, Loss, Shard, dataset_files
from preprocessing.group_files import written_groups
from preprocessing.input import check_outside
from preprocessing.page_results import PageResult, listed_warnings
from preprocessing.parquet import LISTED_LOSSES, LOSSES_TABLE, PAGES_TABLE, losses_table, pages_table
from preprocessing.plan import Plan, make_plan
from preprocessing.shards import CutGroup, GroupReport, resumable, write_reports

log = logging.getLogger("kuzushiji")


def prepare(
    pages: UPath,
    labels: UPath | Sequence[UPath] | None,
    dataset: UPath,
    config: PrepareConfig,
    start_limit: float = START_LIMIT,
    canvases: UPath | None = None,
) -> tuple[DatasetManifest, bool]:
    """Make the dataset, or finish it if an earlier attempt was interrupted.

    Args:
        pages: folder or archive of page scans.
        labels: label files, see `read_labels`; None: `pages` has crops, in a folder for each character.
        dataset: folder to write.
        config: the options.
        start_limit: seconds to wait for room on a cluster.
        canvases: see `read_labels`.

    Returns:
        The manifest, and whether anything was written (False: the dataset was already complete and valid).

    Raises:
        OptionError: a split would be empty; or the folder contains other files or another dataset, or is inside of
            the input.
        InputError: labels or pages can't be used; more than `max_bad_fraction` of the boxes are lost, or all of a
            split; or the manifest would be too large. If the plan shows this already, the error is raised before a page
            is read.
        DamageError: the manifest or plan in the folder is damaged, or the workers do not share the folder.
        KuzushijiError: the folder is full, read-only or missing, or a page can't be read.
    """
    label_places = [] if labels is None else [labels] if isinstance(labels, UPath) else labels
    inputs = [("--crops" if labels is None else "--pages", pages), *(("--labels", label) for label in label_places)]
    check_outside("--dataset", dataset, inputs)
    plan = make_plan(pages, labels, config, canvases)
    manifest, new = _attempts(dataset, plan).accept_or_make(
        lambda: _make(plan, pages, dataset, config, start_limit),
        lambda manifest: write_reports(dataset, plan.groups, manifest),
    )
    _check_losses(manifest.losses, manifest.lost, plan, config, dataset)  # another attempt may have allowed more
    resumable(dataset).remove_traces()
    return manifest, new


def _attempts(dataset: UPath, plan: Plan) -> Attempts[DatasetManifest]:
    """Return the attempts to make the planned dataset in a folder."""

    def identity_of(manifest: DatasetManifest) -> dict[str, Any]:
        # A package that an earlier release did not record did not affect its shards, so its version counts as equal.
        versions = plan.identity["versions"] | manifest.versions
        return manifest.config | {"input": manifest.fingerprint, "versions": versions, "book_rule": manifest.book_rule}

    def check(manifest: DatasetManifest) -> None:
        planned = {name for names in plan.groups.shard_names for name in names if name}
        if {shard.name for shard in manifest.shards} != planned:
            raise DamageError(
                f"{dataset / MANIFEST_FILE} must list the planned shards. Remove the folder and prepare again"
            )

    return Attempts(resumable(dataset), DatasetManifest, plan.identity, identity_of, check, new_options={"margin": 0.0})


def _make(plan: Plan, pages: UPath, dataset: UPath, config: PrepareConfig, start_limit: float) -> DatasetManifest:
    _check_losses(plan.losses, len(plan.losses), plan, config, dataset)
    if plan.splits_without_crops:
        hint = ", or join its book with another one by --books" if config.split == "book" else ""
        raise InputError(
            f"each split must have a box that can be cut. Received: {plan.splits_without_crops[0]}, whose boxes all "
            f"lack a scan or an area. Add the scans, or remove the rows{hint}. See docs/data.md#lost-and-clipped-boxes"
        )
    encoded(_known_manifest(plan, config))
    work = CutGroup(str(pages), str(dataset))
    with written_groups(plan.groups, resumable(dataset).progress_folder, work.attempt) as write:
        reports = map_tasks(
            len(plan.groups),
            work,
            GroupReport,
            what="pages cut",
            unit="pages",
            sizes=plan.groups.sizes,
            begin=write,
            start_limit=start_limit,
        )
    losses = [loss for report in reports for loss in report.losses]
    try:
        _check_losses(losses, len(losses), plan, config, dataset)
        _check_splits(losses, plan, reports, dataset)
    except InputError:
        resumable(dataset).forget_losses(reports)
        raise
    return _finish(plan, dataset, config, reports)


def _check_losses(losses: Sequence[Loss], lost: int, plan: Plan, config: PrepareConfig, dataset: UPath) -> None:
    """Raise InputError if `lost` boxes are too many. `losses` has the first of them."""
    boxes = len(plan.labels.boxes)
    if lost > Fraction(str(config.max_bad_fraction)) * boxes:  # 0.29 * 100 is less than 29
        raise InputError(
            f"at most {config.max_bad_fraction:g} of the boxes may be lost (--max-bad-fraction). "
            f"Received: {lost} of {boxes}, first page {losses[0]['page']}: {losses[0]['what']}. "
            f"Allow more and run again, or fix the input and remove {dataset}. "
            "See docs/data.md#lost-and-clipped-boxes"
        )


def _check_splits(losses: Sequence[Loss], plan: Plan, reports: Sequence[GroupReport], dataset: UPath) -> None:
    """Raise InputError if all boxes of a split are lost, though few of all boxes are."""
    for number, split in enumerate(SPLITS):
        if any(report.shards[split].examples for report in reports if split in report.shards):
            continue
        page_of_box = np.repeat(plan.labels.page_ids, plan.labels.boxes_per_page)[plan.splits == number].tolist()
        boxes = plan.labels.boxes[plan.splits == number].tolist()
        of_split = {(page, *box) for page, box in zip(page_of_box, boxes, strict=True)}
        first = next((loss for loss in losses if (loss["page"], *loss["box"]) in of_split), losses[0])
        raise InputError(
            f"each split must have a box that can be cut. Received: {split}, whose boxes are all lost, first page "
            f"{first['page']}: {first['what']}. Fix the scans, remove {dataset} and run again. "
            "See docs/data.md#lost-and-clipped-boxes"
        )


def _finish(plan: Plan, dataset: UPath, config: PrepareConfig, reports: Sequence[GroupReport]) -> DatasetManifest:
    """Check the counts, write the other files of the dataset, and seal the folder."""
    shards = {split: [report.shards[split] for report in reports if split in report.shards] for split in SPLITS}
    all_shards = [shard for split_shards in shards.values() for shard in split_shards]
    losses = [loss for report in reports for loss in report.losses]
    clipped = [box for report in reports for box in report.clipped]
    written = sum(shard.examples for shard in all_shards)
    assert written + len(losses) == len(plan.labels.boxes), "boxes in the labels = crops + listed losses"
    sizes = list_files(dataset)
    for shard in all_shards:
        if sizes.get(shard.name) != shard.bytes:  # the hosts do not share the folder, or another prepare changed it
            raise DamageError(
                f"--dataset must be a folder that all workers share. Received: {dataset}, without {shard.name}"
            )
    results = [result for report in reports for result in report.pages]
    manifest = _manifest(plan, config, shards, losses, clipped, results)
    doubts = ink_lines(manifest.ink) + clipped_line(len(clipped), len(plan.labels.boxes))
    card = dataset_card(plan.class_names, manifest, doubts)
    texts = dataset_files(plan.class_names, shards, card)
    contents = {name: text.encode() for name, text in texts.items()}
    results_by_page = {result["page"]: result for result in results}
    contents[PAGES_TABLE] = pages_table(plan.labels, plan.books, plan.splits, results_by_page)
    if len(losses) > LISTED_LOSSES:
        contents[LOSSES_TABLE] = losses_table(losses[LISTED_LOSSES:])
    begun_in = resumable(dataset).progress_folder  # if the folder was removed meanwhile, it is not made anew
    files = [write_listed(dataset / name, contents[name], begun_in) for name in sorted(contents)]
    manifest = manifest.model_copy(update={"files": files})
    for line in doubts:
        log.warning("%s", line)
    seal(dataset, manifest)
    return manifest


def _known_manifest(plan: Plan, config: PrepareConfig) -> DatasetManifest:
    """Return the manifest with what is known before a page is read. The final one is larger."""
    names = {split: [names[i] for names in plan.groups.shard_names] for i, split in enumerate(SPLITS)}
    shards = {
        split: [Shard(name=name, bytes=0, sha256="0" * 64, examples=0) for name in split_names if name]
        for split, split_names in names.items()
    }
    return _manifest(plan, config, shards, plan.losses)


def _manifest(
    plan: Plan,
    config: PrepareConfig,
    shards: dict[str, list[Shard]],
    losses: list[Loss],
    clipped: Sequence[Clipped] = (),
    results: Sequence[PageResult] = (),
) -> DatasetManifest:
    """Return the manifest without its files."""
    warnings, more_warnings = listed_warnings(results, plan.labels.warnings)
    return DatasetManifest(
        shards=[shard for split_shards in shards.values() for shard in split_shards],
        files=[],
        counts=_counts(plan, shards),
        losses=losses[:LISTED_LOSSES],
        more_losses=max(0, len(losses) - LISTED_LOSSES),
        clipped=list(clipped),
        unlabelled=plan.unlabelled,
        ignored=plan.ignored,
        warnings=warnings,
        more_warnings=more_warnings,
        ink=count_ink(results),
        seed=config.seed,
        config=config.model_dump(),
        versions=plan.identity["versions"],
        fingerprint=plan.identity["input"],
        book_rule=plan.book_rule,
    )


def _counts(plan: Plan, shards: dict[str, list[Shard]]) -> dict[str, dict[str, int]]:
    """Return, per split, the numbers of planned boxes, written crops, and pages and books that the boxes are from."""
    counts = {}
    for split, name in enumerate(SPLITS):
        pages = np.flatnonzero(plan.labels.pages_with(plan.splits == split))
        counts[name] = {
            "boxes": int(np.count_nonzero(plan.splits == split)),
            "examples": sum(shard.examples for shard in shards[name]),
            "pages": len(pages),
            "books": len({plan.books[page] for page in pages}),
        }
    return counts

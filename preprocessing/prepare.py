"""Run `prepare`: turn page scans and labels into a sealed dataset folder, or resume an earlier attempt."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from upath import UPath

from cluster.capacity import START_LIMIT
from cluster.errors import DamageError, InputError, OptionError
from cluster.manifest import MANIFEST_FILE, FileEntry, encoded, fault_of, is_sealed, read_manifest, seal, write_listed
from cluster.runtime import map_tasks
from cluster.storage import (
    change_bytes,
    is_file,
    list_files,
    list_folders,
    remove_file,
    remove_folder,
    remove_temporaries,
    write_bytes,
)
from preprocessing.config import SPLITS, PrepareConfig
from preprocessing.dataset import (
    Clipped,
    DatasetManifest,
    Loss,
    Shard,
    dataset_card,
    dataset_files,
)
from preprocessing.ink import count_ink, ink_lines
from preprocessing.page_results import LISTED_WARNINGS, PageResult, listed_warnings
from preprocessing.pages import ignored_line
from preprocessing.parquet import LISTED_LOSSES, LOSSES_TABLE, PAGES_TABLE, losses_table, pages_table
from preprocessing.plan import Plan, make_plan
from preprocessing.shards import PLAN_FILE, PROGRESS_FOLDER, CutGroup, GroupReport, report_path, write_reports

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
        start_limit: seconds to wait for a host of a cluster.
        canvases: see `read_labels`.

    Returns:
        The manifest, and whether anything was written (False: the dataset was already complete and valid).

    Raises:
        OptionError: a split would be empty, or the folder holds other files or another dataset.
        InputError: labels or pages can't be used; more than `max_bad_fraction` of the boxes are lost; or the manifest
            would be too large. What the plan shows of these is raised before a page is read.
        DamageError: the manifest or plan in the folder is damaged, or the workers do not share the folder.
        KuzushijiError: the folder is full, read-only or gone, or a page can't be read.
    """
    if config.val_fraction + config.test_fraction >= 1:
        total = config.val_fraction + config.test_fraction
        raise OptionError(
            f"--val-fraction and --test-fraction must leave boxes to train on. Received: {total:g} in all"
        )
    plan = make_plan(pages, labels, config, canvases)
    if plan.ignored:
        log.info("not read in %s: %s", pages, ignored_line(plan.ignored))
    manifest = _earlier_attempt(dataset, plan)
    if manifest is None:
        try:
            return _make(plan, pages, dataset, config, start_limit), True
        except Exception:
            # Another prepare of this folder may have sealed it first and removed the files of this one.
            if not is_sealed(dataset):
                raise
            manifest, faults = _sealed(dataset, plan)
            if faults:
                raise
    _check_losses(manifest.losses, manifest.lost, plan, config, dataset)
    _remove_traces(dataset)
    return manifest, False


def _make(plan: Plan, pages: UPath, dataset: UPath, config: PrepareConfig, start_limit: float) -> DatasetManifest:
    _check_losses(plan.losses, len(plan.losses), plan, config, dataset)
    encoded(_known_manifest(plan, config))
    reports = map_tasks(
        plan.groups,
        CutGroup(str(pages), str(dataset)),
        GroupReport,
        what="pages cut",
        unit="pages",
        sizes=[len(group.page_ids) for group in plan.groups],
        start_limit=start_limit,
    )
    losses = [loss for report in reports for loss in report.losses]
    try:
        _check_losses(losses, len(losses), plan, config, dataset)
    except InputError:
        for group, report in zip(plan.groups, reports, strict=True):
            if report.losses:  # so that the next attempt cuts the group again: its pages may be readable then
                remove_file(report_path(dataset, group.number))
        raise
    return _finish(plan, dataset, config, reports)


def _check_losses(losses: Sequence[Loss], lost: int, plan: Plan, config: PrepareConfig, dataset: UPath) -> None:
    """Raise InputError if `lost` boxes are too many. losses: the first of them."""
    boxes = len(plan.labels.boxes)
    if lost > config.max_bad_fraction * boxes:
        raise InputError(
            f"at most {config.max_bad_fraction:g} of the boxes may be lost (--max-bad-fraction). "
            f"Received: {lost} of {boxes}, first page {losses[0]['page']}: {losses[0]['what']}. "
            f"Allow more and run again, or fix the input and remove {dataset}"
        )


def _earlier_attempt(dataset: UPath, plan: Plan) -> DatasetManifest | None:
    """Return the manifest if the folder is complete and valid. Otherwise prepare the folder for (more) work.

    Raises:
        OptionError: the folder is neither empty nor of the same job.
    """
    plan_path = dataset / PROGRESS_FOLDER / PLAN_FILE
    # In this order: a concurrent attempt writes its plan first and removes it after it has written the manifest.
    # Folders of the file system itself, such as `lost+found` and `.snapshot`, are no other files.
    folders = [name for name in list_folders(dataset) if not name.startswith(".") and name != "lost+found"]
    others = [*list_files(dataset), *folders]
    has_plan = is_file(plan_path)
    if is_sealed(dataset):
        manifest, faults = _sealed(dataset, plan)
        if not faults:
            return manifest
        # Other versions of the libraries may cut different crops.
        _refuse_other(dataset, plan, _identity_of(manifest, plan))
        log.warning("%s: %s; damaged files are made again", dataset, "; ".join(faults))
        write_reports(dataset, plan.groups, manifest)
        write_bytes(plan_path, json.dumps(plan.identity).encode())
        remove_file(dataset / MANIFEST_FILE)
    elif others and not has_plan:
        raise OptionError(
            f"--dataset must be a new or empty folder, or one of the same job. Received: {dataset}, with "
            f"{sorted(others)[0]}. Name another folder or empty it"
        )
    else:

        def write_plan_once(old: bytes | None) -> bytes | None:
            if old is None:
                return json.dumps(plan.identity).encode()
            _refuse_other(dataset, plan, _parse_plan(plan_path, old))
            return None

        change_bytes(plan_path, write_plan_once)
        if is_sealed(dataset):  # by a concurrent attempt, after the check above
            return _earlier_attempt(dataset, plan)
    return None


def _sealed(dataset: UPath, plan: Plan) -> tuple[DatasetManifest, list[str]]:
    """Return the manifest of a sealed folder of this job, and the faults of its files, one line each.

    Raises:
        OptionError: the folder belongs to another job.
        DamageError: the manifest is damaged, or lists other shards than planned.
    """
    manifest = read_manifest(dataset, DatasetManifest)
    _refuse_other(dataset, plan, _identity_of(manifest, plan) | {"versions": plan.identity["versions"]})
    if {shard.name for shard in manifest.shards} != {
        name for group in plan.groups for name in group.shard_names if name
    }:
        raise DamageError(
            f"{dataset / MANIFEST_FILE} must list the planned shards. Remove the folder and prepare again"
        )
    sizes = list_files(dataset)
    return manifest, [fault for entry in manifest.entries if (fault := fault_of(dataset, entry, sizes))]


def _identity_of(manifest: DatasetManifest, plan: Plan) -> dict[str, Any]:
    """Return options, input and versions that the dataset was made with, under the keys of `Plan.identity`.

    A package that an earlier release did not record had no part in its shards: its version counts as equal.
    """
    versions = plan.identity["versions"] | manifest.versions
    return manifest.config | {"input": manifest.fingerprint, "versions": versions, "book_rule": manifest.book_rule}


def _remove_traces(dataset: UPath) -> None:
    """Remove what attempts leave in a sealed dataset: the progress of the last one, temporary files of killed ones."""
    for _ in range(2):  # a task of a killed attempt may still add a file during the removal
        remove_folder(dataset / PROGRESS_FOLDER)
    remove_temporaries(dataset)


def _parse_plan(path: UPath, content: bytes) -> dict[str, Any]:
    try:
        plan = json.loads(content)
        if not isinstance(plan, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise DamageError(
            f"{path} must be a JSON object. Received: {error}. Remove the folder and prepare again"
        ) from error
    return plan


def _refuse_other(dataset: UPath, plan: Plan, earlier: dict[str, Any]) -> None:
    """Raise OptionError if `earlier`, the identity of an earlier attempt, differs from the plan's."""
    there, now = _flat(earlier), _flat(plan.identity)
    differing = [key for key, value in now.items() if there.get(key) != value]
    if differing:
        differences = ", ".join(f"{k} (there {str(there.get(k))[:40]}, now {str(now[k])[:40]})" for k in differing)
        raise OptionError(
            f"--dataset must be a new folder, or one made with the same options and input. Received: {dataset}, where "
            f"these differ: {differences}. Name another folder or remove it"
        )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with a key for each package, instead of `versions`."""
    versions = identity.get("versions")
    return {key: value for key, value in identity.items() if key != "versions"} | {
        f"version of {package}": version
        for package, version in (versions if isinstance(versions, dict) else {}).items()
    }


def _finish(plan: Plan, dataset: UPath, config: PrepareConfig, reports: Sequence[GroupReport]) -> DatasetManifest:
    """Check the counts, write the other files of the dataset, seal the folder, and clean up."""
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
    counts = _counts(plan, shards)
    config_json = config.model_dump()
    results = [result for report in reports for result in report.pages]
    faint = ink_lines(count_ink(results))
    card = dataset_card(plan.class_names, counts, config_json, len(losses), len(clipped), plan.book_rule, faint)
    texts = dataset_files(plan.class_names, shards, card)
    contents = {name: text.encode() for name, text in texts.items()}
    results_by_page = {result["page"]: result for result in results}
    contents[PAGES_TABLE] = pages_table(plan.labels, plan.books, plan.splits, results_by_page)
    if len(losses) > LISTED_LOSSES:
        contents[LOSSES_TABLE] = losses_table(losses[LISTED_LOSSES:])
    files = [write_listed(dataset / name, contents[name]) for name in sorted(contents)]
    manifest = _manifest(plan, config, shards, losses, clipped, files, results)
    for line in faint:
        log.warning("%s", line)
    for folder in (dataset, dataset / PROGRESS_FOLDER):  # left by killed attempts
        remove_temporaries(folder)
    seal(dataset, manifest)
    _remove_traces(dataset)  # after sealing: a folder with neither plan nor manifest would be refused as unknown
    return manifest


def _known_manifest(plan: Plan, config: PrepareConfig) -> DatasetManifest:
    """Return what is known of the manifest before a page is read. The final one is larger."""
    names = {split: [group.shard_names[i] for group in plan.groups] for i, split in enumerate(SPLITS)}
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
    files: Sequence[FileEntry] = (),
    results: Sequence[PageResult] = (),
) -> DatasetManifest:
    warnings = listed_warnings(results, plan.labels.warnings)
    return DatasetManifest(
        shards=[shard for split_shards in shards.values() for shard in split_shards],
        files=list(files),
        counts=_counts(plan, shards),
        losses=losses[:LISTED_LOSSES],
        more_losses=max(0, len(losses) - LISTED_LOSSES),
        clipped=list(clipped),
        unlabelled=plan.unlabelled,
        ignored=plan.ignored,
        warnings=warnings[:LISTED_WARNINGS],
        more_warnings=max(0, len(warnings) - LISTED_WARNINGS),
        ink=count_ink(results),
        seed=config.seed,
        config=config.model_dump(),
        versions=plan.identity["versions"],
        fingerprint=plan.identity["input"],
        book_rule=plan.book_rule,
    )


def _counts(plan: Plan, shards: dict[str, list[Shard]]) -> dict[str, dict[str, int]]:
    """Return, per split, the numbers of planned boxes, written crops, and pages and books that the boxes are from."""
    page_of_box = np.repeat(np.arange(len(plan.labels.page_ids)), plan.labels.boxes_per_page)
    counts = {}
    for split, name in enumerate(SPLITS):
        pages = np.unique(page_of_box[plan.splits == split])
        counts[name] = {
            "boxes": int(np.count_nonzero(plan.splits == split)),
            "examples": sum(shard.examples for shard in shards[name]),
            "pages": len(pages),
            "books": len({plan.books[page] for page in pages}),
        }
    return counts

"""The HTML report of a dataset: splits, leakage, characters, books, losses, and example crops."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import counted
from cluster.storage import is_file
from job.data.staging import StagedDataset, staged
from job.report import html, plots
from job.report.side_files import report_file, write_side_file
from preprocessing.box_checks import clipped_line, ink_lines
from preprocessing.card import split_rule
from preprocessing.classes import RARE
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest
from preprocessing.labels.code_points import code_point_name
from preprocessing.pages import ignored_line
from preprocessing.parquet import LOSSES_TABLE, PAGES_TABLE

MAX_STAGED_BYTES = 10**10  # of a dataset that `prepare` stages for its report, on the disk of the driver's machine
EXAMPLES = 48  # crops shown of each split
MAX_ROWS = 200  # of a table
SEED = 0  # for the choice of example crops

log = logging.getLogger("kuzushiji")


def dataset_report(dataset: UPath) -> bytes:
    """Return the report as HTML. The dataset is staged on this machine's disk during the call.

    Raises:
        InputError, DamageError: the dataset can't be used, or does not match its manifest.
    """
    with staged(dataset, SPLITS) as data:
        crops = _crop_table(data)
        return html.page(f"Dataset: {dataset.name}", _sections(data, crops))


def write_dataset_report(dataset: UPath, manifest: DatasetManifest, new: bool) -> list[str]:
    """Write the report of a sealed dataset next to its folder, unless it exists.

    A failure to write is logged, not raised. No report is written for a dataset that is a whole bucket, or larger than
    `MAX_STAGED_BYTES`.

    new: whether this command sealed the dataset; an existing report is then replaced.

    Returns:
        Lines to print, at most one.
    """
    target = report_file(dataset)
    # A bucket has no parent folder. Very large datasets are staged only by an explicit `kuzushiji report`.
    if not dataset.name or sum(shard.bytes for shard in manifest.shards) > MAX_STAGED_BYTES:
        return ["no report was written next to the dataset: run `kuzushiji report`"] if new else []
    if not new and is_file(target):
        return []
    log.info("the dataset is sealed; writing its report")
    return [f"report: {target}"] if write_side_file(target, lambda: dataset_report(dataset), log.warning) else []


def _crop_table(data: StagedDataset) -> pd.DataFrame:
    """Return a table with a row per crop: split, page, label, code_point, book."""
    parts = [
        pd.DataFrame(
            {"split": split, "page": list(crops.page_ids()), "label": crops.labels, "code_point": crops.code_points},
        )
        for split, crops in data.splits.items()
    ]
    crops = pd.concat(parts, ignore_index=True)
    return crops.assign(book=crops["page"].map(data.books()))


def _sections(data: StagedDataset, crops: pd.DataFrame) -> Iterator[str]:
    manifest, names = data.manifest, data.class_names
    keys = ("examples", "pages", "books")
    rows = [(split, *(manifest.counts[split].get(key, 0) for key in keys)) for split in SPLITS]
    yield html.section(
        "Splits",
        html.paragraph(f"Split {split_rule(manifest.config, manifest.book_rule)}"),
        html.table(["split", "crops", "pages", "books"], rows),
        *_leakage(crops),
    )
    yield html.section("Examples", *_examples(data))
    counts = np.sort(np.asarray(crops["code_point"].value_counts(), np.int64))[::-1]
    kept = len(set(crops["code_point"].map(code_point_name)) & set(names))
    of_rare = int((crops["label"] == names.index(RARE)).sum())
    coverage = manifest.config.get("coverage") if manifest.config.get("classes") is None else None
    if not isinstance(coverage, int | float):
        coverage = None
    yield html.section(
        "Characters",
        html.paragraph(
            f"{len(counts):,} characters, of which {kept:,} have a class of their own. The others are of the "
            f"class {RARE}: {counted(of_rare, 'crop')}, {100 * of_rare / max(1, len(crops)):.0f} %."
        ),
        html.plots(
            (plots.class_frequency(counts, kept, coverage), _coverage_caption(coverage)),
            (plots.crops_per_class(_per_split(crops, "label", range(len(names)))), "Crops per class."),
        ),
    )
    books = crops["book"].value_counts()
    boxes = np.concatenate([split_crops.boxes for split_crops in data.splits.values()])
    caption = (
        "Crops per book."
        if len(books) <= plots.MAX_BARS
        else f"Crops per book: the {plots.MAX_BARS} largest of {len(books):,} books."
    )
    yield html.section(
        "Books and boxes",
        html.plots(
            (plots.stacked(list(books.index), _per_split(crops, "book", list(books.index)), "crops"), caption),
            (plots.box_sizes(boxes), "Size of the boxes on their pages."),
        ),
        *_books(crops),
    )
    yield html.section("Losses", *_losses(manifest))


def _coverage_caption(coverage: float | None) -> str:
    if coverage is None:
        return "The classes are those of an earlier dataset."
    return f"Characters that make up {100 * coverage:g} % of all boxes keep a class of their own; the others are rare."


def _per_split(crops: pd.DataFrame, column: str, values: Any) -> dict[str, NDArray[np.int64]]:
    """Return split to the number of crops with each of the `values` in a column, in the order of `values`."""
    table = crops.groupby([column, "split"], observed=True).size().unstack(fill_value=0)
    table = table.reindex(index=list(values), columns=list(SPLITS), fill_value=0)
    return {split: table[split].to_numpy() for split in SPLITS}


def _leakage(crops: pd.DataFrame) -> Iterator[str]:
    """Count the validation and test crops whose page or book also has training crops."""
    rows = []
    for split in SPLITS[1:]:
        held_out = crops[crops["split"] == split]
        row: list[object] = [split]
        for column in ("page", "book"):
            leaked = held_out[column].isin(crops.loc[crops["split"] == "train", column].unique())
            row += [int(leaked.sum()), float(leaked.mean())]
        rows.append(row)
    yield html.paragraph(
        "Leakage: crops whose page, or book, is in the training split too. A large share inflates accuracy."
    )
    yield html.table(["split", "page in train", "share", "book in train", "share"], rows)


def _examples(data: StagedDataset) -> Iterator[str]:
    for split, crops in data.splits.items():
        chosen = np.sort(np.random.default_rng(SEED).permutation(len(crops))[:EXAMPLES])
        captions = [chr(code) for code in crops.code_points[chosen].tolist()]
        yield html.paragraph(f"{split}: {len(chosen)} of {len(crops):,}", "quiet")
        yield html.crops([crops.images[i][:, :, 0] for i in chosen], captions)


def _books(crops: pd.DataFrame) -> Iterator[str]:
    """List the books, by descending number of crops, with their crops in each split."""
    pages = crops.groupby("book")["page"].nunique().sort_index()
    order = crops["book"].value_counts().reindex(pages.index).sort_values(ascending=False, kind="stable").index
    sides = _per_split(crops, "book", order)
    counts = np.stack(list(sides.values()), axis=1).tolist()
    rows = [(book, int(pages[book]), *of_splits) for book, of_splits in zip(order, counts, strict=True)]
    yield html.table(["book", "pages", *(f"{split} crops" for split in sides)], rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        yield html.paragraph(f"... and {len(rows) - MAX_ROWS:,} more: {PAGES_TABLE} lists the book of each page.")


def _losses(manifest: DatasetManifest) -> Iterator[str]:
    lost, clipped = manifest.lost, len(manifest.clipped)
    yield html.paragraph(
        f"{counted(lost, 'box', 'boxes')} lost, {clipped:,} clipped at the edge of their page, "
        f"{counted(len(manifest.unlabelled), 'page')} without labels."
    )
    boxes = sum(counts.get("boxes", 0) for counts in manifest.counts.values())
    for line in ink_lines(manifest.ink, MAX_ROWS) + clipped_line(clipped, boxes):
        yield html.paragraph(line)
    if manifest.ignored:
        yield html.paragraph(f"Files that are not scans: {ignored_line(manifest.ignored)}.")
    reasons = Counter((loss["page"], loss["what"]) for loss in manifest.losses)
    rows = [(page_id, count, reason) for (page_id, reason), count in sorted(reasons.items())]
    if rows:
        yield html.table(["page", "boxes", "reason"], rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        yield html.paragraph(f"... and {len(rows) - MAX_ROWS:,} more: manifest.json lists each box.")
    warnings = Counter((warning["page"], warning["what"]) for warning in manifest.warnings)
    if warnings:
        number = len(manifest.warnings) + manifest.more_warnings
        yield html.paragraph(f"{counted(number, 'warning')} about scans and labels.")
        yield html.table(["page", "warning"], sorted(warnings)[:MAX_ROWS])
    if manifest.more_losses:
        yield html.paragraph(f"{manifest.more_losses:,} of the lost boxes are only in {LOSSES_TABLE}.")

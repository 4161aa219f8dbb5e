"""What is in a dataset, to be looked at before it is trained on: `report.html`."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from upath import UPath

from cluster.storage import is_file
from job.data.staging import StagedDataset, staged
from job.report import html as page
from job.report import plots
from job.report.side_files import report_file, write_beside
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest
from preprocessing.labels import book_of, code_point_name

MOST_BYTES = 10**10  # of a dataset that `prepare` stages again, on the disk of the machine that it was started on
EXAMPLES = 48  # of each split
MOST_ROWS = 200  # of a table
SEED = 0  # of which crops are shown

log = logging.getLogger("kuzushiji")


def dataset_report(dataset: UPath) -> bytes:
    """The page. The dataset is staged on this machine's disk meanwhile.

    Raises:
        InputError, DamageError: the dataset can't be used, or is not what its manifest says.
    """
    with staged(dataset, SPLITS) as data:
        crops = _table_of(data)
        return page.page(f"Dataset: {dataset.name}", _sections(data, crops))


def report_beside(dataset: UPath, manifest: DatasetManifest, new: bool) -> list[str]:
    """Write the report of a sealed dataset beside it, and tell so, in a line at most. new: it was sealed just now."""
    target = report_file(dataset)
    # Nothing is beside a whole bucket; and what is very large is not staged without being asked.
    if not dataset.name or sum(shard.bytes for shard in manifest.shards) > MOST_BYTES:
        return ["no report beside it: `kuzushiji report` makes one"] if new else []
    if not new and is_file(target):
        return []
    log.info("the dataset is sealed; its report follows")
    return [f"report: {target}"] if write_beside(target, lambda: dataset_report(dataset), log.warning) else []


def _table_of(data: StagedDataset) -> pd.DataFrame:
    """A row a crop: split, page, book, class, character."""
    parts = [
        pd.DataFrame(
            {"split": split, "page": crops.page_ids, "label": crops.labels, "code_point": crops.code_points},
        )
        for split, crops in data.splits.items()
    ]
    crops = pd.concat(parts, ignore_index=True)
    books = {page_id: book_of(page_id) for page_id in crops["page"].unique()}
    return crops.assign(book=crops["page"].map(books))


def _sections(data: StagedDataset, crops: pd.DataFrame) -> Iterator[str]:
    manifest, names = data.manifest, data.class_names
    keys = ("examples", "pages", "books")
    rows = [(split, *(manifest.counts[split].get(key, 0) for key in keys)) for split in SPLITS]
    yield page.section("Splits", page.table(["split", "crops", "pages", "books"], rows), *_both_sides(crops))
    yield page.section("Examples", *_examples(data))
    counts = np.sort(np.asarray(crops["code_point"].value_counts(), np.int64))[::-1]
    kept = len(set(crops["code_point"].map(code_point_name)) & set(names))
    coverage = manifest.config.get("coverage") if manifest.config.get("classes") is None else None
    if not isinstance(coverage, int | float):
        coverage = None
    yield page.section(
        "Characters",
        page.paragraph(f"{len(counts):,} characters, of which {kept:,} have a class of their own."),
        page.plots(
            (plots.class_frequency(counts, kept, coverage), _cut(coverage)),
            (plots.crops_per_class(_per_split(crops, "label", range(len(names)))), "Crops of each class."),
        ),
    )
    books = crops["book"].value_counts()
    boxes = np.concatenate([of_split.boxes for of_split in data.splits.values()])
    caption = (
        "Crops of each book." if len(books) <= plots.MOST_BARS else f"Crops of the largest of {len(books):,} books."
    )
    yield page.section(
        "Books and boxes",
        page.plots(
            (plots.stacked(list(books.index), _per_split(crops, "book", list(books.index)), "crops"), caption),
            (plots.box_sizes(boxes), "How large the boxes are on their pages."),
        ),
    )
    yield page.section("Losses", *_losses(manifest))


def _cut(coverage: float | None) -> str:
    if coverage is None:
        return "The classes are those of an earlier dataset."
    return f"Characters that make up {100 * coverage:g} % of all boxes keep a class of their own; the others are rare."


def _per_split(crops: pd.DataFrame, column: str, of: Any) -> dict[str, NDArray[np.int64]]:
    table = crops.groupby([column, "split"], observed=True).size().unstack(fill_value=0)
    table = table.reindex(index=list(of), columns=list(SPLITS), fill_value=0)
    return {split: table[split].to_numpy() for split in SPLITS}


def _both_sides(crops: pd.DataFrame) -> Iterator[str]:
    """How many crops of one page or book stand on both sides: what a model has seen of what it is tested with."""
    rows = []
    for split in SPLITS[1:]:
        held = crops[crops["split"] == split]
        row: list[object] = [split]
        for column in ("page", "book"):
            seen = held[column].isin(crops.loc[crops["split"] == "train", column].unique())
            row += [int(seen.sum()), float(seen.mean())]
        rows.append(row)
    yield page.paragraph("Crops whose page, or book, is trained on too. Where there are many, accuracy flatters.")
    yield page.table(["split", "page seen", "share", "book seen", "share"], rows)


def _examples(data: StagedDataset) -> Iterator[str]:
    for split, crops in data.splits.items():
        chosen = np.sort(np.random.default_rng(SEED).permutation(len(crops))[:EXAMPLES])
        captions = [chr(code) for code in crops.code_points[chosen].tolist()]
        yield page.paragraph(f"{split}: {len(chosen)} of {len(crops):,}", "quiet")
        yield page.crops([crops.images[i][:, :, 0] for i in chosen], captions)


def _losses(manifest: DatasetManifest) -> Iterator[str]:
    lost, clipped = len(manifest.losses), len(manifest.clipped)
    yield page.paragraph(
        f"{lost:,} boxes lost, {clipped:,} clipped at the edge of their page, "
        f"{len(manifest.unlabelled):,} pages without labels."
    )
    what = Counter((loss["page"], loss["what"]) for loss in manifest.losses)
    rows = [(page_id, count, reason) for (page_id, reason), count in sorted(what.items())]
    if rows:
        yield page.table(["page", "boxes", "what happened"], rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        yield page.paragraph(f"... and {len(rows) - MOST_ROWS:,} more: manifest.json lists each box.")

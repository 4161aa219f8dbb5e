"""The card of a dataset folder, its `README.md`, with the YAML front matter that hubs read."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from preprocessing.classes import CLASSES_FILE, RARE
from preprocessing.dataset import DESCRIPTION, VOLUMES, DatasetManifest
from preprocessing.records import SIDE

TAGS = ["kuzushiji", "japanese", "ocr", "historical-documents"]
# Hugging Face's size categories (huggingface.co/docs/hub/datasets-cards), by their upper limit.
SIZES = {
    1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M",
}  # fmt: skip


def front_matter(license_id: str | None, fields: Mapping[str, Any]) -> str:
    """Return the YAML front matter of a card, as Hugging Face's hub reads it (huggingface.co/docs/hub/model-cards).

    Args:
        license_id: as `PrepareConfig.license`; None becomes the hub's `unknown`.
        fields: further fields.
    """
    head = {"license": license_id or "unknown", "language": ["ja"], "tags": TAGS, **fields}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def license_line(license_id: str | None) -> str:
    """Return a Markdown list item on the licence of a model's training data, its `PrepareConfig.license`."""
    if license_id:
        return f"- Licence of the pages that it was trained on: {license_id}."
    return (
        "- The licence of the training data may also cover models. That of Kaggle's *Kuzushiji Recognition* is\n"
        "  CC BY-SA 4.0."
    )


def split_rule(config: Mapping[str, Any], book_rule: str) -> str:
    """Return a description of how a dataset was split.

    Args:
        config: as in `DatasetManifest`, also that of an earlier release.
        book_rule: as `config`.
    """
    by = {
        "random": "by box: crops of one page and book are in several splits (leakage), which inflates accuracy",
        "page": "by page: crops of one book are in several splits (leakage), which inflates accuracy",
        "book": "by book: each book (a title) is in one split, so the numbers hold for books that the model has not "
        "seen",
    }.get(str(config.get("split")), "unknown")
    if config.get("split") == "book" and book_rule == VOLUMES:
        by = (
            "by volume, which an earlier release took for the book: volumes of one title may be in several splits "
            "(leakage), which inflates accuracy"
        )
    alone = " Some pages or books are for training only." if config.get("train_only") else ""
    if folds := config.get("folds"):
        shares = f"Fold {config.get('fold')} of {folds} (from 0) is the test split, the next one validation"
    else:
        shares = f"Test {config.get('test_fraction')}, validation {config.get('val_fraction')}"
    return f"{by}. {shares}, seed {config.get('seed')}.{alone}"


def _margin(config: Mapping[str, Any]) -> str:
    margin = config.get("margin")  # datasets of earlier releases have none
    return f", widened by {margin:g} of its longer side on each side," if margin else ""


def _license(config: Mapping[str, Any]) -> str:
    return f": {config['license']}, as `--license` says" if config["license"] else ""


def dataset_card(class_names: Sequence[str], manifest: DatasetManifest, warnings: Sequence[str]) -> str:
    """Return the README.md of a dataset folder, in Markdown.

    Args:
        class_names: the classes, `rare` last.
        manifest: of the dataset; its list of files may still be empty.
        warnings: sentences about the dataset.
    """
    counts, config, clipped = manifest.counts, manifest.config, len(manifest.clipped)
    rows = "\n".join(
        f"| {split} | {c['examples']:,} | {c['pages']:,} | {c['books']:,} |" for split, c in counts.items()
    )
    kept = len(class_names) - 1
    noted = "".join(f"\n- Warning: {warning}" for warning in warnings)
    crops = sum(split["examples"] for split in counts.values())
    size = next((name for limit, name in SIZES.items() if crops < limit), "100M<n<1B")
    head = {
        "pretty_name": "Kuzushiji crops",
        "task_categories": ["image-classification"],
        "size_categories": [size],
    }
    return f"""{front_matter(config["license"], head)}
# Kuzushiji crops

{DESCRIPTION}

| split | crops | pages | books |
|---|---|---|---|
{rows}

- Split: {split_rule(config, manifest.book_rule)}
- Pages: the book, splits, size and EXIF orientation of each are in `pages.parquet`.
- Classes: {kept} characters and `{RARE}`, one per line of `{CLASSES_FILE}`. The most frequent characters, up to
  {config["coverage"]} of all boxes, have a class of their own, unless the classes of an earlier dataset were given.
- Crops: the box{_margin(config)} in grayscale, its longer side scaled to {SIDE} pixels, centred on a black square.
- Boxes lost: {manifest.lost}. Boxes clipped at the edge of their page: {clipped}. Each is listed in `manifest.json`,
  losses beyond the first 10,000 in `losses.parquet`.{noted}

Read it with `tfds.builder_from_directory(...)`, `kuzushiji train`, or any reader of TFRecords; each record is a
`tf.train.Example` with `image` ({SIDE * SIDE:,} bytes, uint8, row-major), `label`, `unicode`, `image_id` and `box`
(x, y, width, height).

## Source and licence
The crops have the licence of the pages that they were cut from{_license(config)}.
If they are Kaggle's *Kuzushiji Recognition*: these are adapted from the "Kuzushiji Dataset" (created by the National
Institute of Japanese Literature and others, published by the Center for Open Data in the Humanities),
doi:10.20676/00000341, CC BY-SA 4.0. Pages drawn by `kuzushiji sample` contain no scanned material.
"""

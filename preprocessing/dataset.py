"""The format of a dataset folder, which other programs rely on: TFRecord shards, metadata, and a manifest.

kuzushiji-train.tfrecord-00000-of-00064 ...  dataset_info.json  features.json  label.labels.txt  README.md
pages.parquet  losses.parquet  (see `preprocessing.parquet`; the latter only with many losses)
manifest.json

`tfds.builder_from_directory(folder)` reads the folder. `dataset_info.json` and `features.json` have the format that
`tfds.folder_dataset.write_metadata` writes (protobuf's JSON has 64-bit numbers as strings).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, model_validator
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from cluster.manifest import Count, FileEntry, Manifest
from preprocessing.box_checks import InkCount
from preprocessing.classes import CLASSES_FILE, labels_text
from preprocessing.config import SPLITS, is_license
from preprocessing.page_results import Ignored, PageWarnings
from preprocessing.records import SIDE

DATASET_NAME = "kuzushiji"
VERSION = "1.0.0"
DESCRIPTION = "Characters cut from scans of old Japanese pages: 80 x 80 grayscale crops with their classes."
# The `book_rule` of datasets without `pages.parquet`, made by earlier releases: a book was a volume, see
# `preprocessing.books.volume_of`.
VOLUMES = "volumes"
_FEATURE = "tensorflow_datasets.core.features."


class Loss(TypedDict):
    """A box that could not be cut."""

    box: list[int]
    """x, y, width, height, as in the labels."""
    page: str
    unicode: str | None
    """`U+306F`; None if the label file of `predict` has no character for the box."""
    what: str
    """Reason for the loss."""


class Clipped(TypedDict):
    """A box that is partly off its page. The crop shows the part that is on the page."""

    box: list[int]
    page: str


# FailFast: otherwise pydantic creates an error for each of up to a million entries, of which only one is shown.
Losses = Annotated[list[Loss], FailFast()]
ClippedBoxes = Annotated[list[Clipped], FailFast()]


class Shard(FileEntry):
    """A TFRecord file. `examples` is the number of its crops."""

    examples: Count


class DatasetManifest(Manifest):
    """The manifest of a dataset folder."""

    kind: Literal["dataset"] = "dataset"
    shards: Annotated[list[Shard], FailFast()]
    counts: Annotated[dict[str, Annotated[dict[str, Count], FailFast()]], FailFast()]
    """Per split, the numbers of planned `boxes`, written `examples`, and the `pages` and `books` of these boxes."""
    losses: Losses
    """The first `parquet.LISTED_LOSSES` losses."""
    more_losses: Count = 0
    """Number of further losses, which are in `losses.parquet`."""
    clipped: ClippedBoxes
    unlabelled: Annotated[list[str], FailFast()]
    """Ids of pages that have a file and no row in the labels."""
    ignored: Ignored = Field(default_factory=dict)
    """Number of files among the pages that are not read, by kind (`.db`, `characters/`)."""
    warnings: PageWarnings = Field(default_factory=list)
    """The first `page_results.LISTED_WARNINGS` warnings about labels and scans; `pages.parquet` has all about scans."""
    more_warnings: Count = 0
    """Number of further warnings."""
    ink: InkCount = InkCount()
    seed: int
    config: dict[str, Any]
    """`PrepareConfig`, as JSON."""
    versions: Annotated[dict[str, str], FailFast()]
    fingerprint: str
    """Hex digest of the labels' bytes and of the ids and sizes of the pages, see `preprocessing.pages.fingerprint`."""
    book_rule: str = VOLUMES
    """`VOLUMES`; or `titles, ` and a hex digest of the books of all pages."""

    @property
    def lost(self) -> int:
        """Number of lost boxes."""
        return len(self.losses) + self.more_losses

    @property
    def split_by(self) -> str:
        """What the dataset was split by: `random`, `page`, `book, fold 0 of 5`; `volume`, see `VOLUMES`."""
        unit = str(self.config.get("split", "unknown"))
        if unit == "book" and self.book_rule == VOLUMES:
            unit = "volume"
        folds = self.config.get("folds")
        return f"{unit}, fold {self.config.get('fold')} of {folds}" if folds else unit

    @property
    def margin(self) -> float:
        """The margin around boxes, as `PrepareConfig.margin`."""
        return float(self.config.get("margin", 0.0))  # datasets of earlier releases have none

    @property
    def license(self) -> str | None:
        """The licence of the pages, as `PrepareConfig.license`."""
        return self.config.get("license")

    @property
    def entries(self) -> list[FileEntry]:
        """Shards and other files."""
        return [*self.shards, *self.files]

    @model_validator(mode="after")
    def _has_a_margin_and_a_licence(self) -> Self:
        if not is_margin(self.config.get("margin", 0.0)):
            raise ValueError("the margin must be a number from 0 to 1")
        if not is_license(self.config.get("license")):
            raise ValueError("the licence must be an identifier, such as cc-by-sa-4.0")
        return self

    @model_validator(mode="after")
    def _counts_its_splits(self) -> Self:
        splits = {shard.name.partition(".tfrecord-")[0].rpartition("-")[2] for shard in self.shards}
        if not all({"boxes", "examples"} <= self.counts.get(split, {}).keys() for split in splits):
            raise ValueError("each shard must be of a split whose boxes and examples are counted")
        return self

    def shards_of(self, split: str) -> list[Shard]:
        """Return the shards of a split, in the order of their pages."""
        return [shard for shard in self.shards if f"-{split}.tfrecord-" in shard.name]


def is_margin(value: object) -> bool:
    """Return whether a value from a JSON file is a valid `PrepareConfig.margin`."""
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]  # a number by its type


def shard_name(split: str, index: int, count: int) -> str:
    return f"{DATASET_NAME}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def dataset_files(class_names: Sequence[str], shards: Mapping[str, Sequence[Shard]], card: str) -> dict[str, str]:
    """Return file name to text for the text files of a dataset folder, except the manifest."""
    return {
        "dataset_info.json": _json(_dataset_info(shards)),
        "features.json": _json(_features(len(class_names))),
        CLASSES_FILE: labels_text(class_names),
        "README.md": card,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _dataset_info(shards: Mapping[str, Sequence[Shard]]) -> dict[str, Any]:
    return {
        "description": DESCRIPTION,
        "fileFormat": "tfrecord",
        "name": DATASET_NAME,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(shard.bytes for shard in shards[split])),
                "shardLengths": [str(shard.examples) for shard in shards[split]],
            }
            for split in SPLITS
        ],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": VERSION,
    }


def _features(num_classes: int) -> dict[str, Any]:
    def tensor(dtype: str, encoding: str, *shape: int) -> dict[str, Any]:
        dimensions = {"dimensions": [str(size) for size in shape]}
        return {
            "pythonClassName": _FEATURE + "tensor_feature.Tensor",
            "tensor": {"dtype": dtype, "encoding": encoding, "shape": dimensions},
        }

    text = {"pythonClassName": _FEATURE + "text_feature.Text", "text": {}}
    features = {
        "box": tensor("int64", "none", 4),
        "image": tensor("uint8", "bytes", SIDE, SIDE, 1),
        "image_id": text,
        "label": {
            "classLabel": {"numClasses": str(num_classes)},
            "pythonClassName": _FEATURE + "class_label_feature.ClassLabel",
        },
        "unicode": text,
    }
    return {"featuresDict": {"features": features}, "pythonClassName": _FEATURE + "features_dict.FeaturesDict"}

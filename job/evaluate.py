"""Evaluation of a finished model on a split of a dataset, in this process."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pandas as pd
from upath import UPath

from cluster.errors import OptionError
from cluster.manifest import is_sealed, read_manifest
from cluster.progress import progress
from cluster.storage import check_writable, write_bytes
from job.data.staging import StagedDataset, staged_shards
from job.metrics import SplitMetrics, confusions, metrics, misclassified, per_class
from job.model.folder import load_model, read_trained_on
from preprocessing.classes import CLASSES_FILE, labels_text
from preprocessing.dataset import DatasetManifest


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a split, of its classes, and its misclassified crops."""

    metrics: SplitMetrics
    per_class: pd.DataFrame
    misclassified: pd.DataFrame

    @property
    def confusions(self) -> list[str]:
        return confusions(self.misclassified, self.per_class)


def evaluate(model_place: UPath, dataset_place: UPath, split: str, out: UPath | None = None) -> Evaluation:
    """Predict each crop of a split once. out: folder for the result, checked before work starts.

    Raises:
        OptionError: the classes or margins of the dataset and of the model differ, or `out` is sealed.
        KuzushijiError: `out` is read-only or not a folder, or the model gives probabilities that are not finite.
        InputError, DamageError: the model or the dataset can't be used, or does not match its manifest.
    """
    if out:
        check_out(out)
    model, class_names, folder = load_model(model_place)
    with staged_for(folder, class_names, read_trained_on(folder).margin, dataset_place, [split]) as dataset:
        from job.model.inference import Inference

        crops = dataset.splits[split]
        with progress(f"{split} crops read", len(crops), "crops") as advance:
            predictions = Inference(model).predict(crops.images, crops.labels, advance)
        return Evaluation(
            metrics(predictions, crops.labels, class_names),
            per_class(predictions, crops.labels, class_names),
            misclassified(predictions, crops, class_names),
        )


@contextmanager
def staged_for(
    folder: UPath, class_names: Sequence[str], margin: float, dataset: UPath, splits: Sequence[str]
) -> Iterator[StagedDataset]:
    """Stage splits of a dataset that has the classes of a model, and crops with its margin. Both are checked first.

    Args:
        folder: the model folder, for messages.
        class_names: the model's.
        margin: that of the model's crops.
        dataset: the dataset folder.
        splits: the splits to stage.

    Raises:
        OptionError: the classes or margins differ.
        InputError, DamageError, KuzushijiError: as `staged_shards`, and if the folder is not sealed or no dataset.
    """
    manifest = read_manifest(dataset, DatasetManifest)
    of_model = hashlib.sha256(labels_text(class_names).encode()).hexdigest()
    if any(entry.name == CLASSES_FILE and entry.sha256 != of_model for entry in manifest.files):
        raise OptionError(
            f"the classes of --dataset must be the model's. Received: others than the {len(class_names)} of {folder}. "
            f"Prepare the dataset with --classes {folder / 'labels.txt'}. See docs/data.md#classes"
        )
    if manifest.margin != margin:
        raise OptionError(
            f"--dataset must have the margin of the model's crops, {margin:g}. Received: {manifest.margin:g}. "
            f"Prepare it with --margin {margin:g}. See docs/data.md#margin"
        )
    with staged_shards(dataset, manifest, {split: manifest.shards_of(split) for split in splits}) as data:
        yield data


def write_evaluation(evaluation: Evaluation, out: UPath) -> None:
    """Write metrics.json, per_class.csv and misclassified.csv of the split, as in a model folder.

    Raises:
        OptionError: `out` is sealed, so its files would no longer match its manifest.
        KuzushijiError: `out` is read-only or not a folder.
    """
    check_out(out)
    write_bytes(out / "metrics.json", (json.dumps(asdict(evaluation.metrics), indent=2) + "\n").encode())
    write_bytes(out / "per_class.csv", evaluation.per_class.to_csv(index=False).encode())
    write_bytes(out / "misclassified.csv", evaluation.misclassified.to_csv(index=False).encode())


def check_out(out: UPath) -> None:
    """Check that a result can be written into a folder, before work starts. Create a local folder if it is missing.

    Raises:
        OptionError: the folder is sealed.
        KuzushijiError: it is read-only or not a folder.
    """
    if is_sealed(out):
        raise OptionError(f"--out must not be a finished dataset or model folder. Received: {out}")
    check_writable(out)

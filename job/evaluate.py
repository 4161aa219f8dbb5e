"""A finished model on a split of a dataset, in this process."""

import json
from dataclasses import asdict, dataclass

import pandas as pd
from upath import UPath

from cluster.errors import OptionError
from cluster.manifest import is_sealed
from cluster.progress import progress
from cluster.storage import check_writable, write_bytes
from job.data.staging import staged
from job.metrics import SplitMetrics, confusions, metrics, misclassified, per_class
from job.model.folder import load_model


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one split, its classes, and what was taken for what."""

    metrics: SplitMetrics
    per_class: pd.DataFrame
    misclassified: pd.DataFrame

    @property
    def confusions(self) -> list[str]:
        return confusions(self.misclassified, self.per_class)


def evaluate(model_place: UPath, dataset_place: UPath, split: str, out: UPath | None = None) -> Evaluation:
    """Predict each crop of a split once. out: where the result will be written, looked at before the work.

    Raises:
        OptionError: the dataset's classes are not the model's, or `out` is sealed.
        KuzushijiError: `out` is read-only or no folder.
        InputError, DamageError: model or dataset can't be used, or are not what their manifests say.
    """
    if out:
        check_out(out)
    model, class_names, folder = load_model(model_place)
    with staged(dataset_place, [split]) as dataset:
        if dataset.class_names != class_names:
            raise OptionError(
                f"the classes of --dataset must be the model's. Received: {len(dataset.class_names)} and "
                f"{len(class_names)} classes, not the same. Prepare the dataset with --classes {folder / 'labels.txt'}"
            )
        from job.model.inference import Inference

        crops = dataset.splits[split]
        with progress(f"{split} crops read", len(crops), "crops") as advance:
            predictions = Inference(model).predict(crops.images, crops.labels, advance)
        numbers = metrics(predictions, crops.labels, class_names)
        table = per_class(predictions, crops.labels, class_names)
        return Evaluation(numbers, table, misclassified(predictions, crops, class_names))


def write_evaluation(evaluation: Evaluation, out: UPath) -> None:
    """The same files as in a model folder, of this split.

    Raises:
        OptionError: `out` is sealed, and would not be what its manifest says any more.
    """
    check_out(out)
    write_bytes(out / "metrics.json", (json.dumps(asdict(evaluation.metrics), indent=2) + "\n").encode())
    write_bytes(out / "per_class.csv", evaluation.per_class.to_csv(index=False).encode())
    write_bytes(out / "misclassified.csv", evaluation.misclassified.to_csv(index=False).encode())


def check_out(out: UPath) -> None:
    """Look at where a result will be written, before the work.

    Raises:
        OptionError: it is sealed.
        KuzushijiError: it is read-only or no folder.
    """
    if is_sealed(out):
        raise OptionError(f"--out must not be a finished dataset or model folder. Received: {out}")
    check_writable(out)

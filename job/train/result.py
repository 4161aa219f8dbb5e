"""The result of a finished training: the texts of its model folder (metrics, tables, card), and its report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.storage import place
from job.config import TRANSFER, TrainConfig
from job.data.staging import StagedDataset
from job.metrics import metrics, misclassified, per_class
from job.model.folder import CONFIG_FILE, LABELS_FILE, METRICS_FILE, MODEL_FILE, write_model
from job.model.portable import OLDEST_KERAS
from job.report.side_files import report_file, write_side_file
from job.tables import optional
from preprocessing.config import SPLITS

if TYPE_CHECKING:
    import keras

    from job.train.run import TrainJob


@dataclass(frozen=True)
class EpochRow:
    """Metrics of one epoch: a line of `history.jsonl`."""

    epoch: int
    """Counted from 1."""
    step: int
    """Finished steps since the start of the training."""
    loss: float
    """Mean cross-entropy over the training crops, each computed before the update of its step."""
    accuracy: float
    val_loss: float
    """Before the temperature, see `temperature.py`."""
    val_accuracy: float
    learning_rate: float
    seconds: float
    """Seconds of training, without validation."""
    crops_per_s: float
    data_wait: float
    """Fraction of `seconds` spent waiting for crops."""


def write_result(
    job: "TrainJob",
    model: "keras.Model",
    predictions: Mapping[str, NDArray[np.float32]],
    dataset: StagedDataset,
    history: Sequence[EpochRow],
    best_epoch: int,
    temperature: float,
    log: Callable[[str], object],
) -> None:
    """Write and seal the model folder, then write its report next to it. Other parameters: as `folder_texts`.

    A report that can't be written is logged; it does not fail the training.
    """
    target = place(job.folder)
    texts = folder_texts(job.config, job.run, model, predictions, dataset, history, best_epoch, temperature)
    write_model(target, model, texts, dataset.manifest.sha256)
    report = report_file(target)
    if write_side_file(report, lambda: _report_of(target, texts, model, dataset), log):
        log(f"report: {report}")


def _report_of(folder: UPath, texts: dict[str, str], model: "keras.Model", dataset: StagedDataset) -> bytes:
    from job.report.models import run_report  # imports the plotting library, which must not delay the first step

    return run_report(folder, texts, model, dataset)


def folder_texts(
    config: TrainConfig,
    run: str,
    model: "keras.Model",
    predictions: Mapping[str, NDArray[np.float32]],
    dataset: StagedDataset,
    history: Sequence[EpochRow],
    best_epoch: int,
    temperature: float,
) -> dict[str, str]:
    """Return the text files of a model folder: name to content. The manifest and the model are not among them.

    predictions: split to (N, 4) float32, as `inference.predictions_of`. temperature: which the weights already have.
    """
    names, test = dataset.class_names, dataset.splits["test"]
    recorded = config.model_dump() | {"margin": dataset.manifest.margin}
    numbers: dict[str, Any] = {
        split: asdict(metrics(predictions[split], dataset.splits[split].labels, names)) for split in SPLITS
    }
    numbers |= {
        "parameters": model.count_params(),
        "classes": len(names),
        "best_epoch": best_epoch,
        "temperature": temperature,
        "seconds": sum(row.seconds for row in history),
        "versions": {package: version(package) for package in ("kuzushiji", "keras", "ray", "tensorflow")},
    }
    return {
        LABELS_FILE: "".join(f"{name}\n" for name in names),
        CONFIG_FILE: json.dumps(recorded, indent=2) + "\n",
        METRICS_FILE: json.dumps(numbers, indent=2) + "\n",
        "history.jsonl": "".join(json.dumps(asdict(row)) + "\n" for row in history),
        "per_class.csv": per_class(predictions["test"], test.labels, names).to_csv(index=False),
        "misclassified.csv": misclassified(predictions["test"], test, names).to_csv(index=False),
        "README.md": model_card(recorded, numbers, run, dataset.manifest.split_by),
    }


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any], run: str, dataset: str) -> str:
    """Return the model card, `README.md` of a model folder, in Markdown.

    config, metrics: contents of `config.json` and `metrics.json`. run: name of the run. dataset: what it was split by.
    """
    header = (
        "| split | crops | accuracy | without rare | top 5 | macro F1 | loss | ECE | at 99 % |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows = "\n".join(
        f"| {split} | {m['examples']:,} | {m['accuracy']:.4f} | {optional(m['accuracy_without_rare'])} "
        f"| {m['top5']:.4f} | {m['macro_f1']:.4f} | {m['loss']:.4f} | {m['ece']:.4f} | {m['at_99']:.4f} |"
        for split, m in ((split, metrics[split]) for split in SPLITS)
    )
    return f"""# {config["architecture"]}, run {run}

A classifier of Kuzushiji characters: {metrics["parameters"]:,} parameters, {metrics["classes"]} classes
(`{LABELS_FILE}`, one per line).

{header}
{rows}

Macro F1 is the mean over the classes that have a crop in the split. scikit-learn also counts classes that were only
predicted, with F1 0. ECE is the expected calibration error, in 15 bins of equally many crops. At 99 %: largest share of
crops, the most certain ones first, of which 99 % are right.

- Input: N x 80 x 80 x 1, uint8 or float, 0 to 255: crops as `kuzushiji prepare{_margin(config)}` cuts
  them. The model scales them itself.{_any_size(config)} Output: class probabilities, N x {metrics["classes"]}.
- To load the model: `keras.saving.load_model("{MODEL_FILE}", compile=False)`. It loads in safe mode, with Keras
  {OLDEST_KERAS} and later and any of its backends, and does not need the kuzushiji package.
- Training: {_optimizer(config)}, global batch size {config["global_batch_size"]},
  at most {config["epochs"]} epochs, seed {config["seed"]}, precision {config["precision"]},
  augmentation: {config["augment"]}, class weights: {config["class_weights"]}. The weights are those of epoch
  {metrics["best_epoch"]}, which has the best validation accuracy. The logits are divided by
  {metrics["temperature"]:.3f}, the temperature that fits the validation split best.{_base(config)}
- Split of the dataset: {dataset}. The class `rare` stands for all characters that have no class of their own.
- The licence of the training data also covers works derived from them: CC BY-SA 4.0 for the pages of Kaggle's
  *Kuzushiji Recognition*.
"""


def _optimizer(config: Mapping[str, Any]) -> str:
    decay, smoothing = config["weight_decay"], config["label_smoothing"]
    parts = [
        f"AdamW with weight decay {decay:g}" if decay else "Adam",
        f"learning rate {config['learning_rate']:g} ({config['schedule']})",
        *([f"label smoothing {smoothing:g}"] if smoothing else []),
    ]
    return ", ".join(parts)


def _margin(config: Mapping[str, Any]) -> str:
    return f" --margin {config['margin']:g}" if config["margin"] else ""


def _any_size(config: Mapping[str, Any]) -> str:
    return " It accepts any height and width." if config["architecture"] == "fcn" else ""


def _base(config: Mapping[str, Any]) -> str:
    from_model = config["weights"].startswith("model:")
    if config["architecture"] not in TRANSFER and not from_model:
        return ""
    if config["architecture"] not in TRANSFER:
        return f"\n- Initial weights: {config['weights']}, by the SHA-256 of its manifest."
    trained = {"last": "its last layers were trained", "all": "all its layers were trained"}[config["unfreeze"]]
    return f"\n- Initial weights of the base: {config['weights']}; {trained}."

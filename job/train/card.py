"""The model card, `README.md` of a model folder, with the metadata header for model hubs."""

import math
from collections.abc import Mapping
from typing import Any

from job.config import TRANSFER
from job.model.folder import LABELS_FILE, MODEL_FILE
from job.model.portable import OLDEST_KERAS
from job.tables import optional
from preprocessing.card import front_matter, license_line
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest

TEMPERATURES = (0.25, 4.0)  # limits of the fit, see `temperature.SCALES`


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any], run: str, dataset: DatasetManifest) -> str:
    """Return the model card, `README.md` of a model folder, in Markdown.

    config, metrics: contents of `config.json` and `metrics.json`. run: name of the run.
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
    return f"""{_head(config, metrics, run, dataset)}
# {config["architecture"]}, run {run}

A classifier of Kuzushiji characters: {metrics["parameters"]:,} parameters, {metrics["classes"]} classes
(`{LABELS_FILE}`, one per line).

{header}
{rows}

Without rare: the accuracy over the crops whose character has a class of its own. Top 5: the share of crops whose class
is among the five most probable ones. Macro F1 is the mean over the classes that have a crop in the split. scikit-learn
also counts classes that were only predicted, with F1 0. ECE is the expected calibration error, in 15 bins of equally
many crops. At 99 %: largest share of crops, the most certain ones first, of which 99 % are right.

- Input: N x 80 x 80 x 1, uint8 or float, 0 to 255: crops as `kuzushiji prepare{_margin(config)}` cuts
  them. The model scales them itself.{_any_size(config)} Output: class probabilities, N x {metrics["classes"]}.
- To load the model: `keras.saving.load_model("{MODEL_FILE}", compile=False)`. It loads in safe mode, with Keras
  {OLDEST_KERAS} and later and any of its backends, and does not need the kuzushiji package.
- Training: {_optimizer(config)}, global batch size {config["global_batch_size"]},
  at most {config["epochs"]} epochs, seed {config["seed"]}, precision {config["precision"]},
  augmentation: {config["augment"]}, sampling: {config["sampling"]}. The weights are those of epoch
  {metrics["best_epoch"]}, which has the best validation accuracy. The logits are divided by
  {metrics["temperature"]:.3f}, the temperature{_limited(metrics)} that fits the validation split best.{_base(config)}
- Split of the dataset: {dataset.split_by}. The class `rare` stands for all characters that have no class of their own.
{license_line(config["license"])}
"""


def _head(config: Mapping[str, Any], metrics: Mapping[str, Any], run: str, dataset: DatasetManifest) -> str:
    test = metrics["test"]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {
            "type": "kuzushiji",
            "name": f"Kuzushiji crops, split by {dataset.split_by}",
            "split": "test",
            "revision": dataset.sha256,
        },
        "metrics": [
            {"type": "accuracy", "name": "accuracy", "value": test["accuracy"]},
            {"type": "f1", "name": "macro F1", "value": test["macro_f1"]},
        ],
    }
    fields = {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "metrics": ["accuracy", "f1"],
        "model-index": [{"name": f"{config['architecture']}/{run}", "results": [result]}],
    }
    return front_matter(config["license"], fields)


def _limited(metrics: Mapping[str, Any]) -> str:
    at_limit = any(math.isclose(metrics["temperature"], limit, rel_tol=1e-3) for limit in TEMPERATURES)
    return f" (a limit of the range {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g})" if at_limit else ""


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
    trained = {"last": "its last layers were trained", "all": "all its layers were trained"}.get(config["unfreeze"], "")
    of_base = config["architecture"] in TRANSFER
    if config["weights"].startswith("model:"):
        line = f"\n- Initial weights: {config['weights']}, by the SHA-256 of its manifest. Its licence may differ."
        return f"{line} Of the base, {trained}." if of_base else line
    return f"\n- Initial weights of the base: {config['weights']}; {trained}." if of_base else ""

"""Results of `train`, `evaluate` and `predict`: as JSON for scripts, and as lines and tables for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.errors import counted, one_line
from preprocessing.config import SPLITS

if TYPE_CHECKING:
    from job.evaluate import Evaluation
    from job.predict.folder import PredictionsManifest
    from job.train.driver import Outcome

SHOWN_CLASSES, SHOWN_CONFUSIONS = 10, 20


def outcome_result(outcomes: "Sequence[Outcome]") -> dict[str, Any]:
    """Return the object for `--json`: `models`, the finished ones; `faults`, a line for each failed one."""
    finished = [outcome for outcome in outcomes if outcome.error is None]
    return {
        "models": [
            {
                "architecture": outcome.architecture,
                "model": str(outcome.folder),
                "trained": outcome.trained,
                "metrics": outcome.metrics,
            }
            for outcome in finished
        ],
        "faults": [f"{outcome.architecture}: {one_line(outcome.error)}" for outcome in outcomes if outcome.error],
    }


def outcome_lines(outcomes: "Sequence[Outcome]") -> list[str]:
    """Return the lines for the terminal: all splits of one model, or the test splits of several models."""
    if len(outcomes) > 1:
        return _table(outcomes)
    outcome, numbers = outcomes[0], outcomes[0].metrics
    header = [] if outcome.trained else [f"run {outcome.folder.name} is already finished: nothing to do"]
    return [*header, *splits_table({split: numbers[split] for split in SPLITS}), f"model: {outcome.folder}"]


def _table(outcomes: "Sequence[Outcome]") -> list[str]:
    row = "{:<18} {:>8} {:>12} {:>7} {:>8} {:>12} {:>8}  {}"
    lines = [row.format("test", "accuracy", "without rare", "top 5", "macro F1", "parameters", "minutes", "model")]
    for outcome in outcomes:
        if outcome.error is not None:
            lines.append(f"{outcome.architecture:<18} failed: {one_line(outcome.error)}")
            continue
        numbers = outcome.metrics
        test, parameters = numbers["test"], f"{numbers['parameters']:,}"
        scores = [optional(test[key]) for key in ("accuracy", "accuracy_without_rare", "top5", "macro_f1")]
        minutes = f"{numbers['seconds'] / 60:.1f}"
        lines.append(row.format(outcome.architecture, *scores, parameters, minutes, outcome.folder))
    return lines


def splits_table(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table with one row per split.

    metrics: split to the fields of `metrics.SplitMetrics`; models of earlier releases lack the last ones.
    """
    row = "{:<10} {:>8} {:>9} {:>13} {:>7} {:>9} {:>8} {:>7} {:>8}"
    lines = [row.format("split", "crops", "accuracy", "without rare", "top 5", "macro F1", "loss", "ECE", "at 99 %")]
    for split, numbers in metrics.items():
        keys = ("accuracy", "accuracy_without_rare", "top5", "macro_f1", "loss", "ece", "at_99")
        lines.append(row.format(split, f"{numbers['examples']:,}", *(optional(numbers.get(key)) for key in keys)))
    return lines


def optional(value: float | None) -> str:
    """Format a metric with four decimals, or `-` if it is undefined."""
    return "-" if value is None else f"{value:.4f}"


def evaluation_lines(evaluation: "Evaluation", split: str) -> list[str]:
    """Return the lines for the terminal: the weakest classes, the confusions, and the metrics of the split."""
    weakest_first = evaluation.per_class.query("examples > 0").sort_values(
        ["f1", "examples"], ascending=[True, False], kind="stable"
    )
    columns = ["character", "label", "examples", "precision", "recall", "f1"]
    confusions = evaluation.confusions
    more = len(confusions) - SHOWN_CONFUSIONS
    return [
        f"the classes with the lowest F1, of {counted(len(weakest_first), 'class', 'classes')} in {split}:",
        weakest_first.head(SHOWN_CLASSES)[columns].to_string(index=False, float_format="{:.3f}".format),
        "",
        "confusions, as character (its crops in the split): what it was mistaken for",
        *confusions[:SHOWN_CONFUSIONS],
        *([f"... and {more} more characters, in misclassified.csv (of the model, or --out)"] if more > 0 else []),
        "",
        *splits_table({split: asdict(evaluation.metrics)}),
    ]


def predictions_result(manifest: "PredictionsManifest", out: str, new: bool) -> dict[str, Any]:
    """Return the object for `--json`. new: whether anything was written."""
    return (
        {"out": out, "written": new, "accuracy": manifest.accuracy}
        | manifest.counts
        | {
            "losses": len(manifest.losses),
            "clipped": len(manifest.clipped),
            "warnings": len(manifest.warnings) + manifest.more_warnings,
            "without_ink": manifest.ink.without_ink,
        }
    )


def predictions_lines(manifest: "PredictionsManifest", out: str, new: bool, annotate: str | None) -> list[str]:
    """Return the lines for the terminal. new: whether anything was written. annotate: folder of the pictures."""
    counts, accuracy = manifest.counts, manifest.accuracy
    of_boxes = f"{counts['read']:,} of {counted(counts['boxes'], 'box', 'boxes')}"
    lines = [f"read: {of_boxes} on {counted(counts['pages'], 'page')}; tables: {out}"]
    if annotate and new:
        lines.append(f"pictures: {annotate}")
    if not new:
        drawn = "; its pictures were drawn when it was made: for new ones, name another --out" if annotate else ""
        lines.append(f"the folder is complete and valid: nothing written{drawn}")
    if accuracy:
        names = {"accuracy": "accuracy", "accuracy_without_rare": "without rare", "top5": "top 5"}
        scores = ", ".join(f"{name} {value:.4f}" for key, name in names.items() if (value := accuracy[key]) is not None)
        lines.append(f"{scores}, {accuracy['examples']:,} boxes with a character")
    # A folder of an earlier release has no numbers of `rare` and `uncertain`.
    rare, uncertain, right = counts.get("rare"), counts.get("uncertain", 0), accuracy.get("accuracy_of_shown")
    if rare is not None and (rare or uncertain):
        least = f", {uncertain:,} less probable than {manifest.min_confidence:g}" if uncertain else ""
        of_shown = "" if right is None else f"; accuracy of the others {right:.4f}"
        lines.append(f"〓 for {counted(rare + uncertain, 'box', 'boxes')} ({rare:,} `rare`{least}){of_shown}")
    lost = counted(len(manifest.losses), "box", "boxes")
    return [*lines, f"{lost} lost, {len(manifest.clipped):,} clipped: each is listed in manifest.json"]

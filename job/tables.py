"""Metrics of finished models: as JSON for scripts, and as tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import one_line
from preprocessing.config import SPLITS

if TYPE_CHECKING:
    from job.train.driver import Outcome


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

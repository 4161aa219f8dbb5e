"""Evaluation during a training: all workers predict a split together, each crop once.

Each worker predicts crops of the partitions that it holds. The results are shared with all workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from job.data.partitions import Partitions
from job.data.staging import StagedDataset
from job.metrics import SplitMetrics, metrics, misclassified
from job.train.board import Reporter
from job.train.step import Steps
from job.train.temperature import SCALES, best_scale
from job.train.watchdog import StepLimit


class Predicted(NamedTuple):
    """Predictions of the N crops of a split, in the order of `Partitions`."""

    predictions: NDArray[np.float32]
    """(N, 4), as `inference.predictions_of`."""
    labels: NDArray[np.int64]
    """(N,)"""

    def metrics(self, class_names: Sequence[str]) -> SplitMetrics:
        """Compute the metrics of the split."""
        return metrics(self.predictions, self.labels, class_names)


@dataclass
class Evaluator:
    """One worker's part of an evaluation. All workers call its methods together."""

    steps: Steps
    dataset: StagedDataset
    partitions: Partitions
    step_limit: StepLimit
    reporter: Reporter

    def predict(self, split: str) -> Predicted:
        """Return the predictions of a split, on every worker."""
        crops = self.dataset.splits[split]
        found = np.zeros((self.partitions.crops(split), 5), np.float32)  # the last column is the label
        most = self.steps.predict_rows
        for rows_of_workers in self._steps_of(split, "evaluating"):
            rows, own = rows_of_workers[self.partitions.rank], self.partitions.rank * most
            part = np.zeros((len(rows_of_workers) * most, 5), np.float32)
            local = self.partitions.local(split, rows)
            part[own : own + rows.stop - rows.start, :4] = self.steps.predict(crops.images[local], crops.labels[local])
            part[own : own + rows.stop - rows.start, 4] = crops.labels[local]
            part = self.steps.sum_over_workers(part)
            for worker, rows in enumerate(rows_of_workers):
                found[rows] = part[worker * most : worker * most + rows.stop - rows.start]
        return Predicted(found[:, :4], found[:, 4].astype(np.int64))

    def best_scale(self) -> float:
        """Return the scale of logits, 1 / temperature, that fits the validation split best."""
        crops = self.dataset.splits["validation"]
        losses = np.zeros((1, len(SCALES)))
        for rows_of_workers in self._steps_of("validation", "fitting the temperature to"):
            own = self.partitions.local("validation", rows_of_workers[self.partitions.rank])
            losses += self.steps.sum_over_workers(self.steps.losses(crops.images[own], crops.labels[own]))
        return best_scale(losses[0])

    def own_misclassified(self, split: str, predicted: Predicted) -> pd.DataFrame:
        """Return the table of this worker's own misclassified crops, see `metrics.misclassified`.

        Only workers that hold a crop know its page and box.
        """
        own = self.partitions.own_rows(split)
        crops = self.dataset.splits[split][self.partitions.local(split, own)]
        return misclassified(predicted.predictions[own], crops, self.dataset.class_names)

    def classes_in_loss(self, known: NDArray[np.bool_]) -> NDArray[np.float32] | None:
        """Return 0 for classes that the model of --weights knows and that have no training crops, 1 for others, (K,).

        If the former were in the loss, each crop would teach the model that it is of none of them. None: all classes
        are in the loss. All workers call it together.

        known: (K,), what `initial_model` returned.
        """
        left_out = known & (self._examples_of_classes() == 0)
        if not left_out.any():
            return None
        count = np.count_nonzero(left_out)
        self.reporter.log(f"left out of the loss: {count:,} of the classes that keep their weights; no training crops")
        return np.where(left_out, 0, 1).astype(np.float32)

    def _examples_of_classes(self) -> NDArray[np.int64]:
        """Return the number of training crops of each class, (K,)."""
        own = self.partitions.local("train", self.partitions.own_rows("train"))
        labels, classes = self.dataset.splits["train"].labels[own], len(self.dataset.class_names)
        # Float32 is exact up to 16 million crops of a class.
        own_counts = np.bincount(labels, minlength=classes).astype(np.float32)
        self.step_limit.begin()
        counts = self.steps.sum_over_workers(own_counts[None])[0]
        self.step_limit.end()
        return np.asarray(counts, np.int64)

    def _steps_of(self, split: str, doing: str) -> Iterator[tuple[slice, ...]]:
        """Yield the rows of each worker in each step. doing: the words before the split's name in the progress."""
        crops, done = self.partitions.crops(split), 0
        # All workers take each step together, so that none waits long in the collective.
        for rows_of_workers in self.partitions.evaluated(split, self.steps.predict_rows):
            self.step_limit.begin()
            if self.reporter.is_due():
                self.reporter.show_activity(f"{doing} {split}, {done:,} of {crops:,} crops")
            yield rows_of_workers
            done += sum(rows.stop - rows.start for rows in rows_of_workers)
        self.step_limit.end()

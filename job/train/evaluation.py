"""Evaluation within a training: all workers predict a split together, each crop once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from job.data.order import share
from job.data.staging import StagedDataset
from job.train.display import Reporter
from job.train.step import Steps
from job.train.temperature import SCALES, best_scale
from job.train.watchdog import StepLimit


@dataclass
class Evaluation:
    """One worker's part of it. All workers call its methods together."""

    steps: Steps
    dataset: StagedDataset
    rank: int
    workers: int
    step_limit: StepLimit
    reporter: Reporter

    def predict(self, split: str) -> NDArray[np.float32]:
        """Return (N, 4) predictions of a split, as `inference.predictions_of`, on every worker."""
        crops = self.dataset.splits[split]
        predictions = np.zeros((len(crops), 4), np.float32)
        # All workers take each step together, so that none waits long in the collective.
        rows = self.workers * self.steps.predict_rows
        for begin in range(0, len(crops), rows):
            self._begin_step("evaluates", split, begin)
            end = min(begin + rows, len(crops))
            first, last = (begin + row for row in share(end - begin, self.rank, self.workers))
            predictions[first:last] = self.steps.predict(crops.images[first:last], crops.labels[first:last])
            predictions[begin:end] = self.steps.sum_over_workers(predictions[begin:end])
        self.step_limit.end()
        return predictions

    def best_scale(self) -> float:
        """Return the scale of logits, 1 / temperature, that fits the validation split."""
        crops = self.dataset.splits["validation"]
        losses = np.zeros((1, len(SCALES)))
        rows = self.workers * self.steps.predict_rows
        for begin in range(0, len(crops), rows):
            self._begin_step("fits the temperature to", "validation", begin)
            end = min(begin + rows, len(crops))
            first, last = (begin + row for row in share(end - begin, self.rank, self.workers))
            losses += self.steps.sum_over_workers(self.steps.losses(crops.images[first:last], crops.labels[first:last]))
        self.step_limit.end()
        return best_scale(losses[0])

    def _begin_step(self, doing: str, split: str, done: int) -> None:
        self.step_limit.begin()
        if self.reporter.is_due():
            crops = len(self.dataset.splits[split])
            self.reporter.show_activity(f"{doing} {split}, {done:,} of {crops:,} crops")

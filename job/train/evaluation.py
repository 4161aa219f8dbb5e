"""Evaluation within a training: all workers predict a split together, each crop once."""

from collections.abc import Iterator
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
        for rows, own in self._steps_of(split, "evaluates"):
            predictions[own] = self.steps.predict(crops.images[own], crops.labels[own])
            predictions[rows] = self.steps.sum_over_workers(predictions[rows])
        return predictions

    def best_scale(self) -> float:
        """Return the scale of logits, 1 / temperature, that fits the validation split."""
        crops = self.dataset.splits["validation"]
        losses = np.zeros((1, len(SCALES)))
        for _, own in self._steps_of("validation", "fits the temperature to"):
            losses += self.steps.sum_over_workers(self.steps.losses(crops.images[own], crops.labels[own]))
        return best_scale(losses[0])

    def _steps_of(self, split: str, doing: str) -> Iterator[tuple[slice, slice]]:
        """Yield the rows of each step, and this worker's share of them. doing: for the progress, before the split."""
        crops = len(self.dataset.splits[split])
        # All workers take each step together, so that none waits long in the collective.
        size = self.workers * self.steps.predict_rows
        for begin in range(0, crops, size):
            self.step_limit.begin()
            if self.reporter.is_due():
                self.reporter.show_activity(f"{doing} {split}, {begin:,} of {crops:,} crops")
            end = min(begin + size, crops)
            first, last = share(end - begin, self.rank, self.workers)
            yield slice(begin, end), slice(begin + first, begin + last)
        self.step_limit.end()

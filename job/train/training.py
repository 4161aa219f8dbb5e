"""One worker's part of a training: epochs, checkpoints, evaluation, and the model folder. Reads top to bottom.

Data: crops N x 80 x 80 x 1 uint8, labels N int64. B is the global batch size, W the number of workers. The crops of
global batch s in epoch e are a function of seed, e and the number of partitions (`partitions.py`). Each worker takes
its share of the rows, and holds the partitions of these rows.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from threading import Thread
from typing import Any

import keras
import numpy as np
import ray.train
import tensorflow as tf
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import KuzushijiError
from cluster.places import place
from job.data.order import share
from job.data.partitions import Partitions
from job.data.staging import Crops, StagedDataset
from job.model.architectures import XLA_COMPILES
from job.model.inference import check_finite
from job.train.board import Reporter, StartUp
from job.train.checkpoint import (
    EpochRow,
    State,
    changing_variables,
    remove_unknown,
    restore_checkpoint,
    upload_checkpoint,
    wait_for_upload,
)
from job.train.evaluation import Evaluator, Predicted
from job.train.job import TrainJob
from job.train.optimizer import last_learning_rate, make_optimizer
from job.train.step import Steps, training_form
from job.train.temperature import scale_logits
from job.train.tensorboard import write_in_background
from job.train.watchdog import Preemption, StepLimit
from preprocessing.config import SPLITS

# Before each validation, batch norm statistics are averaged over a quarter of an epoch: at least STATISTICS_CROPS
# crops, at most STATISTICS_BATCHES global batches.
STATISTICS_CROPS = 1024
STATISTICS_BATCHES = 30
# The float32 sums of an epoch are added to float64 totals after this many crops. With float32 only, a worker with 2**28
# crops in steps of 32 would report an accuracy of 0.987 instead of 0.950.
SUM_CROPS = 2**20


class Training:
    """One worker's part of a training."""

    def __init__(
        self,
        job: TrainJob,
        strategy: tf.distribute.Strategy,
        partitions: Partitions,
        dataset: StagedDataset,
        start_up: StartUp,
        plain: keras.Model,
        known: NDArray[np.bool_],
    ) -> None:
        """Build the model, the optimizer and the steps.

        dataset: the staged shards of the partitions that this worker holds. start_up: timer, logged after the first
        step. plain, known: what `initial_model` returned. The model is built outside the strategy, so that the same
        seed gives the same weights under every strategy.
        """
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.job, self.config, self.partitions, self.dataset = job, job.config, partitions, dataset
        self.start_up: StartUp | None = start_up  # None once it is logged
        config = job.config
        self.plain_config = plain.get_config()
        on_one_gpu = strategy.num_replicas_in_sync == 1 and bool(tf.config.list_logical_devices("GPU"))
        # XLA does not compile collectives, and its gradient of max pooling is not deterministic on GPUs.
        xla = on_one_gpu and not config.deterministic and config.architecture in XLA_COMPILES
        with strategy.scope():
            self.model = training_form(plain, config.seed, config.dropout, synchronized=not on_one_gpu)
            self.optimizer = make_optimizer(config, self.model.trainable_variables, config.epochs * partitions.steps)
        self.steps = Steps(
            strategy,
            self.workers,
            self.model,
            self.optimizer,
            config.global_batch_size,
            xla=xla,
            label_smoothing=config.label_smoothing,
            augment_seed=None if config.augment == "none" else config.seed,
        )
        self.state = State()
        self.changing = changing_variables(self.model)
        self.best_weights: list[NDArray[Any]] = []
        self.temperature = 1.0  # already applied to the weights
        self.curves_thread: Thread | None = None
        self.reporter = Reporter(job.board, config.architecture, self.rank)
        self.step_limit = StepLimit(config.step_limit, self.reporter.log_from_any)
        self.preemption = Preemption()
        self.evaluation = Evaluator(self.steps, dataset, partitions, self.step_limit, self.reporter)
        if known.any():
            self.steps.classes_in_loss = self.evaluation.classes_in_loss(known)

    # --- checkpoints

    def resume(self, checkpoints: UPath) -> None:
        """Resume from the run's last checkpoint. Without one, keep the initial weights.

        checkpoints: the folder of all checkpoints of the run. Those that are not in Ray Train's list are removed.

        Raises:
            DamageError: the last checkpoint can't be read.
        """
        if self.rank == 0:
            remove_unknown(checkpoints)
        restored = restore_checkpoint([*self.changing, *self.optimizer.variables], checkpoints)
        if restored is None:
            return
        self.state, best = restored
        self.best_weights = self._weights() if self.state.is_best else best
        self._write_curves()  # the run may have failed after the checkpoint and before the curves
        within = f" and {self.state.step} steps of the next" if self.state.step else ""
        self.reporter.log(f"resuming after epoch {self.state.epoch}{within}")

    def _weights(self) -> list[NDArray[Any]]:
        return [variable.numpy() for variable in self.changing]

    def _report(self, row: dict[str, Any]) -> None:
        """Report to Ray Train. All ranks call it together. Only one saves, since all have the same weights."""
        self.step_limit.end()
        if self.rank != self.preemption.saver:
            ray.train.report(row)
        else:
            variables = [*self.changing, *self.optimizer.variables]
            upload_checkpoint(row, self.state, variables, self.best_weights, scratch=self.dataset.folder)

    # --- epochs

    def finished(self) -> bool:
        return self.state.is_finished(self.config.epochs, self.config.patience)

    def run_epoch(self) -> None:
        """Train the remaining global batches of an epoch, validate, keep the best weights, and save a checkpoint.

        Raises:
            KuzushijiError: the training loss or the validation loss is not finite.
        """
        crops, size = self.dataset.splits["train"], self.config.global_batch_size
        epoch, steps = self.state.epoch + 1, self.partitions.steps
        order = self.partitions.batches(epoch, crops.labels if self.config.sampling == "balanced" else None)
        self._add_to_totals(self._train(crops, order, steps))
        loss, accuracy = (np.array(self.state.totals, np.float32) / (steps * size)).tolist()
        seconds, waited = self.state.seconds, self.state.waited
        batches = min(steps, STATISTICS_BATCHES, max(steps // 4, -(-STATISTICS_CROPS // size)))
        self.steps.estimate_statistics(self._first_batches(crops, order, batches))
        validation = self.evaluation.predict("validation").metrics(self.dataset.class_names)
        # Training losses are computed before each update: only the validation shows the effect of the last one.
        if not math.isfinite(loss + validation.loss):
            raise KuzushijiError(
                f"the loss must stay finite. Received: {loss} in training, {validation.loss} in validation, epoch "
                f"{epoch}. Lower --learning-rate. See docs/faq.md"
            )
        row = EpochRow(
            epoch=epoch,
            step=epoch * steps,
            loss=loss,
            accuracy=accuracy,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            learning_rate=last_learning_rate(self.optimizer),
            seconds=seconds,
            crops_per_s=steps * size / seconds,
            data_wait=waited / seconds,
        )
        self._end_epoch(row)

    def _train(self, crops: Crops, order: NDArray[np.int64], steps: int) -> NDArray[np.float32]:
        """Train the remaining steps of an epoch. Return the sums of this worker that are not in `totals` yet, (2,)."""
        state, size = self.state, self.config.global_batch_size
        sums: Any = tf.constant(state.sums_of(self.rank, self.workers))
        began = time.perf_counter() - state.seconds
        for step in range(state.step, steps):
            self.step_limit.begin()
            gather_began = time.perf_counter()
            first, images, labels = self.rows_of(crops, order, step)
            state.waited += time.perf_counter() - gather_began
            sums += self.steps.train(images, labels, first)
            if self.start_up:
                self._log_start_up(self.start_up, sums)
            if (step + 1) * size // SUM_CROPS > step * size // SUM_CROPS:
                self._add_to_totals(sums.numpy())
                sums = tf.zeros(2)
            state.step, state.seconds = step + 1, time.perf_counter() - began
            if self.reporter.is_due() or step + 1 == steps:
                self._show_step(state.epoch + 1, step + 1, steps, sums, (step + 1) * size / state.seconds)
            preempted, every = self.preemption.is_new(), self.config.checkpoint_every
            if preempted:
                self.reporter.log(
                    "a host is being drained: saving a checkpoint; all workers restart from it once the host is gone"
                )
            due = every is not None and (state.epoch * steps + step + 1) % every == 0
            # After the last step, the checkpoint at the end of the epoch is enough, unless a host is being drained.
            if preempted or (due and step + 1 < steps):
                self._save_within_epoch(sums)
            if preempted:
                wait_for_upload()  # on all ranks: if the next step failed with the lost host, the upload would end
        self.step_limit.begin()
        last_sums: NDArray[np.float32] = sums.numpy()  # waits for the steps in a GPU's queue
        state.seconds = time.perf_counter() - began
        return last_sums

    def _add_to_totals(self, sums: NDArray[np.float32]) -> None:
        """Add the sums of all workers to the totals. All workers call it after the same step. sums: its own, (2,)."""
        self.state.totals = (self.state.totals + self.steps.sum_over_workers(sums[None])[0].astype(np.float64)).tolist()

    def _log_start_up(self, start_up: StartUp, sums: Any) -> None:
        sums.numpy()  # waits for the step
        start_up.ends("first step")
        self.reporter.log(f"first step {start_up} after the worker started")
        self.start_up = None

    def _save_within_epoch(self, sums: Any) -> None:
        """Save a checkpoint. sums: this worker's sums that are not in `totals` yet, (2,)."""
        own_row = np.arange(self.workers)[:, None] == self.rank
        self.state.sums = self.steps.sum_over_workers(own_row * sums.numpy()).tolist()
        self._report({"epoch": self.state.epoch, "step": self.state.step})

    def _first_batches(self, crops: Crops, order: NDArray[np.int64], batches: int) -> Iterator[NDArray[np.uint8]]:
        """Yield this worker's crops of the first global batches of an epoch."""
        for step in range(batches):
            self.step_limit.begin()
            if self.reporter.is_due():
                self.reporter.show_activity(f"estimating batch norm statistics, {step:,} of {batches:,} batches")
            yield self.rows_of(crops, order, step)[1]

    def _end_epoch(self, row: EpochRow) -> None:
        if self.state.end_epoch(row):
            self.best_weights = self._weights()
        self._report(asdict(row))
        self._write_curves()
        self.reporter.log(
            f"epoch {row.epoch} of {self.config.epochs}: loss {row.loss:.4f}, accuracy {row.accuracy:.4f}, "
            f"validation loss {row.val_loss:.4f}, validation accuracy {row.val_accuracy:.4f}, "
            f"{row.seconds:.1f} s, {row.crops_per_s:,.0f} crops/s"
        )

    def rows_of(
        self, crops: Crops, order: NDArray[np.int64], step: int
    ) -> tuple[int, NDArray[np.uint8], NDArray[np.int64]]:
        """Return this worker's first row in global batch `step`, and its n crops and labels: (n, 80, 80, 1), (n,).

        order: as `Partitions.batches` returns it.
        """
        first, _ = share(self.config.global_batch_size, self.rank, self.workers)
        return first, crops.images[order[step]], crops.labels[order[step]]

    # --- result

    def predict_best(self) -> dict[str, Predicted]:
        """Return the predictions of every split, with the weights of the best epoch and a temperature fitted to them.

        Raises:
            KuzushijiError: the probabilities are not finite.
        """
        self.reporter.log(f"evaluating the weights of epoch {self.state.best_epoch}")
        for variable, best in zip(self.changing, self.best_weights, strict=True):
            variable.assign(best)
        scale = self.evaluation.best_scale()
        scale_logits(self.model, scale)
        self.temperature = 1 / scale
        predictions = {split: self.evaluation.predict(split) for split in SPLITS}
        for of_split in predictions.values():
            check_finite(of_split.predictions)
        return predictions

    # --- curves and progress

    def _write_curves(self) -> None:
        """Write the last epoch's point of each curve."""
        if self.rank == 0 and self.state.history:
            self.curves_thread = write_in_background(place(self.job.curves), self.state.history[-1], self.reporter.log)

    def _show_step(self, epoch: int, step: int, steps: int, sums: Any, crops_per_s: float) -> None:
        """Show means of the epoch so far. Since `totals` last changed, they are over rank 0's rows only."""
        size = self.config.global_batch_size
        first, end = share(size, self.rank, self.workers)
        loss, accuracy = ((self.state.totals + sums.numpy() * size / (end - first)) / (step * size)).tolist()
        self.reporter.show_step(
            epoch, self.config.epochs, step, steps, loss=loss, accuracy=accuracy, crops_per_s=crops_per_s
        )

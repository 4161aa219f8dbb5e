"""What each Ray Train worker does, from the staged dataset to the sealed model folder. Reads top to bottom.

Data: crops N x 80 x 80 x 1 uint8, labels N int64. B is the global batch size, W the number of workers, S = N // B
the steps of an epoch. Global batch s of epoch e is a slice of the permutation seeded by (seed, e); a worker takes
its part of it.
"""

import math
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import keras
import numpy as np
import ray.train
import tensorflow as tf
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import KuzushijiError
from cluster.manifest import is_sealed
from cluster.storage import place
from job.config import TRANSFER
from job.data.order import permutation, share
from job.data.staging import Crops, StagedDataset, staged
from job.metrics import metrics
from job.model.architectures import ARCHITECTURES, XLA_COMPILES
from job.model.folder import write_model
from job.model.pretrained import local_copy
from job.report.side_files import report_file, write_side_file
from job.train.checkpoint import (
    State,
    changing_variables,
    read_checkpoint,
    remove_unknown,
    upload_checkpoint,
    wait_for_upload,
)
from job.train.display import Reporter, StartUp
from job.train.optimizer import FusedAdam
from job.train.result import EpochRow, folder_texts
from job.train.run import Failure, TrainJob
from job.train.step import Steps, balanced_weights, training_form
from job.train.strategy import configure_tensorflow, make_strategy
from job.train.tensorboard import begin_to_write
from job.train.watchdog import Preemption, StepLimit
from preprocessing.config import SPLITS

# Over how much batch norm's statistics are averaged before a validation: a quarter of an epoch, within these bounds.
STATISTICS_BATCHES = 30
STATISTICS_CROPS = 1024
SECONDS_FOR_CURVES = 30  # that a finished training waits for them at most


def train_worker(job: TrainJob, start_up: StartUp) -> Failure | None:
    """Train, evaluate, and write the model folder.

    Returns what every worker failed of alike, if anything.
    """
    if is_sealed(place(job.folder)):  # a worker failed between the last line of `write` and its end
        return None
    configure_tensorflow(job.config)
    # Before anything else is computed: collectives can be configured only while TensorFlow is at rest.
    strategy = make_strategy(ray.train.get_context().get_world_size())
    with staged(place(job.dataset), SPLITS) as dataset:
        start_up.ends("connecting and staging")
        with local_copy(job.weights) if job.weights else nullcontext() as weights:
            training = Training(job, strategy, dataset, start_up, weights)
        training.resume(place(job.checkpoints))
        start_up.ends("building the model")
        try:
            while not training.finished():
                training.run_epoch()
        except KuzushijiError as error:
            return Failure(str(error), traceback.format_exc())
        except tf.errors.ResourceExhaustedError as error:
            if training.workers > 1:  # the others wait for this process in a collective, until it ends
                raise
            return Failure(_out_of_memory_line(error), traceback.format_exc())
        training.write()
    return None


def _out_of_memory_line(error: Exception) -> str:
    """One line with what could not be allocated, out of TensorFlow's long message."""
    text = " ".join(str(error).split())
    found = re.search(r"(OOM when|Out of memory while)[^\[]*(\[[^\[\]]+\])?", text)
    received = found[0].strip() if found else text[:200]
    return f"a step must fit into memory. Received: {received}. Lower --global-batch-size, or use more --workers"


class Training:
    """One worker's side of a training."""

    def __init__(
        self,
        job: TrainJob,
        strategy: tf.distribute.Strategy,
        dataset: StagedDataset,
        start_up: StartUp,
        weights: str | None = None,
    ) -> None:
        """start_up: logged after the first step. weights: file of the pretrained weights; None: random."""
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.job, self.config, self.dataset = job, job.config, dataset
        self.start_up: StartUp | None = start_up  # None once it is logged
        config, batch, classes = job.config, job.config.global_batch_size, len(dataset.class_names)
        # Built outside of the strategy first: the same seed gives the same weights whatever the strategy.
        base = {"weights": weights, "unfreeze": config.unfreeze} if config.architecture in TRANSFER else {}
        plain = ARCHITECTURES[config.architecture](classes, **base)
        self.plain_form = plain.get_config()
        on_one_gpu = strategy.num_replicas_in_sync == 1 and bool(tf.config.list_logical_devices("GPU"))
        # XLA compiles no collectives, and has no deterministic gradient of max pooling on GPUs.
        xla = on_one_gpu and not config.deterministic and config.architecture in XLA_COMPILES
        with strategy.scope():
            self.model = training_form(plain, config.seed, config.dropout, synchronized=not on_one_gpu)
            self.optimizer = FusedAdam(config.learning_rate)
            self.optimizer.build(self.model.trainable_variables)
        of_classes = balanced_weights(self._labels("train"), classes) if config.class_weights == "balanced" else None
        self.steps = Steps(strategy, self.workers, self.model, self.optimizer, batch, of_classes, xla)
        self.state = State()
        self.changing = changing_variables(self.model)
        self.best_weights: list[NDArray[Any]] = []
        self.writing_curves: Thread | None = None
        self.reporter = Reporter(job.board, config.architecture, self.rank)
        self.limit = StepLimit(config.step_limit, self.reporter.log_from_any)
        self.preemption = Preemption()

    # --- checkpoints

    def resume(self, checkpoints: UPath) -> None:
        """Go on from the run's own last checkpoint, if Ray Train has one; else the first weights stay.

        checkpoints: the folder of all of them. Those that Ray Train has not taken, whole or not, are removed.
        """
        if self.rank == 0:
            remove_unknown(checkpoints)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            variables = [*self.changing, *self.optimizer.variables]
            self.state, best = read_checkpoint(Path(folder), variables)
        self.best_weights = self._weights() if self.state.is_best else best
        self._write_curves()  # whoever was lost may not have come to it
        within = f" and {self.state.step} steps of the next" if self.state.step else ""
        self.reporter.log(f"goes on after epoch {self.state.epoch}{within}")

    def _weights(self) -> list[NDArray[Any]]:
        return [variable.numpy() for variable in self.changing]

    def _report(self, row: dict[str, Any]) -> None:
        """Tell Ray Train, on every rank at once; rank 0's weights are everyone's, so its checkpoint is enough."""
        self.limit.rest()
        if self.rank > 0:
            ray.train.report(row)
        else:
            variables = [*self.changing, *self.optimizer.variables]
            upload_checkpoint(row, self.state, variables, self.best_weights, scratch=self.dataset.folder)

    # --- epochs

    def finished(self) -> bool:
        patience = self.config.patience
        worse = self.state.epoch - self.state.best_epoch
        return self.state.epoch >= self.config.epochs or (patience is not None and worse >= patience)

    def run_epoch(self) -> None:
        """Train on the S global batches of an epoch, or on what a checkpoint leaves of them; validate, keep the best
        weights, save.
        """
        crops, size = self.dataset.splits["train"], self.config.global_batch_size
        epoch, steps = self.state.epoch + 1, len(crops) // size
        order = permutation(len(crops), self.config.seed, epoch)
        sums = self._train(crops, order, steps)
        loss, accuracy = (self.steps.sum_over_workers(sums[None])[0] / (steps * size)).tolist()
        seconds, waited = self.state.seconds, self.state.waited
        batches = min(steps, STATISTICS_BATCHES, max(steps // 4, -(-STATISTICS_CROPS // size)))
        self.steps.estimate_statistics(self._beginning(crops, order, batches))
        validation = metrics(self._predict("validation"), self._labels("validation"), self.dataset.class_names)
        # The training loss is that before each update: what the last one did shows in the validation only.
        if not math.isfinite(loss + validation.loss):
            raise KuzushijiError(
                f"the loss must stay finite. Received: {loss} in training, {validation.loss} in validation, epoch "
                f"{epoch}. Lower --learning-rate"
            )
        row = EpochRow(
            epoch=epoch,
            step=epoch * steps,
            loss=loss,
            accuracy=accuracy,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            learning_rate=float(np.asarray(self.optimizer.learning_rate)),
            seconds=seconds,
            crops_per_s=steps * size / seconds,
            data_wait=waited / seconds,
        )
        self._end_epoch(row)

    def _train(self, crops: Crops, order: NDArray[np.int64], steps: int) -> NDArray[np.float32]:
        """The steps of an epoch that are left. Returns this worker's (2,) sums over all of the epoch."""
        state, size = self.state, self.config.global_batch_size
        sums: Any = tf.constant(state.sums_of(self.rank, self.workers))
        begin = time.perf_counter() - state.seconds
        for step in range(state.step, steps):
            self.limit.begin()
            asked = time.perf_counter()
            first, images, labels = self.rows_of(crops, order, step)
            state.waited += time.perf_counter() - asked
            sums += self.steps.train(images, labels, first)
            if self.start_up:
                self._say_started(self.start_up, sums)
            state.step, state.seconds = step + 1, time.perf_counter() - begin
            if self.reporter.is_due() or step + 1 == steps:
                self._show_step(state.epoch + 1, step + 1, steps, sums, (step + 1) * size / state.seconds)
            to_go, every = self.preemption.is_new(), self.config.checkpoint_every
            if to_go:
                self.reporter.log(
                    "a host is about to go: a checkpoint is saved, and all begin again from it once it is gone"
                )
            due = every is not None and (state.epoch * steps + step + 1) % every == 0
            # The epoch's own comes after the last step, unless it has to be quick.
            if to_go or (due and step + 1 < steps):
                self._save_within_epoch(sums)
        self.limit.begin()
        all_sums: NDArray[np.float32] = sums.numpy()  # waits for what a GPU has in its queue
        state.seconds = time.perf_counter() - begin
        return all_sums

    def _say_started(self, start_up: StartUp, sums: Any) -> None:
        sums.numpy()  # waits for the step
        start_up.ends("first step")
        self.reporter.log(f"first step {start_up} after the worker was there")
        self.start_up = None

    def _save_within_epoch(self, sums: Any) -> None:
        row = np.arange(self.workers)[:, None] == self.rank
        self.state.sums = self.steps.sum_over_workers(row * sums.numpy()).tolist()
        self._report({"epoch": self.state.epoch, "step": self.state.step})

    def _beginning(self, crops: Crops, order: NDArray[np.int64], batches: int) -> Iterator[NDArray[np.uint8]]:
        """This worker's crops of an epoch's first global batches."""
        for step in range(batches):
            self.limit.begin()
            if self.reporter.is_due():
                self.reporter.show_activity(f"batch norm's statistics, {step:,} of {batches:,} batches")
            yield self.rows_of(crops, order, step)[1]

    def _end_epoch(self, row: EpochRow) -> None:
        self.state.epoch = row.epoch
        self.state.step, self.state.sums, self.state.seconds, self.state.waited = 0, [], 0.0, 0.0
        self.state.history.append(row)
        if row.val_accuracy > self.state.best_accuracy:
            self.state.best_epoch, self.state.best_accuracy = row.epoch, row.val_accuracy
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
        """This worker's first row in global batch `step`, and its crops and labels."""
        size = self.config.global_batch_size
        first, end = share(size, self.rank, self.workers)
        rows = order[step * size + first : step * size + end]
        return first, crops.images[rows], crops.labels[rows]

    # --- evaluation

    def _labels(self, split: str) -> NDArray[np.int64]:
        return self.dataset.splits[split].labels

    def _predict(self, split: str) -> NDArray[np.float32]:
        """(N, 4) predictions of a split, on every worker; each crop is seen once, by one worker."""
        crops, labels = self.dataset.splits[split], self._labels(split)
        predictions = np.zeros((len(crops), 4), np.float32)
        # In steps that all workers take together, so that none waits for long for the others.
        rows = self.workers * self.steps.predict_rows
        for begin in range(0, len(crops), rows):
            self.limit.begin()
            if self.reporter.is_due():
                self.reporter.show_activity(f"evaluates {split}, {begin:,} of {len(crops):,} crops")
            end = min(begin + rows, len(crops))
            first, last = (begin + row for row in share(end - begin, self.rank, self.workers))
            predictions[first:last] = self.steps.predict(crops.images[first:last], labels[first:last])
            predictions[begin:end] = self.steps.sum_over_workers(predictions[begin:end])
        self.limit.rest()
        return predictions

    def write(self) -> None:
        """Evaluate every split with the best epoch's weights; rank 0 writes and seals the model folder."""
        self.reporter.log(f"evaluates the weights of epoch {self.state.best_epoch}")
        for variable, best in zip(self.changing, self.best_weights, strict=True):
            variable.assign(best)
        predictions = {split: self._predict(split) for split in SPLITS}
        if self.rank > 0:
            return
        self.reporter.show_activity("writes the model and its report")
        wait_for_upload()  # one that fails would begin again what is sealed
        model = keras.Model.from_config(self.plain_form)
        model.set_weights(self.model.get_weights())
        target, state = place(self.job.folder), self.state
        texts = folder_texts(
            self.config, self.job.run, model, predictions, self.dataset, state.history, state.best_epoch
        )
        write_model(target, model, texts, self.dataset.manifest.sha256)
        report = report_file(target)
        if write_side_file(report, lambda: _report_of(target, texts, model, self.dataset), self.reporter.log):
            self.reporter.log(f"report: {report}")
        if self.writing_curves:
            self.writing_curves.join(timeout=SECONDS_FOR_CURVES)

    # --- what people see

    def _write_curves(self) -> None:
        """Of the last epoch."""
        if self.rank == 0 and self.state.history:
            self.writing_curves = begin_to_write(place(self.job.curves), self.state.history[-1], self.reporter.log)

    def _show_step(self, epoch: int, step: int, steps: int, sums: Any, crops_per_s: float) -> None:
        """Of rank 0's rows alone: the sum over workers waits for the end of the epoch."""
        first, end = share(self.config.global_batch_size, self.rank, self.workers)
        loss, accuracy = (sums.numpy() / (step * (end - first))).tolist()
        self.reporter.show_step(
            epoch, self.config.epochs, step, steps, loss=loss, accuracy=accuracy, crops_per_s=crops_per_s
        )


def _report_of(folder: UPath, texts: dict[str, str], model: keras.Model, dataset: StagedDataset) -> bytes:
    from job.report.models import run_report  # plots: not before the first step

    return run_report(folder, texts, model, dataset)

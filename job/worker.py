"""What each Ray Train worker does, from the staged dataset to the sealed model folder. Reads top to bottom.

Data: crops N x 80 x 80 x 1 uint8, labels N int64. B is the global batch size, W the number of workers, S = N // B
the steps of an epoch. Global batch s of epoch e is a slice of the permutation seeded by (seed, e); a worker takes
its part of it.
"""

import json
import math
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import ray.train
import tensorflow as tf
from numpy.typing import NDArray

from cluster.errors import KuzushijiError
from cluster.manifest import is_sealed
from cluster.storage import place
from job.architectures import ARCHITECTURES
from job.board import SECONDS_BETWEEN_POSTS
from job.checkpoint import State, changing_variables, read_checkpoint, write_checkpoint
from job.config import TRANSFER, TrainConfig
from job.evaluation import metrics, misclassified, per_class
from job.model_folder import LABELS_FILE, METRICS_FILE, model_card, write_model
from job.optimizer import FusedAdam
from job.order import permutation, share
from job.staging import Crops, StagedDataset, staged
from job.step import Steps, balanced_weights, make_strategy, training_form
from job.weights import WeightsFile, local_copy
from preprocessing.split import SPLITS

# Over how much batch norm's statistics are averaged before a validation: a quarter of an epoch, within these bounds.
STATISTICS_BATCHES = 30
STATISTICS_CROPS = 1024


def train_worker(job: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker. `job`: `config`, `weights` (of a WeightsFile, or None),
    places `dataset` and `folder`, `run`, `board`.
    """
    if is_sealed(place(job["folder"])):  # a worker was lost between the last line of `write` and its end
        return
    config = TrainConfig.model_validate(job["config"])
    fix_what_bits_depend_on(config)
    # Before anything else is computed: collectives can only be configured while TensorFlow is at rest.
    strategy = make_strategy(ray.train.get_context().get_world_size())
    weights = local_copy(WeightsFile(**job["weights"])) if job["weights"] else nullcontext()
    with staged(place(job["dataset"]), SPLITS) as dataset:
        with weights as file:
            training = Training(config, strategy, dataset, job["board"], file)
        training.resume()
        while not training.finished():
            training.run_epoch()
        training.write(job["folder"], job["run"])


def fix_what_bits_depend_on(config: TrainConfig) -> None:
    """Threads, seeds, precision, deterministic kernels; before TensorFlow runs anything."""
    tf.config.threading.set_intra_op_parallelism_threads(config.cpus_per_worker)
    # One more, so that gradients travel while others are computed.
    tf.config.threading.set_inter_op_parallelism_threads(config.cpus_per_worker + 1)
    if config.gpus_per_worker == 0:
        tf.config.set_visible_devices([], "GPU")
    for gpu in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    # The gradient of Xception's depthwise convolutions has no deterministic kernel on GPUs, and would raise
    # (github.com/tensorflow/tensorflow/issues/47174).
    if config.gpus_per_worker == 0 or config.architecture != "xception":
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(config.precision)
    keras.utils.set_random_seed(config.seed)


def build(config: TrainConfig, num_classes: int, weights: str | None) -> keras.Model:
    """The model before its first step. weights: file of what its base begins with; None: chance."""
    base = {"weights": weights, "unfreeze": config.unfreeze} if config.architecture in TRANSFER else {}
    return ARCHITECTURES[config.architecture](num_classes, **base)


class Training:
    """One worker's side of a training."""

    def __init__(
        self,
        config: TrainConfig,
        strategy: tf.distribute.Strategy,
        dataset: StagedDataset,
        board: Any,
        weights: str | None = None,
    ) -> None:
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.config, self.dataset, self.board = config, dataset, board
        classes = len(dataset.class_names)
        # Built in one piece first: the same seed gives the same weights whatever the strategy.
        plain = build(config, classes, weights)
        self.form = plain.get_config()
        with strategy.scope():
            self.model = training_form(plain, config.seed, config.dropout)
            self.optimizer = FusedAdam(config.learning_rate)
            self.optimizer.build(self.model.trainable_variables)
        of_classes = balanced_weights(self._labels("train"), classes) if config.class_weights == "balanced" else None
        self.steps = Steps(strategy, self.workers, self.model, self.optimizer, config.global_batch_size, of_classes)
        self.state = State()
        self.changing = changing_variables(self.model)
        self.best_weights: list[NDArray[Any]] = []

    # --- checkpoints

    def resume(self) -> None:
        """Go on from the run's own last checkpoint, if Ray Train has one; else the first weights stay."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            variables = [*self.changing, *self.optimizer.variables]
            self.state, best = read_checkpoint(Path(folder), variables)
        self.best_weights = best or self._weights()
        self._say(f"goes on after epoch {self.state.epoch}")

    def _weights(self) -> list[NDArray[Any]]:
        return [variable.numpy() for variable in self.changing]

    def _report(self, row: dict[str, Any]) -> None:
        """Tell Ray Train, on every rank at once; rank 0's weights are everyone's, so its checkpoint is enough."""
        if self.rank > 0:
            ray.train.report(row)
            return
        self._wait_for_upload()
        folder = tempfile.mkdtemp(dir=self.dataset.folder)
        variables = [*self.changing, *self.optimizer.variables]
        write_checkpoint(Path(folder), self.state, variables, self.best_weights)
        ray.train.report(
            row,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            # The next epoch goes on meanwhile. Ray removes the folder after it; if it can't, it goes with the dataset.
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    def _wait_for_upload(self) -> None:
        """One at a time: Ray queues any number, of which a lost worker would lose all."""
        if self.rank == 0:
            ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)

    # --- epochs

    def finished(self) -> bool:
        patience = self.config.patience
        worse = self.state.epoch - self.state.best_epoch
        return self.state.epoch >= self.config.epochs or (patience is not None and worse >= patience)

    def run_epoch(self) -> None:
        """Train on S global batches, validate, keep the best weights, save."""
        crops, size = self.dataset.splits["train"], self.config.global_batch_size
        epoch = self.state.epoch + 1
        order = permutation(len(crops), self.config.seed, epoch)
        steps = len(crops) // size
        sums: Any = tf.zeros(2)
        begin = last_post = time.perf_counter()
        waited = 0.0
        for step in range(steps):
            asked = time.perf_counter()
            first, images, labels = self.rows_of(crops, order, step)
            waited += time.perf_counter() - asked
            sums += self.steps.train(images, labels, first)
            if self.rank == 0 and time.perf_counter() - last_post > SECONDS_BETWEEN_POSTS:
                last_post = time.perf_counter()
                self._post_step(epoch, step + 1, steps, sums, (step + 1) * size / (last_post - begin))
        loss, accuracy = (self.steps.sum_over_workers(sums.numpy()[None])[0] / (steps * size)).tolist()
        seconds = time.perf_counter() - begin
        batches = min(steps, STATISTICS_BATCHES, max(steps // 4, -(-STATISTICS_CROPS // size)))
        self.steps.estimate_statistics(self.rows_of(crops, order, step)[1] for step in range(batches))
        validation = metrics(self._predict("validation"), self._labels("validation"), self.dataset.class_names)
        # The training loss is that before each update: what the last one did shows in the validation only.
        if not math.isfinite(loss + validation["loss"]):
            raise KuzushijiError(
                f"the loss must stay finite. Received: {loss} in training, {validation['loss']} in validation, epoch "
                f"{epoch}. Lower --learning-rate"
            )
        row = {
            "epoch": epoch,
            "step": epoch * steps,
            "loss": loss,
            "accuracy": accuracy,
            "val_loss": validation["loss"],
            "val_accuracy": validation["accuracy"],
            "learning_rate": float(np.asarray(self.optimizer.learning_rate)),
            "seconds": seconds,
            "crops_per_s": steps * size / seconds,
            "data_wait": waited / seconds,
        }
        self._end_epoch(row)

    def _end_epoch(self, row: dict[str, Any]) -> None:
        self.state.epoch = row["epoch"]
        self.state.history.append(row)
        if row["val_accuracy"] > self.state.best_accuracy:
            self.state.best_epoch, self.state.best_accuracy = row["epoch"], row["val_accuracy"]
            self.best_weights = self._weights()
        self._report(row)
        self._say(
            f"epoch {row['epoch']} of {self.config.epochs}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}, "
            f"validation loss {row['val_loss']:.4f}, validation accuracy {row['val_accuracy']:.4f}, "
            f"{row['seconds']:.1f} s, {row['crops_per_s']:,.0f} crops/s"
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
        crops = self.dataset.splits[split]
        first, end = share(len(crops), self.rank, self.workers)
        predictions = np.zeros((len(crops), 4), np.float32)
        predictions[first:end] = self.steps.predict(crops.images[first:end], crops.labels[first:end])
        return self.steps.sum_over_workers(predictions)

    def write(self, folder: str, run: str) -> None:
        """Evaluate every split with the best epoch's weights; rank 0 writes and seals the model folder."""
        self._say(f"evaluates the weights of epoch {self.state.best_epoch}")
        for variable, best in zip(self.changing, self.best_weights, strict=True):
            variable.assign(best)
        predictions = {split: self._predict(split) for split in SPLITS}
        if self.rank > 0:
            return
        self._wait_for_upload()  # one that fails would begin again what is sealed
        names, splits = self.dataset.class_names, self.dataset.splits
        model = keras.Model.from_config(self.form)
        model.set_weights(self.model.get_weights())
        recorded = self.config.model_dump()
        numbers: dict[str, Any] = {split: metrics(predictions[split], self._labels(split), names) for split in SPLITS}
        numbers |= {
            "parameters": model.count_params(),
            "classes": len(names),
            "best_epoch": self.state.best_epoch,
            "seconds": sum(row["seconds"] for row in self.state.history),
            "versions": {package: version(package) for package in ("kuzushiji", "keras", "ray", "tensorflow")},
        }
        split_rule = self.dataset.manifest.config.get("split", "unknown")
        texts = {
            LABELS_FILE: "".join(f"{name}\n" for name in names),
            "config.json": json.dumps(recorded, indent=2) + "\n",
            METRICS_FILE: json.dumps(numbers, indent=2) + "\n",
            "history.jsonl": "".join(json.dumps(row) + "\n" for row in self.state.history),
            "per_class.csv": per_class(predictions["test"], self._labels("test"), names).to_csv(index=False),
            "misclassified.csv": misclassified(predictions["test"], splits["test"], names).to_csv(index=False),
            "README.md": model_card(recorded, numbers, run, split_rule),
        }
        write_model(place(folder), model, texts, self.dataset.manifest.sha256)

    # --- what people see

    def _say(self, text: str) -> None:
        if self.rank == 0:
            self.board.post.remote({"architecture": self.config.architecture, "text": text})

    def _post_step(self, epoch: int, step: int, steps: int, sums: Any, crops_per_s: float) -> None:
        """Of rank 0's rows alone: the sum over workers waits for the end of the epoch."""
        first, end = share(self.config.global_batch_size, self.rank, self.workers)
        loss, accuracy = (sums.numpy() / (step * (end - first))).tolist()
        position: dict[str, Any] = {"architecture": self.config.architecture, "epoch": epoch}
        position |= {"epochs": self.config.epochs, "step": step, "steps": steps}
        self.board.post.remote(position | {"loss": loss, "accuracy": accuracy, "crops_per_s": crops_per_s})

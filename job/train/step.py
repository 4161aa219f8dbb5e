"""The computations of a training: training step, predictions, and batch norm statistics, on one or many devices.

A custom loop, because `keras.Model.fit` fails under MultiWorkerMirroredStrategy with Keras 3
(github.com/keras-team/keras/issues/20585). A worker passes its rows of the global batch to `strategy.run` as one plain
tensor, and each of its replicas takes a slice. Legend: B global batch size, n rows of this worker, K classes.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from job.data.augment import augmented
from job.data.chance import BatchRows
from job.data.order import share
from job.model.inference import COUNT, IMAGES, LABELS, crops_per_step, predictions_of
from job.train.batch_norm import SharedBatchNorm
from job.train.dropout import SharedDropout, dropout_masks
from job.train.temperature import SCALES, losses_of


def training_form(model: keras.Model, seed: int, dropout: bool, synchronized: bool = True) -> keras.Model:
    """Return a copy with batch norm synchronized over replicas, and dropout that is independent of their number.

    The order of the weights stays the same: `model.set_weights(trained.get_weights())` copies them back. dropout: False
    sets all rates to 0. synchronized: False for a single replica on a GPU, where synchronization costs time and changes
    only rounding.
    """
    dropout_names: list[str] = []

    def replace(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, keras.layers.BatchNormalization):
            return SharedBatchNorm.from_config(config | {"synchronized": synchronized})
        if isinstance(layer, keras.layers.Dropout):
            dropout_names.append(layer.name)
            rate = config["rate"] if dropout else 0.0
            layer_seed = seed + (len(dropout_names) << 32)
            return SharedDropout(rate, seed=layer_seed, name=layer.name, dtype=layer.dtype_policy)
        return layer.from_config(config)

    trained = keras.models.clone_model(model, clone_function=replace)
    trained.set_weights(model.get_weights())
    return trained


def out_of_memory_message(error: Exception) -> str:
    """Return one line that names the failed allocation, from TensorFlow's long message."""
    text = " ".join(str(error).split())
    found = re.search(r"(OOM when|Out of memory while)[^\[]*(\[[^\[\]]+\])?", text)
    received = found[0].strip() if found else text[:200]
    return (
        f"a step must fit into memory. Received: {received}. Lower --global-batch-size, or use more --workers. "
        "See docs/faq.md"
    )


class Steps:
    """The compiled functions of a training, on this worker's replicas."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        workers: int,
        model: keras.Model,
        optimizer: keras.Optimizer,
        global_batch_size: int,
        xla: bool = False,
        label_smoothing: float = 0.0,
        augment_seed: int | None = None,
    ) -> None:
        """Set up the functions. The model and the built optimizer must be created within `strategy.scope()`.

        xla: compile a replica's computation with XLA; for a single replica only. label_smoothing: share of the label
        that is spread evenly over the classes in the loss. augment_seed: random seed of the augmentation; None: no
        augmentation.
        """
        self.strategy, self.model, self.optimizer = strategy, model, optimizer
        self.global_batch_size, self.xla = global_batch_size, xla
        self.classes_in_loss: NDArray[np.float32] | None = None
        """(K,), 1 for classes in the minimized loss, 0 for others; None: all. Set it before the first step."""
        self.label_smoothing, self.augment_seed = label_smoothing, augment_seed
        self.predict_rows = crops_per_step(model)
        self.local_replicas = strategy.num_replicas_in_sync // workers
        self.train = tf.function(self._train, autograph=False, input_signature=[IMAGES, LABELS, COUNT])
        self._dropouts = [layer for layer in model._flatten_layers() if isinstance(layer, SharedDropout)]
        self._compiled_train = self._compile(self._train_replica)
        self._compiled_predict = self._compile(self._predict_replica)
        self._predict_step = tf.function(self._predict, autograph=False, input_signature=[IMAGES, LABELS])
        self._losses_step = tf.function(self._losses, autograph=False, input_signature=[IMAGES, LABELS])
        self._sum_step = tf.function(
            self._sum, autograph=False, input_signature=[tf.TensorSpec((None, None), tf.float32)]
        )
        self._statistics_step: Any = None

    def _train(self, images: Any, labels: Any, first_row: Any) -> Any:
        """Train one step on this worker's n rows, which begin at `first_row` of the global batch.

        images: (n, 80, 80, 1) uint8. labels: (n,) int64.

        Returns:
            (2,) float32 sums over the rows, computed before the update: cross-entropy over all classes, without label
            smoothing (comparable with other splits), and correct predictions.
        """

        def replica() -> Any:
            first, end = self._replica_rows(tf.shape(images)[0])
            step = tf.cast(self.optimizer.iterations.value, tf.int64)
            batch_rows = BatchRows(step, first_row + first, self.global_batch_size)
            masks = {layer.name: layer.mask(batch_rows, end - first) for layer in self._dropouts}
            crops = images[first:end]
            if self.augment_seed is not None:
                crops = augmented(crops, batch_rows, self.augment_seed)
            return self._compiled_train(crops, labels[first:end], masks)

        return tf.add_n(self.strategy.experimental_local_results(self.strategy.run(replica)))

    def _train_replica(self, images: Any, labels: Any, masks: Any) -> Any:
        """Train one step on a replica's rows. Return the sums of `_train` over these rows."""
        with dropout_masks(masks), tf.GradientTape() as tape:
            probabilities = self.model(images, training=True)
            losses = minimized = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
            in_loss = self.classes_in_loss
            if self.label_smoothing:
                logs = tf.math.log(probabilities + keras.config.epsilon())
                everywhere = -tf.reduce_mean(logs, axis=-1)
                if in_loss is not None:
                    everywhere = -tf.reduce_sum(in_loss * logs, axis=-1) / in_loss.sum()
                minimized = (1 - self.label_smoothing) * losses + self.label_smoothing * everywhere
            if in_loss is not None:
                # -log(p / sum) = -log(p) + log(sum), where the sum is over the classes in the loss. Keras computes the
                # first term from logits; it would clip p / sum, and a clipped crop has no gradient.
                sums = tf.reduce_sum(in_loss * probabilities, axis=-1)
                minimized += tf.math.log(tf.maximum(sums, np.finfo(np.float32).tiny))
            # `apply` sums gradients over all replicas, so the loss is divided by B, not by the rows of this replica.
            loss = tf.reduce_sum(minimized) / self.global_batch_size
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        correct = tf.argmax(probabilities, axis=-1) == labels
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(tf.cast(correct, tf.float32))])

    def predict(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the predictions of this worker's crops, (n, 4) float32, as `inference.predictions_of` does."""
        parts = [np.empty((0, 4), np.float32)]
        for first in range(0, len(labels), self.predict_rows):
            rows = slice(first, first + self.predict_rows)
            parts.append(self._predict_step(images[rows], labels[rows]).numpy())
        return np.concatenate(parts)

    def _predict(self, images: Any, labels: Any) -> Any:
        def replica() -> Any:
            first, end = self._replica_rows(tf.shape(images)[0])
            return self._compiled_predict(images[first:end], labels[first:end])

        return tf.concat(self.strategy.experimental_local_results(self.strategy.run(replica)), axis=0)

    def _predict_replica(self, images: Any, labels: Any) -> Any:
        return predictions_of(self.model, images, labels)

    def losses(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return `temperature.losses_of` for this worker's crops, (1, 65) float32."""
        if not len(labels):
            return np.zeros((1, len(SCALES)), np.float32)
        sums: NDArray[np.float32] = self._losses_step(images, labels).numpy()
        return sums[None]

    def _losses(self, images: Any, labels: Any) -> Any:
        def replica() -> Any:
            first, end = self._replica_rows(tf.shape(images)[0])
            return losses_of(self.model, images[first:end], labels[first:end])

        return tf.add_n(self.strategy.experimental_local_results(self.strategy.run(replica)))

    def sum_over_workers(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the sum over all workers of arrays of the same shape (rows, columns). All workers call it together."""
        total: NDArray[np.float32] = self._sum_step(values).numpy()
        return total

    def _sum(self, values: Any) -> Any:
        def replica() -> Any:
            context = tf.distribute.get_replica_context()
            is_first = tf.cast(context.replica_id_in_sync_group % self.local_replicas == 0, tf.float32)  # on its worker
            return context.all_reduce(tf.distribute.ReduceOp.SUM, values * is_first)

        return self.strategy.experimental_local_results(self.strategy.run(replica))[0]

    def estimate_statistics(self, batches: Iterable[NDArray[np.uint8]]) -> None:
        """Set the mean and variance of batch norm to their averages over batches.

        batches: this worker's rows of each global batch, (n, 80, 80, 1) uint8. Keras' moving averages (momentum 0.99)
        need many hundreds of steps to forget their initial values: after a short training, the model would predict the
        same class for every crop. Training itself does not read these statistics.
        """
        norms = [
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        if self._statistics_step is None:
            self._statistics_step = self._trace_statistics(norms)
        variables = [variable for norm in norms for variable in norm.non_trainable_variables]
        sums = [np.zeros(variable.shape, np.float64) for variable in variables]
        count = 0
        for images in batches:
            self._statistics_step(images)
            for total, variable in zip(sums, variables, strict=True):
                total += np.asarray(variable)
            count += 1
        for total, variable in zip(sums, variables, strict=True):
            variable.assign((total / count).astype(np.float32))

    def _trace_statistics(self, norms: list[Any]) -> Callable[[Any], Any]:
        """Return a forward pass that assigns the statistics of its batch to the layers.

        With momentum 0, the moving averages are those of the last batch. Keras reads the momentum when it traces.
        """

        def forward(crops: Any) -> None:
            self.model(crops, training=True)  # outside `dropout_masks`: no dropout

        compiled = self._compile(forward)

        def all_replicas(images: Any) -> None:
            def replica() -> None:
                first, end = self._replica_rows(tf.shape(images)[0])
                compiled(images[first:end])

            self.strategy.run(replica)

        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        traced: Callable[[Any], Any] = tf.function(
            all_replicas, autograph=False, input_signature=[IMAGES]
        ).get_concrete_function()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return traced

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile the computation of a replica with XLA if `xla` is set. It must not contain collectives."""
        return tf.function(function, autograph=False, jit_compile=True) if self.xla else function

    def _replica_rows(self, rows: Any) -> tuple[Any, Any]:
        """Return the first row and the end of this replica's share of the worker's rows."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group % self.local_replicas
        return share(rows, replica, self.local_replicas)

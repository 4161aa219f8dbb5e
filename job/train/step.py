"""What a training computes: its step, its validation, and the statistics of batch norm, on one device or on many.

One custom loop, since `keras.Model.fit` fails under MultiWorkerMirroredStrategy with Keras 3
(github.com/keras-team/keras/issues/20585). A worker hands its rows of the global batch to `strategy.run` as one
plain tensor, of which each of its replicas takes a slice. Legend: B global batch size, n rows of this worker, K
classes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from job.data.order import share
from job.model.inference import COUNT, IMAGES, LABELS, crops_per_step, predictions_of
from job.train.dropout import BatchRows, SharedDropout, dropout_masks


def balanced_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """(K,) what a crop of each class counts: as much as all others of its class together, 1 on average over the crops.

    King and Zeng, Logistic Regression in Rare Events Data, 2001; scikit-learn's `class_weight="balanced"`.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0.0).astype(np.float32)


def training_form(model: keras.Model, seed: int, dropout: bool, synchronized: bool = True) -> keras.Model:
    """The same model with batch norm that is synchronized over replicas, and dropout that does not depend on their
    number.

    The weights stay in the same order: `model.set_weights(trained.get_weights())` brings them back. synchronized: off
    for a single replica on a GPU, where it costs time and changes nothing but rounding.
    """
    drops: list[str] = []

    def swap(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, keras.layers.BatchNormalization):
            return layer.from_config(config | {"synchronized": synchronized})
        if isinstance(layer, keras.layers.Dropout):
            drops.append(layer.name)
            rate = config["rate"] if dropout else 0.0
            seed_of_layer = seed + (len(drops) << 32)
            return SharedDropout(rate, seed=seed_of_layer, name=layer.name, dtype=layer.dtype_policy)
        return layer.from_config(config)

    trained = keras.models.clone_model(model, clone_function=swap)
    trained.set_weights(model.get_weights())
    return trained


class Steps:
    """The compiled functions of one training, on this worker's replicas."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        workers: int,
        model: keras.Model,
        optimizer: keras.Optimizer,
        global_batch_size: int,
        class_weights: NDArray[np.float32] | None = None,
        xla: bool = False,
    ) -> None:
        """The model and the built optimizer must be made within `strategy.scope()`.

        class_weights: (K,) weight of a crop of each class in the loss that is minimised; None: 1. xla: compile what a
        replica computes; only for a single replica.
        """
        self.strategy, self.model, self.optimizer = strategy, model, optimizer
        self.global_batch_size, self.class_weights, self.xla = global_batch_size, class_weights, xla
        self.predict_rows = crops_per_step(model)
        self.local_replicas = strategy.num_replicas_in_sync // workers
        self.train = tf.function(self._train, autograph=False, input_signature=[IMAGES, LABELS, COUNT])
        self._dropouts = [layer for layer in model._flatten_layers() if isinstance(layer, SharedDropout)]
        self._compiled_train = self._compile(self._train_replica)
        self._compiled_predict = self._compile(self._predict_replica)
        self._predict_step = tf.function(self._predict, autograph=False, input_signature=[IMAGES, LABELS])
        self._sum_step = tf.function(
            self._sum, autograph=False, input_signature=[tf.TensorSpec((None, None), tf.float32)]
        )
        self._statistics_step: Any = None

    def _train(self, images: Any, labels: Any, first_row: Any) -> Any:
        """One step on this worker's rows, which begin at `first_row` of the global batch.

        Returns (2,) float32 sums over the rows, as they were before the update: cross-entropy (each crop counts 1, to
        compare with other splits), correct predictions.
        """

        def replica() -> Any:
            first, end = self._my_rows(tf.shape(images)[0])
            step = tf.cast(self.optimizer.iterations.value, tf.int64)
            mine = BatchRows(step, first_row + first, self.global_batch_size)
            masks = {layer.name: layer.mask(mine, end - first) for layer in self._dropouts}
            return self._compiled_train(images[first:end], labels[first:end], masks)

        return tf.add_n(self.strategy.experimental_local_results(self.strategy.run(replica)))

    def _train_replica(self, images: Any, labels: Any, masks: Any) -> Any:
        """One step on a replica's rows; the sums of `_train` over them."""
        with dropout_masks(masks), tf.GradientTape() as tape:
            probabilities = self.model(images, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
            weighted = losses
            if self.class_weights is not None:
                weighted *= tf.gather(self.class_weights, labels)
            # Summed by `apply` over all replicas, so divided by B and not by the rows of this one.
            loss = tf.reduce_sum(weighted) / self.global_batch_size
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        correct = tf.argmax(probabilities, axis=-1) == labels
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(tf.cast(correct, tf.float32))])

    def predict(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, 4) float32 of this worker's crops, as `inference.predictions_of`."""
        parts = [np.empty((0, 4), np.float32)]
        for at in range(0, len(labels), self.predict_rows):
            rows = slice(at, at + self.predict_rows)
            parts.append(self._predict_step(images[rows], labels[rows]).numpy())
        return np.concatenate(parts)

    def _predict(self, images: Any, labels: Any) -> Any:
        def replica() -> Any:
            first, end = self._my_rows(tf.shape(images)[0])
            return self._compiled_predict(images[first:end], labels[first:end])

        return tf.concat(self.strategy.experimental_local_results(self.strategy.run(replica)), axis=0)

    def _predict_replica(self, images: Any, labels: Any) -> Any:
        return predictions_of(self.model, images, labels)

    def sum_over_workers(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The sum of the workers' arrays of one shape (rows, columns); every worker calls it, and gets it."""
        total: NDArray[np.float32] = self._sum_step(values).numpy()
        return total

    def _sum(self, values: Any) -> Any:
        def replica() -> Any:
            context = tf.distribute.get_replica_context()
            once = tf.cast(context.replica_id_in_sync_group % self.local_replicas == 0, tf.float32)
            return context.all_reduce(tf.distribute.ReduceOp.SUM, values * once)

        return self.strategy.experimental_local_results(self.strategy.run(replica))[0]

    def estimate_statistics(self, batches: Iterable[NDArray[np.uint8]]) -> None:
        """Set batch norm's mean and variance to their averages over `batches`, this worker's rows of global batches.

        Keras' moving averages (momentum .99) need many hundreds of steps to forget where they began: after a short
        training the model would predict one class for everything. Training itself does not read them.
        """
        norms = [
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        if self._statistics_step is None:
            self._statistics_step = self._trace_statistics(norms)
        sums = [np.zeros(v.shape, np.float64) for norm in norms for v in norm.non_trainable_variables]
        count = 0
        for images in batches:
            self._statistics_step(images)
            for total, variable in zip(sums, (v for norm in norms for v in norm.non_trainable_variables), strict=True):
                total += np.asarray(variable)
            count += 1
        for total, variable in zip(sums, (v for norm in norms for v in norm.non_trainable_variables), strict=True):
            variable.assign((total / count).astype(np.float32))

    def _trace_statistics(self, norms: list[Any]) -> Callable[[Any], Any]:
        """A forward pass that leaves the batch's own statistics in the layers: momentum is read while tracing."""

        def forward(crops: Any) -> None:
            self.model(crops, training=True)  # outside of `dropout_masks`: without dropout

        compiled = self._compile(forward)

        def all_replicas(images: Any) -> None:
            def replica() -> None:
                first, end = self._my_rows(tf.shape(images)[0])
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

    def _compile(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, which a replica does on its own; compiled by XLA if that is asked for."""
        return tf.function(work, autograph=False, jit_compile=True) if self.xla else work

    def _my_rows(self, rows: Any) -> tuple[Any, Any]:
        """First row and end of this replica's part of its worker's rows."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group % self.local_replicas
        return share(rows, replica, self.local_replicas)

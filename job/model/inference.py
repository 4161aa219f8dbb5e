"""Inference with a classifier on one device: crops in, classes and probabilities out.

In shapes, N is the number of crops and K the number of classes.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from cluster.errors import KuzushijiError
from preprocessing.records import SIDE

IMAGES = tf.TensorSpec((None, SIDE, SIDE, 1), tf.uint8)
LABELS = tf.TensorSpec((None,), tf.int64)
COUNT = tf.TensorSpec((), tf.int32)


def crops_per_step(model: keras.Model) -> int:
    """Return the batch size for inference.

    It is smaller for `fcn`, recognized by its undefined input height: none of its layers reduces the image, so the
    activations of a crop are 500 times as large as those of `baseline`.
    """
    return 512 if model.input_shape[1] else 16


def predictions_of(model: keras.Model, images: Any, labels: Any) -> Any:
    """Predict crops, inside a `tf.function`.

    images: N x 80 x 80 x 1 uint8. labels: (N,) int64.

    Returns:
        (N, 4) float32 tensor. Columns: predicted class; its probability; 1 if the label is among the 5 most probable
        classes, else 0; cross-entropy.
    """
    probabilities = model(images, training=False)
    losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
    label_probability = tf.gather(probabilities, labels, axis=1, batch_dims=1)[:, None]
    # Ties are ranked by ascending class, as in argmax: `fcn` gives many classes exactly the same probability.
    lower_class = tf.range(tf.shape(probabilities, tf.int64)[1])[None] < labels[:, None]
    ranked_before = (probabilities > label_probability) | ((probabilities == label_probability) & lower_class)
    rank = tf.reduce_sum(tf.cast(ranked_before, tf.float32), axis=1)
    predicted = tf.cast(tf.argmax(probabilities, axis=1), tf.float32)
    # Comparisons with NaN are false, so a label whose probability is NaN would have rank 0.
    in_top_5 = tf.cast((rank < 5) & (label_probability[:, 0] >= 0), tf.float32)
    return tf.stack([predicted, tf.reduce_max(probabilities, axis=1), in_top_5, losses], axis=1)


def check_finite(values: NDArray[np.float32]) -> None:
    """Check that a model gave finite probabilities. values: (N, columns), a row for each crop.

    Raises:
        KuzushijiError: the probabilities are not finite.
    """
    faulty = np.count_nonzero(~np.isfinite(values).all(axis=1))
    if faulty:
        raise KuzushijiError(
            f"the model must give finite probabilities. Received: NaN or infinity for {faulty:,} of {len(values):,} "
            "crops. Use another model, or train it again with a lower --learning-rate. See docs/faq.md"
        )


class Inference:
    """A classifier with compiled functions for prediction in this process."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._batch_size = crops_per_step(model)

        def predict(images: Any, labels: Any) -> Any:
            return predictions_of(model, images, labels)

        def top(images: Any, count: Any) -> Any:
            return tf.math.top_k(model(images, training=False), count)

        self._predict = tf.function(predict, autograph=False, input_signature=[IMAGES, LABELS])
        self._top = tf.function(top, autograph=False, input_signature=[IMAGES, COUNT])

    def predict(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], advance: Callable[[int], None] = lambda _: None
    ) -> NDArray[np.float32]:
        """Predict crops in batches and return `predictions_of` all of them, (N, 4) float32.

        images: N x 80 x 80 x 1. labels: (N,). advance: called after each batch with its number of crops.

        Raises:
            KuzushijiError: the probabilities are not finite.
        """
        parts = [np.empty((0, 4), np.float32)]
        for start in range(0, len(labels), self._batch_size):
            rows = slice(start, start + self._batch_size)
            parts.append(self._predict(images[rows], labels[rows]).numpy())
            check_finite(parts[-1])
            advance(len(parts[-1]))
        return np.concatenate(parts)

    def top(self, images: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the most probable classes of each crop and their probabilities, both (N, min(count, K)).

        images: N x 80 x 80 x 1, N at least 1. Ties are ranked by ascending class.

        Raises:
            KuzushijiError: the probabilities are not finite.
        """
        classes, probabilities = [], []
        count = min(count, self.model.output_shape[-1])
        for start in range(0, len(images), self._batch_size):
            values, indices = self._top(images[start : start + self._batch_size], count)
            classes.append(indices.numpy().astype(np.int64))
            probabilities.append(values.numpy())
            check_finite(probabilities[-1])
        return np.concatenate(classes), np.concatenate(probabilities)

"""Inference with a classifier on one device: crops in, classes and probabilities out. No training step.

K classes, N crops; K and N are sizes of arrays.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from preprocessing.records import SIDE

IMAGES = tf.TensorSpec((None, SIDE, SIDE, 1), tf.uint8)
LABELS = tf.TensorSpec((None,), tf.int64)
COUNT = tf.TensorSpec((), tf.int32)


def crops_per_step(model: keras.Model) -> int:
    """How many crops to hand to a model at once.

    Fewer where no layer makes the image smaller (`fcn`, whose height and width are free): the activations of a crop
    are 500 times as large as those of `baseline`.
    """
    return 512 if model.input_shape[1] else 16


def predictions_of(model: keras.Model, images: Any, labels: Any) -> Any:
    """(N, 4) float32 tensor: predicted class, its probability, whether the label is among the first 5, cross-entropy.

    images: N x 80 x 80 x 1 uint8. labels: (N,) int64.
    """
    probabilities = model(images, training=False)
    losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
    of_label = tf.gather(probabilities, labels, axis=1, batch_dims=1)[:, None]
    # Among equal probabilities the lower class goes first, as in argmax: `fcn` gives many classes exactly the same.
    earlier = tf.range(tf.shape(probabilities, tf.int64)[1])[None] < labels[:, None]
    before = (probabilities > of_label) | ((probabilities == of_label) & earlier)
    better = tf.reduce_sum(tf.cast(before, tf.float32), axis=1)
    predicted = tf.cast(tf.argmax(probabilities, axis=1), tf.float32)
    in_first_5 = tf.cast(better < 5, tf.float32)
    return tf.stack([predicted, tf.reduce_max(probabilities, axis=1), in_first_5, losses], axis=1)


class Inference:
    """A classifier, compiled to predict in this process."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._rows = crops_per_step(model)

        def predict(images: Any, labels: Any) -> Any:
            return predictions_of(model, images, labels)

        def top(images: Any, count: Any) -> Any:
            return tf.math.top_k(model(images, training=False), count)

        self._predict = tf.function(predict, autograph=False, input_signature=[IMAGES, LABELS])
        self._top = tf.function(top, autograph=False, input_signature=[IMAGES, COUNT])

    def predict(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], advance: Callable[[int], None] = lambda _: None
    ) -> NDArray[np.float32]:
        """(N, 4) float32, as `predictions_of`. advance: called with the number of crops after each step."""
        parts = [np.empty((0, 4), np.float32)]
        for at in range(0, len(labels), self._rows):
            rows = slice(at, at + self._rows)
            parts.append(self._predict(images[rows], labels[rows]).numpy())
            advance(len(parts[-1]))
        return np.concatenate(parts)

    def top(self, images: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The likeliest classes of each crop and their probabilities, both (N, count), or (N, K) with fewer classes.

        Among equal probabilities the lower class goes first.
        """
        classes, probabilities = [], []
        count = min(count, self.model.output_shape[-1])
        for at in range(0, len(images), self._rows):
            values, indices = self._top(images[at : at + self._rows], count)
            classes.append(indices.numpy().astype(np.int64))
            probabilities.append(values.numpy())
        return np.concatenate(classes), np.concatenate(probabilities)

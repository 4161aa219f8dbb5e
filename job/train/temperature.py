"""Calibration: one temperature, fitted on the validation split and folded into the weights of the last layer.

A network is overconfident on data that it was not trained on. Dividing its logits by one number, the temperature,
calibrates its probabilities and keeps its predictions (arxiv.org/abs/1706.04599).
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SCALES = np.geomspace(1 / 4, 4, 65)  # of logits, to choose from


def losses_of(model: keras.Model, images: Any, labels: Any) -> Any:
    """Return the sum of the cross-entropy for each of `SCALES`, (65,) float32. Call it inside a `tf.function`.

    images: N x 80 x 80 x 1 uint8. labels: (N,) int64.
    """
    # Scaled log probabilities have the same softmax as scaled logits.
    logarithms = tf.math.log(tf.maximum(model(images, training=False), np.finfo(np.float32).tiny))
    of_labels = tf.gather(logarithms, labels, axis=1, batch_dims=1)
    losses = (tf.reduce_logsumexp(scale * logarithms, axis=1) - scale * of_labels for scale in SCALES.tolist())
    return tf.stack([tf.reduce_sum(loss) for loss in losses])


def best_scale(losses: NDArray[np.float64]) -> float:
    """Return the scale of logits with the least cross-entropy, interpolated by a parabola. losses: (65,).

    If all crops are right, the loss falls with the scale until it rounds to 0: of equal losses, the last one counts.
    """
    least = len(losses) - 1 - int(losses[::-1].argmin())
    if least in (0, len(SCALES) - 1):
        return float(SCALES[least])
    before, at, after = losses[least - 1 : least + 2]
    curvature = before - 2 * at + after
    moved = 0.5 * (before - after) / curvature if curvature > 0 else 0.0
    return float(SCALES[least] * (SCALES[1] / SCALES[0]) ** moved)


def scale_logits(model: keras.Model, scale: float) -> None:
    """Multiply the logits by `scale`, through the last layer that has trainable weights.

    It is a dense layer, or the batch norm of `fcn`: the ReLU and the maximum after it preserve a positive factor.
    """
    last = [layer for layer in model.layers if layer.trainable_variables][-1]
    for variable in last.trainable_variables:
        variable.assign(variable.numpy() * scale)

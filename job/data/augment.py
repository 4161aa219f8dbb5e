"""Augmentation: each crop of a step is distorted a little, so that a model learns hands that the dataset does not have.

Keras' own augmentation layers draw for the rows of one worker, so that their results depend on the number of workers.
"""

import math
from typing import Any

import tensorflow as tf

from job.data.chance import BatchRows
from preprocessing.records import SIDE

# The limits of `--augment standard`; each value is drawn uniformly up to its limit in both directions.
ROTATION = math.radians(6)
SHEAR = 0.1  # pixels to the side per pixel down
LOG_ZOOM = math.log(1.14)  # on each axis
SHIFT = 5.0  # pixels
GAIN = 0.2  # of the grey levels
LOG_GAMMA = math.log(1.4)
STROKE = 0.5  # of the way to the lightest or darkest of 3 x 3 pixels
ERASED = 0.25  # of the crops
LEAST_ERASED, MOST_ERASED = 0.1, 0.35  # of the side

SEED_OFFSET = 1 << 62  # dropout layers have the seeds from seed + (1 << 32)
NUMBERS = 14  # that are drawn for a crop


def augmented(images: Any, rows: BatchRows, seed: int) -> Any:
    """Return distorted crops, (n, 80, 80, 1) float32 from 0 to 255. What is beyond their edges is black.

    Args:
        images: (n, 80, 80, 1), from 0 to 255, with paper lighter than ink.
        rows: where they stand in the global batch.
        seed: that of the training.
    """
    # Of the whole batch, then the rows: the functions of vectors round otherwise for another number of rows.
    drawn = rows.uniform(seed + SEED_OFFSET, (NUMBERS,))
    rotation, shear, zoom_x, zoom_y, shift_x, shift_y, gain, gamma, stroke = tf.unstack(2 * drawn[:, :9] - 1, axis=1)
    transforms = _transforms(
        ROTATION * rotation,
        SHEAR * shear,
        tf.exp(LOG_ZOOM * zoom_x),
        tf.exp(LOG_ZOOM * zoom_y),
        SHIFT * shift_x,
        SHIFT * shift_y,
    )
    levels = tf.stack([STROKE * stroke, tf.exp(LOG_GAMMA * gamma), 1 + GAIN * gain], axis=1)
    count = tf.shape(images)[0]
    stroke, gamma, gain = tf.unstack(rows.own(levels, count)[:, None, None, None], axis=-1)
    x = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=rows.own(transforms, count),
        output_shape=[SIDE, SIDE],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    x = gain * 255 * tf.pow(_with_stroke(x, stroke) / 255, gamma)
    return tf.minimum(_erased(x, rows.own(drawn, count)[:, 9:]), 255)


def _transforms(angle: Any, shear: Any, zoom_x: Any, zoom_y: Any, shift_x: Any, shift_y: Any) -> Any:
    """Return (n, 8) projective transforms about the middle: from pixels of the result to those of the crop."""
    cosine, sine = tf.cos(angle), tf.sin(angle)
    # The rotation times the shear times the zoom.
    a, b = cosine / zoom_x, (cosine * shear - sine) / zoom_y
    c, d = sine / zoom_x, (sine * shear + cosine) / zoom_y
    middle = (SIDE - 1) / 2
    x = middle - (a + b) * middle + shift_x
    y = middle - (c + d) * middle + shift_y
    zero = tf.zeros_like(angle)
    return tf.stack([a, b, x, c, d, y, zero, zero], axis=1)


def _with_stroke(x: Any, weight: Any) -> Any:
    """Blend crops with the lightest (weight > 0, thinner strokes) or darkest (bolder ones) of 3 x 3 pixels."""
    lightest = tf.nn.max_pool2d(x, 3, 1, "SAME")
    darkest = -tf.nn.max_pool2d(-x, 3, 1, "SAME")
    changed = tf.where(weight > 0, lightest, darkest)
    return x + tf.abs(weight) * (changed - x)


def _erased(x: Any, drawn: Any) -> Any:
    """Return crops of which some have a rectangle filled with their mean. drawn: (n, 5) from 0 to 1."""
    whether, height, width, middle_y, middle_x = tf.unstack(drawn, axis=1)
    pixels = tf.range(SIDE, dtype=tf.float32)[None] + 0.5

    def inside(middle: Any, size: Any) -> Any:
        half = SIDE * (LEAST_ERASED + (MOST_ERASED - LEAST_ERASED) * size) / 2
        return tf.abs(pixels - SIDE * middle[:, None]) < half[:, None]

    rectangle = inside(middle_y, height)[:, :, None] & inside(middle_x, width)[:, None, :]
    erased = rectangle[..., None] & (whether < ERASED)[:, None, None, None]
    return tf.where(erased, tf.reduce_mean(x, axis=(1, 2, 3), keepdims=True), x)
